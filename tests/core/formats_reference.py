"""Block formats in NumPy, written from their specifications alone.

OCP Microscaling Formats v1.0, sections 5 and 6.3; NVFP4 as arXiv 2509.25149 and the
library's page say; BitNet b1.58, arXiv 2402.17764, section 2. Elements are rounded by
`ml_dtypes`.
"""

import ml_dtypes
import numpy as np

E2M1, E2M3, E3M2 = (
    ml_dtypes.float4_e2m1fn,
    ml_dtypes.float6_e2m3fn,
    ml_dtypes.float6_e3m2fn,
)
ELEMENTS = {
    "mxfp8": ml_dtypes.float8_e4m3fn,
    "mxfp8_e5m2": ml_dtypes.float8_e5m2,
    "mxfp6": E2M3,
    "mxfp6_e3m2": E3M2,
    "mxfp4": E2M1,
}
"""The elements of the types whose scales are powers of two, but for mxint8."""


def rounded(y, dtype):
    """Scaled values, rounded to a small float; those beyond its range saturate."""
    largest = float(ml_dtypes.finfo(dtype).max)
    y = np.clip(np.asarray(y, np.float32), -largest, largest)
    return y.astype(dtype).astype(np.float64)


def microscaling(block, name):
    """The values of a block, and its scale.

    Args:
        block: float64, one block.
        name: The type; with `_floor`, its scale is that of the specification.
    """
    kind = name.removesuffix("_floor")
    largest = 127.0 if kind == "mxint8" else float(ml_dtypes.finfo(ELEMENTS[kind]).max)
    absmax = np.abs(block).max()
    if absmax == 0:
        return np.zeros_like(block), 1.0
    if name.endswith("_floor"):
        # The exponent of the largest magnitude, less that of the largest element.
        exponent = np.floor(np.log2(absmax)) - np.floor(np.log2(largest))
    else:
        exponent = -200
        while largest * 2.0**exponent < absmax:
            exponent += 1
    scale = 2.0**exponent
    if kind == "mxint8":
        return np.clip(np.round(block / scale), -127, 127) * scale, scale
    return rounded(block / scale, ELEMENTS[kind]) * scale, scale


def nvfp4(blocks):
    """The values of a tensor of blocks, shape (blocks, 16)."""
    tensor = np.float32(np.abs(blocks).max() / (6 * 448))
    absmax = np.abs(blocks).max(-1, keepdims=True).astype(np.float32)
    ratio = np.clip(absmax / np.float32(6) / tensor, 2.0**-9, 448)
    code = ratio.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    scale = code * tensor
    return rounded(blocks.astype(np.float32) * (1 / scale), E2M1) * scale


def ternary(x):
    """The values of an array with one scale, the mean magnitude."""
    scale = np.abs(x).mean()
    return np.clip(np.round(x / scale), -1, 1) * scale
