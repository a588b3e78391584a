"""Linen models on quantized params: what `init` gives and `apply` takes.

The outputs are compared with those of QAT, on the float params.
"""

import flax.linen as nn
import jax
import numpy as np
import pytest
from jax import numpy as jnp

import qwix_train
from qwix_train import (
    PtqProvider,
    QtProvider,
    QuantizationRule,
    WithAux,
    dequantize,
    ptq,
)
from tests.spellings import data

# Margins, so that no value lies on the border of two codes.
MARGIN = {
    "weight_calibration_method": "absmax,1.1",
    "act_calibration_method": "absmax,1.1",
}
INT8 = QuantizationRule(weight_qtype="int8", act_qtype="int8", **MARGIN)
X = jax.device_put(data(3, 8, seed=1))
KEY = jax.random.key(0)


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(nn.relu(nn.Dense(6)(x)))


class Regularized(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(6)(x))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        self.sow("intermediates", "hidden", x)
        return nn.Dense(4)(x)


class Codec(nn.Module):
    def setup(self):
        self.encoder = nn.Dense(6)
        self.decoders = [nn.Dense(8), nn.Dense(8)]

    def __call__(self, x):
        return self.decode(self.encode(x))

    def encode(self, x):
        return self.encoder(x)

    def decode(self, z):
        return self.decoders[1](self.decoders[0](z) @ jnp.ones((8, 6)))


class Block(nn.Module):
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x, _=None):
        return jnp.tanh(nn.Dense(8, kernel_init=self.kernel_init)(x)), None


class Layers(nn.Module):
    partitioned: bool = False
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.lecun_normal()
        if self.partitioned:
            init = nn.with_partitioning(init, ("in", "out"))
        layers = nn.scan(
            nn.remat(Block) if self.remat else Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return layers(init, name="layers")(x, None)[0]


class Plain(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.tanh(nn.Dense(8)(x))


class RematLayers(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.remat_scan(Plain, lengths=(2, 3))()(x)


class Partitioned(nn.Module):
    @nn.compact
    def __call__(self, x):
        init = nn.initializers.lecun_normal()
        x = nn.Dense(4, kernel_init=nn.with_partitioning(init, ("in", "out")))(x)
        init = nn.with_logical_partitioning(init, ("a", "b", "c"))
        return jnp.einsum("bi,ihd->bhd", x, self.param("w", init, (4, 2, 3)))


def is_quantized(leaf):
    return isinstance(leaf, WithAux)


def values_of(tree):
    return jax.tree.map(
        lambda leaf: dequantize(leaf.array) if is_quantized(leaf) else leaf,
        tree,
        is_leaf=is_quantized,
    )


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def quantized(model, rules, *inputs):
    """The quantized model, and float and quantized variables."""
    variables = model.init(KEY, *inputs)
    ptq_model = qwix_train.quantize_model(model, PtqProvider(rules))
    abstract = jax.eval_shape(ptq_model.init, KEY, *inputs)
    params = nn.unbox(variables["params"])
    params = qwix_train.quantize_params(params, abstract["params"])
    return ptq_model, variables, {**variables, "params": params}


MODELS = {
    "compact": Mlp(),
    "setup": Codec(),
    "batch norm": Regularized(),
    "scan": Layers(),
    "scan of partitioned": Layers(partitioned=True),
    "scan of remat": Layers(remat=True),
    "remat_scan": RematLayers(),
    "partitioned": Partitioned(),
}


@pytest.mark.thinned(8)
@pytest.mark.parametrize("name", MODELS)
def test_init_gives_what_apply_takes(name):
    model = MODELS[name]
    ptq_model, floats, variables = quantized(model, [INT8], X)
    first = ptq_model.init(KEY, X)
    equal(nn.unbox(first), nn.unbox(variables))
    again = jax.jit(ptq_model.init)(KEY, X)
    assert jax.tree.structure(again) == jax.tree.structure(first)
    abstract = jax.eval_shape(ptq_model.init, KEY, X)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(abstract)] == [
        (x.shape, x.dtype) for x in jax.tree.leaves(first)
    ]
    qat = qwix_train.quantize_model(model, QtProvider([INT8])).apply(floats, X)
    apply = jax.jit(ptq_model.apply)
    outputs = [ptq_model.apply(first, X), apply(variables, X)]
    outputs.append(ptq_model.init_with_output(KEY, X)[0])
    for output in outputs:
        np.testing.assert_allclose(output, qat, 2e-6, 2e-6)


def test_init_has_the_keys_of_float_params_and_quantized_kernels():
    model = qwix_train.quantize_model(Mlp(), PtqProvider([INT8]))
    kernel = model.init(KEY, X)["params"]["Dense_1"]["kernel"]
    floats = Mlp().init(KEY, X)["params"]["Dense_1"]["kernel"]
    scale = np.abs(floats).max(0, keepdims=True) * np.float32(1.1) / 127.5
    np.testing.assert_allclose(kernel.array.scale, scale, 1e-6)
    np.testing.assert_array_equal(
        kernel.array.qvalue, np.round(np.asarray(floats, np.float64) / scale)
    )


@pytest.mark.slow
def test_metadata_is_that_of_each_part():
    model = qwix_train.quantize_model(Partitioned(), PtqProvider([INT8]))
    variables = jax.eval_shape(model.init, KEY, X)
    w = variables["params"]["w"].array
    assert isinstance(w.qvalue, nn.LogicallyPartitioned)
    assert (w.qvalue.names, w.scale.names) == (("a", "b", "c"), (None, "b", "c"))
    specs = nn.get_partition_spec(variables)["params"]
    kernel = specs["Dense_0"]["kernel"].array
    assert (kernel.qvalue, kernel.scale) == (jax.P("in", "out"), jax.P(None, "out"))
    variables = model.init(KEY, X)
    np.testing.assert_array_equal(
        model.apply(variables, X), model.apply(nn.unbox(variables), X)
    )
    # Under a mesh, Flax constrains what has a name.
    mesh = jax.make_mesh(
        (2, 2), ("in", "out"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )
    with jax.set_mesh(mesh):
        out = jax.jit(model.apply)(variables, X)
    np.testing.assert_allclose(out, model.apply(variables, X), 1e-6, 1e-6)


def test_stacked_layers_keep_their_names():
    model = qwix_train.quantize_model(Layers(partitioned=True), PtqProvider([INT8]))
    kernel = jax.eval_shape(model.init, KEY, X)["params"]["layers"]["Dense_0"]["kernel"]
    assert kernel.array.qvalue.names == ("layers", "in", "out")
    assert kernel.array.scale.names == ("layers", None, "out")
    assert kernel.array.scale.value.shape == (3, 1, 8)


def test_a_call_changes_nothing():
    model, floats, variables = quantized(Regularized(), [INT8], X)
    before = jax.tree.map(np.array, variables)
    first = model.apply(variables, X)
    options = {"train": True, "rngs": {"dropout": jax.random.key(3)}}
    out, updates = model.apply(variables, X, mutable=["batch_stats"], **options)
    qat = qwix_train.quantize_model(Regularized(), QtProvider([INT8]))
    expected = qat.apply(floats, X, mutable=["batch_stats"], **options)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, 2e-6, 2e-6),
        (out, updates),
        expected,
    )
    _, everything = model.apply(variables, X, mutable=True, **options)
    assert set(everything) == {"params", "batch_stats", "intermediates"}
    equal(everything["params"], variables["params"])
    _, sown = model.apply(variables, X, mutable="intermediates")
    assert sown["intermediates"]["hidden"][0].shape == (3, 6)
    _, captured = model.apply(
        variables, X, mutable="intermediates", capture_intermediates=True
    )
    np.testing.assert_array_equal(captured["intermediates"]["__call__"][0], first)
    assert set(captured["intermediates"]["Dense_0"]) == {"__call__"}
    np.testing.assert_array_equal(model.apply(variables, X), first)
    equal(jax.tree.map(np.array, variables), before)


def test_boxed_params_come_back_as_they_were():
    model = qwix_train.quantize_model(Partitioned(), PtqProvider([INT8]))
    variables = model.init(KEY, X)
    _, updates = model.apply(variables, X, mutable=True)
    equal(updates, variables)


def test_init_shapes_of_batch_statistics_are_the_models():
    model, floats, variables = quantized(Regularized(), [INT8], X)
    equal(model.init(KEY, X)["batch_stats"], floats["batch_stats"])
    copied = model.clone()
    equal(copied.apply(variables, X), model.apply(variables, X))


class Decoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(nn.MultiHeadDotProductAttention(2, decode=True)(x))


@pytest.mark.slow
def test_a_cache_is_initialized_for_the_longest_input():
    """The module with the cache takes a whole sequence once, and then single steps."""
    x = jax.device_put(data(2, 5, 8, seed=4))
    model, floats, variables = quantized(Decoder(), [INT8], x)
    equal(model.init(KEY, x)["cache"], floats["cache"])
    qat = qwix_train.quantize_model(Decoder(), QtProvider([INT8]))
    step = lambda model: jax.jit(  # noqa: E731
        lambda variables, x: model.apply(variables, x, mutable="cache")
    )
    steps = {"ptq": (step(model), variables), "qat": (step(qat), floats)}
    for token in range(5):
        outputs = {}
        for name, (run, held) in steps.items():
            outputs[name], updates = run(held, x[:, token : token + 1])
            steps[name] = run, {**held, **updates}
        np.testing.assert_allclose(outputs["ptq"], outputs["qat"], 1e-5, 1e-5)
    assert (
        steps["ptq"][1]["cache"]["MultiHeadDotProductAttention_0"]["cache_index"] == 5
    )


@pytest.mark.slow
def test_two_methods():
    methods = ("encode", "decode")
    model = qwix_train.quantize_model(Codec(), PtqProvider([INT8]), methods=methods)
    variables = model.init(KEY, X)
    kernels = jax.tree.leaves(variables, is_leaf=is_quantized)
    assert sum(map(is_quantized, kernels)) == 3
    floats = Codec().init(KEY, X)
    encoded = model.apply(variables, X, method="encode")
    decoded = model.apply(variables, encoded, method="decode")
    qat = qwix_train.quantize_model(Codec(), QtProvider([INT8]), methods=methods)
    np.testing.assert_allclose(decoded, qat.apply(floats, X), 2e-6, 2e-6)
    np.testing.assert_array_equal(model.apply(variables, X), decoded)
    only = model.init(KEY, X, method="encode")
    assert set(only["params"]) == {"encoder"}


@pytest.mark.parametrize("method", ["encode", Codec.encode])
def test_quantize_takes_a_method(method):
    params = Codec().init(KEY, X, method="encode")["params"]
    model, quantized = ptq.quantize(Codec(), params, [INT8], X, method=method)
    assert is_quantized(quantized["encoder"]["kernel"])
    assert model.apply({"params": quantized}, X, method=method).shape


def test_quantize_says_that_a_function_calls_no_quantized_method():
    params = Codec().init(KEY, X, method="encode")["params"]
    with pytest.raises(
        ValueError, match="calls no method of Codec that runs quantized"
    ):
        ptq.quantize(
            Codec(), params, [INT8], X, method=lambda codec, x: codec.encode(x)
        )


class Noisy(nn.Module):
    """It draws from a stream of its own, in `init`, too."""

    @nn.compact
    def __call__(self, x):
        noise = jax.random.normal(self.make_rng("noise"), x.shape)
        return nn.Dropout(0.5, deterministic=False)(nn.Dense(3)(x + noise))


@pytest.mark.parametrize("variables", [None, {}])
def test_quantize_takes_random_keys(variables):
    rngs = {"noise": KEY, "dropout": KEY}
    params = Noisy().init({"params": KEY, **rngs}, X)["params"]
    options = {"rngs": rngs, "variables": variables}
    model, quantized = ptq.quantize(Noisy(), params, [INT8], X, **options)
    assert is_quantized(quantized["Dense_0"]["kernel"])
    assert model.apply({"params": quantized}, X, rngs=rngs).shape == (len(X), 3)


def test_random_keys_of_what_is_no_linen_model():
    def noisy(params, x, *, rngs):
        return (x + jax.random.normal(rngs["noise"], x.shape)) @ params["w"]

    params, rngs = {"w": np.ones((X.shape[1], 3), np.float32)}, {"noise": KEY}
    plan = qwix_train.plan(noisy, [INT8], params, X, rngs=rngs)
    assert len(plan.quantized_ops) == 1
    _, quantized = ptq.quantize(noisy, params, [INT8], X, rngs=rngs)
    assert is_quantized(quantized["w"])


class Mixed(nn.Module):
    """Quantized submodules inside of a float model; one is called twice."""

    @nn.compact
    def __call__(self, x):
        provider = PtqProvider([INT8])
        shared = qwix_train.quantize_model(Mlp(), provider)
        first = shared(nn.Dense(8)(x))
        last = qwix_train.quantize_model(nn.Dense(4, name="last"), provider)
        return last(first + shared(2 * x))


class QuantizedBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return qwix_train.quantize_model(nn.Dense(8), PtqProvider([INT8]))(x), None


def test_submodules_of_a_float_model():
    model = Mixed()
    out, variables = model.init_with_output(KEY, X)
    equal(out, model.apply(variables, X))
    equal(model.init(KEY, X), variables)
    params = variables["params"]
    assert not is_quantized(params["Dense_0"]["kernel"])
    assert is_quantized(params["last"]["kernel"])
    assert is_quantized(params["Mlp_0"]["Dense_1"]["kernel"])
    values = values_of(params)
    hidden = X @ values["Dense_0"]["kernel"]
    mlp = qwix_train.quantize_model(Mlp(), PtqProvider([INT8]))
    shared = {"params": params["Mlp_0"]}
    total = mlp.apply(shared, hidden) + mlp.apply(shared, 2 * X)
    last = qwix_train.quantize_model(nn.Dense(4), PtqProvider([INT8]))
    expected = last.apply({"params": params["last"]}, total)
    np.testing.assert_allclose(out, expected, 2e-6, 2e-6)


@pytest.mark.slow
def test_a_submodule_within_a_scan():
    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            layers = nn.scan(
                QuantizedBlock,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=3,
            )
            return layers(name="layers")(x, None)[0]

    variables = Outer().init(KEY, X)
    kernel = variables["params"]["layers"]["Dense_0"]["kernel"].array
    assert (kernel.qvalue.shape, kernel.scale.shape) == ((3, 8, 8), (3, 1, 8))
    dense = qwix_train.quantize_model(nn.Dense(8), PtqProvider([INT8]))
    x = X
    for i in range(3):
        layer = jax.tree.map(lambda x, i=i: x[i], variables["params"]["layers"])
        x = dense.apply({"params": layer["Dense_0"]}, x)
    np.testing.assert_allclose(Outer().apply(variables, X), x, 2e-6, 2e-6)


@pytest.mark.slow
def test_vmap_over_inputs_and_over_models():
    model, _, variables = quantized(Mlp(), [INT8], X)
    apply = jax.jit(model.apply)
    rows = jax.jit(jax.vmap(lambda x: model.apply(variables, x)))(X)
    one = jnp.stack([apply(variables, x) for x in X])
    np.testing.assert_allclose(rows, one, 2e-6, 2e-6)
    keys = jax.random.split(KEY, 2)
    models = jax.jit(jax.vmap(model.init, (0, None)))(keys, X)
    outs = jax.jit(jax.vmap(model.apply, (0, None)))(models, X)
    for i, key in enumerate(keys):
        expected = apply(model.init(key, X), X)
        np.testing.assert_allclose(outs[i], expected, 2e-6, 2e-6)


@pytest.mark.thinned(6)
@pytest.mark.parametrize("act_qtype", [None, "int8"])
@pytest.mark.parametrize("weight_qtype", ["int8", "nf4"])
def test_gradients_are_those_of_qat(weight_qtype, act_qtype):
    rule = QuantizationRule(weight_qtype=weight_qtype, act_qtype=act_qtype, **MARGIN)
    rules = [rule]
    model, floats, variables = quantized(Regularized(), rules, X)
    qat = qwix_train.quantize_model(Regularized(), QtProvider(rules))

    def loss(model, variables, x):
        return (model.apply(variables, x) ** 2).sum()

    expected = jax.grad(loss, 2)(qat, floats, X)
    assert np.abs(expected).max() > 0.1
    got = jax.jit(jax.grad(loss, 2), static_argnums=0)(model, variables, X)
    np.testing.assert_allclose(got, expected, 1e-5, 1e-5)
    # Params that stay in float can be trained.
    bias = jnp.ones(6)

    def of_bias(model, variables, bias):
        params = dict(variables["params"])
        params["Dense_0"] = {**params["Dense_0"], "bias": bias}
        return loss(model, {**variables, "params": params}, X)

    np.testing.assert_allclose(
        jax.grad(of_bias, 2)(model, variables, bias),
        jax.grad(of_bias, 2)(qat, floats, bias),
        1e-5,
        1e-5,
    )
