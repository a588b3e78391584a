"""A quantized step sends what the float step sends, and scales and ranges."""

import functools
import pathlib
import re

import jax
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.training.train_state import TrainState
from jax import numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import qwix_train
from qwix_train import QtRule, QuantizationRule
from tests import models, traffic

P = PartitionSpec
WIDTH = 256
# No array of activations is as large as a weight.
X = models.normal(16, 24, WIDTH)
INT8 = {"weight_qtype": "int8", "act_qtype": "int8"}
RULES = {
    "qat": QuantizationRule(**INT8),
    "tiles": QuantizationRule(**INT8, tile_size=32),
    "static": QuantizationRule(**INT8, act_static_scale=True),
    "mse": QuantizationRule(**INT8, act_static_scale=True, act_observer="mse"),
    "quantized_training": QtRule(
        **INT8, bwd_qtype="int8", bwd_stochastic_rounding="uniform"
    ),
}
# The histograms of four ranges are summed up, at most three times each: their size does
# not depend on that of the model.
HISTOGRAMS = 4 * 3 * 24_576


class Model(nn.Module):
    """Two feed-forward blocks, which say where activations are, as large models do."""

    mesh: jax.sharding.Mesh

    @nn.compact
    def __call__(self, x):
        def put(x, *spec):
            return jax.lax.with_sharding_constraint(
                x, NamedSharding(self.mesh, P(*spec))
            )

        for block in range(2):
            dense = functools.partial(nn.Dense, use_bias=False)
            y = nn.gelu(dense(4 * WIDTH, name=f"up_{block}")(nn.RMSNorm()(x)))
            y = put(y, "data", None, "model")
            x = put(x + dense(WIDTH, name=f"down_{block}")(y), "data")
        return x


def fully_sharded(name):
    return P("data")


def tensor_parallel(name):
    return P("model") if "down" in name else P(None, "model")


def both(name):
    return P("model", "data") if "down" in name else P("data", "model")


MESHES = {
    "fsdp": ((8, 1), fully_sharded),
    "tensor": ((1, 8), tensor_parallel),
    "both": ((2, 4), both),
}


def train_step(state, x):
    def loss_of(params):
        return (state.apply_fn({"params": params}, x) ** 2).mean()

    loss, grads = jax.value_and_grad(loss_of)(state.params)
    return state.apply_gradients(grads=grads), loss


@functools.cache
def sent(layout, name=None):
    """What a step of training sends on a mesh."""
    shape, spec_of = MESHES[layout]
    mesh = jax.make_mesh(shape, ("data", "model"), (AxisType.Auto,) * 2)

    def place(path, leaf):
        spec = spec_of(path[-2].key) if leaf.ndim == 2 else P()
        sharding = NamedSharding(mesh, spec)
        return jax.device_put(np.ones(leaf.shape, np.float32), sharding)

    model, x = Model(mesh), jax.device_put(X, NamedSharding(mesh, P("data")))
    shapes = jax.eval_shape(model.init, jax.random.key(0), X)["params"]
    params = jax.tree_util.tree_map_with_path(place, shapes)
    tx = optax.sgd(0.1)
    state, step = TrainState(0, model.apply, params, tx, tx.init(params)), train_step
    if name is not None:
        rules = [RULES[name]]
        if RULES[name].act_static_scale:
            state = qwix_train.attach(state, rules, x)
        step = qwix_train.wrap_train_step(step, rules)

    def sharding_of(leaf):
        own = getattr(leaf, "sharding", None)
        return own if isinstance(own, NamedSharding) else NamedSharding(mesh, P())

    out = jax.tree.map(sharding_of, state)
    state = jax.device_put(state, out)
    compiled = jax.jit(step, out_shardings=(out, None)).lower(state, x).compile()
    return traffic.collectives(compiled)


@pytest.mark.thinned(20)
@pytest.mark.parametrize(
    "name, layout",
    # Histograms take long to compile.
    [(n, m) for n in RULES for m in MESHES if n != "mse" or m == "both"],
)
def test_a_step(name, layout):
    extra = HISTOGRAMS if name == "mse" else 0
    traffic.assert_sends_no_more(sent(layout, name), sent(layout), 4 * WIDTH**2, extra)


@pytest.mark.slow
@pytest.mark.parametrize("layout", MESHES)
def test_the_bytes_are_those_of_the_formulas(layout):
    # Of docs/scale.md, which computes large models with them.
    page = pathlib.Path(__file__).parents[2] / "docs" / "scale.md"
    names = {}
    exec(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)[0], names)
    (data, model), _ = MESHES[layout]
    rows = X.shape[0] * X.shape[1] // data
    products = [(WIDTH, 4 * WIDTH, False), (4 * WIDTH, WIDTH, model > 1)] * 2
    found = [
        names["sent"](contracted, kept, rows, data, model, cut, item=4)
        for contracted, kept, cut in products
    ]
    in_float, scales = np.sum(found, axis=0)
    measured, quantized = (
        sum(each.bytes for each in sent(layout, name)) for name in (None, "qat")
    )
    assert quantized - measured == scales
    # Beside the products there are the loss and the scales of norms.
    assert 0 <= measured - in_float <= 3 * 4 * WIDTH


def pipeline(mesh, weights, x):
    """Each device has a layer, and hands its result on to the next one."""
    stages = mesh.shape["stage"]
    following = [(i, (i + 1) % stages) for i in range(stages)]

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P("stage"), P()), out_specs=P("stage")
    )
    def run(weights, batches):
        stage = jax.lax.axis_index("stage")

        def tick(x, t):
            x = jnp.where(stage == 0, batches[t % len(batches)], x)
            x = jnp.tanh(x @ weights[0])
            return jax.lax.ppermute(x, "stage", following), x

        first = jax.lax.pcast(jnp.zeros_like(batches[0]), "stage", to="varying")
        _, outs = jax.lax.scan(tick, first, jnp.arange(len(batches) + stages - 1))
        return outs[None]

    return run(weights, x)[-1, stages - 1 :]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qat", "quantized_training"])
def test_a_pipeline(name):
    mesh = jax.make_mesh((8,), ("stage",), (AxisType.Auto,))
    weights = jax.device_put(
        models.normal(8, WIDTH, WIDTH) / 16, NamedSharding(mesh, P("stage"))
    )
    x = models.normal(4, 8, WIDTH)
    apply = qwix_train.as_model(functools.partial(pipeline, mesh))

    def step(weights, x):
        loss, grads = jax.value_and_grad(lambda w: (apply(w, x) ** 2).mean())(weights)
        return weights - 0.1 * grads, loss

    def compiled(step):
        return jax.jit(step).lower(weights, x).compile()

    quantized = qwix_train.wrap_train_step(step, [RULES[name]])
    found = traffic.collectives(compiled(quantized))
    in_float = traffic.collectives(compiled(step))
    assert any(x.kind == "collective-permute" for x in in_float)
    traffic.assert_sends_no_more(found, in_float, WIDTH**2)
