"""GPTQ against its recursion in NumPy, and against `qwix.contrib`."""

import jax
import numpy as np
import pytest
from flax import linen as nn
from jax import numpy as jnp
from qwix._src.core import qarray as qwix_qarray
from qwix.contrib import gptq_core

from qwix_train import HowToQuantize, QuantizationRule, dequantize, ptq
from qwix_train.core.qarray import quantize_array
from qwix_train.ptq.gptq import Options, gptq_matrix, inverse_factor
from tests.ptq.gptq_reference import BOUNDS, WIDE, correlated, reference, run


def case(rows=12, columns=32, seed=0):
    rng = np.random.default_rng(seed + 100)
    x = correlated(256, columns, seed)
    return rng.normal(size=(rows, columns)).astype(np.float32), 2 * x.T @ x / len(x)


def codes_of(w, hessian, qtype, options, scale=None):
    how = HowToQuantize(qtype=qtype, channelwise_axes=(0,), calibration_method=WIDE)
    if scale is None:
        scale = jnp.broadcast_to(quantize_array(jax.device_put(w), how).scale, w.shape)
    corrected, scale, _, ok = jax.jit(gptq_matrix, static_argnames=("how", "options"))(
        jax.device_put(w),
        jax.device_put(hessian),
        scale,
        None,
        how=how,
        options=options,
    )
    assert ok
    low, high, _ = BOUNDS[qtype]
    return np.clip(np.round(corrected / scale), low, high).astype(int), scale


@pytest.mark.parametrize(("qtype", "block_size"), [("int3", 5), ("int8", 128)])
def test_the_recursion(qtype, block_size):
    w, hessian = case()
    codes, scale = codes_of(w, hessian, qtype, Options(block_size=block_size))
    expected, scales = reference(w, hessian, qtype)
    np.testing.assert_allclose(scale, scales, rtol=1e-6)
    # A value close to the border of two codes may fall to either side.
    assert np.mean(codes != expected) < (0.02 if qtype == "int8" else 0.003)


@pytest.mark.parametrize(("tile", "block_size"), [(8, 128), (16, 6), (1, 4)])
def test_scales_of_tiles_are_those_of_the_corrected_weights(tile, block_size):
    w, hessian = case()
    options = Options(block_size=block_size, tile=tile)
    codes, scale = codes_of(w, hessian, "int4", options)
    expected, scales = reference(w, hessian, "int4", tile=tile)
    same = np.isclose(scale, scales, rtol=1e-4)
    assert same.mean() > 0.99
    assert np.mean(codes != expected) < 0.01


@pytest.mark.slow
def test_channels_with_large_inputs_first():
    w, hessian = case(columns=24)
    how = HowToQuantize(
        qtype="int4", channelwise_axes=(0,), tiled_axes={1: 8}, calibration_method=WIDE
    )
    scale = jnp.repeat(quantize_array(jax.device_put(w), how).scale, 8, axis=1)
    options = Options(act_order=True, block_size=7)
    codes, scale = codes_of(w, hessian, "int4", options, scale)
    order = np.argsort(-np.diag(hessian), kind="stable")
    expected, scales = reference(w, hessian, "int4", tile=8, order=order, static=True)
    np.testing.assert_allclose(scale, scales, rtol=1e-6)
    assert np.mean(codes != expected) < 0.003


def test_the_factor_of_the_inverse():
    _, hessian = case()
    factor = np.asarray(inverse_factor(jax.device_put(hessian), 0.05), np.float64)
    damped = hessian + 0.05 * np.diag(hessian).mean() * np.eye(len(hessian))
    np.testing.assert_allclose(factor, np.triu(factor))
    inverse = np.linalg.inv(damped.astype(np.float64))
    np.testing.assert_allclose(
        factor.T @ factor, inverse, rtol=1e-3, atol=1e-4 * np.abs(inverse).max()
    )


@pytest.mark.slow
@pytest.mark.parametrize("tile", [None, 8])
def test_parity_with_qwix(tile):
    """The same codes, scales and zero points.

    `qwix` finds the scales of a tile before it has corrected what lies in the block
    that the tile starts in, so its blocks are the tiles here. Zero points are an error
    in it.
    """
    w, hessian = case(columns=16)
    how = {
        "qtype": "int4",
        "channelwise_axes": (0,),
        "tiled_axes": {1: tile} if tile else {},
        # The largest magnitude is no tie between two codes, and no error is one more.
        "calibration_method": "absmax,1.1",
    }
    theirs, _ = gptq_core.quantize_weight(
        jax.device_put(w),
        jax.device_put(hessian),
        qwix_qarray.HowToQuantize(**{**how, "qtype": jnp.int4}),
        blocksize=tile or 128,
    )
    ours = quantized(w.T, hessian, HowToQuantize(**how), Options(tile=tile))
    np.testing.assert_allclose(ours.scale.T, theirs.scale, rtol=1e-4)
    different = np.asarray(ours.qvalue.T, int) != np.asarray(theirs.qvalue, int)
    assert different.mean() < 0.006


def quantized(kernel, hessian, how, options):
    """The codes of a kernel of shape (inputs, outputs), through the method."""
    how = HowToQuantize(
        qtype=how.qtype,
        channelwise_axes=(1,),
        tiled_axes={0: how.tiled_axes[1]} if how.tiled_axes else {},
        calibration_method=how.calibration_method,
    )
    params = {"kernel": jax.device_put(kernel)}
    rule = QuantizationRule(
        weight_qtype=how.qtype,
        tile_size=how.tiled_axes.get(0),
        weight_calibration_method=how.calibration_method,
    )
    # Inputs with just this second moment.
    factor = np.linalg.cholesky(hessian.astype(np.float64) / 2)
    x = jnp.asarray(factor.T * len(hessian) ** 0.5, jnp.float32)
    model = nn.Dense(kernel.shape[1], use_bias=False)
    method = ptq.Gptq([rule], block_size=options.block_size)
    return run(method, model, params, x)["kernel"].array


@pytest.mark.slow
def test_without_correlation_it_is_rounding_to_nearest():
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(16, 8)).astype(np.float32)
    x = jnp.eye(16) * jnp.arange(1.0, 17)
    rules = [QuantizationRule(weight_qtype="int4", weight_calibration_method=WIDE)]
    model = nn.Dense(8, use_bias=False)
    params = run(ptq.Gptq(rules), model, {"kernel": kernel}, x)
    how = HowToQuantize(qtype="int4", channelwise_axes=(1,), calibration_method=WIDE)
    expected = quantize_array(jax.device_put(kernel), how)
    np.testing.assert_array_equal(params["kernel"].array.qvalue, expected.qvalue)
    np.testing.assert_array_equal(params["kernel"].array.scale, expected.scale)


@pytest.mark.slow
def test_channels_without_input_are_rounded_to_nearest():
    w, _ = case(columns=16)
    x = correlated(64, 16)
    x[:, [3, 7]] = 0
    rules = [QuantizationRule(weight_qtype="int4", weight_calibration_method=WIDE)]
    kernel = jax.device_put(w.T)
    params = run(ptq.Gptq(rules), nn.Dense(12, use_bias=False), {"kernel": kernel}, x)
    how = HowToQuantize(qtype="int4", channelwise_axes=(1,), calibration_method=WIDE)
    nearest = quantize_array(kernel, how)
    found = params["kernel"].array
    unused = np.array([3, 7])
    np.testing.assert_array_equal(found.qvalue[unused], nearest.qvalue[unused])
    used = np.delete(np.arange(16), [3, 7])
    expected, _ = reference(
        w[:, used],
        # The damping is a share of the mean over all channels.
        (2 * x.T @ x / 64)[np.ix_(used, used)],
        "int4",
        damping=0.01 * 14 / 16,
    )
    # The range of a row may come from a channel that is not used.
    rows = np.abs(w[:, used]).max(1) == np.abs(w).max(1)
    assert np.mean(np.asarray(found.qvalue[used].T, int)[rows] != expected[rows]) < 0.02


@pytest.mark.thinned(4)
@pytest.mark.parametrize(
    ("qtype", "dtype"),
    [
        ("int1", "float32"),
        ("int4", "bfloat16"),
        ("nf4", "float32"),
        ("float8_e4m3fn", "bfloat16"),
    ],
)
def test_every_type_gives_a_smaller_error(qtype, dtype):
    w, _ = case(rows=24)
    kernel = jnp.asarray(w.T, dtype)
    x = jnp.asarray(correlated(256, 32), dtype)
    model = nn.Dense(24, use_bias=False, dtype=dtype, param_dtype=dtype)
    method = ptq.Gptq([QuantizationRule(weight_qtype=qtype)])
    array = run(method, model, {"kernel": kernel}, x)["kernel"].array
    nearest = quantize_array(kernel, HowToQuantize(qtype=qtype, channelwise_axes=(1,)))
    assert jax.tree.map(lambda a: (a.shape, a.dtype), array) == jax.tree.map(
        lambda a: (a.shape, a.dtype), nearest
    )
    (record,) = method.report.weights
    x, w = np.asarray(x, np.float64), np.asarray(kernel, np.float64)

    def error(q):
        q = np.asarray(dequantize(q), np.float64)
        return np.sum((x @ (q - w)) ** 2) / np.sum((x @ w) ** 2)

    np.testing.assert_allclose(record.error, error(array), rtol=1e-2)
    np.testing.assert_allclose(record.rounding_error, error(nearest), rtol=1e-2)
    assert record.error < 0.9 * record.rounding_error


@pytest.mark.slow
def test_ranges_that_are_not_centered():
    """Scales and zero points of tiles, by the recursion with the ones that it found."""
    w, hessian = case(columns=16)
    how = HowToQuantize(
        qtype="int4",
        channelwise_axes=(0,),
        tiled_axes={1: 8},
        calibration_method="minmax",
    )
    array = quantized((w + 0.5).T, hessian, how, Options())
    low, high = (w + 0.5)[:, :8].min(1), (w + 0.5)[:, :8].max(1)
    scale = (np.maximum(high, 0) - np.minimum(low, 0)) / 15
    np.testing.assert_allclose(array.scale[0], scale, rtol=1e-5)
    zero_point = np.round(-8 - np.minimum(low, 0) / scale)
    np.testing.assert_array_equal(array.zero_point[0], zero_point)

    damped = hessian + 0.01 * np.diag(hessian).mean() * np.eye(16)
    inverse, rest = np.linalg.inv(damped.astype(np.float64)), (w + 0.5).astype(float)
    different = 0
    for j in range(16):
        scale = np.asarray(array.scale, np.float64)[j // 8]
        zero = np.asarray(array.zero_point, int)[j // 8]
        code = np.clip(np.round(rest[:, j] / scale) + zero, -8, 7)
        different += np.sum(code != np.asarray(array.qvalue[j], int))
        error = (rest[:, j] - (code - zero) * scale) / inverse[j, j]
        rest -= np.outer(error, inverse[j])
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    assert different <= 2


def test_errors():
    rules = [QuantizationRule(weight_qtype="int4")]
    with pytest.raises(ValueError, match="damping=-1 must not be negative"):
        ptq.Gptq(rules, damping=-1)
    with pytest.raises(ValueError, match="block_size=0 must be positive"):
        ptq.Gptq(rules, block_size=0)
    with pytest.raises(ValueError, match="leave out static_groups=False"):
        ptq.Gptq(rules, act_order=True, static_groups=False)
    x = jnp.ones((4, 8))
    params = {"kernel": jnp.ones((8, 3))}
    model = nn.Dense(3, use_bias=False)
    with pytest.raises(ValueError, match="dot_general0_lhs is not positive definite"):
        run(ptq.Gptq(rules, damping=0.0), model, params, x)
