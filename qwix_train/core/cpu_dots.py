"""Products with codes, in forms that XLA compiles well for a CPU.

A dot on a CPU reads its operands from memory, so XLA writes a converted weight there
first: four bytes for each one of int8. That takes ten times as long as the product of
one row. The forms here keep what is converted in the caches, or in registers:

- *rows*: no dot. Eight rows of the weight at a time are converted, multiplied, and
  added in one fusion; a dot with ones adds what is left. For one or two rows of
  activations.
- *blocks*: a loop over blocks of the contraction, each converted and multiplied; or,
  where the contraction is the last axis, over blocks of the other.
- *whole*: one block, for a small weight.

What calls these has to keep XLA from converting the weights before it has the
activations; see `arrival`.

Two codes of four bits share a byte, and are neighbors along the last axis of the
weight. Each of them is read on its own, by a slice: LLVM then knows which half of the
byte it is, and vectorizes the loads. Where that axis is kept, the even and the odd
columns of the result are computed apart and then interleaved.

The contraction is cut into chunks, and a block takes a piece of each. So the scale of
a tile is that of a chunk, and a weight that is sharded along the contraction is not
gathered: each device cuts its own chunks.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from qwix_train.core import numerics, product_forms
from qwix_train.core.formats import SmallFloat
from qwix_train.core.symbolic import surely

# Measured by `python -m benchmarks.ptq --sections forms` on two cores of an AMD EPYC
# (Zen 5, 32 MiB of L3), busy with other work; medians in ms, to compare along a line:
#
#   weight       size    M  float32    rows  blocks   whole integer
#   int8         1024    1     0.22    0.15    0.30    0.34       -
#   int8         1024   16     0.44       -    0.43    0.50       -
#   int8         1024  256     2.57       -    2.42    1.82       -
#   int4         1024    1     0.22    0.31    0.34    0.38       -
#   int4         1024   16     0.54       -    0.63    0.49       -
#   int4         1024  256     2.46       -    2.77    2.56       -
#   nf4          1024    1     0.25    0.36    0.43    0.44       -
#   nf4          1024   16     0.46       -    0.75    0.56       -
#   nf4          1024  256     2.56       -    2.83    1.82       -
#   dynamic int8 1024    1     0.21    0.14    0.29       -    0.36
#   dynamic int8 1024   16     0.46       -    0.55       -    0.25
#   dynamic int8 1024  256     2.50       -    2.28       -    1.62
#   int8         4096    1     2.31    1.07    2.65   18.50       -
#   int8         4096   16     3.86       -    4.58   19.47       -
#   int8         4096  256    25.51       -   24.71   37.67       -
#   int4         4096    1     2.49    1.36    2.42   29.43       -
#   int4         4096   16     6.30       -    5.20   26.00       -
#   int4         4096  256    39.57       -   43.26   69.49       -
#   nf4          4096    1     4.05    4.01    7.80   40.97       -
#   nf4          4096   16    11.80       -   11.50   57.79       -
#   nf4          4096  256    60.45       -   86.75  110.64       -
#   dynamic int8 4096    1     2.84    1.31    5.44       -   31.29
#   dynamic int8 4096   16     6.24       -    5.91       -    8.75
#   dynamic int8 4096  256    59.49       -   71.17       -   50.15
#
# Alone, *whole* is faster up to 2**20 weights. A transformer of such layers, with 16
# tokens, took 42 ms with it and 16 ms with *blocks*, and 69 MiB of temporary memory
# instead of 4.
_WHOLE_MOST = 2**18
_INTEGER_BLOCKS_MOST = 16
_INTEGER_WHOLE_MOST = 2**22
_BLOCK_SIZE = 2**20
_BLOCK_ROWS = (64, 512)  # No more than _EXACT_TERMS.

_UNROLLED = 8
"""Rows that one step of the form *rows* adds."""

_CHUNKS = 16
"""Chunks of a contraction that has no tiles."""

_EXACT_TERMS = 2**10
"""Products of two int8 codes whose sum is surely at most 2**24.

Up to there float32 holds every integer, so that no order of addition rounds.
"""

_LAST_AXES = (((1,), (1,)), ((), ()))
"""The dimension numbers of a product over the second axis of both operands."""

Form: TypeAlias = Literal["rows", "blocks", "whole", "integer"]
"""A form; ``integer`` is a dot of int8 operands, which is not one of this module."""


def choose_form(rows: int, weight_size: int, qtype: Any) -> Form:
    """Returns the fastest form of a product with a quantized weight.

    Args:
        rows: Rows of activations; a number that is not known counts as many.
        weight_size: The number of weights.
        qtype: The type of the weight.
    """
    if surely(rows, 1 if numerics.format_of(qtype).table is not None else 2):
        return "rows"
    return "whole" if weight_size <= _WHOLE_MOST else "blocks"


def choose_integer_form(rows: int, weight_size: int) -> Form:
    """Returns the fastest form of a product of integer codes."""
    if rows == 1:
        return "rows"
    few = rows <= _INTEGER_BLOCKS_MOST
    return "blocks" if few and weight_size > _INTEGER_WHOLE_MOST else "integer"


class Operand(NamedTuple):
    """A quantized weight, or its codes alone, of any rank.

    Attributes:
        codes: The codes.
        scale: The scale, or None for codes alone.
        zero_point: The zero point, or None.
        qtype: The type of the codes.
    """

    codes: jax.Array
    scale: jax.Array | None
    zero_point: jax.Array | None
    qtype: Any


class _Plane(NamedTuple):
    """Part of a product: activations, and how to read their weights from codes."""

    x: jax.Array  # shape=(M, K)
    read: Callable[[jax.Array], jax.Array]  # Codes to scaled values.
    scale: jax.Array | None  # shape=(A or 1, C, B or 1): one for each chunk
    zero_point: jax.Array | None  # shape=(A or 1, C or 1, B or 1)

    def values(self, stored: jax.Array) -> jax.Array:
        """Returns values but for the scale, of codes (A, C, ..., B, planes)."""
        out = self.read(stored)
        if self.zero_point is None:
            return out
        a, c, b = self.zero_point.shape
        return out - self.zero_point.reshape(a, c, *(1,) * (out.ndim - 3), b)

    def scaled_values(self, stored: jax.Array) -> jax.Array:
        """Returns values, of codes of shape (A, C, K, B, planes)."""
        out = self.values(stored)
        return out if self.scale is None else out * self.scale[:, :, None]


class _Product(NamedTuple):
    planes: list[_Plane]
    stored: jax.Array  # shape=(A, K, B, planes)
    join: Callable[[Sequence[jax.Array]], jax.Array]
    scale: jax.Array | None  # shape=(A or 1, B or 1): applied to the result
    chunks: int


def weight_dot(
    x: jax.Array,
    weight: Operand,
    contracting: tuple[tuple[int, ...], tuple[int, ...]],
    result: np.dtype,
    precision: Any,
    *,
    form: Form | None = None,
    transposable: bool = False,
) -> jax.Array | None:
    """Returns the product of a float array and a quantized weight.

    Args:
        x: The float array.
        weight: The weight, with a scale.
        contracting: The contracted axes of both.
        result: The dtype of the result.
        precision: As in `jax.lax.dot_general`.
        form: The form; the fastest if None. Where rows do not fit, it is blocks.
        transposable: Take blocks, and let no converted block be kept for the way back.

    Returns:
        The product, the kept axes of ``x`` before those of the weight; None where no
        form here fits.
    """
    assert weight.scale is not None
    wide = numerics.promote_types(x.dtype, weight.scale.dtype, result, jnp.float32)
    matrices = merged(x.astype(wide), weight, contracting)
    if matrices is None:
        return None
    x2, weight3, shape = matrices
    product = _product(x2, weight3, wide, in_memory=not transposable)
    if product is None:
        return None
    size = weight3.codes.size
    form = (
        "blocks"
        if transposable
        else form or choose_form(x2.shape[0], size, weight.qtype)
    )
    out = _rows(product, _sum_floats) if form == "rows" else None
    if out is None and form == "rows":
        form = "blocks"
    product_forms.tell(f"{form} on CPU")
    if out is None:
        rows = product.stored.shape[1] if form == "whole" else _block_rows(product)
        out = _blocks(product, rows, precision, wide, remat=transposable)
    if product.scale is not None:
        lead = tuple(range(out.ndim - product.scale.ndim))
        out = out * jnp.expand_dims(product.scale.astype(wide), lead)
    return out.astype(result).reshape(shape)


def integer_dot(
    left: jax.Array,
    right: jax.Array,
    contracting: tuple[tuple[int, ...], tuple[int, ...]],
    *,
    form: Form | None = None,
) -> jax.Array | None:
    """Returns the product of int8 and int4 codes in int32, computed in float32.

    It is exact, and so has the bits of the dot in integers. That one is as fast as can
    be for many rows, and slow for a few: it converts the weight to int32 in memory.

    Args:
        left: Codes.
        right: Codes.
        contracting: The contracted axes of both.
        form: The form; the fastest if None.

    Returns:
        The product, the kept axes of ``left`` before those of ``right``; None where
        it is to be a dot in integers.
    """
    if left.size > right.size:
        flipped = (contracting[1], contracting[0])
        swapped = integer_dot(right, left, flipped, form=form)
        if swapped is None:
            return None
        kept = range(right.ndim - len(contracting[1]))
        return jnp.moveaxis(swapped, kept, range(-len(kept), 0))
    weight = Operand(right, None, None, right.dtype)
    matrices = merged(left.astype(jnp.float32), weight, contracting)
    if matrices is None:
        return None
    x, weight, shape = matrices
    form = form or choose_integer_form(len(x), right.size)
    if form == "integer":
        return None
    product = _product(x, weight, np.dtype(np.float32), longest=_EXACT_TERMS)
    if product is None or product.chunks > _BLOCK_ROWS[0]:
        return None
    out = None
    if form == "rows" and product.stored.shape[1] // product.chunks <= _EXACT_TERMS:
        out = _rows(product, _sum_integers)
    product_forms.tell(f"{'blocks' if out is None else 'rows'} on CPU")
    if out is None:
        out = _blocks(product, _block_rows(product), None, np.dtype(np.int32))
    return out.reshape(shape)


def merged(
    x: jax.Array,
    weight: Operand,
    contracting: tuple[tuple[int, ...], tuple[int, ...]],
) -> tuple[jax.Array, Operand, tuple[int, ...]] | None:
    """Merges axes: ``x`` to (M, K), the weight to (A, K, B); and the result's shape.

    Returns None where the contracted axes of the weight are not neighbors, an array
    is empty, or tiles are padded.
    """
    order = np.argsort(contracting[1])
    x_axes = [contracting[0][i] for i in order]
    axes = [contracting[1][i] for i in order]
    shape = weight.codes.shape
    if not axes or axes != list(range(axes[0], axes[-1] + 1)):
        return None
    if not all(surely(1, size) for size in (*x.shape, *shape)):
        return None
    first, end = axes[0], axes[-1] + 1

    def of_three(array: jax.Array) -> jax.Array:
        counts = array.shape
        groups = counts[:first], counts[first:end], counts[end:]
        return array.reshape([math.prod(group) for group in groups])

    def part(array: jax.Array) -> jax.Array:
        # Kept axes get one entry for all, or one for each index. So do contracted
        # axes before one that has tiles, whose tiles are then those of the whole.
        counts = array.shape
        last = max((a for a in axes if counts[a] > 1), default=first)
        for axis, (n, count) in enumerate(zip(shape, counts, strict=True)):
            group = counts[:first] if axis < first else counts[end:]
            kept = not first <= axis < end
            if (kept and max(group) > 1) or (first <= axis < last):
                array = jnp.repeat(array, n // count, axis)
        return of_three(array)

    parts = (weight.scale, weight.zero_point)
    for entries in (p.shape for p in jax.tree.leaves(parts)):
        if any(n % count for n, count in zip(shape, entries, strict=True)):
            return None
    scale, zero_point = jax.tree.map(part, parts)
    codes = of_three(weight.codes)
    free = [axis for axis in range(x.ndim) if axis not in x_axes]
    kept = tuple(x.shape[axis] for axis in free) + shape[:first] + shape[end:]
    x = x.transpose(*free, *x_axes).reshape(-1, codes.shape[1])
    return x, Operand(codes, scale, zero_point, weight.qtype), kept


def _product(
    x: jax.Array,
    weight: Operand,
    wide: np.dtype,
    longest: int | None = None,
    *,
    in_memory: bool = True,
) -> _Product | None:
    """Cuts the contraction into chunks, and the weight into planes.

    `in_memory` says that XLA does not compute the codes where they are read.
    """
    codes, scale, zero = weight.codes, weight.scale, weight.zero_point
    tiles = {p.shape[1] for p in jax.tree.leaves((scale, zero))} - {1}
    if len(tiles) > 1:
        return None
    a, k, b = codes.shape
    narrow = jnp.dtype(codes.dtype).name in ("int4", "uint4")
    dtype = scale.dtype if scale is not None else wide
    plain = functools.partial(
        _to_float, qtype=weight.qtype, dtype=dtype, in_memory=in_memory
    )
    # Pairs lie along the last axis that is longer than 1.
    along_k = b == 1
    pairs = (k // max(tiles, default=1) if along_k else b) % 2 == 0
    count = 2 if narrow and pairs else 1
    # XLA reads floats of 8 bits ten times as slowly as their bits.
    is_float = jnp.issubdtype(codes.dtype, jnp.floating)
    stored = jax.lax.bitcast_convert_type(codes, jnp.uint8) if is_float else codes
    lines = (k // count, b) if along_k else (k, b // count)
    stored = stored.reshape(a, *lines, count)
    chunks = _chunk_count(stored.shape[1], tiles, longest)
    per_chunk = scale is not None and scale.shape[1] > 1

    def plane(i: int) -> _Plane:
        columns = slice(None) if along_k else slice(i, None, count)
        own_scale, own_zero = jax.tree.map(
            lambda p: (p if p.shape[2] == 1 else p[:, :, columns]).astype(wide),
            (scale, zero),
        )
        return _Plane(
            x[:, i::count] if along_k else x,
            lambda stored: plain(stored[..., i]).astype(wide),
            own_scale if per_chunk else None,
            own_zero,
        )

    def join(outs: Sequence[jax.Array]) -> jax.Array:
        if len(outs) == 1 or along_k:
            return functools.reduce(jnp.add, outs)
        return jnp.stack(outs, -1).reshape(x.shape[0], a, b)

    after = None if scale is None or per_chunk else scale[:, 0]
    return _Product([plane(i) for i in range(count)], stored, join, after, chunks)


def _to_float(
    stored: jax.Array, *, qtype: Any, dtype: Any, in_memory: bool
) -> jax.Array:
    """What codes stand for, or the bits of those that are floats."""
    entry = numerics.format_of(qtype)
    if isinstance(entry.elements, SmallFloat):
        return numerics.bits_to_float(stored, entry, dtype)
    return numerics.codes_to_float(stored, qtype, dtype, in_memory=in_memory)


def _chunk_count(size: int, tiles: set[int], longest: int | None) -> int:
    """Returns in how many chunks to cut; the tiles if there are any."""
    if tiles:
        return max(tiles)
    chunks = 1
    while size % (2 * chunks * _UNROLLED) == 0:
        if chunks >= _CHUNKS and (longest is None or size // chunks <= longest):
            break
        chunks *= 2
    return chunks


def _rows(
    product: _Product, total: Callable[[jax.Array], jax.Array]
) -> jax.Array | None:
    """Multiplies and adds rows of the weight, with no dot; None if it has too few."""
    stored, chunks = product.stored, product.chunks
    a, k, b, _ = stored.shape
    if k % (chunks * _UNROLLED) or (b == 1 and a > 1):
        return None  # A dot is fast along the last axis.
    split = (chunks, _UNROLLED, k // chunks // _UNROLLED)
    stored = stored.reshape(a, *split, *stored.shape[2:])
    outs = []
    for plane in product.planes:
        x = plane.x.reshape(-1, *split)
        rows = []
        for m in range(len(x)):
            terms = [
                x[m, None, :, j, :, None] * plane.values(stored[:, :, j])
                for j in range(_UNROLLED)
            ]
            while len(terms) > 1:
                terms = [p + q for p, q in zip(terms[::2], terms[1::2], strict=True)]
            out = terms[0]
            if plane.scale is not None:
                out = out * plane.scale[:, :, None]
            rows.append(total(out))
        outs.append(jnp.stack(rows))
    return product.join(outs)


def _sum_floats(terms: jax.Array) -> jax.Array:
    """Adds over the two axes in the middle; a dot does it faster than a sum."""
    ones = jnp.ones(terms.shape[1:3], terms.dtype)
    return jax.lax.dot_general(ones, terms, (((0, 1), (1, 2)), ((), ())))


def _sum_integers(terms: jax.Array) -> jax.Array:
    """The same in integers; float32 is exact within a chunk."""
    _, chunks, rows, _ = terms.shape
    ones = jnp.ones((chunks, rows), terms.dtype)
    sums = jax.lax.dot_general(ones, terms, (((1,), (2,)), ((0,), (1,))))
    return jnp.sum(sums.astype(jnp.int32), axis=0)


def _column_blocks(
    product: _Product, precision: Any, accumulator: np.dtype, *, remat: bool = False
) -> jax.Array:
    """The same for a weight of shape (A, K, 1): blocks of A, with all of K."""
    a, k, _, _ = product.stored.shape
    chunks = math.gcd(a, _CHUNKS)
    most = max(1, _BLOCK_SIZE // len(product.planes) // (k * chunks))
    piece = _largest_divisor(a // chunks, most)
    count = a // chunks // piece
    longest = _EXACT_TERMS if accumulator == jnp.int32 else k

    def cut(part: jax.Array | None, i: jax.Array) -> jax.Array | None:
        if part is None or part.shape[0] == 1:
            return part
        split = part.reshape(chunks, count, piece, *part.shape[1:])
        split = jax.lax.dynamic_index_in_dim(split, i, 1, keepdims=False)
        return split.reshape(-1, *part.shape[1:])

    def block(i):
        stored = cut(product.stored, i)
        assert stored is not None
        stored = stored.reshape(
            -1, product.chunks, k // product.chunks, 1, len(product.planes)
        )
        outs = []
        for plane in product.planes:
            plane = plane._replace(
                scale=cut(plane.scale, i), zero_point=cut(plane.zero_point, i)
            )
            values = plane.scaled_values(stored).reshape(-1, k)
            pieces = [slice(start, start + longest) for start in range(0, k, longest)]
            sums = [
                jax.lax.dot_general(
                    plane.x[:, piece], values[:, piece], _LAST_AXES, precision=precision
                ).astype(accumulator)
                for piece in pieces
            ]
            outs.append(functools.reduce(jnp.add, sums))
        return product.join(outs).reshape(-1, chunks, piece)

    one = jax.checkpoint(block, prevent_cse=False) if remat else block
    outs = jax.lax.map(one, jnp.arange(count))
    return outs.transpose(1, 2, 0, 3).reshape(-1, a, 1)


def _largest_divisor(number: int, most: int) -> int:
    return max(n for n in range(1, min(most, number) + 1) if number % n == 0)


def _block_rows(product: _Product) -> int:
    a, _, b, _ = product.stored.shape
    low, high = _BLOCK_ROWS
    return min(max(_BLOCK_SIZE // (a * b), low), high)


def _blocks(
    product: _Product,
    rows: int,
    precision: Any,
    accumulator: np.dtype,
    *,
    remat: bool = False,
) -> jax.Array:
    """Adds the products of blocks of about so many rows."""
    a, k, b, planes = product.stored.shape
    if b == 1 and a > 1:
        return _column_blocks(product, precision, accumulator, remat=remat)
    chunk = k // product.chunks
    most = max(1, rows // product.chunks)
    piece = _largest_divisor(chunk, most)
    count = chunk // piece
    stored = product.stored.reshape(a, product.chunks, count, piece, b, planes)
    # One array for each plane; the blocks are a leading axis, for the loop to slice.
    xs = [
        jnp.moveaxis(p.x.reshape(-1, product.chunks, count, piece), 2, 0)
        for p in product.planes
    ]

    def block(stored, xs, i):
        piece = jax.lax.dynamic_index_in_dim(stored, i, 2, keepdims=False)
        outs: list[jax.Array] = []
        for plane, x in zip(product.planes, xs, strict=True):
            # A plain matrix product where it is one; XLA would find out less well.
            x = x.reshape(x.shape[0], -1)
            values = plane.scaled_values(piece).reshape(a, -1, b)
            if a == 1:
                out = jnp.matmul(x, values[0], precision=precision)[:, None]
            else:
                out = jax.lax.dot_general(x, values, _LAST_AXES, precision=precision)
            outs.append(out.astype(accumulator))
        return outs

    # Else what is converted would be kept for the way back.
    add = jax.checkpoint(block, prevent_cse=False) if remat else block

    def step(sums, i_and_xs):
        outs = add(stored, i_and_xs[1], i_and_xs[0])
        return [s + out for s, out in zip(sums, outs, strict=True)], None

    # Products of nothing are zeros that vary as the products do over the axes of a
    # `shard_map`. All blocks are in the loop: it starts when the activations are
    # there, while one outside would be converted, into memory of its own, at any time.
    zeros = [
        jax.lax.dot_general(
            x[0, :, 0, :0], stored[:, 0, 0, :0, :, 0].astype(x.dtype), _LAST_AXES
        ).astype(accumulator)
        for x in xs
    ]
    outs, _ = jax.lax.scan(step, zeros, (jnp.arange(count), xs))
    return product.join(outs)
