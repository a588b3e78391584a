import jax.numpy as jnp
import numpy as np
import pytest

from qwix_train.core.calibration import calibrate, compute_scale_zero_point
from qwix_train.core.how import HowToQuantize, is_learned


def reference_scale(method, x, bits):
    """What the papers say that one scale begins with."""
    if method == "lsq":
        return 2 * np.abs(x).mean() / np.sqrt(2 ** (bits - 1) - 1)
    mean, deviation = x.mean(), x.std()
    ends = abs(mean - 3 * deviation), abs(mean + 3 * deviation)
    return max(ends) / 2 ** (bits - 1)


@pytest.mark.parametrize("method", ["lsq", "lsq+"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_scales_begin_as_the_papers_say(method, bits):
    x = np.random.default_rng(0).normal(0.1, 1, (10, 3))
    how = HowToQuantize(
        qtype=f"int{bits}",
        channelwise_axes=(1,),
        tiled_axes={0: 4},
        pad_tiles=True,
        calibration_method=method,
    )
    calibration = calibrate(jnp.float32(x), how)
    scale, zero_point = compute_scale_zero_point(calibration, how.qtype)
    tiles = [x[:4], x[4:8], x[8:]]
    want = [[reference_scale(method, t[:, c], bits) for c in range(3)] for t in tiles]
    np.testing.assert_allclose(scale, want, 1e-5)
    assert zero_point is None and is_learned(method)


def test_they_take_integers_and_no_arguments():
    with pytest.raises(ValueError, match="no integer codes"):
        HowToQuantize(qtype="nf4", calibration_method="lsq")
    with pytest.raises(ValueError, match="1 arguments. Write lsq"):
        HowToQuantize(qtype="int8", calibration_method="lsq,2")
