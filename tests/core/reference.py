"""Quantization in float64 NumPy, written from the definitions."""

import numpy as np

from qwix_train.core import nf4, numerics
from qwix_train.core.how import HowToQuantize, parse_calibration_method


def tiles_of(shape, how: HowToQuantize):
    """Yields the scale index and the slices of each group that shares a scale."""
    scale_shape = how.scale_shape(shape)
    sizes = [-(-n // s) if s else 0 for n, s in zip(shape, scale_shape, strict=True)]
    for index in np.ndindex(*scale_shape):
        yield (
            index,
            tuple(
                slice(i * size, min((i + 1) * size, n))
                for i, size, n in zip(index, sizes, shape, strict=True)
            ),
        )


def reference_range(x: np.ndarray, how: HowToQuantize) -> dict[str, np.ndarray]:
    name, numbers = parse_calibration_method(how.calibration_method)
    if name == "fixed":
        one = np.ones((1,) * x.ndim)
        low, high = numbers
        return (
            {"absmax": one * high}
            if low == -high
            else dict(min=one * low, max=one * high)
        )
    lows, highs = (np.zeros(how.scale_shape(x.shape)) for _ in range(2))
    for index, where in tiles_of(x.shape, how):
        tile = x[where].astype(np.float64)
        factor = numbers[0] if numbers else 1
        if name == "minmax":
            lows[index] = min(tile.min(), 0) * factor
            highs[index] = max(tile.max(), 0) * factor
        elif name == "absmax":
            highs[index] = np.abs(tile).max() * factor
        else:
            highs[index] = np.sqrt(np.mean(tile**2)) * factor
    return {"min": lows, "max": highs} if name == "minmax" else {"absmax": highs}


def expand(part, shape):
    """Repeats each entry of a scale over the elements it belongs to."""
    part = np.asarray(part, np.float64)
    for axis, n in enumerate(shape):
        s = part.shape[axis]
        part = np.repeat(part, -(-n // s) if s else 0, axis)
        part = np.take(part, range(n), axis)
    return part


def levels_of(qtype: str) -> np.ndarray:
    """Returns every scaled value that a type represents, in order."""
    if qtype == "nf4":
        return nf4.LEVELS.astype(np.float64)
    if qtype == "int1":
        return np.array([-1.0, 1.0])
    if qtype.startswith("int"):
        low, high = numerics.code_range(qtype)
        return np.arange(low, high + 1.0)
    codes = np.arange(256, dtype=np.uint8).view(numerics.storage_dtype(qtype))
    values = codes.astype(np.float64)
    return np.unique(values[np.isfinite(values)])


def reference_dequantized(x, how: HowToQuantize, scale, zero_point) -> np.ndarray:
    """Returns the nearest value that the scales can represent, for each element."""
    scale = expand(scale, x.shape)
    zero = 0 if zero_point is None else expand(zero_point, x.shape)
    levels = levels_of(numerics.qtype_name(how.qtype))
    scaled = (np.asarray(x, np.float64) / scale + zero)[..., None]
    nearest = levels[np.argmin(np.abs(levels - scaled), axis=-1)]
    return (nearest - zero) * scale
