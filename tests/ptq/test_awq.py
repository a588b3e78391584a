"""AWQ against its definition in NumPy, and against `qwix.contrib`."""

import jax
import numpy as np
import pytest
from flax import linen as nn
from jax import numpy as jnp
from qwix._src.core import qarray as qwix_qarray
from qwix.contrib import awq_core

from qwix_train import QuantizationRule, dequantize, ptq, quantize_model
from qwix_train.ptq.awq import candidate
from tests.ptq.gptq_reference import WIDE, correlated, run

BOUND = 7.5


def fake_quant(w, tile, share=1.0):
    """Int4 of a kernel (inputs, outputs), tiles along its inputs, ranges narrowed."""
    parts = w.reshape(-1, tile, w.shape[1])
    scale = 1.1 * np.abs(parts).max(1, keepdims=True) / BOUND * share
    return (np.clip(np.round(parts / scale), -8, 7) * scale).reshape(w.shape)


def reference(w, x, tile):
    """The kernel that AWQ gives, by trying everything on the inputs themselves.

    Args:
      w: the kernel, shape (inputs, outputs).
      x: the inputs.
      tile: the number of inputs that share a scale.
    """
    w, x = np.asarray(w, np.float64), np.asarray(x, np.float64)
    size = np.abs(x).mean(0)
    best = None
    for exponent in np.linspace(0, 1, 20):
        s = np.maximum(size / size.max(), 1e-4) ** exponent
        s = (s / np.sqrt(s.max() * s.min()))[:, None]
        error = np.sum((x @ (fake_quant(w * s, tile) / s - w)) ** 2)
        if best is None or error < best[0]:
            best = error, s
    s = best[1]
    result, errors = None, None
    for step in range(10):
        q = fake_quant(w * s, tile, 1 - step / 20) / s
        parts = (q - w).reshape(-1, tile, w.shape[1])
        inputs = x.reshape(len(x), -1, tile)
        error = np.sum(np.einsum("nti,tio->nto", inputs, parts) ** 2, 0)
        error = np.repeat(error, tile, 0)
        result = q if result is None else np.where(error < errors, q, result)
        errors = error if errors is None else np.minimum(error, errors)
    return s[:, 0], result


def inputs(seed=0, columns=32):
    x = correlated(96, columns, seed)
    x[:, [1, 5, 20]] *= 8
    return x


@pytest.mark.slow
@pytest.mark.parametrize("tile", [None, 8])
def test_the_definition(tile):
    x, model = inputs(), nn.Dense(16, use_bias=False)
    kernel = np.random.default_rng(1).normal(size=(32, 16)).astype(np.float32)
    rules = [
        QuantizationRule(
            weight_qtype="int4", tile_size=tile, weight_calibration_method=WIDE
        )
    ]
    method = ptq.Awq(rules)
    params = run(method, model, {"kernel": jax.device_put(kernel)}, x)
    scales, expected = reference(kernel, x, tile or 32)
    stored = params["dot_general0_lhs_pre_quant_scale"]
    np.testing.assert_allclose(stored, [1 / scales], rtol=1e-4)
    found = np.asarray(dequantize(params["kernel"].array)) * np.asarray(stored).T
    # A value close to the border of two codes may fall to either side.
    assert np.mean(~np.isclose(found, expected, rtol=1e-3, atol=1e-6)) < 0.02
    (record,) = method.report.weights
    error = np.sum((x @ (found - kernel)) ** 2) / np.sum((x @ kernel) ** 2)
    np.testing.assert_allclose(record.error, error, rtol=1e-3)
    assert record.error < 0.8 * record.rounding_error
    out = quantize_model(model, method.provider).apply({"params": params}, x)
    np.testing.assert_allclose(out, x @ found, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("tile", [None, 8])
def test_parity_with_qwix(tile):
    """The same codes and scales, where the inputs have no correlation.

    `qwix` measures the error of a channel by its mean magnitude squared, which is the
    error of outputs for inputs with just that second moment; it clips nothing. Its
    runtime divides the weight by the factors, ours multiplies the input.
    """
    size = np.exp(np.random.default_rng(0).normal(size=16) * 1.5).astype(np.float32)
    kernel = np.random.default_rng(1).normal(size=(16, 12)).astype(np.float32)
    how = qwix_qarray.HowToQuantize(
        qtype=jnp.int4,
        channelwise_axes=(0,),
        tiled_axes={1: tile} if tile else {},
        calibration_method=WIDE,
    )
    theirs, factors = awq_core.quantize_weight(
        jax.device_put(kernel.T), jax.device_put(size), how
    )
    # Every vector has all of these magnitudes; the signs have no correlation.
    signs = np.array([[1.0]])
    while len(signs) < 16:
        signs = np.block([[signs, signs], [signs, -signs]])
    x = (signs * size).astype(np.float32)
    np.testing.assert_allclose(x.T @ x / 16, np.diag(size**2), atol=1e-4)
    rules = [
        QuantizationRule(
            weight_qtype="int4", tile_size=tile, weight_calibration_method=WIDE
        )
    ]
    model = nn.Dense(12, use_bias=False)
    params = run(ptq.Awq(rules, clip=False), model, {"kernel": kernel}, x)
    scale = params["dot_general0_lhs_pre_quant_scale"]
    np.testing.assert_allclose(1 / scale, factors, rtol=1e-4)
    ours = params["kernel"].array
    np.testing.assert_allclose(ours.scale.T, theirs.scale, rtol=1e-4)
    different = np.asarray(ours.qvalue.T, int) != np.asarray(theirs.qvalue, int)
    assert different.mean() < 0.01


def test_channels_that_are_hardly_used():
    factors = np.asarray(candidate(jnp.array([[1.0, 0.0], [0.0, 0.0]]), 1.0))
    np.testing.assert_allclose(factors, [[100, 0.01], [1, 1]], rtol=1e-5)


@pytest.mark.slow
def test_where_ranges_cannot_be_narrowed():
    """One range for the whole weight: the report says so."""
    rules = [
        QuantizationRule(weight_qtype="int4", weight_calibration_method="fixed,-2,2")
    ]
    kernel = np.random.default_rng(1).normal(size=(32, 16)).astype(np.float32)
    method = ptq.Awq(rules)
    run(method, nn.Dense(16, use_bias=False), {"kernel": kernel}, inputs())
    (record,) = method.report.weights
    assert record.applied and record.note == "ranges are not narrowed"
    assert record.error <= record.rounding_error


def test_errors():
    with pytest.raises(ValueError, match="grid_size=1 must be at least 2"):
        ptq.Awq([QuantizationRule(weight_qtype="int4")], grid_size=1)
