"""How floats become codes, and codes floats; and the dtypes that this is computed in.

A *code* is the number that is stored for a value; dividing a value by its scale
(and adding the zero point) gives the *scaled value*, which this module rounds to
the nearest code of a type. What a type is stands in `formats`.

The symmetric bound is the largest scaled magnitude of a calibrated range. For
integers it is half a step beyond the top code, so that the top bucket is as wide
as the others. ``int1`` has two codes, a step of 2 apart, so the same rule gives
1 + 1 = 2: a range ``[-a, a]`` is reconstructed as ``-a / 2`` and ``+a / 2``, the
best pair for values spread evenly over the range. (For Gaussian values the best
pair is plus and minus the mean magnitude, XNOR-Net, arXiv 1603.05279, section 3.1;
``rms,1.5958`` gives it, because the mean magnitude is ``sqrt(2 / pi)`` times the
root mean square.) Zero takes the code +1. The narrow integers are those of LiteRT's
weights: their range ends at the top code, and the lowest code is not used.

The largest magnitude of a calibrated range lies on this bound, which is halfway
between two codes. A positive one saturates. A negative one becomes the lowest code,
also where float rounding put it a few last bits inside the range: the last bits of an
activation differ between two ways to compute it, and must not decide on a whole code.

Special values of a scaled value: an infinity saturates; NaN becomes NaN in the
types of 8 bits that are floats, and in the others the code nearest to 0 (+1 in
``int1``). Fake quantization (`round_to_level`) keeps NaN in every type.
"""

import difflib
import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from qwix_train.core import formats
from qwix_train.core.formats import Format, SmallFloat, levels

NoiseFn: TypeAlias = Callable[[tuple[int, ...]], jax.Array]
"""Takes a shape; gives noise, broadcastable to it, in units of one rounding step.

Uniform noise in ``[-0.5, 0.5)`` makes rounding unbiased for every type, for values
between its lowest and its highest code: each becomes one of its two neighbors, the
nearer one more often. `stochastic_rounding` makes such noise.
"""

QType: TypeAlias = Any
"""Anything `canonical_qtype` accepts: ``'int4'``, ``jnp.int8``, ``'nf4'``, ..."""


def canonical_qtype(qtype: QType) -> Any:
    """Returns the one form of a type that the library carries around.

    It is the NumPy dtype where one of that name exists, else the name. Either
    compares equal to the name, and a dtype to its JAX scalar type as well.

    Args:
        qtype: A name, a NumPy dtype, or a JAX scalar type.

    Raises:
        ValueError: It is no type of the table in `formats`. (Unsigned ones are not.)

    >>> canonical_qtype('int8') == jnp.int8, canonical_qtype(jnp.int4) == 'int4'
    (True, True)
    >>> canonical_qtype('nf4')
    'nf4'
    """
    try:
        return _canonical_qtype(qtype)
    except TypeError:  # Not hashable: nothing that could name a type.
        raise ValueError(_unknown(qtype)) from None


@functools.lru_cache(maxsize=256)
def _canonical_qtype(qtype: QType) -> Any:
    name = qtype if isinstance(qtype, str) else _dtype_name(qtype)
    entry = None if name is None else formats.find(name)
    if entry is None:
        raise ValueError(_unknown(qtype))
    try:
        return jnp.dtype(entry.name)
    except TypeError:
        return entry.name


def _dtype_name(qtype: QType) -> str | None:
    # `jnp.dtype(None)` is float64, and a class such as `int` has a dtype too:
    # neither is a mention of a quantized type.
    if qtype is None or qtype in (int, float, bool):
        return None
    try:
        return jnp.dtype(qtype).name
    except TypeError:
        return None


def _unknown(qtype: QType) -> str:
    names = [entry.name for entry in formats.entries()]
    meant = difflib.get_close_matches(str(qtype).lower(), names, n=1)
    near = f" Do you mean {meant[0]!r}?" if meant else ""
    return f"Unknown quantized type {qtype!r}.{near} Choose from {', '.join(names)}."


@functools.lru_cache(maxsize=256)
def qtype_name(qtype: QType) -> str:
    """Returns the name of a type, such as ``'int8'``."""
    canonical = canonical_qtype(qtype)
    return canonical if isinstance(canonical, str) else canonical.name


def format_of(qtype: QType) -> Format:
    """Returns all that is known of a type.

    >>> format_of('mxfp4').block, format_of(jnp.int8).bits
    (32, 8)
    """
    entry = formats.find(qtype_name(qtype))
    assert entry is not None
    return entry


def check_any_scale(qtype: QType) -> None:
    """Complains of a type whose scale is not any number, or whose codes no integers.

    Raises:
        ValueError: It is one.
    """
    if not is_integer_qtype(qtype):
        raise ValueError(
            f"{qtype_name(qtype)} has no integer codes with a scale of any value, "
            "which this needs: choose from int1 to int8 and ternary."
        )


def is_integer_qtype(qtype: QType) -> bool:
    """Whether the codes of a type are integers, with any scale and zero point."""
    entry = format_of(qtype)
    return entry.integers is not None and not entry.coded_scales


def qtype_bits(qtype: QType) -> int:
    """Returns how many bits one code of a type needs.

    >>> qtype_bits('int3'), qtype_bits('nf4'), qtype_bits('float8_e5m2')
    (3, 4, 8)
    """
    return format_of(qtype).bits


def storage_dtype(qtype: QType) -> np.dtype:
    """Returns the dtype of the array that holds the codes of a type.

    ``int1`` is stored as int4, because JAX's own 1-bit integer holds -1 and 0.

    >>> storage_dtype('int3'), storage_dtype('int6'), storage_dtype('nf4')
    (dtype(int4), dtype('int8'), dtype(uint4))
    """
    return format_of(qtype).storage


def is_int16(qtype: Any) -> bool:
    """Whether a type is int16, which only activations of LiteRT have."""
    return isinstance(qtype, str | type | np.dtype) and qtype in ("int16", np.int16)


def code_range(qtype: QType) -> tuple[int, int]:
    """Returns the lowest and highest code of a type whose codes are integers.

    Raises:
        ValueError: The type is not an integer type.
    """
    codes = format_of(qtype).integers
    if codes is None:
        raise ValueError(f"{qtype_name(qtype)} has no integer codes.")
    return codes.low, codes.high


def symmetric_bound(qtype: QType) -> float:
    """Returns the largest scaled magnitude of a range that is centered at zero.

    >>> symmetric_bound('int8'), symmetric_bound('int1'), symmetric_bound('nf4')
    (127.5, 2.0, 1.0)
    """
    return format_of(qtype).bound


def asymmetric_bound(qtype: QType) -> tuple[float, float]:
    """Returns the ends of the scaled range when a zero point is used.

    Raises:
        ValueError: The type has no zero points: it is not of integers, or its scales
            are coded.

    >>> asymmetric_bound('int4')
    (-8.0, 7.0)
    """
    if not is_integer_qtype(qtype):
        names = [entry.name for entry in formats.entries()]
        integers = ", ".join(filter(is_integer_qtype, names))
        raise ValueError(
            f"{qtype_name(qtype)} has no zero points; ranges such as 'minmax' need "
            f"one of {integers}."
        )
    low, high = code_range(qtype)
    return float(low), float(high)


def is_quantizable(dtype: Any) -> bool:
    """Whether arrays of a dtype can be quantized: the floats of 16 bits and more."""
    return jnp.dtype(dtype).name in ("bfloat16", "float16", "float32", "float64")


def compute_dtype(dtype: Any) -> np.dtype:
    """Returns the dtype that scales and scaled values are computed in.

    It is float32, or float64 for float64. Narrower floats are widened and then
    rounded by `round_to_dtype` where an eager computation would round, because a
    compiled one may keep the excess precision.
    """
    return promote_types(dtype, jnp.float32)


def promote_types(*dtypes: Any) -> np.dtype:
    """Returns the dtype that holds what all of some dtypes do.

    It is that of JAX's standard promotion, also where the user has chosen another
    (``jax.numpy_dtype_promotion("strict")``): what a model's own arrays become is not
    touched, arrays are cast to it explicitly.
    """
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*dtypes)


def round_to_dtype(x: jax.Array, dtype: Any) -> jax.Array:
    """Rounds to the precision of a dtype, keeping the (wider) dtype of ``x``.

    XLA may drop a conversion to bfloat16 and back; it never drops this.
    """
    dtype = jnp.dtype(dtype)
    if dtype == jnp.bfloat16:
        return jax.lax.reduce_precision(x, 8, 7)
    if dtype == jnp.float16:
        # `reduce_precision` flushes subnormals to zero; they are multiples of 2**-24.
        normal = jax.lax.reduce_precision(x, 5, 10)
        return jnp.where(jnp.abs(x) < 2**-14, jnp.round(x * 2**24) * 2**-24, normal)
    return x


def scale_in_dtype(scale: Any, dtype: Any) -> Any:
    """Returns scales, or ends of ranges, in the dtype of their array.

    Ordinary weights have scales below the smallest normal number of float16. There its
    values are the multiples of 2**-24, and a scale becomes the next larger one: none
    becomes zero, and no range narrower.

    Args:
        scale: Any shape, a float dtype; computed by NumPy if it is of NumPy.
        dtype: The dtype.

    >>> scale_in_dtype(jnp.array([1e-9, -1.5]), jnp.float16).tolist()
    [5.960464477539063e-08, -1.5]
    """
    constant = isinstance(scale, np.ndarray | np.generic)
    xp: Any = np if constant else jnp
    if scale.dtype == dtype:
        return scale
    if jnp.dtype(dtype) == jnp.float16:
        multiple = xp.sign(scale) * xp.ceil(xp.abs(scale) * 2**24) * 2**-24
        scale = xp.where(xp.abs(scale) < 2**-14, multiple, scale)
    return (scale if constant else round_to_dtype(scale, dtype)).astype(dtype)


def true_divide(x: jax.Array, divisor: jax.Array | float) -> jax.Array:
    """Returns ``x / divisor``, correctly rounded however it is compiled.

    XLA replaces a division by a constant, or by a broadcast array, by a multiplication
    with the reciprocal. It cannot where the divisor depends on ``x``.
    """
    return x / jnp.where(jnp.isfinite(x), divisor, jnp.ones((), x.dtype))


def round_to_qtype(
    x: jax.Array, qtype: QType, noise_fn: NoiseFn | None = None, *, dtype: Any = None
) -> jax.Array:
    """Rounds scaled values to the nearest codes; values beyond the ends saturate.

    Ties go to the even code (integers, float8), to the lower code (nf4), and to +1
    (int1); half a step above the lowest integer code this holds within float rounding.

    Args:
        x: Scaled values, any shape, a float dtype.
        qtype: The type.
        noise_fn: Noise for stochastic rounding.
        dtype: The dtype of the array that was scaled; that of ``x`` if None.

    Returns:
        The codes, in the shape of ``x`` and the dtype ``storage_dtype(qtype)``.

    >>> round_to_qtype(jnp.array([-0.5, 1.5, 9.0]), 'int4').tolist()
    [0, 2, 7]
    """
    entry = format_of(qtype)
    if entry.integers is not None:
        codes = _round_to_integer(x, entry, noise_fn, dtype or x.dtype)
        return codes.astype(entry.storage)
    if entry.table is not None:
        if noise_fn is None:
            return levels.encode(x, entry.table)
        return levels.encode_stochastically(x, entry.table, noise_fn(x.shape))
    values = _round_to_float(x, entry, noise_fn)
    assert isinstance(entry.elements, SmallFloat)
    bits = entry.elements.to_bits(values, entry.bits)
    if not entry.has_bits:
        # Faster than XLA's conversion, which would round again.
        nan = np.full((), np.nan, entry.storage).view(np.uint8)
        bits = jnp.where(jnp.isnan(values), nan, bits)
        return jax.lax.bitcast_convert_type(bits, entry.storage)
    # As in `levels`: the barrier keeps the arithmetic out of a loop of half bytes.
    return jax.lax.optimization_barrier(bits).astype(entry.storage)


def round_to_level(
    x: jax.Array, qtype: QType, dtype: Any, noise_fn: NoiseFn | None = None
) -> jax.Array:
    """Rounds scaled values to the scaled values that their codes stand for.

    It is ``codes_to_float(round_to_qtype(x, ...), qtype, dtype)`` bit for bit, but
    widened to the dtype of ``x``, and without codes, which for integers is faster. And
    NaN stays NaN, which most codes cannot say: a training loop is to see it.

    >>> round_to_level(jnp.array([jnp.nan, 1.2]), 'int4', jnp.float32).tolist()
    [nan, 1.0]
    """
    entry = format_of(qtype)
    if entry.integers is not None:
        level = _round_to_integer(x, entry, noise_fn, dtype).astype(x.dtype)
        level = jnp.where(level == 0, 0, level)  # Integers know no negative zero.
    elif entry.table is not None:
        codes = round_to_qtype(x, entry.name, noise_fn)
        level = levels.decode(codes, entry.table, dtype).astype(x.dtype)
    else:
        level = _round_to_float(x, entry, noise_fn).astype(x.dtype)
    return jnp.where(jnp.isnan(x), x, level)


def _round_to_integer(
    x: jax.Array, entry: Format, noise_fn: NoiseFn | None, dtype: Any
) -> jax.Array:
    assert entry.integers is not None
    low, high, step = entry.integers
    if noise_fn is not None:
        x = x.astype(compute_dtype(x.dtype)) + step * noise_fn(x.shape)
    if step == 2:  # The codes -1 and 1.
        return jnp.where(x < 0, jnp.asarray(low, x.dtype), high)
    code = jnp.clip(jnp.round(x), low, high)
    if noise_fn is not None or entry.bound == high:
        return code
    return jnp.where(x <= (low + 0.5) * (1 - tie_width(dtype)), low, code)


def tie_width(dtype: Any) -> float:
    """Returns how far, as a share, a scaled value may lie from the bound it stands for.

    The scale, its reciprocal, that of the bound, and the product are each rounded by
    half an epsilon of the `compute_dtype`. A float16 scale is rounded by half of its
    own. (A bfloat16 scale, too; but as much as that is a whole code of ``int8``, and
    `qwix` has the one or the other.)
    """
    width = 2.5 * float(jnp.finfo(compute_dtype(dtype)).eps)
    return width + (2**-11 if jnp.dtype(dtype) == jnp.float16 else 0)


def _round_to_float(x: jax.Array, entry: Format, noise_fn: NoiseFn | None) -> jax.Array:
    """Rounds to what the codes of a type of small floats stand for."""
    assert isinstance(entry.elements, SmallFloat)
    noise = None if noise_fn is None else noise_fn(x.shape)
    return entry.elements.rounded(x.astype(compute_dtype(x.dtype)), noise)


def round_zero_point(x: jax.Array, qtype: QType) -> jax.Array:
    """Rounds to an integer between the lowest and the highest code of a type.

    A zero point is an offset, not a code: in ``int1``, whose codes are -1 and +1, it
    may be 0. NaN becomes 0.

    >>> round_zero_point(jnp.array([-0.3, 7.6]), 'int1').tolist()
    [0, 1]
    """
    low, high = code_range(qtype)
    x = jnp.where(jnp.isnan(x), 0, jnp.round(x))
    return jnp.clip(x, low, high).astype(storage_dtype(qtype))


def codes_to_float(
    q: jax.Array, qtype: QType, dtype: Any, *, in_memory: bool = False
) -> jax.Array:
    """Returns the scaled values that codes stand for, in a float dtype.

    Args:
        q: Any shape, the codes.
        qtype: Their type.
        dtype: The dtype of the result.
        in_memory: Whether the codes are read, and not computed by the same program: a
            CPU then looks up the levels of a table, in half the time.

    >>> codes_to_float(jnp.array([0, 7, 15], jnp.uint4), 'nf4', jnp.float32).tolist()
    [-1.0, 0.0, 1.0]
    """
    entry = format_of(qtype)
    if entry.table is not None:
        of_codes = levels.looked_up if in_memory else levels.decode
        return of_codes(q, entry.table, dtype)
    if entry.has_bits:
        return bits_to_float(q, entry, dtype)
    return q.astype(dtype)


def bits_to_float(bits: jax.Array, entry: Format, dtype: Any) -> jax.Array:
    """Returns what the bits of a type of small floats stand for.

    Args:
        bits: Any shape, an unsigned dtype.
        entry: The type.
        dtype: The dtype of the result.
    """
    assert isinstance(entry.elements, SmallFloat)
    return entry.elements.from_bits(bits.astype(jnp.uint8), entry.bits, dtype)


def negated(codes: jax.Array, qtype: QType) -> jax.Array:
    """Returns the codes of the negative values, in a type that has these.

    >>> negated(jnp.array([1, 15], jnp.uint4), 'float4_e2m1fn').tolist()
    [9, 7]
    """
    entry = format_of(qtype)
    if not entry.has_bits:
        return -codes
    flipped = codes.astype(jnp.uint8) ^ jnp.uint8(2 ** (entry.bits - 1))
    return flipped.astype(codes.dtype)
