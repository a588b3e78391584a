"""Integers without their lowest code, against NumPy in float64."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from qwix_train.core.fake_quant import fake_quant
from qwix_train.core.how import HowToQuantize
from qwix_train.core.qarray import dequantize, quantize

W = np.random.default_rng(0).normal(size=(64, 5)).astype(np.float32)


@pytest.mark.parametrize("bits, top", [(4, 7), (8, 127)])
def test_the_range_ends_at_the_highest_code(bits, top):
    q = quantize(jax.device_put(W), f"int{bits}_narrow", channelwise_axes=(1,))
    scale = np.abs(W.astype(np.float64)).max(0, keepdims=True) / top
    np.testing.assert_allclose(q.scale, scale, rtol=1e-6)
    np.testing.assert_array_equal(q.qvalue, np.round(W / scale))
    assert (np.abs(q.qvalue.astype(np.int32)).max(0) == top).all()
    # Codes of the same width as those of the full type.
    assert q.qvalue.dtype == f"int{bits}"


def test_training_sees_what_is_stored():
    w = jnp.asarray([-2.0, -1.0, 0.3, 0.9])
    how = HowToQuantize(qtype="int4_narrow", calibration_method="fixed,-1,1")
    expected = np.array([-7, -7, 2, 6]) / 7
    np.testing.assert_allclose(fake_quant(w, how), expected, rtol=1e-6)
    q = quantize(w, "int4_narrow", calibration_method="fixed,-1,1")
    np.testing.assert_allclose(dequantize(q), expected, rtol=1e-6)
