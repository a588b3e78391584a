"""What a step sends on meshes with axes for sequences, experts and replicas."""

import functools

import jax
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from jax import numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import qwix_train
from qwix_train import QtRule, QuantizationRule
from tests import models, traffic

P = PartitionSpec
WIDTH, HEADS, EXPERTS = 256, 4, 8
INT8 = {"weight_qtype": "int8", "act_qtype": "int8"}
RULES = {
    "qat": QuantizationRule(**INT8),
    "static": QuantizationRule(**INT8, act_static_scale=True),
    "quantized_training": QtRule(**INT8, bwd_qtype="int8"),
}


class Sequence:
    """Attention whose queries are cut along the sequence, and keys and values whole."""

    shape = {"data": 2, "sequence": 4}
    x = models.normal(4, 64, WIDTH)
    specs = {
        name: (shape, P("data", "sequence"))
        for name, shape in {
            **{name: (WIDTH, WIDTH) for name in ("query", "key", "value", "out")},
            "up": (WIDTH, 4 * WIDTH),
            "down": (4 * WIDTH, WIDTH),
        }.items()
    }
    of_x = P("data", "sequence")

    def apply(self, params, x, put):
        def heads(y):
            return y.reshape(*y.shape[:2], HEADS, -1)

        def split(name):
            return heads(x @ whole[name])

        # What FSDP does, said in the program, for explicit axes.
        whole = {name: put(w) for name, w in params.items()}
        query = split("query")
        key, value = (put(split(name), "data") for name in ("key", "value"))
        scores = jnp.einsum("bqhe,bkhe->bhqk", query, key) / 8
        scores = put(jax.nn.softmax(scores), "data", None, "sequence")
        y = jnp.einsum("bhqk,bkhe->bqhe", scores, value).reshape(x.shape)
        x = x + put(y, *self.of_x) @ whole["out"]
        return x + jax.nn.gelu(x @ whole["up"]) @ whole["down"]


class Experts:
    """Tokens that go to their experts and back, by a mask of their places there."""

    shape = {"data": 2, "expert": 4}
    x = models.normal(8, 64, WIDTH)
    specs = {
        "router": ((WIDTH, EXPERTS), P()),
        "up": ((EXPERTS, WIDTH, 2 * WIDTH), P("expert", "data")),
        "down": ((EXPERTS, 2 * WIDTH, WIDTH), P("expert", None, "data")),
    }
    of_x = P(("data", "expert"))

    def apply(self, params, x, put):
        capacity = 2 * x.shape[1] // EXPERTS
        logits = x @ params["router"]
        chosen = jax.nn.one_hot(logits.argmax(-1), EXPERTS)
        place = (jnp.cumsum(chosen, 1) - 1) * chosen
        place = place.astype(jnp.int32)
        mask = chosen[..., None] * jax.nn.one_hot(place, capacity)
        up, down = (put(params[name], "expert") for name in ("up", "down"))
        inside = put(jnp.einsum("gtec,gtd->egcd", mask, x), "expert", "data")
        inside = jax.nn.gelu(jnp.einsum("egcd,edf->egcf", inside, up))
        inside = put(jnp.einsum("egcf,efd->egcd", inside, down), "expert", "data")
        inside = put(inside, None, ("data", "expert"))
        gate = (jax.nn.softmax(logits) * chosen).sum(-1, keepdims=True)
        return x + gate * jnp.einsum("gtec,egcd->gtd", mask, inside)


class Hybrid:
    """Replicas, as over slow connections, of what FSDP and tensor parallelism cut."""

    shape = {"replica": 2, "data": 2, "model": 2}
    x = models.normal(16, 24, WIDTH)
    specs = {
        "up": ((WIDTH, 4 * WIDTH), P("data", "model")),
        "down": ((4 * WIDTH, WIDTH), P("model", "data")),
    }
    of_x = P(("replica", "data"))

    def apply(self, params, x, put):
        up = put(params["up"], None, "model")
        down = put(params["down"], "model", None)
        y = put(jax.nn.gelu(x @ up), ("replica", "data"), None, "model")
        # Its sum over devices, said in the product where axes are explicit.
        sharding = {"out_sharding": self.of_x} if is_explicit(x) else {}
        y = jnp.einsum("bsf,fd->bsd", y, down, **sharding)
        return x + put(y, ("replica", "data"))


def is_explicit(x):
    return AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types


MODELS = {"sequence": Sequence(), "experts": Experts(), "hybrid": Hybrid()}


@functools.cache
def compiled(name, rule=None, kind=AxisType.Auto):
    """A step of training that is compiled for a mesh."""
    model = MODELS[name]
    mesh = jax.make_mesh(
        tuple(model.shape.values()), tuple(model.shape), (kind,) * len(model.shape)
    )

    def put(x, *spec):
        sharding = NamedSharding(mesh, P(*spec))
        if kind is AxisType.Explicit:
            return jax.sharding.reshard(x, sharding)
        return jax.lax.with_sharding_constraint(x, sharding)

    def apply(variables, x):
        return model.apply(variables["params"], x, put)

    params = {
        name: jax.device_put(
            np.ones(shape, np.float32) / WIDTH, NamedSharding(mesh, spec)
        )
        for name, (shape, spec) in model.specs.items()
    }
    tx = optax.sgd(0.1)
    state, step = TrainState(0, apply, params, tx, tx.init(params)), train_step
    x = jax.device_put(model.x, NamedSharding(mesh, model.of_x))
    with jax.set_mesh(mesh):
        if rule is not None:
            rules = [RULES[rule]]
            if rules[0].act_static_scale:
                state = qwix_train.attach(state, rules, x)
            step = qwix_train.wrap_train_step(step, rules)
        out = jax.tree.map(
            lambda x: (
                x.sharding
                if isinstance(getattr(x, "sharding", None), NamedSharding)
                else NamedSharding(mesh, P())
            ),
            state,
        )
        state = jax.device_put(state, out)
        return jax.jit(step, out_shardings=(out, None)).lower(state, x).compile()


def train_step(state, x):
    def loss_of(params):
        return (state.apply_fn({"params": params}, x) ** 2).mean()

    loss, grads = jax.value_and_grad(loss_of)(state.params)
    return state.apply_gradients(grads=grads), loss


CASES = [
    *((name, rule, AxisType.Auto) for rule in RULES for name in MODELS),
    *((name, "qat", AxisType.Explicit) for name in MODELS),
]


@pytest.mark.thinned(len(CASES))
@pytest.mark.parametrize("name, rule, kind", CASES)
def test_a_step(name, rule, kind):
    found = traffic.collectives(compiled(name, rule, kind))
    in_float = traffic.collectives(compiled(name, None, kind))
    assert in_float
    traffic.assert_sends_no_more(found, in_float, WIDTH**2)
