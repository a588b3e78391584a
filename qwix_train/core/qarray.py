"""Quantized arrays, and the way there and back.

``quantize`` is ``calibrate`` (the range), ``compute_scale_zero_point`` (the scale of
the range) and ``quantize_with_scale_zero_point`` (the codes). The codes are

    round(x * (1 / scale) + zero_point)

with the reciprocal in float32. That is what XLA makes of a division by a scale that is
broadcast, eager or compiled; written out, it has the same bits in every execution, and
costs less. Where each element has its own scale nothing is broadcast, and it is a true
division. A value of a bfloat16 array is rounded to bfloat16 before the zero point is
added, and again before the rounding to codes.

NaN and infinities in an array whose range comes from the data make their whole tile
NaN or infinite when dequantized. With a range given beforehand an infinity saturates,
and NaN becomes 0 (-/+ scale in ``int1``, NaN in the float8 types). The largest float32
values (within half a step of the largest) may dequantize to an infinity, since the
center of the outermost bucket may lie half a step outside the range.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, TypeAlias

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx

from qwix_train.core import numerics, shape_ops, tiling
from qwix_train.core.calibration import (
    calibrate,
    check_quantizable,
    compute_scale_zero_point,
    covers_array,
)
from qwix_train.core.how import HowToQuantize, parse_calibration_method

__all__ = [
    "HowToQuantize",
    "MaybeQArray",
    "QArray",
    "WithAux",
    "calibrate",
    "compute_scale_zero_point",
    "covers_array",
    "dequantize",
    "parse_calibration_method",
    "quantize",
    "quantize_array",
    "quantize_with_scale_zero_point",
    "validate_qarray",
]


@flax.struct.dataclass
class QArray:
    """A quantized array: ``(qvalue - zero_point) * scale`` is about the original.

    Attributes:
        qvalue: The codes, in the shape of the original array.
        scale: The scales; per axis 1 entry, one for each index, or one for each tile
            (see `tiling`). Its dtype is that of the dequantized array.
        zero_point: The code that stands for 0, in a layout such as the scale's and
            in the dtype of ``qvalue``; None where that is code 0.
        qtype: The type of the codes, which may be narrower than their storage;
            taken from ``qvalue`` where it is not given.

    Raises:
        ValueError: ``qtype`` is not a quantized type.

    >>> q = quantize(jnp.array([[0., 1., -127.5], [0., 2., 3.]]), 'int8')
    >>> q.shape, q.dtype, q.qtype == jnp.int8, q.scale.shape
    ((2, 3), dtype('float32'), True, (1, 1))
    >>> q.T[1].qvalue.tolist()
    [1, 2]
    """

    qvalue: jax.Array
    scale: jax.Array
    zero_point: jax.Array | None = None
    qtype: Any = flax.struct.field(pytree_node=False, default=None)

    def __post_init__(self):
        qtype = self.qvalue.dtype if self.qtype is None else self.qtype
        object.__setattr__(self, "qtype", numerics.canonical_qtype(qtype))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the original array."""
        return self.qvalue.shape

    @property
    def ndim(self) -> int:
        """The rank of the original array."""
        return self.qvalue.ndim

    @property
    def size(self) -> int:
        """The number of elements."""
        return self.qvalue.size

    @property
    def dtype(self) -> Any:
        """The dtype of the dequantized array."""
        return self.scale.dtype

    @property
    def nbytes(self) -> int:
        """The bytes that codes (packed), scales and zero points take."""
        bits = numerics.qtype_bits(self.qtype)
        count = lambda x: 0 if x is None else x.size
        codes = -(-self.size * bits // 8) + -(-count(self.zero_point) * bits // 8)
        return codes + self.scale.nbytes

    @property
    def scale_tile_shape(self) -> tuple[int, ...]:
        """The number of elements along each axis that share a scale."""
        return tiling.tile_sizes(self.shape, self.scale.shape)

    @property
    def zero_point_tile_shape(self) -> tuple[int, ...] | None:
        """The number of elements along each axis that share a zero point."""
        if self.zero_point is None:
            return None
        return tiling.tile_sizes(self.shape, self.zero_point.shape)

    @property
    def T(self) -> "QArray":
        """The array with its axes in reverse order."""
        return self.transpose()

    @property
    def mT(self) -> "QArray":
        """The array with its last two axes swapped."""
        return self.swapaxes(-1, -2)

    def __len__(self) -> int:
        return len(self.qvalue)

    def __getitem__(self, index: Any) -> "QArray":
        return shape_ops.take(self, index)

    def transpose(self, *axes: Any) -> "QArray":
        """Permutes the axes, as `jax.Array.transpose`."""
        return jax.tree.map(lambda x: x.transpose(*axes), self)

    def swapaxes(self, axis1: int, axis2: int) -> "QArray":
        """Swaps two axes."""
        return jax.tree.map(lambda x: x.swapaxes(axis1, axis2), self)

    def reshape(self, *shape: Any) -> "QArray":
        """Reshapes, where each element keeps its scale.

        Raises:
            ValueError: The new shape would separate elements from their scale.
        """
        return shape_ops.reshape(self, *shape)

    def astype(self, dtype: Any) -> "QArray":
        """Changes the dtype that the array dequantizes to; the codes stay.

        Raises:
            ValueError: The dtype is not a float dtype of at least 16 bits.
        """
        if not numerics.is_quantizable(dtype):
            raise ValueError(f"A QArray dequantizes to floats, not to {dtype}.")
        return dataclasses.replace(self, scale=self.scale.astype(dtype))


nnx.register_data_type(QArray)

MaybeQArray: TypeAlias = jax.Array | QArray


@flax.struct.dataclass
class WithAux:
    """A quantized array in a tree of params, with how it was quantized.

    Attributes:
        array: The array.
        how: How it was quantized.
    """

    array: MaybeQArray
    how: HowToQuantize = flax.struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the original array."""
        return self.array.shape

    @property
    def ndim(self) -> int:
        """The rank of the original array."""
        return self.array.ndim

    @property
    def dtype(self) -> Any:
        """The dtype of the dequantized array."""
        return self.array.dtype


nnx.register_data_type(WithAux)


def validate_qarray(array: QArray) -> None:
    """Checks that the parts of a QArray fit together.

    Raises:
        ValueError: A shape or dtype does not fit; the message names it.
    """
    for name in ("scale", "zero_point"):
        part = getattr(array, name)
        if part is not None and not tiling.is_layout(array.shape, part.shape):
            raise ValueError(
                f"The {name} of shape {part.shape} does not fit codes of shape "
                f"{array.shape}: along each axis it has 1 entry, or one for each "
                "index or tile."
            )
    if array.qvalue.dtype.itemsize > 1:
        raise ValueError(f"Codes of dtype {array.qvalue.dtype} are wider than a byte.")
    if not numerics.is_quantizable(array.scale.dtype):
        raise ValueError(f"A scale cannot be of dtype {array.scale.dtype}.")
    if array.zero_point is not None and array.zero_point.dtype != array.qvalue.dtype:
        raise ValueError(
            f"The zero point is of dtype {array.zero_point.dtype}, and the codes are "
            f"of dtype {array.qvalue.dtype}."
        )


def scaled_values(
    array: jax.Array, scale: jax.Array, zero_point: jax.Array | None
) -> jax.Array:
    """Returns what is rounded to codes, in float32 (float64 for float64)."""
    dtype, wide = array.dtype, numerics.compute_dtype(array.dtype)
    own_scales = array.shape == scale.shape
    factor = scale.astype(wide) if own_scales else 1 / scale.astype(wide)

    def scaled(x: jax.Array, factor: jax.Array, zero: jax.Array | None) -> jax.Array:
        x = x.astype(wide)
        y = numerics.true_divide(x, factor) if own_scales else x * factor
        if dtype == jnp.bfloat16:
            y = numerics.round_to_dtype(y, dtype)
        if zero is None:
            return y
        # Clipping far outside any type's range keeps LLVM from fusing the product
        # with the sum, which would then round once instead of twice.
        y = jnp.clip(y, -1024, 1024) + zero.astype(wide)
        return numerics.round_to_dtype(y, dtype) if dtype == jnp.bfloat16 else y

    return tiling.elementwise(scaled, array, factor, zero_point)


def rescaled_values(
    levels: jax.Array, scale: jax.Array, zero_point: jax.Array | None
) -> jax.Array:
    """Returns ``(levels - zero_point) * scale`` in the dtype of the scale."""
    dtype, wide = scale.dtype, numerics.compute_dtype(scale.dtype)

    def rescaled(x: jax.Array, scale: jax.Array, zero: jax.Array | None) -> jax.Array:
        x = x.astype(wide)
        if zero is not None:
            x = x - zero.astype(wide)
        return numerics.round_to_dtype(x * scale.astype(wide), dtype).astype(dtype)

    return tiling.elementwise(rescaled, levels, scale, zero_point)


def quantize_with_scale_zero_point(
    array: jax.Array,
    qtype: numerics.QType,
    scale: jax.Array,
    zero_point: jax.Array | None,
    noise_fn: numerics.NoiseFn | None = None,
) -> QArray:
    """Quantizes an array with a scale and zero point that are given.

    Args:
        array: Any shape, a float dtype.
        qtype: The type.
        scale: In a layout for the array; cast to the dtype of the array.
        zero_point: None, or in the shape of the scale.
        noise_fn: Noise for stochastic rounding.

    Raises:
        ValueError: A dtype, shape or type does not fit.
    """
    check_quantizable(array)
    if zero_point is not None and zero_point.shape != scale.shape:
        raise ValueError(
            f"The zero point of shape {zero_point.shape} does not fit the scale of "
            f"shape {scale.shape}."
        )
    scale = jnp.asarray(scale, array.dtype)
    y = scaled_values(array, scale, zero_point)
    qvalue = numerics.round_to_qtype(y, qtype, noise_fn)
    return QArray(qvalue, scale, zero_point, qtype)


def quantize_array(array: jax.Array, how: HowToQuantize) -> QArray:
    """Quantizes an array with the range that ``how`` says.

    Raises:
        ValueError: ``how`` does not fit the array.

    >>> how = HowToQuantize(qtype='int4', calibration_method='minmax')
    >>> quantize_array(jnp.array([0., 1., 15.]), how).zero_point.tolist()
    [-8]
    """
    scale, zero_point = compute_scale_zero_point(calibrate(array, how), how.qtype)
    return quantize_with_scale_zero_point(
        array, how.qtype, scale, zero_point, how.noise_fn
    )


def quantize(
    array: jax.Array,
    qtype: numerics.QType,
    *,
    channelwise_axes: Collection[int] = (),
    tiled_axes: Mapping[int, int | float] | None = None,
    calibration_method: str = "absmax",
    scale_dtype: Any = None,
) -> QArray:
    """Quantizes an array.

    Args:
        array: Any shape, a float dtype.
        qtype: The type of the codes, such as ``'int4'`` or ``jnp.int8``.
        channelwise_axes: Axes along which every index has its own scale.
        tiled_axes: A mapping from an axis to its tile size, see `HowToQuantize`.
        calibration_method: How the range is found, see `HowToQuantize`.
        scale_dtype: The dtype of the scale, and so of the dequantized array; that of
            the array if None.

    Raises:
        ValueError: An argument is wrong, or does not fit the array.

    >>> q = quantize(jnp.array([0.5, -2., 1.]), 'int4')
    >>> q.qvalue.tolist(), [round(x, 3) for x in dequantize(q).tolist()]
    ([2, -8, 4], [0.533, -2.133, 1.067])
    """
    how = HowToQuantize(
        qtype=qtype,
        channelwise_axes=channelwise_axes,
        tiled_axes=tiled_axes or {},
        calibration_method=calibration_method,
    )
    qarray = quantize_array(array, how)
    return qarray if scale_dtype is None else qarray.astype(scale_dtype)


def dequantize(array: QArray) -> jax.Array:
    """Returns ``(qvalue - zero_point) * scale``, in the dtype of the scale.

    Raises:
        ValueError: The parts of the array do not fit together.
    """
    validate_qarray(array)
    levels = numerics.codes_to_float(array.qvalue, array.qtype, array.dtype)
    return rescaled_values(levels, array.scale, array.zero_point)
