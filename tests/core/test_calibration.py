import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwix_train.core import numerics
from qwix_train.core.calibration import (
    calibrate,
    compute_scale_zero_point,
    smallest_scale,
    uncut,
)
from qwix_train.core.how import HowToQuantize
from tests.core.reference import QTYPE_NAMES, reference_range

LAYOUTS = [
    {},
    dict(channelwise_axes=(0,)),
    dict(channelwise_axes=(-1,), tiled_axes={0: 3}),
    dict(tiled_axes={0: 0.5, 1: 5}),
    dict(tiled_axes={0: 5}, pad_tiles=True),
    dict(tiled_axes={0: 7, 1: 4}, pad_tiles=True),
]


@pytest.mark.thinned(3)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(
    "method", ["absmax", "absmax,0.7", "minmax", "minmax,0.5", "rms,2", "fixed,-1,2"]
)
def test_ranges_against_a_reference(layout, method):
    # All positive: the range must still hold 0, and padding must not pull it down.
    x = np.random.default_rng(0).uniform(1, 3, (12, 10)).astype(np.float32)
    how = HowToQuantize(qtype="int8", calibration_method=method, **layout)
    got = calibrate(jax.device_put(x), how)
    want = reference_range(x, how)
    assert got.keys() == want.keys()
    for key in want:
        np.testing.assert_allclose(got[key], want[key], rtol=1e-6)


@pytest.mark.parametrize("qtype", QTYPE_NAMES)
def test_scale_of_a_range(qtype):
    absmax = jnp.array([[1.0, 3.0, 0.0]])
    scale, zero_point = compute_scale_zero_point({"absmax": absmax}, qtype)
    bound = numerics.symmetric_bound(qtype)
    np.testing.assert_allclose(scale, [[1 / bound, 3 / bound, 1]], rtol=1e-6)
    assert zero_point is None


@pytest.mark.parametrize("qtype", [f"int{bits}" for bits in range(1, 9)])
def test_zero_point_of_a_range(qtype):
    low = np.array([[-1.0, 0.0, -4.0, -1.0]], np.float32)
    high = np.array([[2.0, 3.0, 0.0, 1.0]], np.float32)
    calibration = {"min": jax.device_put(low), "max": jax.device_put(high)}
    scale, zero_point = compute_scale_zero_point(calibration, qtype)
    q_low, q_high = numerics.asymmetric_bound(qtype)
    want = (high - low) / (q_high - q_low)
    np.testing.assert_allclose(scale, want, rtol=1e-6)
    assert zero_point is not None
    assert zero_point.dtype == numerics.storage_dtype(qtype)
    if qtype != "int1":
        zeros = zero_point.astype(jnp.float32)
        assert np.abs(zeros - (q_low - low / want)).max() <= 0.5001
    # The ends of a range that touches zero are codes.
    assert zero_point[0, 1:3].astype(jnp.float32).tolist() == [q_low, q_high]


def test_special_ranges():
    absmax = jnp.array([0.0, 1e-30, np.inf, np.nan, 3e38])
    scale, _ = compute_scale_zero_point({"absmax": absmax}, "nf4")
    assert scale[:2].tolist() == [1, 1]
    assert np.isinf(scale[2]) and np.isnan(scale[3]) and scale[4] == 2.0**126


@pytest.mark.thinned(4)
@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3)])
@pytest.mark.parametrize("method", ["absmax", "minmax", "rms,2", "fixed,2"])
@pytest.mark.parametrize("axes", [(), (0,)])
def test_empty_arrays_have_scale_one(shape, method, axes):
    how = HowToQuantize(qtype="int8", channelwise_axes=axes, calibration_method=method)
    calibration = calibrate(jnp.zeros(shape), how)
    scale, _ = compute_scale_zero_point(calibration, "int8")
    assert np.isfinite(scale).all()
    if method != "fixed,2":
        assert (scale == 1).all()


def test_smallest_scale_is_that_of_the_reference():
    assert smallest_scale(jnp.float32) == smallest_scale(jnp.bfloat16) < 1e-18


def test_refusals():
    how = HowToQuantize(qtype="int8")
    with pytest.raises(ValueError, match="dtype int32"):
        calibrate(jnp.zeros(3, jnp.int32), how)
    with pytest.raises(ValueError, match="keys"):
        compute_scale_zero_point({"min": jnp.zeros(1)}, "int8")


@pytest.mark.optimized
def test_a_constant_range_has_the_same_scale_compiled():
    for method in ("fixed,-1.7,2.3", "fixed,0.3"):
        how = HowToQuantize(qtype="int8", calibration_method=method)
        x = jnp.ones((3, 4))

        def scale(x):
            return compute_scale_zero_point(calibrate(x, how), "int8")

        jax.tree.map(np.testing.assert_array_equal, scale(x), jax.jit(scale)(x))


@pytest.mark.parametrize("qtype", ["int8", "int4", "int2"])
@pytest.mark.parametrize("method", ["absmax", "minmax"])
def test_nothing_is_cut_off_of_a_range_for_stochastic_rounding(method, qtype):
    """All scaled values lie between two codes, wherever zero is among them."""
    shares = np.linspace(0, 1, 101)
    x = np.stack([-shares, 1 - shares], 1).astype(np.float32)
    how = HowToQuantize(qtype=qtype, channelwise_axes=(0,), calibration_method=method)
    found = uncut(calibrate(jax.device_put(x), how), qtype)
    scale, zero_point = compute_scale_zero_point(found, qtype)
    scaled = x / np.asarray(scale, np.float64)
    scaled += 0 if zero_point is None else np.asarray(zero_point, np.float64)
    bits = int(qtype.removeprefix("int"))
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    assert scaled.min() >= low - 1e-4 and scaled.max() <= high + 1e-4
    assert np.ptp(scaled, axis=1).min() >= (high - low) / 2 - 1  # and no wider
