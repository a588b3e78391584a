"""The range of an array, and the scale and zero point of a range.

Results are bit-exact across eager, compiled, vectorized and sharded execution. What
XLA may evaluate in more than one way is written so that there is one way:

- Division by the bound, which XLA turns into multiplication by the reciprocal wherever
  the bound is broadcast, *is* multiplication by the float32 reciprocal; and a true
  division where there is one scale only.
- bfloat16 is computed in float32 and rounded after each step by
  `numerics.round_to_dtype`, as eager execution does; compiled code would otherwise
  keep the excess precision. float16 is computed in float32 and rounded at the end,
  because squares of ordinary weights, and sums of large activations, lie outside of
  what it can hold.
- Two multiplications in a row, which XLA may merge, and a multiplication before an
  addition, which LLVM may fuse, are kept apart by a minimum or maximum.
- A fixed range is a constant; its scale is computed by NumPy, so that no compiler
  folds it.

Whether there is one scale is judged by the shape at hand, which inside a `shard_map`
is that of a shard. The one exception: the order in which a root mean square adds is
XLA's, and differs for a *sharded* array, so the last bit of its scale may.

Special ranges: an empty one, or one whose scale is below `smallest_scale`, has scale
1. A range with NaN has scale NaN, and one with an infinity has an infinite scale: the
tile then dequantizes to NaN and infinities throughout, which a training loop sees. A
range beyond 2**126 times the bound is cut to that, because the reciprocal of a larger
scale is not a normal number. Scales that are coded are found in `formats.scales`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwix_train.core import formats, initial_range, joined_range, numerics, tiling
from qwix_train.core.formats import CodedScale, Scales
from qwix_train.core.how import HowToQuantize, parse_calibration_method
from qwix_train.core.shortened import shortened


def calibrate(array: jax.Array, how: HowToQuantize) -> dict[str, Any]:
    """Finds the range of each group of elements that shares a scale.

    Args:
        array: Any shape, a float dtype.
        how: How the array is to be quantized.

    Returns:
        ``{'absmax': a}`` for a range from ``-a`` to ``a``, or ``{'min': l, 'max': h}``
        with ``l <= 0 <= h``; in the shape of the scale and the dtype of the array.
        For ``fixed``, NumPy arrays of one element. With it, of a type that has a scale
        for the tensor, ``tensor_absmax``: the largest of these in each tensor.

    Raises:
        ValueError: The array is not of a float dtype, or ``how`` does not fit it, or
            asks for a rotation, which the array must have had.

    >>> how = HowToQuantize(qtype='int8', channelwise_axes=(0,))
    >>> calibrate(jnp.array([[1., -2.], [0., 3.]]), how)['absmax'].tolist()
    [[2.0], [3.0]]
    """
    check_quantizable(array)
    if how.rotation is not None:
        raise ValueError(
            f"Arrays with rotation={how.rotation.name!r} are not supported here: they "
            "are in QAT, quantized training, PTQ to the nearest codes and LoRA, with "
            "ranges that are not trained. Take a rule without rotation."
        )
    found = _calibrate(array, how)
    if not how.axis_names:
        return found
    # Where blocks share a second scale, that alone is of more than one shard.
    of_shards = {"tensor_absmax"} & found.keys() or found.keys()
    shared = {key: found[key] for key in of_shards}
    method, names = how.calibration_method, how.axis_names
    return {**found, **joined_range.joined(shared, method, names)}


def _calibrate(array: jax.Array, how: HowToQuantize) -> dict[str, Any]:
    scale_shape = how.scale_shape(array.shape)
    name, numbers = parse_calibration_method(how.calibration_method)
    dtype = array.dtype
    if name == "fixed":
        low, high = (np.full((1,) * array.ndim, v, dtype) for v in numbers)
        return {"absmax": high} if -low == high else {"min": low, "max": high}

    if numerics.format_of(how.qtype).scales is Scales.TWO_LEVELS:
        own = dataclasses.replace(how, qtype="float4_e2m1fn", tensor_axes=())
        absmax = _calibrate(array, own)["absmax"]
        axes = tuple(a for a in range(array.ndim) if a not in how.tensor_axes)
        largest = jnp.max(absmax, axis=axes, initial=0, keepdims=True)
        return {"absmax": absmax, "tensor_absmax": largest}
    padded = tiling.pad_to_tiles(array, scale_shape)
    tiles, axes = tiling.split_tiled_axes(padded, scale_shape)
    if name in ("lsq", "lsq+"):
        counts = _counts(array.shape, scale_shape)
        initial = initial_range.lsq if name == "lsq" else initial_range.lsq_plus
        value = initial(tiles, axes, scale_shape, counts, how.qtype)
        return {"absmax": numerics.scale_in_dtype(value, dtype)}
    if name == "absmean":
        value = _mean_magnitude(tiles, axes, array.shape, scale_shape)
        return {"absmax": _times(value, *numbers)}
    if name == "rms":
        value = _root_mean_square(tiles, axes, array.shape, scale_shape)
        return {"absmax": _times(value.reshape(scale_shape), numbers[0])}
    # `initial=0` makes the range hold 0, and gives an empty axis a range.
    if name == "absmax":
        value = _largest_magnitude(tiles, axes, array.ndim).reshape(scale_shape)
        return {"absmax": _times(value, *numbers)}
    low = jnp.min(tiles, axis=axes, initial=0).reshape(scale_shape)
    high = jnp.max(tiles, axis=axes, initial=0).reshape(scale_shape)
    if not numbers:
        return {"min": low, "max": high}
    return {"min": -_times(-low, *numbers), "max": _times(high, *numbers)}


def _largest_magnitude(tiles: jax.Array, axes: Any, ndim: int) -> jax.Array:
    if tiles.ndim == ndim:
        return jnp.max(jnp.abs(tiles), axis=axes, initial=0)
    # Of several tiles of an axis: XLA on a CPU is five times as slow in the form above.
    high = jnp.max(tiles, axis=axes, initial=0)
    return jnp.maximum(high, -jnp.min(tiles, axis=axes, initial=0))


def passes_gradients(calibration_method: str) -> bool:
    """Whether the straight-through gradient is the identity for every element.

    So it is where no element lies outside the range, and in BitNet b1.58, whose
    training lets weights beyond the mean magnitude move (arXiv 2402.17764).

    >>> passes_gradients('minmax'), passes_gradients('absmax,0.9')
    (True, False)
    """
    name, numbers = parse_calibration_method(calibration_method)
    covered = name in ("absmax", "minmax") and (not numbers or numbers[0] >= 1)
    return covered or name == "absmean"


def shows_nan(calibration_method: str) -> bool:
    """Whether the range that a method finds in an array with NaN is NaN.

    >>> shows_nan('rms,3'), shows_nan('fixed,-1,1')
    (True, False)
    """
    return parse_calibration_method(calibration_method)[0] != "fixed"


def compute_scale_zero_point(
    calibration: Mapping[str, Any], qtype: numerics.QType
) -> tuple[Any, jax.Array | None]:
    """Computes the scale, and for a range with two ends the zero point.

    With the bounds of `numerics`: ``scale = absmax / symmetric_bound``, or
    ``scale = (max - min) / (q_max - q_min)`` and
    ``zero_point = round(q_min - min / scale)``.

    Args:
        calibration: ``{'absmax': ...}`` or ``{'min': ..., 'max': ...}``, as `calibrate`
            gives it.
        qtype: The type.

    Returns:
        The scale in the dtype of the range, or a `CodedScale` where the type has such;
        and the zero point in the dtype that stores the codes, or None.

    Raises:
        ValueError: The calibration has other keys, or the type has no zero points.

    >>> scale, zero_point = compute_scale_zero_point(
    ...     {'min': jnp.array([-1.]), 'max': jnp.array([14.])}, 'int4')
    >>> scale.tolist(), zero_point.tolist()
    ([1.0], [-7])
    """
    entry = numerics.format_of(qtype)
    keys = set(calibration)
    if entry.coded_scales and "absmax" in keys:
        return _coded_scale(calibration, entry), None
    if keys not in ({"absmax"}, {"min", "max"}):
        raise ValueError(f"A range has the keys absmax, or min and max; not {keys}.")
    # NumPy computes what is constant; see the top of this module.
    constant = all(isinstance(v, np.ndarray) for v in calibration.values())
    xp: Any = np if constant else jnp
    values = {key: xp.asarray(value) for key, value in calibration.items()}
    dtype = next(iter(values.values())).dtype
    wide = numerics.compute_dtype(dtype)

    if "absmax" in values:
        bound = numerics.symmetric_bound(qtype)
        extent = values["absmax"].astype(wide)
    else:
        low, high = numerics.asymmetric_bound(qtype)
        bound = high - low
        smallest = values["min"].astype(wide)
        extent = _rounded_step(values["max"].astype(wide) - smallest, dtype)
    if extent.size != 1:
        scale = extent * _reciprocal(bound, wide)
    elif constant:
        scale = extent / np.asarray(bound, wide)
    else:
        scale = numerics.true_divide(extent, bound)
    scale = numerics.scale_in_dtype(scale, dtype).astype(wide)
    scale = xp.where(scale < smallest_scale(dtype), xp.ones_like(scale), scale)
    largest = 2.0**1022 if dtype == jnp.float64 else 2.0**126
    too_large = (scale > largest) & (scale < np.inf)
    scale = xp.where(too_large, xp.full_like(scale, largest), scale)
    if "absmax" in values:
        return jnp.asarray(scale, dtype), None
    lowest = _rounded_step(smallest / scale, dtype)
    zero_point = jnp.asarray(_rounded_step(low - lowest, dtype))
    zero_point = numerics.round_zero_point(_even_on_ties(zero_point, dtype), qtype)
    return jnp.asarray(scale, dtype), zero_point


def _coded_scale(calibration: Mapping[str, Any], entry: formats.Format) -> CodedScale:
    absmax = calibration["absmax"]
    wide = numerics.compute_dtype(absmax.dtype)
    tensor = calibration.get("tensor_absmax", absmax)
    return formats.coded(
        absmax.astype(wide),
        tensor.astype(wide),
        entry.scales,
        entry.bound,
        _is_empty,
    )


def _is_empty(scale: Any) -> Any:
    # Scales that are coded do not depend on the dtype of the array.
    return scale < smallest_scale(jnp.float32)


def uncut(calibration: Mapping[str, Any], qtype: numerics.QType) -> dict[str, Any]:
    """Returns a range that stochastic rounding cuts nothing off of, from another one.

    The ends of an integer range that is centered at zero lie half a step beyond the
    codes. Rounded to nearest they get the outermost code; at random, half of them would
    get the code behind it, which does not exist. A range with two ends has them up to
    half a step beyond the codes, as its zero point is a whole number. Where the scale
    of a block is a code itself, it may be rounded to less than the block needs; here it
    is not.

    Args:
        calibration: As `calibrate` gives it.
        qtype: The type.

    >>> uncut({'absmax': jnp.array([127.])}, 'int8')['absmax'].tolist()
    [127.5]
    """
    found, entry = dict(calibration), numerics.format_of(qtype)
    if "absmax" in found and numerics.is_integer_qtype(qtype):
        factor = numerics.symmetric_bound(qtype) / numerics.code_range(qtype)[1]
        found["absmax"] = found["absmax"] * factor
    elif "min" in found:
        low, high = numerics.asymmetric_bound(qtype)
        half = (found["max"] - found["min"]) / (2 * (high - low - 1))
        found = {"min": found["min"] - half, "max": found["max"] + half}
    elif entry.scales is Scales.TWO_LEVELS:
        tensor = found.get("tensor_absmax", found["absmax"])
        found["absmax"] = formats.covering(
            found["absmax"], tensor, entry.bound, _is_empty
        )
    return found


def range_ends(calibration: Mapping[str, Any]) -> tuple[Any, Any]:
    """Returns the lowest and the highest value of a range, as `calibrate` gives it."""
    if "absmax" in calibration:
        return -calibration["absmax"], calibration["absmax"]
    return calibration["min"], calibration["max"]


def is_inside(array: jax.Array, ends: tuple[Any, Any]) -> jax.Array:
    """Returns whether each element is within the ends of its range."""
    low, high = (jnp.asarray(end, array.dtype) for end in ends)
    return tiling.elementwise(
        lambda x, low, high: (x >= low) & (x <= high), array, low, high
    )


def _even_on_ties(zero_point: jax.Array, dtype: Any) -> jax.Array:
    """Moves what is halfway between two codes, but for float rounding, onto the tie.

    A range that is centered at zero has a zero point of -1/2. The last bits of its ends
    must not decide between the codes -1 and 0.
    """
    half = jnp.round(2 * zero_point) / 2
    near = 128 * numerics.tie_width(dtype)
    return jnp.where(jnp.abs(zero_point - half) < near, half, zero_point)


def smallest_scale(dtype: Any) -> float:
    """Returns the scale below which a range counts as empty, and gets scale 1.

    It is the square root of the smallest normal number, as in `qwix`. For float16 that
    would be 0.008, which the scales of ordinary weights are below: there it is the
    smallest number above zero, so that only a range of zeros is empty.
    """
    info = jnp.finfo(dtype)
    if jnp.dtype(dtype) == jnp.float16:
        return float(info.smallest_subnormal)
    return float(info.tiny) ** 0.5


def check_quantizable(array: jax.Array) -> None:
    """Complains of what cannot be quantized.

    Raises:
        TypeError: It is not an array.
        ValueError: Its dtype is not a float dtype.
    """
    if not hasattr(array, "dtype"):
        raise TypeError(
            f"Expected an array, got {shortened(array)}. Make one of it: "
            "jnp.asarray(...)."
        )
    if not numerics.is_quantizable(array.dtype):
        raise ValueError(
            f"Cannot quantize an array of dtype {array.dtype}; it takes bfloat16, "
            "float16, float32 or float64."
        )


def _rounded_step(x: Any, dtype: Any) -> Any:
    """Rounds between two steps, as the top of this module says; it stays wide."""
    if dtype == jnp.float16:
        return x
    if isinstance(x, np.ndarray | np.generic):
        return np.asarray(x, dtype).astype(x.dtype)
    return numerics.round_to_dtype(x, dtype)


def _reciprocal(number: Any, wide: np.dtype) -> Any:
    """Returns ``1 / number`` as the compute dtype rounds it."""
    return np.ones((), wide) / np.asarray(number, wide)


def _times(value: jax.Array, factor: float | None = None) -> jax.Array:
    """Multiplies a magnitude by a factor, rounding as its dtype does."""
    if factor is None:
        return value
    dtype, wide = value.dtype, numerics.compute_dtype(value.dtype)
    product = value.astype(wide) * np.asarray(factor, dtype).astype(wide)
    # The maximum keeps XLA from merging the factor with that of the scale.
    return numerics.scale_in_dtype(jnp.maximum(product, 0), dtype)


def _mean_magnitude(
    tiles: jax.Array,
    axes: tuple[int, ...],
    shape: tuple[int, ...],
    scale_shape: tuple[int, ...],
) -> jax.Array:
    """Returns the mean magnitude of each tile; the padding does not count."""
    wide = numerics.compute_dtype(tiles.dtype)
    total = jnp.sum(jnp.abs(tiles.astype(wide)), axis=axes).reshape(scale_shape)
    mean = total * _reciprocal(_counts(shape, scale_shape), wide)
    return numerics.scale_in_dtype(mean, tiles.dtype)


def _root_mean_square(
    tiles: jax.Array,
    axes: tuple[int, ...],
    shape: tuple[int, ...],
    scale_shape: tuple[int, ...],
) -> jax.Array:
    """Returns the root mean square of each tile; the padding does not count."""
    dtype, wide = tiles.dtype, numerics.compute_dtype(tiles.dtype)

    squares = _rounded_step(jnp.square(tiles.astype(wide)), dtype)
    squares = jnp.maximum(squares, 0)  # Not to be fused with the addition.
    reciprocal = _reciprocal(_counts(shape, scale_shape), wide)
    mean = jnp.sum(squares, axis=axes).reshape(scale_shape) * reciprocal
    return numerics.scale_in_dtype(jnp.sqrt(_rounded_step(mean, dtype)), dtype)


def _counts(shape: tuple[int, ...], scale_shape: tuple[int, ...]) -> np.ndarray:
    """Returns the elements of each tile, without padding, in a layout."""
    counts = np.ones((1,) * len(shape), np.int64)
    for axis, tile in enumerate(tiling.tile_sizes(shape, scale_shape)):
        ends = np.minimum(np.arange(scale_shape[axis] + 1) * tile, shape[axis])
        sizes = np.maximum(np.diff(ends), 1)
        if np.all(sizes == tile):
            sizes = np.array([max(tile, 1)])
        others = [other for other in range(len(shape)) if other != axis]
        counts = counts * np.expand_dims(sizes, others)
    return counts
