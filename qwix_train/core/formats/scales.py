"""How the scales of a type are stored: as floats, powers of two, or coded themselves.

Microscaling types (OCP Microscaling Formats, v1.0) have a power of two for each block,
stored as E8M0: the exponent alone. Of the two ways to choose it,

- `Scales.POWER_UP` is the smallest one with which nothing saturates,
  ``max|x| <= largest * scale``; so do `qwix` and the recipe for MXFP8 of
  arXiv 2506.08027, appendix A. It is what the plain names stand for;
- `Scales.POWER_DOWN` is that of the specification, section 6.3: the exponent of
  ``max|x|`` less that of the largest value. What lies beyond the largest value
  saturates.

NVFP4 (arXiv 2509.25149, appendix C) has two levels. With the largest magnitude ``a`` of
the tensor and ``b`` of a block,

    tensor_scale = a / (6 * 448)
    code = e4m3(b / 6 / tensor_scale)
    scale = code * tensor_scale

so that codes use all of E4M3 however large the tensor is. The code of a block that is
small against its tensor is no less than the smallest one above 0, by which it can be
divided.
"""

import enum
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qwix_train.core import tiling
from qwix_train.core.formats.exponents import frexp


class Scales(enum.Enum):
    """How the scales of a type are stored."""

    PLAIN = "float"
    POWER_UP = "E8M0, rounded up"
    POWER_DOWN = "E8M0, as the specification rounds"
    TWO_LEVELS = "E4M3 and a float32 for the tensor"


E8M0 = jnp.dtype(jnp.float8_e8m0fnu)
E4M3 = jnp.dtype(jnp.float8_e4m3fn)
_LARGEST_E4M3 = 448.0
_SMALLEST_E4M3 = 2.0**-9
_EXPONENTS = (-126, 126)  # Those of scales whose reciprocal is a normal float32.


class CodedScale(NamedTuple):
    """A scale that is coded, in a layout for its array.

    Attributes:
        codes: Powers of two (E8M0), or E4M3.
        tensor: The scale of the codes, float32, in a layout, too; None if they have
            none.
    """

    codes: jax.Array
    tensor: jax.Array | None = None

    @property
    def value(self) -> jax.Array:
        """The scale as a float, float32, in the layout of the codes."""
        return scale_value(self.codes, self.tensor)

    def recoded(self, value: jax.Array) -> "CodedScale":
        """This with other values, each that of a code next to the same tensor scale."""
        if self.tensor is None:
            return CodedScale(value.astype(self.codes.dtype))
        of_tensor = tiling.elementwise(lambda x, y: x / y, value, self.tensor)
        return CodedScale(of_tensor.astype(self.codes.dtype), self.tensor)


def is_coded(scale: Any) -> bool:
    """Whether the scale of a quantized array has codes."""
    return scale.dtype in (E8M0, E4M3)


def scale_value(scale: jax.Array, tensor: jax.Array | None) -> jax.Array:
    """Returns a scale as a float: itself, if it is not coded.

    >>> scale_value(jnp.array([2.0], E8M0), None).tolist()
    [2.0]
    """
    if not is_coded(scale):
        return scale
    values = scale.astype(jnp.float32)
    if tensor is None:
        return values
    return tiling.elementwise(lambda x, y: x * y, values, tensor)


def coded(
    absmax: Any,
    tensor_absmax: Any,
    kind: Scales,
    largest: float,
    is_empty: Callable[[Any], Any],
) -> CodedScale:
    """Returns the scales of blocks.

    Args:
        absmax: The largest magnitude of each block, float32 or float64.
        tensor_absmax: That of each tensor, in a layout for ``absmax``.
        kind: How they are stored; not `Scales.PLAIN`.
        largest: The largest value of an element.
        is_empty: Whether a scale is that of a block of zeros.

    >>> ones = jnp.array([6., 7.])
    >>> coded(ones, None, Scales.POWER_UP, 6.0, lambda scale: scale == 0).value.tolist()
    [1.0, 2.0]
    """
    absmax = jnp.asarray(absmax)
    if kind is Scales.TWO_LEVELS:
        tensor = _tensor_scale(tensor_absmax, largest, is_empty)
        return CodedScale(_of_tensor(absmax, tensor, largest).astype(E4M3), tensor)
    # Both are found from exponents, in which nothing is rounded: absmax and the largest
    # value are m * 2**e with 1/2 <= m < 1.
    of_largest, highest = math.frexp(largest)
    part, exponent = frexp(absmax)
    exponent = exponent - highest
    if kind is Scales.POWER_UP:
        exponent = exponent + (part > of_largest).astype(exponent.dtype)
    exponent = jnp.where(is_empty(absmax * (1 / largest)), 0, exponent)
    exponent = jnp.clip(exponent, *_EXPONENTS)
    # A block with NaN or an infinity has the scale NaN, as E8M0 knows no infinity.
    code = jnp.where(jnp.isfinite(absmax), exponent + 127, 255).astype(jnp.uint8)
    return CodedScale(jax.lax.bitcast_convert_type(code, E8M0))


def covering(
    absmax: Any, tensor_absmax: Any, largest: float, is_empty: Callable[[Any], Any]
) -> jax.Array:
    """Returns ranges of blocks whose E4M3 scales, as `coded` rounds them, cover these.

    Args:
        absmax: The largest magnitude of each block.
        tensor_absmax: That of each tensor, in a layout for ``absmax``.
        largest: The largest value of an element.
        is_empty: Whether a scale is that of a tensor of zeros.

    >>> found = covering(
    ...     jnp.array([6.0, 1.05]), jnp.array([6.0]), 6.0, lambda scale: scale == 0)
    >>> [round(x, 4) for x in found.tolist()]
    [6.0, 1.0714]
    """
    tensor = _tensor_scale(tensor_absmax, largest, is_empty)
    ratio = _of_tensor(jnp.asarray(absmax), tensor, largest)
    nearest = ratio.astype(E4M3)
    bits = jax.lax.bitcast_convert_type(nearest, jnp.uint8) + jnp.uint8(1)
    above = jax.lax.bitcast_convert_type(bits, E4M3)
    code = jnp.where(nearest.astype(jnp.float32) < ratio, above, nearest)
    wide = jnp.maximum(code.astype(jnp.float32) * largest, 0)
    return tiling.elementwise(lambda x, t: x * t, wide, tensor).astype(absmax.dtype)


def _tensor_scale(
    tensor_absmax: Any, largest: float, is_empty: Callable[[Any], Any]
) -> jax.Array:
    tensor = jnp.asarray(tensor_absmax) / (largest * _LARGEST_E4M3)
    return jnp.where(is_empty(tensor), 1, tensor).astype(jnp.float32)


def _of_tensor(absmax: jax.Array, tensor: jax.Array, largest: float) -> jax.Array:
    """The scales of blocks as multiples of that of the tensor, where E4M3 has some."""
    ratio = tiling.elementwise(
        lambda b, t: b / largest / t, absmax.astype(jnp.float32), tensor
    )
    return jnp.clip(ratio, _SMALLEST_E4M3, _LARGEST_E4M3)
