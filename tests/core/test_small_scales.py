"""Arrays of small numbers keep their values, in float16, too.

The scales of ordinary float16 weights lie below its smallest normal number, 6.1e-5. The
reference is the quantization of the same numbers in float64 NumPy.
"""

import jax
import numpy as np
import pytest
from flax import linen as nn
from jax import numpy as jnp

from qwix_train import QtProvider, QuantizationRule, ptq, quantize_model
from qwix_train.core import learned_quant, numerics
from qwix_train.core.calibration import smallest_scale
from qwix_train.core.fake_quant import fake_quant, fake_quant_with_calibration
from qwix_train.core.how import HowToQuantize
from qwix_train.core.packed_array import unpack
from qwix_train.core.qarray import dequantize, quantize, quantize_array
from qwix_train.optim import _blocks
from qwix_train.values import stored
from tests.core.reference import reference_dequantized
from tests.models import assert_same
from tests.ptq.gptq_reference import run

LAYOUTS = [{}, dict(channelwise_axes=(1,)), dict(tiled_axes={0: 32})]


def normal(size, dtype=jnp.float16, shape=(64, 48), seed=0):
    x = size * np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(x.astype(np.float32), dtype)


def error(x, y):
    x, y = (np.asarray(a, np.float64) for a in (x, y))
    return float(np.linalg.norm(y - x) / np.linalg.norm(x))


def least_error(x, how):
    """The error of quantization without any rounding of scales."""
    return error(x, reference_dequantized(x, how))


@pytest.mark.thinned(12)
@pytest.mark.parametrize("size", [2e-3, 1e-4, 1e-5])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_no_float16_channel_is_lost(size, layout):
    x = normal(size)
    how = HowToQuantize(qtype="int8", **layout)
    # At 1e-5 a scale is some five times 2**-24, the smallest float16.
    allowed = 1.3 if size == 1e-5 else 1.05
    got = error(x, dequantize(quantize_array(x, how)))
    assert got < allowed * least_error(x, how)
    assert_same(fake_quant(x, how), dequantize(quantize_array(x, how)))


@pytest.mark.thinned(4)
@pytest.mark.parametrize("method", ["minmax", "rms,4", "absmax,0.9", "minmax,0.9"])
def test_every_calibration_keeps_small_float16_values(method):
    x = normal(1e-3)
    how = HowToQuantize(qtype="int8", channelwise_axes=(1,), calibration_method=method)
    got = error(x, dequantize(quantize_array(x, how)))
    assert got < 1.05 * least_error(x, how)


@pytest.mark.thinned(4)
@pytest.mark.parametrize("qtype", ["float8_e4m3fn", "float8_e5m2", "nf4", "int4"])
def test_every_type_keeps_small_float16_values(qtype):
    x = normal(1e-3)
    how = HowToQuantize(qtype=qtype, channelwise_axes=(1,))
    got = error(x, dequantize(quantize_array(x, how)))
    wide = quantize_array(x.astype(jnp.float32), how)
    assert got < 1.05 * error(x, dequantize(wide))


def test_the_smallest_float16_numbers_are_exact():
    """They are multiples of 2**-24, and so is a scale."""
    x = jnp.arange(-127, 128).astype(jnp.float16) * jnp.float16(2**-24)
    for method in ("absmax", "minmax"):
        q = quantize(x, "int8", calibration_method=method)
        assert_same(dequantize(q), x)


def test_only_zeros_are_empty():
    x = jnp.zeros((3, 4), jnp.float16).at[0, 1].set(2**-24)
    q = quantize(x, "int8", channelwise_axes=(0,))
    assert q.scale.ravel().tolist() == [2**-24, 1, 1]
    assert smallest_scale(jnp.float16) == 2**-24


@pytest.mark.slow
def test_large_float16_values_keep_a_finite_range():
    x = jnp.array([-6e4, 6e4, 3e4], jnp.float16)
    for method, qtype in [("minmax", "int8"), ("rms,1", "int8"), ("absmax", "nf4")]:
        q = quantize(x, qtype, calibration_method=method)
        got = dequantize(q).astype(jnp.float32)
        np.testing.assert_allclose(got, x.astype(jnp.float32), rtol=0.3)


@pytest.mark.slow
def test_codes_are_the_same_compiled():
    x = normal(1e-3)
    for method in ("absmax", "minmax", "rms,3"):
        for axes in ((), (1,), (0, 1)):
            how = HowToQuantize(
                qtype="int8", channelwise_axes=axes, calibration_method=method
            )
            compiled = jax.jit(quantize_array, static_argnums=1)(x, how)
            assert_same(compiled, quantize_array(x, how))


def test_a_collected_range_of_small_float16_activations():
    x = normal(1e-5)
    calibration = {"absmax": jnp.max(jnp.abs(x.astype(jnp.float32)), keepdims=True)}
    got = fake_quant_with_calibration(x, "int8", calibration)
    assert got.dtype == jnp.float16
    assert error(x, got) < 0.02


@pytest.mark.slow
def test_trained_scales_of_small_float16_activations():
    x = jnp.abs(normal(1e-6))
    alpha = jnp.full((1, 1), 5e-6, jnp.float32)
    # 255 steps of less than 2**-24 each: they are widened to one.
    assert error(x, learned_quant.pact(x, "int8", alpha)) < 0.01
    assert error(x, learned_quant.lsq(x, "int8", alpha / 127)) < 0.01


def test_scale_in_dtype():
    scale = np.array([3e-8, 0, -1e-9, 1, np.nan, np.inf], np.float32)
    want = np.array([2**-24, 0, -(2**-24), 1, np.nan, np.inf], np.float32)
    assert_same(numerics.scale_in_dtype(scale, np.float16).astype(np.float32), want)
    got = numerics.scale_in_dtype(jax.device_put(scale), jnp.float16)
    assert_same(got.astype(jnp.float32), want)
    assert_same(numerics.scale_in_dtype(jax.device_put(scale), jnp.float32), scale)


@pytest.mark.thinned(4)
@pytest.mark.parametrize("qtype", ["int8", "dynamic"])
def test_float16_moments_are_not_lost(qtype):
    x = jnp.abs(normal(1e-6))
    codes, scale = _blocks.quantize(x, qtype, 32)
    assert error(x, _blocks.dequantize(codes, scale, qtype)) < 0.05


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(8, use_bias=False, dtype=jnp.float16)(x)


@pytest.mark.slow
def test_a_row_of_small_activations_is_not_lost():
    model, x = Layer(), normal(1e-3, shape=(4, 32)).at[0].mul(1e3)
    variables = {"params": {"Dense_0": {"kernel": normal(0.1, shape=(32, 8), seed=1)}}}
    rules = [QuantizationRule(weight_qtype="int8", act_qtype="int8")]
    want = np.asarray(x, np.float64) @ np.asarray(
        variables["params"]["Dense_0"]["kernel"], np.float64
    )
    qat = quantize_model(model, QtProvider(rules)).apply(variables, x)
    served, params = ptq.quantize(model, variables["params"], rules, x)
    for got in (qat, served.apply({"params": params}, x)):
        for row, expected in zip(got, want, strict=True):
            assert error(expected, row) < 0.02


class Half(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(8, use_bias=False, param_dtype=jnp.float16)(x)


@pytest.mark.slow
@pytest.mark.parametrize("method", [ptq.Gptq, ptq.Awq])
@pytest.mark.parametrize("tile", [None, 8])
def test_methods_that_look_at_data_keep_small_float16_weights(method, tile):
    kernel, x = normal(1e-3, shape=(16, 8)), normal(1, jnp.float32, (64, 16), seed=1)
    params = {"Dense_0": {"kernel": kernel}}
    chosen = method([QuantizationRule(weight_qtype="int8", tile_size=tile)])
    run(chosen, Half(), params, x)
    (record,) = chosen.report.weights
    assert record.error < 0.02


@pytest.mark.parametrize("method", ["absmax", "minmax"])
def test_scales_that_are_kept_in_float16(method):
    x = normal(3e-5, jnp.float32)
    q = quantize(x, "int8", calibration_method=method, scale_dtype=jnp.float16)
    assert q.dtype == jnp.float16
    # The scale is rounded up to a multiple of 2**-24.
    exact = quantize(x, "int8", calibration_method=method).scale
    step = np.ceil(np.asarray(exact, np.float64) * 2**24) * 2**-24
    assert_same(np.asarray(q.scale, np.float64), step)
    wide = np.asarray(dequantize(q), np.float64)
    assert np.abs(wide - np.asarray(x, np.float64)).max() <= step.max()


@pytest.mark.parametrize("size", [1e-4, 1e-6])
@pytest.mark.parametrize("packed", [False, True])
def test_a_float32_weight_that_the_model_casts_to_float16(size, packed):
    w = normal(size, jnp.float32)
    x = normal(10, jnp.float16, (8, 64), seed=1)
    rules = [QuantizationRule(weight_qtype="int4" if packed else "int8", tile_size=16)]
    model = nn.Dense(48, use_bias=False, dtype=jnp.float16)
    ptq_model, params = ptq.quantize(model, {"kernel": w}, rules, x)
    held = params["kernel"].array
    if packed:
        params = {"kernel": stored.packed(params["kernel"])}
        held = unpack(params["kernel"].array)
    want = np.asarray(x, np.float64) @ np.asarray(dequantize(held), np.float64)
    got = ptq_model.apply({"params": params}, x)
    assert error(want, got) < (1e-3 if size == 1e-4 else 0.05)
