"""Ranges of shards, joined over the devices that hold the other shards.

Within `jax.shard_map` a device sees its shard, and the range that it finds is that of
the shard. Joined over the axes of the mesh that cut what shares a scale, it is the
range of the whole array.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qwix_train.core import numerics
from qwix_train.core.how import parse_calibration_method


def joined(
    calibration: Mapping[str, Any], method: str, axis_names: Collection[str]
) -> dict[str, Any]:
    """Returns the range of an array from those of its shards, which are equally large.

    It is the widest of them; for `absmean` the mean of means, and for `rms` the root of
    the mean of squares. NaN and infinities of any shard are in it.

    Args:
        calibration: The range of a shard, as `calibrate` gives it.
        method: How it was found.
        axis_names: The axes of the mesh.

    Raises:
        ValueError: There is no such axis where this is traced.

    >>> def largest(x):
    ...     return joined({'absmax': x}, 'absmax', ['shards'])['absmax']
    >>> jax.vmap(largest, axis_name='shards')(jnp.array([1., 3.])).tolist()
    [3.0, 3.0]
    """
    check_bound(axis_names)
    name, _ = parse_calibration_method(method)
    if name == "fixed":
        return dict(calibration)
    dtypes = {key: value.dtype for key, value in calibration.items()}
    ends = {
        key: jnp.abs(value.astype(numerics.compute_dtype(value.dtype)))
        for key, value in lax.stop_gradient(dict(calibration)).items()
    }
    names = tuple(axis_names)
    if name in ("absmean", "rms"):
        power = 2 if name == "rms" else 1
        ends = {key: value**power for key, value in ends.items()}
        ends = lax.pmean(_varying(ends, names), names)
        ends = {key: value ** (1 / power) for key, value in ends.items()}
    else:
        # The bits of magnitudes are ordered as these are. NaN is above them all, which
        # the maximum of floats over devices drops on a CPU.
        bits = jax.tree.map(_bits, ends)
        bits = lax.pmax(_varying(bits, names), names)
        ends = {
            key: lax.bitcast_convert_type(bits[key], value.dtype)
            for key, value in ends.items()
        }
    return {
        key: numerics.scale_in_dtype(-value if key == "min" else value, dtypes[key])
        for key, value in ends.items()
    }


def check_bound(axis_names: Collection[str]) -> None:
    """Complains of axes over which nothing can be joined where this is traced.

    Raises:
        ValueError: There is no such axis.

    >>> check_bound(['data'])  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    ValueError: ranges are to be joined over the axis 'data', and none of that name ...
    """
    for name in axis_names:
        try:
            lax.axis_index(name)
        except NameError:
            around = jax.sharding.get_abstract_mesh().manual_axes
            known = (
                f"those of shard_map are {list(around)}" if around else "there are none"
            )
            raise ValueError(
                f"ranges are to be joined over the axis {name!r}, and none of that "
                f"name is around: {known}. Name an axis of the shard_map that the "
                "operation is in, or leave it out: outside of shard_map, a range is "
                "that of the whole array."
            ) from None


def _bits(magnitude: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(magnitude, f"int{magnitude.dtype.itemsize * 8}")


def _varying(values: dict[str, jax.Array], names: Sequence[str]) -> dict[str, Any]:
    """The same values, as such that differ along all axes; the types of JAX say so."""
    nothing = sum(0 * lax.axis_index(name) for name in names)
    return {key: x + jnp.asarray(nothing, x.dtype) for key, x in values.items()}
