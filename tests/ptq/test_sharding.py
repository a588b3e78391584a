"""Quantized params on meshes: sharded as the float ones, and the same results."""

import jax
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import P
from jax import numpy as jnp
from jax.sharding import AxisType, NamedSharding

from qwix_train import (
    PtqProvider,
    QtProvider,
    QuantizationRule,
    ptq,
    quantize_fn,
    quantize_model,
)
from qwix_train.values import stored
from tests import models

AUTO = jax.make_mesh((2, 4), ("data", "model"), (AxisType.Auto,) * 2)
EXPLICIT = jax.make_mesh((2, 4), ("data", "model"), (AxisType.Explicit,) * 2)
X = models.normal(16, 8, seed=0)
W = models.normal(64, 32, seed=1)


def put(array, *names, mesh=AUTO):
    return jax.device_put(array, NamedSharding(mesh, P(*names)))


def is_sharded(array, *names, mesh=AUTO):
    return array.sharding.is_equivalent_to(NamedSharding(mesh, P(*names)), array.ndim)


RULES = {
    "int8": models.rule("int8"),
    "nf4": models.rule("nf4"),
    "tiles": models.rule("int4", tile_size=4),
    "minmax": QuantizationRule(weight_qtype="int8", weight_calibration_method="minmax"),
}


@pytest.mark.thinned(9)
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(
    "names", [("data", "model"), ("data", None), (None, "model"), (("data", "model"),)]
)
def test_params_are_quantized_where_they_are(name, names):
    shapes = ptq.abstract_params(
        lambda p, x: x @ p["w"], {"w": W}, [RULES[name]], jnp.ones((1, 64))
    )
    want = ptq.quantize_params({"w": W}, shapes)["w"].array
    sharded = put(W, *names)
    array = ptq.quantize_params({"w": sharded}, shapes)["w"].array
    models.assert_same(array, want)
    assert is_sharded(array.qvalue, *names)
    rows, columns = (*names, None)[:2]
    rows = rows if name == "tiles" else None
    assert is_sharded(array.scale, rows, columns)
    if name == "minmax":
        assert is_sharded(array.zero_point, rows, columns)
    compiled = jax.jit(stored.quantize_array, static_argnums=1)
    text = compiled.lower(sharded, shapes["w"].how).compile().as_text()
    assert "all-gather" not in text


@pytest.mark.slow
@pytest.mark.parametrize(
    "rule",
    [models.rule("int8", "int8"), models.rule("int4"), models.rule("nf4", tile_size=4)],
    ids=["dynamic", "weights", "tiles"],
)
def test_the_forward_is_that_of_one_device(rule):
    network = models.Mlp()
    params = models.params_of(network, X)
    model, quantized = ptq.quantize(network, params, [rule], X)
    run = jax.jit(lambda params, x: model.apply({"params": params}, x))
    want = run(quantized, X)
    names = {"Dense_0": (None, "model"), "Dense_1": ("model", None)}
    sharded = {
        layer: {
            "kernel": put(params[layer]["kernel"], *names[layer]),
            "bias": put(params[layer]["bias"]),
        }
        for layer in params
    }
    _, quantized = ptq.quantize(network, sharded, [rule], X)
    batch = put(X, "data", None)
    models.assert_close(run(quantized, batch), want)
    with jax.set_mesh(AUTO):
        models.assert_close(run(quantized, batch), want)


class Partitioned(nn.Module):
    """A model that says how its params are sharded."""

    logical: bool

    @nn.compact
    def __call__(self, x):
        box = nn.with_logical_partitioning if self.logical else nn.with_partitioning
        init = nn.initializers.lecun_normal()
        x = nn.Dense(16, kernel_init=box(init, ("data", "model")))(x)
        if self.logical:
            x = nn.with_logical_constraint(x, ("data", "model"))
        return nn.Dense(8, kernel_init=box(init, ("model", "data")))(x)


@pytest.mark.slow
@pytest.mark.parametrize("logical", [False, True])
def test_a_linen_model_is_initialized_sharded(logical):
    network = Partitioned(logical)
    model = quantize_model(network, PtqProvider(models.INT8))
    names = [("data", "data"), ("model", "model")]
    key = jax.random.key(0)
    with jax.set_mesh(AUTO), nn.logical_axis_rules(names):
        abstract = jax.eval_shape(model.init, key, X)
        specs = nn.get_partition_spec(abstract)
        shardings = nn.logical_to_mesh_sharding(specs, AUTO, names)
        if not logical:
            shardings = nn.get_sharding(abstract, AUTO)
        variables = jax.jit(model.init, out_shardings=shardings)(key, X)
        kernel = stored.unbox(variables)["params"]["Dense_0"]["kernel"].array
        assert is_sharded(kernel.qvalue, "data", "model")
        assert is_sharded(kernel.scale, None, "model")
        out = jax.jit(model.apply)(variables, X)
        floats = jax.jit(network.init)(key, X)
        trained = quantize_model(network, QtProvider(models.INT8))
        models.assert_close(out, jax.jit(trained.apply)(floats, X))
        params = ptq.quantize_params(nn.unbox(floats)["params"], abstract["params"])
        models.assert_close(jax.jit(model.apply)({"params": params}, X), out)


# Three tiles of eight rows, which four devices share.
UNEVEN = np.random.default_rng(0).normal(size=(24, 16)).astype(np.float32)
UNEVEN_RULES = {
    "tiles": models.rule("int4", tile_size=8),
    "activations": models.rule("int4", "int8", tile_size=8),
    "padded": models.rule("int4", "int8", tile_size=5, pad_tiles=True),
}


@pytest.mark.thinned(6)
@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("name", UNEVEN_RULES)
def test_tiles_that_an_explicit_axis_does_not_divide(name, eager):
    rules = [UNEVEN_RULES[name]]

    def function(p, x):
        return jnp.einsum("bi,io->bo", x, p["w"], out_sharding=P("data", None))

    x = np.random.default_rng(1).normal(size=(4, 24)).astype(np.float32)
    single = quantize_fn(lambda p, x: x @ p["w"], QtProvider(rules))
    want = single({"w": UNEVEN}, x)
    jit = (lambda f: f) if eager else jax.jit
    with jax.set_mesh(EXPLICIT):
        params = {"w": put(UNEVEN, "model", None, mesh=EXPLICIT)}
        x = put(x, "data", None, mesh=EXPLICIT)
        trained = quantize_fn(function, QtProvider(rules))
        models.assert_close(jit(trained)(params, x), want)
        gradient = jit(jax.grad(lambda p: trained(p, x).sum()))(params)["w"]
        assert gradient.sharding == params["w"].sharding
        quantized, values = ptq.quantize(function, params, rules, x)
        assert is_sharded(values["w"].array.qvalue, "model", None, mesh=EXPLICIT)
        assert is_sharded(values["w"].array.scale, None, None, mesh=EXPLICIT)
        models.assert_close(jit(quantized)(values, x), want)


@pytest.mark.slow
@pytest.mark.parametrize("flax", ["linen", "nnx"])
def test_flax_models_with_tiles_that_a_mesh_does_not_divide(flax):
    rules = [models.rule("int4", tile_size=8)]
    x = jnp.ones((4, 24))
    with jax.set_mesh(AUTO):
        if flax == "linen":
            box = nn.with_partitioning(nn.initializers.lecun_normal(), ("model", None))
            model = quantize_model(nn.Dense(16, kernel_init=box), PtqProvider(rules))
            key = jax.random.key(0)
            shardings = nn.get_sharding(jax.eval_shape(model.init, key, x), AUTO)
            variables = jax.jit(model.init, out_shardings=shardings)(key, x)
            kernel = variables["params"]["kernel"]
            model.apply(variables, x)
        else:
            box = nnx.with_partitioning(nnx.initializers.normal(1.0), ("model", None))
            model = nnx.Linear(24, 16, kernel_init=box, rngs=nnx.Rngs(0))
            model = quantize_model(model, PtqProvider(rules), x)
            kernel = model.kernel
            model(x)
    array = stored.unbox(kernel).array
    assert is_sharded(array.qvalue, "model", None)
    assert is_sharded(array.scale, None, None)


A = models.normal(8, 16, seed=2)
B = models.normal(16, 4, seed=3)
STACK = models.normal(3, 8, 8, seed=4)

# On a mesh whose shardings are part of the types.
FUNCTIONS = {
    "columns": (lambda p, x: x @ p["a"], {"a": (None, "model")}),
    "rows": (
        lambda p, x: jnp.einsum(
            "bm,mo->bo", nn.relu(x @ p["a"]), p["b"], out_sharding=P("data", None)
        ),
        {"a": (None, "model"), "b": ("model", None)},
    ),
    # Without its sharding the weight would need no resharding.
    "gathered": (
        lambda p, x: x @ jax.sharding.reshard(p["a"], P(None, "model")),
        {"a": ("data", "model")},
    ),
    "reshaped": (
        lambda p, x: jnp.einsum("bi,ihk->bhk", x, p["a"].reshape(8, 4, 4)),
        {"a": (None, "model")},
    ),
    "dequantized": (lambda p, x: x @ p["a"] + p["a"].sum(), {"a": (None, "model")}),
    "scan": (
        lambda p, x: jax.lax.scan(
            lambda c, w: (jax.sharding.reshard(jnp.tanh(c @ w), P("data", None)), None),
            x,
            p["stack"],
        )[0],
        {"stack": (None, None, "model")},
    ),
}


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_explicit_shardings(name):
    function, names = FUNCTIONS[name]
    floats = {"a": A, "b": B, "stack": STACK}
    with jax.set_mesh(EXPLICIT):
        params = {k: put(floats[k], *names[k], mesh=EXPLICIT) for k in names}
        x = put(X, "data", None, mesh=EXPLICIT)
        for rules in (models.INT8, [models.rule("int4")]):
            trained = jax.jit(quantize_fn(function, QtProvider(rules)))(params, x)
            quantized, values = ptq.quantize(function, params, rules, x)
            for key, value in values.items():
                assert is_sharded(value.array.qvalue, *names[key], mesh=EXPLICIT)
            out = jax.jit(quantized)(values, x)
            models.assert_close(out, trained)
            assert out.sharding == trained.sharding


@pytest.mark.slow
def test_flax_models_with_explicit_shardings():
    with jax.set_mesh(EXPLICIT):
        x = put(X, "data", None, mesh=EXPLICIT)
        init = nnx.with_partitioning(nnx.initializers.normal(1.0), (None, "model"))
        module = nnx.Linear(8, 4, kernel_init=init, rngs=nnx.Rngs(0))
        trained = quantize_model(module, QtProvider(models.INT8), x)
        quantized, tree = ptq.quantize(module, None, models.INT8, x)
        assert is_sharded(tree["kernel"].array.scale, None, "model", mesh=EXPLICIT)
        models.assert_close(quantized(x), trained(x))
        models.assert_close(nnx.jit(lambda m, x: m(x))(quantized, x), trained(x))
        kernel = put(A, None, "model", mesh=EXPLICIT)
        params = {"kernel": kernel, "bias": put(jnp.zeros(16), "model", mesh=EXPLICIT)}
        model, quantized = ptq.quantize(nn.Dense(16), params, models.INT8, x)
        trained = quantize_model(nn.Dense(16), QtProvider(models.INT8))
        models.assert_close(
            model.apply({"params": quantized}, x), trained.apply({"params": params}, x)
        )


@pytest.mark.thinned(2)
@pytest.mark.parametrize("inside", [False, True])
def test_shard_map(inside):
    def function(params, x):
        return jnp.tanh(x @ params["a"])

    def sharded(f):
        return jax.shard_map(
            f, mesh=AUTO, in_specs=(P(), P("data")), out_specs=P("data")
        )

    quantized, params = ptq.quantize(function, {"a": A}, models.INT8, X)
    want = quantized(params, X)
    if inside:
        run, params = ptq.quantize(sharded(function), {"a": A}, models.INT8, X)
    else:
        run = sharded(quantized)
    models.assert_close(jax.jit(run)(params, X), want)
    assert np.abs(want).max() > 0.5
