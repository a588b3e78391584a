"""SmoothQuant against equation 4 in NumPy, and against `qwix.contrib`."""

import numpy as np
import pytest
from flax import linen as nn
from jax import numpy as jnp
from qwix.contrib import smooth_quant

from qwix_train import QuantizationRule, dequantize, ptq
from qwix_train.ptq.smoothquant import smoothing
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


@pytest.mark.thinned(2)
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


def test_channels_that_are_zero():
    inputs, weights = jnp.array([0.0, 2.0, 0.0, 4.0]), jnp.array([0.0, 0.0, 3.0, 1.0])
    assert smoothing(inputs, weights, 0.5).tolist() == [1, 1, 1, 2]


@pytest.mark.parametrize("alpha", [-0.1, 1.1])
def test_errors(alpha):
    with pytest.raises(ValueError, match="must be from 0 to 1"):
        ptq.SmoothQuant(RULES, alpha=alpha)
