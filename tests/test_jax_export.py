"""`jax.export` of quantized functions whose sizes are symbols, and their files."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax import export
from jax import numpy as jnp

import qwix_train
from qwix_train import (
    HowToQuantize,
    QtProvider,
    QtRule,
    QuantizationRule,
    WithAux,
    dot_general,
    lora,
    ptq,
    quantize,
    quantize_fn,
    quantize_model,
)
from qwix_train.core.dequantized_product import dequantized_product
from qwix_train.core.packed_array import pack, unpack
from qwix_train.core.qarray import dequantize
from tests import models
from tests.models import Layers, assert_same
from tests.spellings import data


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(jnp.tanh(nn.Dense(256)(x)))


class Convolution(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), strides=2)(x)
        return nn.Dense(4)(x.reshape(x.shape[0], -1))


class Attention(nn.Module):
    """Looks tokens up; attention contracts the sequence, whose length is a symbol."""

    @nn.compact
    def __call__(self, x):
        table = nn.Embed(7, 8)
        h = table(x)
        h = nn.MultiHeadDotProductAttention(2)(h, mask=nn.make_causal_mask(x))
        flat = h.reshape(-1, 8)
        return table.attend(nn.Dense(8)(flat)).reshape(*x.shape, 7)


X = data(4, 6)
IMAGE = data(2, 4, 4, 3)
TOKENS = np.array([[1, 2, 0], [6, 3, 1]], np.int32)
MODELS = {
    "mlp": (Mlp(), X, "b, 6"),
    "convolution": (Convolution(), IMAGE, "b, 4, 4, 3"),
    "attention": (Attention(), TOKENS, "b, t"),
    "layers": (Layers(), X, "b, 6"),
}
FORMS = {
    "weights": {"weight_qtype": "int8"},
    "dynamic": {"weight_qtype": "int8", "act_qtype": "int8"},
    "tiles": {"weight_qtype": "int4", "tile_size": 2, "act_qtype": "int8"},
    "nf4": {"weight_qtype": "nf4", "tile_size": 2},
    "minmax": {
        "weight_qtype": "int8",
        "weight_calibration_method": "minmax",
        "act_qtype": "int8",
        "act_calibration_method": "minmax",
    },
}
CASES = [
    ("mlp", "weights"),
    ("mlp", "dynamic"),
    ("mlp", "tiles"),
    ("mlp", "nf4"),
    ("convolution", "dynamic"),
    ("attention", "weights"),
    ("attention", "minmax"),
    ("layers", "dynamic"),
]


def shapes_of(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def check(function, params, x, symbols):
    """A restored export gives for other sizes what the function itself gives."""
    symbolic = jax.ShapeDtypeStruct(export.symbolic_shape(symbols), x.dtype)
    exported = export.export(jax.jit(function))(shapes_of(params), symbolic)
    restored = export.deserialize(exported.serialize())
    x = np.concatenate([x, x[:1]])
    np.testing.assert_allclose(
        restored.call(params, x), jax.jit(function)(params, x), 1e-4, 1e-4
    )


@pytest.mark.thinned(9)
@pytest.mark.parametrize(("model", "form"), CASES)
@pytest.mark.parametrize("mode", ["QAT", "PTQ"])
def test_models(model, form, mode):
    model, x, symbols = MODELS[model]
    rules = [QuantizationRule(**FORMS[form])]
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]
    if mode == "QAT":
        quantized = quantize_model(model, QtProvider(rules))
    else:
        quantized, params = ptq.quantize(model, params, rules, x)
    check(lambda params, x: quantized.apply({"params": params}, x), params, x, symbols)


def test_large_tiles_that_stay_quantized():
    def function(p, x):
        return x @ p["w"]

    rules = [QuantizationRule(weight_qtype="int8", act_qtype="int8", tile_size=128)]
    x = data(2, 256)
    check(*ptq.quantize(function, {"w": data(256, 3)}, rules, x), x, "b, 256")


def test_a_size_that_may_be_zero():
    def products(weights, x):
        quantized, packed = weights
        x = x[:, 1:]
        return qwix_train.dot(x, quantized) + dequantized_product(
            jnp.matmul, lambda packed: dequantize(unpack(packed)), x, packed
        )

    check(products, (ARRAY, jax.jit(pack)(ARRAY)), data(2, 3, 4), "b, t, 4")


@pytest.mark.slow
def test_lookups_and_broadcast_weights():
    def function(p, tokens):
        x = p["table"][tokens] + p["position"][: tokens.shape[1]]
        queries = jnp.broadcast_to(p["queries"], (tokens.shape[0], 2, 4))
        return jnp.einsum("btd,bqd->btq", x, queries).sum(1) + (
            queries.reshape(-1, 4) @ p["w"]
        ).reshape(-1, 2)

    params = {
        "table": data(7, 4),
        "position": data(9, 4),
        "queries": data(2, 4),
        "w": data(4, 1),
    }
    rules = [
        QuantizationRule(op_names=["gather"], weight_qtype="int4"),
        QuantizationRule(weight_qtype="int8", act_qtype="int8"),
    ]
    tokens = jax.device_put(TOKENS)
    quantized, params = ptq.quantize(function, params, rules, tokens)
    sizes = export.symbolic_shape("b, t", constraints=["t <= 9"])
    symbolic = jax.ShapeDtypeStruct(sizes, tokens.dtype)
    exported = export.export(jax.jit(quantized))(shapes_of(params), symbolic)
    np.testing.assert_allclose(
        exported.call(params, tokens), quantized(params, tokens), 1e-4, 1e-4
    )


def test_gradients_of_quantized_training():
    rules = [QtRule(weight_qtype="int8", act_qtype="int8", bwd_qtype="int8")]
    quantized = quantize_fn(lambda p, x: x @ p["w"], QtProvider(rules))

    def gradient(params, x):
        return jax.grad(lambda p: quantized(p, x).sum())(params)["w"]

    check(gradient, {"w": data(6, 3)}, X, "b, 6")


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    "fields",
    [{}, {"weight_qtype": "nf4", "tile_size": 2, "double_quant": True}],
    ids=["float", "double quant"],
)
def test_adapters(fields):
    params = jax.jit(Mlp().init)(jax.random.key(0), X)["params"]
    rules = [lora.LoraRule(rank=2, alpha=2.0, **fields)]
    state = models.lora_state(
        Mlp().apply, params, optax.sgd(0.1), rules, jax.random.key(1), X
    )
    check(lambda p, x: state.apply_fn({"params": p}, x), state.params, X, "b, 6")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lsq", "lsq+"])
def test_trained_scales(method):
    """LSQ scales gradients by the elements of an example, whose number is a symbol."""
    rules = [
        QuantizationRule(
            weight_qtype="int8",
            weight_calibration_method="lsq",
            act_qtype="int8",
            act_calibration_method=method,
        )
    ]
    model = quantize_model(Mlp(), QtProvider(rules))
    x = data(2, 5, 6)
    params = jax.jit(Mlp().init)(jax.random.key(0), x)["params"]
    params = qwix_train.attach(params, rules, x, model=Mlp())

    def loss(params, x):
        return jnp.square(model.apply({"params": params}, x)).sum()

    def loss_and_gradient(params, x):
        value, gradient = jax.value_and_grad(loss)(params, x)
        return jnp.append(value, gradient["Dense_0"]["dot_general0_lhs_scale"])

    check(loss_and_gradient, params, x, "b, t, 6")


def test_a_contraction_that_may_be_too_long_for_int32():
    """The length is a symbol, so the sum of codes must fit whatever it is."""
    length = 2**18
    codes = quantize(jnp.ones((1, length)), "int8")

    def product(codes):
        return dot_general(codes, codes, (((1,), (1,)), ((), ())))

    shape = (1, *export.symbolic_shape("n"))
    abstract = dataclasses.replace(
        codes,
        qvalue=jax.ShapeDtypeStruct(shape, jnp.int8),
        scale=shapes_of(codes.scale),
    )
    exported = export.export(jax.jit(product))(abstract)
    # 127 * 127 * length is beyond int32.
    np.testing.assert_allclose(exported.call(codes), [[length]], 1e-2)


ARRAY = jax.jit(lambda x: quantize(x, "nf4", channelwise_axes=(1,)))(data(4, 8))
FLOAT8 = jax.jit(lambda x: quantize(x, "float8_e5m2"))(X)
HOW = HowToQuantize(qtype="int4", channelwise_axes=(1,), tiled_axes={0: 0.5, 2: 4})


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    "value",
    [ARRAY, jax.jit(pack)(ARRAY), WithAux(ARRAY, HOW), FLOAT8],
    ids=lambda value: type(value).__name__,
)
def test_files_keep_quantized_arrays(value):
    """As inputs and as outputs."""
    exported = export.export(jax.jit(lambda x: x))(value)
    restored = export.deserialize(exported.serialize())
    assert restored.in_tree == jax.tree.structure(((value,), {}))
    assert_same(restored.call(value), value)


def test_noise_cannot_be_written():
    how = dataclasses.replace(HOW, noise_fn=lambda shape: jnp.zeros(shape))
    exported = export.export(jax.jit(lambda x: x.array.scale))(WithAux(ARRAY, how))
    with pytest.raises(ValueError, match="noise_fn=.* cannot be serialized"):
        exported.serialize()
