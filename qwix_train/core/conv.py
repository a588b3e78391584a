"""Convolutions of quantized arrays.

Codes are convolved and the result is scaled, where scales follow the axes that the
result keeps: the batch axis of ``lhs`` and the output features of ``rhs``. A zero point
is taken care of as in `dot_general`, with convolutions in place of sums:

    conv(qa - za, qb - zb) = conv(qa, qb) - zb * conv(qa, 1) - za * conv(1, qb)
                             + za * zb * conv(1, 1)

The ones have the shape of the codes they stand for, so that padding, strides, dilation
and groups count the same elements; but only one entry along the batch axis (``lhs``)
and one output feature for each group (``rhs``), so that they cost little.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qwix_train.core import numerics
from qwix_train.core import operands as ops
from qwix_train.core.qarray import MaybeQArray, QArray, validate_qarray


def conv_general_dilated(
    lhs: MaybeQArray,
    rhs: MaybeQArray,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
) -> jax.Array:
    """`jax.lax.conv_general_dilated` for arrays and quantized arrays.

    Codes are convolved if both operands have codes (or are arrays of 8-bit types) and
    scales and zero points follow the batch axis and the output features only.
    Otherwise quantized operands are dequantized first: if one is a float array or has
    codes from a table, has scales along other axes, or tiles; with batch groups, if
    scales or zero points follow the batch axis; and if an int32 sum could overflow.

    Args:
        lhs: The input.
        rhs: The kernel.
        window_strides: As in `jax.lax.conv_general_dilated`, like all that follow.
        padding: The padding.
        lhs_dilation: The dilation of the input.
        rhs_dilation: The dilation of the kernel.
        dimension_numbers: The layouts.
        feature_group_count: The number of groups of features.
        batch_group_count: The number of groups of the batch.
        precision: The precision of float arithmetic.
        preferred_element_type: The dtype of the result; that of the dequantized
            operands, promoted, if None.
        out_sharding: The sharding of the result.

    Raises:
        ValueError: A QArray is malformed.

    >>> from jax import numpy as jnp
    >>> from qwix_train import conv_general_dilated
    >>> from qwix_train.core.qarray import quantize
    >>> x = quantize(jnp.ones((1, 3, 8, 8)), 'int8', calibration_method='minmax')
    >>> kernel = quantize(jnp.ones((4, 3, 3, 3)), 'int4', channelwise_axes=(0,))
    >>> conv_general_dilated(x, kernel, (1, 1), 'SAME').shape
    (1, 4, 8, 8)
    """
    for operand in (lhs, rhs):
        if isinstance(operand, QArray):
            validate_qarray(operand)
    numbers = jax.lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    quantized = isinstance(lhs, QArray) or isinstance(rhs, QArray)
    result = preferred_element_type
    if quantized:
        result = ops.result_dtype(lhs, rhs, preferred=preferred_element_type)

    def conv(left: jax.Array, right: jax.Array, dtype: Any, sharding: Any) -> jax.Array:
        return jax.lax.conv_general_dilated(
            left,
            right,
            window_strides,
            padding,
            lhs_dilation,
            rhs_dilation,
            numbers,
            feature_group_count,
            batch_group_count,
            precision,
            dtype,
            out_sharding=sharding,
        )

    if not quantized or not _stays_quantized(lhs, rhs, numbers, batch_group_count):
        left, right = ops.as_float(lhs), ops.as_float(rhs)
        if quantized:
            dtype = numerics.promote_types(left.dtype, right.dtype)
            left, right = left.astype(dtype), right.astype(dtype)
        return conv(left, right, result, out_sharding)

    accumulator = ops.accumulator_dtype(lhs, rhs, result)
    left, right = ops.common_codes(lhs, rhs)
    if left.dtype != right.dtype:
        left, right = left.astype(jnp.int16), right.astype(jnp.int16)
    lhs_zero = aligned(ops.zero_point_of(lhs), numbers, "lhs", accumulator)
    rhs_zero = aligned(ops.zero_point_of(rhs), numbers, "rhs", accumulator)
    sums = conv(left, right, accumulator, out_sharding)
    lhs_ones = _ones(left, numbers.lhs_spec[0], batch_group_count)
    groups = max(feature_group_count, batch_group_count)
    rhs_ones = _ones(right, numbers.rhs_spec[0], groups)
    if lhs_zero is not None:
        sums = sums - lhs_zero * conv(lhs_ones, right, accumulator, None)
    if rhs_zero is not None:
        counted = conv(left, rhs_ones, accumulator, None)
        sums = sums - rhs_zero * _each_feature(counted, sums, numbers)
    if lhs_zero is not None and rhs_zero is not None:
        counted = conv(lhs_ones, rhs_ones, accumulator, None)
        counted = _each_feature(counted, sums, numbers)
        sums = sums + lhs_zero * rhs_zero * counted
    wide = ops.scale_dtype(lhs, rhs, result=result)
    out = sums.astype(wide)
    for operand, side in ((lhs, "lhs"), (rhs, "rhs")):
        if isinstance(operand, QArray):
            out = out * aligned(operand.float_scale, numbers, side, wide)
    return out.astype(result)


def aligned(
    part: jax.Array | None,
    numbers: jax.lax.ConvDimensionNumbers,
    side: str,
    dtype: Any,
) -> Any:
    """Puts a scale or zero point on the axis of the result that it belongs to.

    Args:
        part: An array with one entry along all axes but the one that the result keeps;
            None stays None.
        numbers: The dimension numbers.
        side: The operand that it belongs to, ``lhs`` or ``rhs``.
        dtype: The dtype to cast it to.
    """
    if part is None:
        return None
    shape = [1] * part.ndim
    shape[numbers.out_spec[0 if side == "lhs" else 1]] = part.size
    return part.reshape(shape).astype(dtype)


def _stays_quantized(
    lhs: MaybeQArray,
    rhs: MaybeQArray,
    numbers: jax.lax.ConvDimensionNumbers,
    batch_group_count: int,
) -> bool:
    """Whether the codes are convolved, rather than dequantized values."""
    if not (ops.multiplies_codes(lhs) and ops.multiplies_codes(rhs)):
        return False
    most = ops.max_terms(lhs, rhs)
    for operand, kept in ((lhs, numbers.lhs_spec[0]), (rhs, numbers.rhs_spec[0])):
        if not isinstance(operand, QArray):
            continue
        if operand.zero_point is not None and most is None:
            return False
        grouped = operand is lhs and batch_group_count > 1
        counts = (1,) if grouped else (1, operand.shape[kept])
        for part in operand.layouts.values():
            if part.size != part.shape[kept] or part.size not in counts:
                return False
    # Each output adds one product for every element of an output feature's kernel.
    terms = ops.size_of(rhs.shape, numbers.rhs_spec[1:])
    return most is None or terms <= most


def _ones(codes: jax.Array, axis: int, count: int) -> jax.Array:
    """Returns ones in the shape of the codes, but ``count`` along an axis."""
    shape = list(codes.shape)
    shape[axis] = count
    return jnp.ones(shape, codes.dtype)


def _each_feature(
    counted: jax.Array, sums: jax.Array, numbers: jax.lax.ConvDimensionNumbers
) -> jax.Array:
    """Repeats the result of one feature for each group for all features of a group."""
    axis = numbers.out_spec[1]
    return jnp.repeat(counted, sums.shape[axis] // counted.shape[axis], axis)
