"""Ranges of shards, joined, against those of the whole array."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from qwix_train import HowToQuantize
from qwix_train.core.calibration import calibrate
from tests import models
from tests.core.reference import reference_range

AXES = ("rows", "columns")
SPLIT = P(*AXES)
CASES = [
    *((method, "int8") for method in ("absmax", "absmax,0.5", "minmax", "absmean")),
    *((method, "int8") for method in ("rms,3", "fixed,-2,1")),
    ("absmax", "nvfp4"),
]


@functools.cache
def mesh():
    return jax.make_mesh((2, 4), AXES, (AxisType.Auto,) * 2)


def of_shards(x, how, out_specs):
    """The range that each device finds."""
    return jax.jit(
        jax.shard_map(
            lambda x: calibrate(x, how),
            mesh=mesh(),
            in_specs=SPLIT,
            out_specs=out_specs,
        )
    )(x)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("method, qtype", CASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_joined_range_is_that_of_the_whole(method, qtype, dtype):
    x = np.array(models.normal(4, 64, dtype=dtype))
    how = HowToQuantize(qtype=qtype, calibration_method=method, axis_names=AXES)
    if qtype == "nvfp4":
        # Blocks lie in a shard each, and have a second scale for all.
        blocks = {"channelwise_axes": (0,), "tiled_axes": {1: 16}}
        how = HowToQuantize(qtype=qtype, axis_names=AXES, **blocks)
        found = of_shards(x, how, {"absmax": SPLIT, "tensor_absmax": P()})
        wanted = calibrate(jax.device_put(x), HowToQuantize(qtype=qtype, **blocks))
        jax.tree.map(np.testing.assert_array_equal, found, wanted)
        return
    found = of_shards(x, how, P())
    wide = x.astype(np.float64)
    wanted = {"absmax": abs(wide).mean(keepdims=True)}
    if method != "absmean":
        wanted = reference_range(wide, how)
    assert found.keys() == wanted.keys()
    for key, end in wanted.items():
        assert found[key].dtype == dtype
        rtol = 1e-2 if dtype == "bfloat16" else 1e-6
        np.testing.assert_allclose(np.asarray(found[key], np.float64), end, rtol=rtol)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("method", ["absmax", "minmax", "rms,3"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_in_one_shard_is_in_the_range_of_all(method, value):
    joined = HowToQuantize(qtype="int8", calibration_method=method, axis_names=AXES)
    how = dataclasses.replace(joined, axis_names=())
    for row, column in (0, 0), (3, 7):
        x = np.ones((4, 8), np.float32)
        x[row, column] = value
        found = of_shards(x, joined, P())
        whole = calibrate(jax.device_put(x), how)
        for key in whole:
            np.testing.assert_array_equal(found[key], whole[key])
