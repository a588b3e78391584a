"""Quantization in float64 NumPy, written from the definitions alone.

Nothing of the library is computed here: of a `HowToQuantize` only the fields that a
user sets are read.
"""

import itertools

import numpy as np

# QLoRA, arXiv 2305.14314, appendix E.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


QTYPE_NAMES = (
    *(f"int{bits}" for bits in range(1, 9)),
    "float8_e4m3fn",
    "float8_e5m2",
    "nf4",
)
"""Types whose scales are floats; the others have tests of their own."""


def scale_shape(shape, how) -> tuple[int, ...]:
    """One scale for a channel, for a tile, or for a whole axis."""
    counts = [1] * len(shape)
    for axis in how.channelwise_axes:
        counts[axis] = shape[axis]
    for axis, tile in dict(how.tiled_axes).items():
        elements = round(tile * shape[axis]) if isinstance(tile, float) else tile
        counts[axis] = int(np.ceil(shape[axis] / elements))
    return tuple(counts)


def tiles_of(shape, how):
    """Yields the scale index and the slices of each group that shares a scale."""
    groups = []
    for n, count in zip(shape, scale_shape(shape, how), strict=True):
        size = int(np.ceil(n / count))
        groups.append([np.arange(i, min(i + size, n)) for i in range(0, n, size)])
    for index in itertools.product(*(range(len(group)) for group in groups)):
        members = [group[i] for group, i in zip(groups, index, strict=True)]
        yield index, np.ix_(*members)


def reference_range(x: np.ndarray, how) -> dict[str, np.ndarray]:
    """The range of each group, under the names that the library gives its parts."""
    name, *numbers = how.calibration_method.split(",")
    numbers = [float(number) for number in numbers]
    if name == "fixed":
        one = np.ones((1,) * x.ndim)
        low, high = numbers if len(numbers) == 2 else (-numbers[0], numbers[0])
        if low == -high:
            return {"absmax": one * high}
        return {"min": one * low, "max": one * high}
    lows, highs = (np.zeros(scale_shape(x.shape, how)) for _ in range(2))
    factor = numbers[0] if numbers else 1
    for index, where in tiles_of(x.shape, how):
        tile = x[where].astype(np.float64)
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


def small_floats(exponent_bits: int, mantissa_bits: int, infinities: bool):
    """The finite values of a small float, from its bit fields.

    OCP 8-bit Floating Point Specification, revision 1.0, section 5: the top exponent
    of E5M2 is that of infinities and NaN; E4M3 has no infinity, and one NaN, of which
    all bits but the sign are set.
    """
    bias = 2 ** (exponent_bits - 1) - 1
    values = set()
    for exponent in range(2**exponent_bits):
        for mantissa in range(2**mantissa_bits):
            top = exponent == 2**exponent_bits - 1
            if top and (infinities or mantissa == 2**mantissa_bits - 1):
                continue
            fraction = mantissa / 2**mantissa_bits
            if exponent:
                value = (1 + fraction) * 2.0 ** (exponent - bias)
            else:
                value = fraction * 2.0 ** (1 - bias)
            values |= {value, -value}
    return np.array(sorted(values))


def levels_of(qtype) -> np.ndarray:
    """Every scaled value that a type represents, in order."""
    qtype = str(qtype)
    if qtype == "nf4":
        return np.array(NF4)
    if qtype == "float8_e4m3fn":
        return small_floats(4, 3, infinities=False)
    if qtype == "float8_e5m2":
        return small_floats(5, 2, infinities=True)
    if qtype == "int1":
        return np.array([-1.0, 1.0])
    bits = int(qtype.removeprefix("int"))
    return np.arange(-(2.0 ** (bits - 1)), 2.0 ** (bits - 1))


def bound_of(qtype) -> float:
    """The scaled magnitude at which a symmetric range ends."""
    qtype = str(qtype)
    if qtype == "int1":
        return 2.0
    top = levels_of(qtype)[-1]
    return top + 0.5 if qtype.startswith("int") else top


def reference_scale(x: np.ndarray, how) -> tuple[np.ndarray, np.ndarray | None]:
    """The scale and, for a range with two ends, the zero point of each group."""
    found = reference_range(x, how)
    if "absmax" in found:
        scale = found["absmax"] / bound_of(how.qtype)
        return np.where(scale > 0, scale, 1), None
    levels = levels_of(how.qtype)
    scale = (found["max"] - found["min"]) / (levels[-1] - levels[0])
    scale = np.where(scale > 0, scale, 1)
    return scale, np.round(levels[0] - found["min"] / scale)


def reference_dequantized(x, how) -> np.ndarray:
    """The nearest value that can be represented, for each element."""
    scale, zero_point = reference_scale(np.asarray(x, np.float64), how)
    scale = expand(scale, x.shape)
    zero = 0 if zero_point is None else expand(zero_point, x.shape)
    levels = levels_of(how.qtype)
    scaled = (np.asarray(x, np.float64) / scale + zero)[..., None]
    nearest = levels[np.argmin(np.abs(levels - scaled), axis=-1)]
    return (nearest - zero) * scale
