"""SmoothQuant against equation 4 in NumPy, and against `qwix.contrib`."""

import jax
import numpy as np
import pytest
from flax import linen as nn
from jax import numpy as jnp
from qwix.contrib import smooth_quant

from qwix_train import QuantizationRule, dequantize, ptq
from qwix_train.core.how import HowToQuantize
from qwix_train.ops.vectors import Channels
from qwix_train.ptq.input_statistics import InputMoments
from qwix_train.ptq.smoothquant import smoothing
from tests import models
from tests.ptq.gptq_reference import WIDE, correlated, run

RULES = [
    QuantizationRule(
        weight_qtype="int8", act_qtype="int8", weight_calibration_method=WIDE
    )
]


def case():
    x = correlated(64, 16)
    x[:, 3] *= 50
    kernel = np.random.default_rng(1).normal(size=(16, 12)).astype(np.float32)
    return x, kernel, nn.Dense(12, use_bias=False)


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
def test_equation_4(alpha):
    x, kernel, model = case()
    method = ptq.SmoothQuant(RULES, alpha=alpha)
    params = run(method, model, {"kernel": kernel}, x[:10], x[10:])
    inverse = params["dot_general0_lhs_pre_quant_scale"]
    s = np.abs(x).max(0) ** alpha / np.abs(kernel).max(1) ** (1 - alpha)
    np.testing.assert_allclose(1 / inverse, [s], rtol=1e-5)
    np.testing.assert_allclose(
        dequantize(params["kernel"].array),
        kernel * s[:, None],
        atol=1.01 * np.asarray(params["kernel"].array.scale).max() / 2,
    )


@pytest.mark.thinned(2)
@pytest.mark.parametrize("alpha", [0.5, 0.75])
def test_parity_with_qwix(alpha):
    """The same codes: its factors are ours up to one number for all channels.

    It takes the scales of int8, 127.5 times smaller, in the place of the largest
    magnitudes.
    """
    x, kernel, model = case()
    theirs = smooth_quant.compute_scales_ratio(
        jnp.abs(x).max(0) / 127.5, jnp.abs(kernel).max(1) / 127.5, alpha
    )
    params = run(ptq.SmoothQuant(RULES, alpha=alpha), model, {"kernel": kernel}, x)
    ours = 1 / np.asarray(params["dot_general0_lhs_pre_quant_scale"])[0]
    ratio = ours / np.asarray(theirs)
    np.testing.assert_allclose(ratio, 127.5 ** (2 * alpha - 1), rtol=1e-5)
    scaled = kernel * np.asarray(theirs)[:, None]
    codes = np.round(scaled * 127.5 / (1.1 * np.abs(scaled).max(0)))
    found = np.asarray(params["kernel"].array.qvalue, int)
    assert np.abs(found - codes).max() <= 1
    assert np.mean(found != codes) < 0.01


def product_error(params, kernel, x, per_row=True):
    """The relative error of the quantized product, in NumPy."""
    scaled = x * np.asarray(params["dot_general0_lhs_pre_quant_scale"])
    axis = 1 if per_row else None
    step = np.abs(scaled).max(axis, keepdims=True) / 127.5
    codes = np.clip(np.round(scaled / step), -128, 127)
    out = codes * step @ np.asarray(dequantize(params["kernel"].array))
    exact = x @ kernel
    return np.square(out - exact).sum() / np.square(exact).sum()


@pytest.mark.slow
def test_the_strength_is_the_one_with_the_smallest_error():
    x, kernel, model = case()
    kernel[3] /= 50
    method = ptq.SmoothQuant(RULES)
    chosen = run(method, model, {"kernel": kernel}, x)
    found = product_error(chosen, kernel, x)
    errors = {}
    for alpha in (0.1, 0.3, 0.5, 0.7, 0.9):
        one = ptq.SmoothQuant(RULES, alpha=alpha)
        errors[alpha] = product_error(run(one, model, {"kernel": kernel}, x), kernel, x)
        (record,) = one.report.weights
        np.testing.assert_allclose(record.error, errors[alpha], rtol=0.15)
    assert found <= 1.1 * min(errors.values())
    (record,) = method.report.weights
    np.testing.assert_allclose(record.error, found, rtol=0.15)
    assert record.applied and record.error < record.rounding_error / 2
    assert record.note.startswith("alpha=0.")
    assert "SmoothQuant" in str(method.report) and record.note in str(method.report)


def test_a_weight_that_smoothing_does_not_help_is_left_as_it_is():
    # It can only spoil weights that lie on the grid, where nothing else is quantized.
    method = "fixed,-1.875,1.875"
    rules = [QuantizationRule(weight_qtype="int4", weight_calibration_method=method)]
    x, kernel, model = case()
    kernel = np.clip(np.round(4 * kernel), -8, 7) / 4
    method = ptq.SmoothQuant(rules)
    params = run(method, model, {"kernel": kernel}, x)
    assert (np.asarray(params["dot_general0_lhs_pre_quant_scale"]) == 1).all()
    (record,) = method.report.weights
    assert not record.applied and record.rounding_error == record.error
    assert "no smoothing makes its outputs better" in str(method.report)
    plain, rounded = ptq.quantize(model, {"kernel": kernel}, rules, x)
    models.assert_same(rounded["kernel"].array, params["kernel"].array)
    # A strength that is given is taken; the report says what it did.
    forced = ptq.SmoothQuant(rules, alpha=0.9)
    run(forced, model, {"kernel": kernel}, x)
    assert "it makes the outputs worse" in str(forced.report)


@pytest.mark.slow
def test_each_of_stacked_matrices_is_smoothed_or_not():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(32, 2, 16)).astype(np.float32)
    x[:, 1, 3] *= 50
    kernel = rng.normal(size=(2, 16, 8)).astype(np.float32)
    kernel[0] = np.clip(np.round(4 * kernel[0]), -8, 7) / 4
    kernel[1] /= 20

    class PerHead(nn.Module):
        @nn.compact
        def __call__(self, x):
            w = self.param("kernel", lambda _: jax.device_put(kernel))
            return jnp.einsum("bhi,hio->bho", x, w)

    fixed = "fixed,-1.875,1.875"
    rules = [QuantizationRule(weight_qtype="int4", weight_calibration_method=fixed)]
    method = ptq.SmoothQuant(rules)
    params = run(method, PerHead(), {"kernel": jax.device_put(kernel)}, x)
    (scale,) = (np.asarray(v)[0] for k, v in params.items() if "pre_quant" in k)
    assert (scale[0] == 1).all() and scale[1].max() < 1
    (record,) = method.report.weights
    assert "1 of 2 matrices are left as they are" in record.note


def test_vectors_are_drawn_from_all_batches():
    moments = InputMoments(Channels(contracting=(1,)), second_moment=False, rows=50)
    how = HowToQuantize(qtype="int8")
    state = moments.init((4, 1), how)
    update = jax.jit(lambda state, x: moments.update(state, x, how))
    x = np.arange(400, dtype=np.float32)[:, None]
    for part in np.split(x, 100):
        state = update(state, part)
    found = np.asarray(state["rows"])[0, :, 0]
    assert len(set(found)) == 50
    # Of a uniform distribution; the standard deviation of its mean is 16.
    assert abs(found.mean() - 199.5) < 50 and found.min() < 60 and found.max() > 340


def test_channels_that_are_zero():
    inputs, weights = jnp.array([0.0, 2.0, 0.0, 4.0]), jnp.array([0.0, 0.0, 3.0, 1.0])
    assert smoothing(inputs, weights, 0.5).tolist() == [1, 1, 1, 2]


@pytest.mark.thinned(2)
@pytest.mark.parametrize("alpha", [-0.1, 1.1])
def test_errors(alpha):
    with pytest.raises(ValueError, match="must be from 0 to 1"):
        ptq.SmoothQuant(RULES, alpha=alpha)
