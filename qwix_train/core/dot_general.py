"""Dot products of quantized arrays.

With ``a = (qa - za) * sa`` and ``b = (qb - zb) * sb``, and scales that do not vary
along the contracted axes,

    sum(a * b) = sa * sb * (sum(qa * qb) - zb * sum(qa) - za * sum(qb) + n * za * zb)

so that the dot multiplies codes, and zero points cost two sums of codes. A contracted
axis with tiles becomes two, one of tiles and one within the tile; the results of tiles
are scaled and then added.

Integer codes are added in int32. Where the number of products allows a sum beyond
int32, judged by the shapes and types alone, the contraction is cut into parts that
cannot overflow, and their sums are added in float32. (Within a part, single terms
above may wrap around; the part's result does not, and modular arithmetic makes it
right.)
"""

import math
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from qwix_train.core import operands as ops
from qwix_train.core import product_forms, scaled_dots, structural, tiling
from qwix_train.core.integer_dot import integer_dot
from qwix_train.core.qarray import MaybeQArray, QArray, validate_qarray
from qwix_train.core.symbolic import is_symbolic, surely
from qwix_train.core.weight_only import weight_only_dot

MIN_TILE_SIZE = 128
"""Operands with smaller tiles of what is contracted are dequantized first.

The results of all tiles exist at once, before they are scaled and added; with small
tiles they take more memory, and time, than the dequantized operand.
"""

_Axes: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]
_Numbers: TypeAlias = tuple[_Axes, _Axes]


def dot_general(
    lhs: MaybeQArray,
    rhs: MaybeQArray,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
    *,
    out_sharding: Any = None,
) -> jax.Array:
    """`jax.lax.dot_general` for arrays and quantized arrays.

    Codes are multiplied if both operands have codes (or are arrays of 8-bit types).
    If one is a float array, has codes from a table, or has contracted axes with tiles
    that are padded, of fewer than `MIN_TILE_SIZE` elements, or of another size than the
    other's, it is the product of the dequantized operands, to rounding: a large one
    stays quantized, see `weight_only`.

    Args:
        lhs: The left operand.
        rhs: The right operand.
        dimension_numbers: ``((lhs_contracting, rhs_contracting), (lhs_batch,
            rhs_batch))``.
        precision: As in `jax.lax.dot_general`.
        preferred_element_type: The dtype of the result; that of the dequantized
            operands, promoted, if None.
        out_sharding: As in `jax.lax.dot_general`.

    Returns:
        The result, with batch axes first, then the other axes of ``lhs``, then those
        of ``rhs``.

    Raises:
        ValueError: A QArray is malformed, or the sizes of axes differ.

    >>> from jax import numpy as jnp
    >>> from qwix_train import dot_general
    >>> from qwix_train.core.qarray import quantize
    >>> a = quantize(jnp.array([[1., 2.]]), 'int8')
    >>> b = quantize(jnp.array([[3.], [4.]]), 'int4')
    >>> dot_general(a, b, (((1,), (0,)), ((), ()))).shape
    (1, 1)
    """
    kwargs = dict(precision=precision, out_sharding=out_sharding)
    for operand in (lhs, rhs):
        if isinstance(operand, QArray):
            validate_qarray(operand)
    if not isinstance(lhs, QArray) and not isinstance(rhs, QArray):
        return jax.lax.dot_general(
            lhs,
            rhs,
            dimension_numbers,
            preferred_element_type=preferred_element_type,
            **kwargs,
        )
    numbers = _normalized(dimension_numbers, lhs.ndim, rhs.ndim)
    _check_sizes(lhs.shape, rhs.shape, numbers)
    lhs, rhs = _with_kept_scales(lhs, numbers, 0), _with_kept_scales(rhs, numbers, 1)
    result = ops.result_dtype(lhs, rhs, preferred=preferred_element_type)
    if not numbers[1][0] and out_sharding is None:
        out = scaled_dots.product(lhs, rhs, numbers[0])
        if out is not None:
            product_forms.tell("scaled_dot")
            return out.astype(result)
    tiles = _contracted_tiles(lhs, rhs, numbers)
    if not _stays_quantized(lhs, rhs, numbers) or (tiles and out_sharding is not None):
        return _dequantized_product(lhs, rhs, numbers, result, kwargs)

    batch = len(numbers[1][0])
    product_forms.tell("codes")
    lhs, rhs = _cut(lhs, numbers[0][0], tiles), _cut(rhs, numbers[0][1], tiles)
    numbers = _split_numbers(numbers, tiles)
    sums = _sum_products(
        ops.codes_of(lhs),
        ops.codes_of(rhs),
        (ops.zero_point_of(lhs), ops.zero_point_of(rhs)),
        numbers,
        accumulator=ops.accumulator_dtype(lhs, rhs, result),
        max_terms=ops.max_terms(lhs, rhs),
        kwargs=kwargs,
    )
    wide = ops.scale_dtype(lhs, rhs, result=result)
    out = sums.astype(wide)
    for side, operand in enumerate((lhs, rhs)):
        if isinstance(operand, QArray):
            scale = operand.float_scale.astype(wide)
            out = out * aligned(scale, numbers, (lhs.ndim, rhs.ndim), side)
    if tiles:
        out = jnp.sum(out, axis=tuple(range(batch, batch + len(tiles))))
    return out.astype(result)


def dot(
    a: MaybeQArray,
    b: MaybeQArray,
    precision: Any = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
) -> jax.Array:
    """`jax.numpy.dot` for arrays and quantized arrays.

    It sums over the last axis of ``a`` and the second-to-last of ``b`` (its only one,
    if ``b`` has one axis); with a scalar, it multiplies.

    Raises:
        ValueError: As `dot_general`.

    >>> from jax import numpy as jnp
    >>> from qwix_train import dot
    >>> from qwix_train.core.qarray import quantize
    >>> dot(quantize(jnp.ones((2, 3)), 'int8'), quantize(jnp.ones(3), 'int8')).shape
    (2,)
    """
    contracting: _Axes = ((), ())
    if a.ndim and b.ndim:
        contracting = ((a.ndim - 1,), (max(b.ndim - 2, 0),))
    return dot_general(
        a,
        b,
        (contracting, ((), ())),
        precision=precision,
        preferred_element_type=preferred_element_type,
        out_sharding=out_sharding,
    )


def aligned(
    part: jax.Array, numbers: _Numbers, ndims: tuple[int, int], side: int
) -> jax.Array:
    """Arranges the axes of a scale, or of sums, as those of the result.

    Args:
        part: An array with one entry along each contracted axis.
        numbers: The dimension numbers, without negative axes.
        ndims: The ranks of the operands.
        side: The operand that it belongs to: 0 for the left one, 1 for the right one.

    >>> scale = jnp.ones((1, 5))
    >>> aligned(scale, (((2,), (0,)), ((), ())), (3, 2), 1).shape
    (1, 1, 5)
    """
    contracting, batch = numbers[0][side], numbers[1][side]
    free = [[], []]
    for s in range(2):
        used = {*numbers[0][s], *numbers[1][s]}
        free[s] = [axis for axis in range(ndims[s]) if axis not in used]
    part = part.transpose(*batch, *free[side], *contracting)
    kept = part.shape[: len(batch) + len(free[side])]
    before = (1,) * len(free[0]) if side else ()
    after = () if side else (1,) * len(free[1])
    return part.reshape((*kept[: len(batch)], *before, *kept[len(batch) :], *after))


def _normalized(dimension_numbers: Any, lhs_ndim: int, rhs_ndim: int) -> _Numbers:
    (lc, rc), (lb, rb) = dimension_numbers

    def axes(values: Any, ndim: int) -> tuple[int, ...]:
        return tuple(tiling.normalize_axis(int(v), ndim) for v in values)

    return (
        (axes(lc, lhs_ndim), axes(rc, rhs_ndim)),
        (axes(lb, lhs_ndim), axes(rb, rhs_ndim)),
    )


def _check_sizes(lhs: tuple[int, ...], rhs: tuple[int, ...], numbers: _Numbers) -> None:
    for kind, (left, right) in zip(("contract", "batch"), numbers, strict=True):
        sizes = [lhs[axis] for axis in left], [rhs[axis] for axis in right]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"Operands of shapes {lhs} and {rhs} cannot {kind} the axes {left} and "
                f"{right}, of sizes {tuple(sizes[0])} and {tuple(sizes[1])}."
            )


def _entries(operand: MaybeQArray, axis: int) -> int:
    """Returns how many scales or zero points an operand has along an axis."""
    if not isinstance(operand, QArray):
        return 1
    zero_point = operand.zero_point
    zeros = 1 if zero_point is None else zero_point.shape[axis]
    return max(operand.scale.shape[axis], zeros)


def _with_kept_scales(
    operand: MaybeQArray, numbers: _Numbers, side: int
) -> MaybeQArray:
    """The same, with a scale for each index of axes that are kept and have tiles."""
    if not isinstance(operand, QArray):
        return operand
    for axis in range(operand.ndim):
        tiled = _entries(operand, axis) not in (1, operand.shape[axis])
        if axis not in numbers[0][side] and tiled:
            operand = structural.spread(operand, axis)
    return operand


def _stays_quantized(lhs: MaybeQArray, rhs: MaybeQArray, numbers: _Numbers) -> bool:
    """Whether the codes are multiplied, rather than dequantized values."""
    if not (ops.multiplies_codes(lhs) and ops.multiplies_codes(rhs)):
        return False
    for left, right in zip(*numbers[0], strict=True):
        if len({_entries(lhs, left), _entries(rhs, right)} - {0, 1}) > 1:
            return False
    for operand, contracting in zip((lhs, rhs), numbers[0], strict=True):
        # The range of a zero point that is not of integers is unknown.
        if ops.zero_point_of(operand) is not None:
            if not (ops.is_integer(lhs) and ops.is_integer(rhs)):
                return False
        counts = {axis: _entries(operand, axis) for axis in contracting}
        if any(n > 1 and operand.shape[axis] % n for axis, n in counts.items()):
            return False
        tiles = math.prod(max(n, 1) for n in counts.values())
        terms = ops.size_of(operand.shape, contracting)
        if tiles > 1 and not surely(tiles * MIN_TILE_SIZE, terms):
            return False
        # Kept axes are scaled index by index.
        kept = [axis for axis in range(operand.ndim) if axis not in contracting]
        if any(_entries(operand, a) not in (1, operand.shape[a]) for a in kept):
            return False
    return True


def _dequantized_product(
    lhs: MaybeQArray,
    rhs: MaybeQArray,
    numbers: _Numbers,
    result: np.dtype,
    kwargs: dict[str, Any],
) -> jax.Array:
    """Returns the product of values, one operand of which may stay quantized."""
    (left_axes, right_axes), (batch, _) = numbers
    # The larger one stays; the smaller one is the activation.
    swap = isinstance(lhs, QArray) and not (
        isinstance(rhs, QArray) and (is_symbolic(lhs) or surely(lhs.size, rhs.size))
    )
    weight, x = (lhs, ops.as_float(rhs)) if swap else (rhs, ops.as_float(lhs))
    is_float = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize > 1
    if batch or kwargs["out_sharding"] is not None or not is_float:
        product_forms.tell("dequantized")
        return jax.lax.dot_general(
            ops.as_float(lhs),
            ops.as_float(rhs),
            numbers,
            preferred_element_type=result,
            **kwargs,
        )
    assert isinstance(weight, QArray)
    contracting = (right_axes, left_axes) if swap else (left_axes, right_axes)
    out = weight_only_dot(
        x, weight, contracting, precision=kwargs["precision"], result=result
    )
    if not swap:
        return out
    kept = x.ndim - len(right_axes)
    return out.transpose(*range(kept, out.ndim), *range(kept))


def _contracted_tiles(
    lhs: MaybeQArray, rhs: MaybeQArray, numbers: _Numbers
) -> dict[int, int]:
    """Returns the tile count of each contraction (by position) that has tiles."""
    pairs = enumerate(zip(*numbers[0], strict=True))
    counts = {i: max(_entries(lhs, a), _entries(rhs, b)) for i, (a, b) in pairs}
    return {position: count for position, count in counts.items() if count > 1}


def _cut(
    operand: MaybeQArray, contracting: tuple[int, ...], tiles: dict[int, int]
) -> MaybeQArray:
    """Splits the contracted axes that have tiles."""
    counts = {contracting[position]: count for position, count in tiles.items()}
    split = [counts.get(axis) for axis in range(operand.ndim)]
    return jax.tree.map(lambda part: tiling.cut(part, split), operand)


def _split_numbers(numbers: _Numbers, tiles: dict[int, int]) -> _Numbers:
    """Returns the dimension numbers once tiled axes are split; tiles are batch axes."""
    contracting, batch = [], []
    for side in range(2):
        tiled = [numbers[0][side][position] for position in tiles]

        def moved(axis: int, tiled: list[int] = tiled) -> int:
            return axis + sum(t < axis for t in tiled)

        contracting.append(tuple(moved(a) + (a in tiled) for a in numbers[0][side]))
        batch.append(tuple(map(moved, (*numbers[1][side], *tiled))))
    return (contracting[0], contracting[1]), (batch[0], batch[1])


def _sum_products(
    left: jax.Array,
    right: jax.Array,
    zeros: tuple[jax.Array | None, jax.Array | None],
    numbers: _Numbers,
    *,
    accumulator: Any,
    max_terms: int | None,
    kwargs: dict[str, Any],
) -> jax.Array:
    """Returns the dot product of codes less their zero points."""
    lhs_contracting, rhs_contracting = numbers[0]
    terms = ops.size_of(left.shape, lhs_contracting)
    sizes = [left.shape[axis] for axis in lhs_contracting]
    too_long = max_terms is not None and not surely(terms, max_terms)
    if too_long and any(map(export.is_symbolic_dim, sizes)):
        # In how many parts to cut is not known; so all is added in float32.
        left, right = left.astype(jnp.float32), right.astype(jnp.float32)
        accumulator = jnp.float32
    elif too_long:
        # Halve the longest contracted axis.
        longest = sizes.index(max(sizes))
        axes = (lhs_contracting[longest], rhs_contracting[longest])
        middle, end = sizes[longest] // 2, sizes[longest]
        parts = []
        for start, stop in ((0, middle), (middle, end)):
            part = _sum_products(
                jax.lax.slice_in_dim(left, start, stop, axis=axes[0]),
                jax.lax.slice_in_dim(right, start, stop, axis=axes[1]),
                zeros,
                numbers,
                accumulator=accumulator,
                max_terms=max_terms,
                kwargs=kwargs,
            )
            parts.append(part.astype(jnp.float32))
        return parts[0] + parts[1]

    if accumulator == jnp.int32 and kwargs["out_sharding"] is None:
        out = integer_dot(left, right, numbers, kwargs["precision"])
    else:
        pair = (left, right)
        if not {x.dtype for x in pair} <= ops.MULTIPLIED:
            pair = ops.common_codes(left, right)
        out = jax.lax.dot_general(
            *pair,
            numbers,
            preferred_element_type=accumulator,
            **kwargs,
        )
    ndims = (left.ndim, right.ndim)
    both: Any = 1
    for side, (zero, other) in enumerate(zip(zeros, (right, left), strict=True)):
        if zero is not None:
            axes = numbers[0][1 - side]
            sums = jnp.sum(other, axes, dtype=accumulator, keepdims=True)
            zero = aligned(zero.astype(accumulator), numbers, ndims, side)
            out = out - zero * aligned(sums, numbers, ndims, 1 - side)
            both = both * zero
    return out if any(zero is None for zero in zeros) else out + terms * both
