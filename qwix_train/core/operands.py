"""What the quantized ops know about their operands: types, ranges, accumulators."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from qwix_train.core import numerics
from qwix_train.core.qarray import MaybeQArray, QArray, dequantize

INT32_MAX = 2**31 - 1
MULTIPLIED = {jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.float8_e5m2)}
"""Floats that hardware multiplies, also with each other: activations or weights of the
one, and gradients of the other."""


def result_dtype(*operands: MaybeQArray, preferred: Any = None) -> np.dtype:
    """Returns the dtype of an op's result: that of the dequantized operands.

    Plain float8 operands count as bfloat16, and plain integers of up to 8 bits as
    int32, because JAX does not promote them.
    """
    if preferred is not None:
        return jnp.dtype(preferred)
    dtypes = []
    for operand in operands:
        dtype = jnp.dtype(operand.dtype)
        if dtype.itemsize == 1:
            is_integer = jnp.issubdtype(dtype, jnp.integer) or dtype == jnp.bool_
            dtype = jnp.dtype(jnp.int32 if is_integer else jnp.bfloat16)
        dtypes.append(dtype)
    return numerics.promote_types(*dtypes)


def as_float(operand: MaybeQArray) -> jax.Array:
    """Returns the values of an operand as an array."""
    return dequantize(operand) if isinstance(operand, QArray) else operand


def is_concrete(array: Any) -> bool:
    """Whether the values of an array are known: it is not a tracer, nor a shape.

    NumPy looks at them. Within a trace, JAX would give a tracer of what it finds.
    """
    return not isinstance(array, Tracer | jax.ShapeDtypeStruct)


def codes_of(operand: MaybeQArray) -> jax.Array:
    """Returns what is multiplied: the codes, or the array itself."""
    return operand.qvalue if isinstance(operand, QArray) else operand


def zero_point_of(operand: MaybeQArray) -> jax.Array | None:
    """Returns the zero point of an operand, if it has one."""
    return operand.zero_point if isinstance(operand, QArray) else None


def multiplies_codes(operand: MaybeQArray) -> bool:
    """Whether an operand can be multiplied before it is scaled.

    That is not so where codes are bits or places in a table, for float arrays of 16
    bits or more, which make the op a float op anyway, and for wide integers.
    """
    if isinstance(operand, QArray):
        return numerics.format_of(operand.qtype).has_values
    return jnp.dtype(operand.dtype).itemsize == 1


def is_integer(operand: MaybeQArray) -> bool:
    """Whether the codes of an operand are integers."""
    dtype = codes_of(operand).dtype
    return jnp.issubdtype(dtype, jnp.integer) or dtype == jnp.bool_


def magnitude(operand: MaybeQArray) -> int:
    """Returns the largest ``|code - zero_point|`` of an operand with integer codes."""
    if not isinstance(operand, QArray):
        if operand.dtype == jnp.bool_:
            return 1
        info = jnp.iinfo(operand.dtype)
        return max(-int(info.min), int(info.max))
    low, high = numerics.code_range(operand.qtype)
    return max(-low, high) if operand.zero_point is None else high - low


def max_terms(lhs: MaybeQArray, rhs: MaybeQArray) -> int | None:
    """Returns how many products of codes can surely be added, as integers in int32.

    None for any number, where codes are floats.
    """
    if not (is_integer(lhs) and is_integer(rhs)):
        return None
    return INT32_MAX // (magnitude(lhs) * magnitude(rhs))


def common_codes(lhs: MaybeQArray, rhs: MaybeQArray) -> tuple[jax.Array, jax.Array]:
    """Returns the codes in dtypes that every backend can multiply, without rounding.

    Integers become int8, which holds all of their types. Two types of `MULTIPLIED` stay
    as they are if they are the same. Anything else becomes bfloat16: it holds every
    float of 8 bits and fewer, and every integer of up to 8 bits.
    """
    left, right = codes_of(lhs), codes_of(rhs)
    if is_integer(lhs) and is_integer(rhs):
        return _as_byte(left), _as_byte(right)
    if left.dtype == right.dtype and left.dtype in MULTIPLIED:
        return left, right
    return left.astype(jnp.bfloat16), right.astype(jnp.bfloat16)


def _as_byte(codes: jax.Array) -> jax.Array:
    # An unsigned byte has no place in int8; it comes only from a plain array.
    return codes.astype(jnp.int16 if codes.dtype == jnp.uint8 else jnp.int8)


def accumulator_dtype(lhs: MaybeQArray, rhs: MaybeQArray, result: np.dtype) -> np.dtype:
    """Returns the dtype that products of codes are summed in."""
    if is_integer(lhs) and is_integer(rhs):
        return jnp.dtype(jnp.int32)
    return numerics.promote_types(result, jnp.float32)


def scale_dtype(*operands: MaybeQArray, result: np.dtype) -> np.dtype:
    """Returns the dtype that sums are scaled in: at least float32."""
    dtypes = [operand.dtype for operand in operands if isinstance(operand, QArray)]
    floats = [result] if jnp.issubdtype(result, jnp.floating) else []
    return numerics.promote_types(jnp.float32, *dtypes, *floats)


def size_of(shape: tuple[int, ...], axes: Any) -> int:
    """Returns the number of elements along some axes."""
    return math.prod(shape[axis] for axis in axes)


def with_sharding(array: jax.Array, sharding: Any) -> jax.Array:
    """The same array with a sharding, as a `jit` gives its inputs and results."""
    kinds = sharding.mesh.axis_types if hasattr(sharding, "mesh") else ()
    if jax.sharding.AxisType.Explicit in kinds:
        return jax.sharding.reshard(array, sharding)
    return jax.lax.with_sharding_constraint(array, sharding)


def is_explicitly_sharded(array: jax.Array) -> bool:
    """Whether a sharding is part of the type, so that reshapes must respect it."""
    return any(axis is not None for axis in jax.typeof(array).sharding.spec)
