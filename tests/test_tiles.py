"""Which elements of a weight share a tile, however its product is written.

A tile is cut from the last of the contracted axes, as the operand has them. One that is
larger takes that axis whole and is cut from the contracted axis before it.
"""

import re

import jax
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax
from jax import numpy as jnp
from qwix._src.core import einsum as qwix_einsum
from qwix._src.core import qarray as qwix_qarray

from qwix_train import (
    PtqProvider,
    QtProvider,
    QtRule,
    QuantizationRule,
    dequantize,
    plan,
    ptq,
    quantize_fn,
    quantize_model,
)
from tests.models import assert_close, rule
from tests.ptq.gptq_reference import run
from tests.spellings import data, fq

HEADS, SIZE, WIDTH = 4, 8, 5
PARAMS = {"w": data(HEADS, SIZE, WIDTH)}
X = data(3, HEADS, SIZE, seed=1)

SPELLINGS = {
    "sorted letters": lambda x, w: jnp.einsum("bij,ijd->bd", x, w),
    "letters in other order": lambda x, w: jnp.einsum("BNH,NHD->BD", x, w),
    "weight on the left": lambda x, w: jnp.einsum("NHD,BNH->BD", w, x),
    "tensordot": lambda x, w: jnp.tensordot(x, w, 2),
    "tensordot, axes reversed": lambda x, w: jnp.tensordot(x, w, ((2, 1), (1, 0))),
    "dot_general, axes reversed": lambda x, w: lax.dot_general(
        x, w, (((2, 1), (1, 0)), ((), ()))
    ),
    "heads before the sequence": lambda x, w: jnp.einsum(
        "NBH,NHD->BD", x.transpose(1, 0, 2), w
    ),
    "DenseGeneral": lambda x, w: nn.DenseGeneral(
        WIDTH, axis=(-2, -1), use_bias=False
    ).apply({"params": {"kernel": w}}, x),
    "Einsum": lambda x, w: nn.Einsum(
        (HEADS, SIZE, WIDTH), "BNH,NHD->BD", use_bias=False
    ).apply({"params": {"kernel": w}}, x),
}


def int8(**kwargs):
    return QuantizationRule(weight_qtype="int8", **kwargs)


def how_of(found, *path):
    """How a plan quantizes a param."""
    how = found.params[path].how
    assert how is not None
    return how


def merged(x, w):
    """The product of the merged axes, by NumPy in float64."""
    return x.reshape(len(x), -1) @ w.reshape(-1, w.shape[-1])


@pytest.mark.thinned(5)
@pytest.mark.parametrize("act", [None, "int8"])
@pytest.mark.parametrize("tile", [4, 16])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_has_the_same_tiles(spelling, tile, act):
    def function(p, x):
        return SPELLINGS[spelling](x, p["w"])

    rules = [int8(tile_size=tile, act_qtype=act)]
    found = plan(function, rules, PARAMS, X)
    assert how_of(found, "w").scale_shape(PARAMS["w"].shape) == (
        (1, 2, WIDTH) if tile == 4 else (2, 1, WIDTH)
    )
    actual = quantize_fn(function, QtProvider(rules))(PARAMS, X)
    if tile == 4:  # Shared by all heads.
        w = fq(PARAMS["w"], (2,), tile=(1, 4))
        x = fq(X, (0,), tile=(2, 4)) if act else X
    else:
        w = fq(PARAMS["w"].reshape(2, 2 * SIZE, WIDTH), (0, 2))
        x = fq(X.reshape(3, 2, 2 * SIZE), (0, 1)) if act else X
    np.testing.assert_allclose(actual, merged(x, w), 1e-5, 1e-5)


def test_nnx_modules_have_the_same_tiles():
    class Model(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.out = nnx.Einsum(
                "BNH,NHD->BD", (HEADS, SIZE, WIDTH), (WIDTH,), rngs=rngs
            )
            self.general = nnx.LinearGeneral(
                (HEADS, SIZE), WIDTH, axis=(-2, -1), use_bias=False, rngs=rngs
            )

        def __call__(self, x):
            return self.out(x) + self.general(x)

    found = plan(Model(), [int8(tile_size=4)], X)
    for name in ("out", "general"):
        how = how_of(found, name, "kernel")
        assert how.tiled_axes == {1: 4} and how.channelwise_axes == (2,)


@pytest.mark.slow
def test_the_scales_and_numbers_of_qwix():
    equation = "BTNH,NHD->BTD"
    x = data(2, 3, 2, 6)
    w = data(2, 6, 4, seed=1)
    hows = [
        qwix_einsum.get_how_to_quantize(
            einsum_str=equation,
            ndims=(4, 3),
            for_lhs=side == 0,
            tile_size=2,
            qtype=jnp.int8,
        )
        for side in range(2)
    ]
    theirs = [
        qwix_qarray.quantize(jax.device_put(a), how)
        for a, how in zip((x, w), hows, strict=True)
    ]

    def function(p, x):
        return jnp.einsum(equation, x, p["w"])

    rules = [int8(act_qtype="int8", tile_size=2)]
    _, stored = ptq.quantize(function, {"w": w}, rules, x)
    np.testing.assert_array_equal(stored["w"].array.qvalue, theirs[1].qvalue)
    np.testing.assert_array_equal(stored["w"].array.scale, theirs[1].scale)
    expected = qwix_einsum.einsum(equation, *theirs)
    for provider, params in ((QtProvider, {"w": w}), (PtqProvider, stored)):
        actual = quantize_fn(function, provider(rules))(params, x)
        np.testing.assert_allclose(actual, expected, 1e-5, 1e-6)


@pytest.mark.slow
def test_operands_whose_last_axes_are_not_the_same():
    """Each has its tiles along its own last axis; the product cuts both."""
    x = data(3, SIZE, HEADS, seed=1)

    def function(p, x):
        return jnp.einsum("BHN,NHD->BD", x, p["w"])

    rules = [int8(act_qtype="int8", tile_size=2)]
    expected = np.einsum(
        "BHN,NHD->BD",
        fq(x, (0,), tile=(2, 2)),
        fq(PARAMS["w"], (2,), tile=(1, 2)),
    )
    quantized, stored = ptq.quantize(function, PARAMS, rules, x)
    for found in (
        quantized(stored, x),
        quantize_fn(function, QtProvider(rules))(PARAMS, x),
    ):
        np.testing.assert_allclose(found, expected, 1e-5, 1e-5)


# A tile that spans axes is the tile of the merged axis, in every mode.


class General(nn.Module):
    """An output projection: heads and their elements are contracted."""

    @nn.compact
    def __call__(self, x):
        x = x.reshape(len(x), 6, 8)
        return nn.DenseGeneral(12, axis=(-2, -1), use_bias=False, name="out")(x)


class Flat(nn.Module):
    """The same layer, on merged axes."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(12, use_bias=False, name="out")(x)


KERNEL = np.random.default_rng(2).normal(size=(48, 12)).astype(np.float32)
INPUTS = np.random.default_rng(3).normal(size=(16, 48)).astype(np.float32)
OF_GENERAL = {"out": {"kernel": jax.device_put(KERNEL.reshape(6, 8, 12))}}
OF_FLAT = {"out": {"kernel": jax.device_put(KERNEL)}}


def test_twelve_heads_of_32_in_tiles_of_64():
    params = {"w": np.ones((12, 32, 16), np.float32)}

    def function(p, x):
        return jnp.einsum("BTNH,NHD->BTD", x, p["w"])

    rules = [int8(act_qtype="int8", tile_size=64)]
    found = plan(function, rules, params, np.ones((2, 3, 12, 32), np.float32))
    how = how_of(found, "w")
    assert how.scale_shape((12, 32, 16)) == (6, 1, 16)
    (op,) = found.ops
    (act,) = filter(None, op.activations)
    assert act.scale_shape((2, 3, 12, 32)) == (2, 3, 6, 1)


@pytest.mark.thinned(5)
@pytest.mark.parametrize("bwd_qtype", [None, "int8"])
def test_training_in_spanning_tiles(bwd_qtype):
    rules = [
        QtRule(
            weight_qtype="int4",
            weight_calibration_method="absmax,1.1",
            act_qtype="int8",
            act_calibration_method="absmax,1.1",
            tile_size=16,
            bwd_qtype=bwd_qtype,
        )
    ]

    def of(model, params):
        quantized = quantize_model(model, QtProvider(rules))

        def loss(params):
            out = quantized.apply({"params": params}, INPUTS)
            return jnp.sum(out * INPUTS[:, :12]), out

        (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        return out, grads["out"]["kernel"].reshape(KERNEL.shape)

    assert_close(of(General(), OF_GENERAL), of(Flat(), OF_FLAT))


@pytest.mark.thinned(5)
@pytest.mark.parametrize("method", [None, ptq.Gptq, ptq.Awq, ptq.SmoothQuant])
def test_weights_in_spanning_tiles(method):
    rules = [rule("int4", tile_size=16)]

    def of(model, params):
        if method is None:
            quantized, stored = ptq.quantize(model, params, rules, INPUTS)
        else:
            made = method(rules)
            stored = run(made, model, params, INPUTS)
            quantized = quantize_model(model, made.provider)
        out = jax.jit(quantized.apply)({"params": stored}, INPUTS)
        return out, dequantize(stored["out"]["kernel"].array).reshape(KERNEL.shape)

    assert_close(of(General(), OF_GENERAL), of(Flat(), OF_FLAT))


def test_lookups_in_spanning_tiles():
    table = data(7, 3, 4)

    def function(p, tokens):
        return p["table"][tokens]

    rules = [int8(tile_size=12, op_names=["gather"])]
    found = plan(function, rules, {"table": table}, jnp.array([1, 2]))
    how = how_of(found, "table")
    assert how.scale_shape(table.shape) == (7, 1, 1)


def test_gradients_of_weights_in_spanning_tiles():
    """The gradient of a weight sums over the batch and the sequence."""
    x, w, g = data(4, 2, 6), data(6, 5), data(8, 5, seed=2)
    rules = [
        QtRule(
            weight_qtype="int8",
            act_qtype="int8",
            bwd_qtype="int8",
            bwd_weight_grad_tile_size=4,
        )
    ]

    def of(x):
        quantized = quantize_fn(lambda p, x: x @ p["w"], QtProvider(rules))

        @jax.jit
        def gradient(p):
            return jax.vjp(lambda p: quantized(p, x).reshape(g.shape), p)[1](g)

        return gradient({"w": w})

    assert_close(of(x), of(x.reshape(8, 6)))


def test_large_spanning_tiles_multiply_codes():
    """The number of tiles decides whether codes are multiplied, not an axis's part."""
    params = {"w": np.ones((16, 16, 4), np.float32)}

    def function(p, x):
        return jnp.einsum("BNH,NHD->BD", x, p["w"])

    rules = [int8(act_qtype="int8", tile_size=128)]
    x = np.ones((2, 16, 16), np.float32)
    quantized, stored = ptq.quantize(function, params, rules, x)
    dots = re.findall(
        r"i32\[.*?\] = dot_general", str(jax.make_jaxpr(quantized)(stored, x))
    )
    assert dots


def test_padded_spanning_tiles():
    w = data(5, 4, 3)

    def function(p, x):
        return jnp.einsum("bnh,nhd->bd", x, p["w"])

    x = data(2, 5, 4)
    with pytest.raises(ValueError) as error:
        plan(function, [int8(tile_size=8)], {"w": w}, x)
    assert str(error.value).startswith(
        "einsum0, param 'w': a tile of 2 does not divide axis 0, of length 5, of the "
        "shape (5, 4, 3). Choose a tile_size that does, instead of 8"
    )
    rules = [int8(tile_size=8, pad_tiles=True)]
    actual = quantize_fn(function, QtProvider(rules))({"w": w}, x)
    padded = np.concatenate([w, np.zeros((1, 4, 3))]).reshape(3, 8, 3)
    expected = fq(padded, (0, 2)).reshape(6, 4, 3)[:5]
    np.testing.assert_allclose(actual, merged(x, expected), 1e-5, 1e-6)


def test_a_tile_larger_than_all_that_is_contracted():
    with pytest.raises(ValueError, match=r"'w': a tile of 64 does not divide axis 1"):
        plan(
            lambda p, x: jnp.einsum("bnh,nhd->bd", x, p["w"]),
            [int8(tile_size=64)],
            PARAMS,
            X,
        )
