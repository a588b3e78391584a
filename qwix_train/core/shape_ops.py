"""Reshaping and indexing of quantized arrays, where that is exact.

Each element must keep its scale and zero point, and the result must have a layout such
as `tiling` describes; anything else raises a ValueError, which says to dequantize
first.
"""

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from qwix_train.core.symbolic import is_smaller

if TYPE_CHECKING:
    from qwix_train.core.qarray import QArray


def with_parts(
    array: "QArray", qvalue: Any, change: Callable[[jax.Array], jax.Array]
) -> "QArray":
    """Returns an array of other codes, with its scales and zero point changed alike."""
    parts = jax.tree.map(change, array.layouts)
    return array.replace(qvalue=qvalue, **parts)  # pyright: ignore


def reshape(array: "QArray", *shape: Any) -> "QArray":
    """Reshapes a quantized array.

    Axes are reshaped in groups: the smallest runs of old and new axes of equal size.
    Within a group the scale may be shared by all elements, may follow an old axis or
    tiles of it that map to leading new axes, or the group is left as it is.

    Raises:
        ValueError: The sizes differ, or elements would lose their scale.
    """
    if len(shape) == 1 and not isinstance(shape[0], int | np.integer):
        shape = tuple(shape[0])
    new_shape = _resolve(array.shape, tuple(shape))
    groups = _groups(array.shape, new_shape)

    def reshape_part(part: jax.Array) -> jax.Array:
        target: list[int] = []
        for old_axes, new_axes in groups:
            old = [array.shape[a] for a in old_axes]
            new = [new_shape[a] for a in new_axes]
            counts = [part.shape[a] for a in old_axes]
            new_counts = _regroup(old, counts, new)
            if new_counts is None:
                raise ValueError(
                    f"Cannot reshape a QArray of shape {array.shape} with a scale of "
                    f"shape {part.shape} to {new_shape}: elements would lose their "
                    "scale. Dequantize it first."
                )
            target += new_counts
        return part.reshape(target)

    return with_parts(array, array.qvalue.reshape(new_shape), reshape_part)


def _resolve(old: tuple[int, ...], new: tuple[int, ...]) -> tuple[int, ...]:
    """Fills in an axis of -1 and checks the size."""
    size = math.prod(old)
    if new.count(-1) == 1:
        rest = math.prod(n for n in new if n != -1)
        if rest and size % rest == 0:
            new = tuple(size // rest if n == -1 else n for n in new)
    if any(n < 0 for n in new) or math.prod(new) != size:
        raise ValueError(f"Cannot reshape a QArray of shape {old} to {new}.")
    return new


def _groups(
    old: tuple[int, ...], new: tuple[int, ...]
) -> list[tuple[list[int], list[int]]]:
    """Cuts both shapes into the smallest runs of axes of equal size."""
    if 0 in old:  # Nothing to keep together.
        return [(list(range(len(old))), list(range(len(new))))]
    groups = []
    i = j = 0
    while i < len(old) or j < len(new):
        old_axes, new_axes = [], []
        old_size = new_size = 1
        # One axis on either side if there is one, then the smaller side catches up.
        if i < len(old) and (old[i] != 1 or j >= len(new) or new[j] == 1):
            old_axes.append(i)
            old_size, i = old[i], i + 1
        if j < len(new) and (new[j] != 1 or old_size == 1):
            new_axes.append(j)
            new_size, j = new[j], j + 1
        while old_size != new_size:
            if is_smaller(old_size, new_size):
                old_axes.append(i)
                old_size, i = old_size * old[i], i + 1
            else:
                new_axes.append(j)
                new_size, j = new_size * new[j], j + 1
        groups.append((old_axes, new_axes))
    return groups


def _regroup(old: list[int], counts: list[int], new: list[int]) -> list[int] | None:
    """Returns the scale's shape along the new axes of a group; None if there is none.

    Args:
        old: The sizes of the old axes.
        counts: The entries of the scale along them.
        new: The sizes of the new axes, of the same product.
    """
    if old == new:
        return list(counts)
    if all(count == 1 for count in counts):
        return [1] * len(new)
    if 0 in old or any(n % c for n, c in zip(old, counts, strict=True)):
        return None
    # The runs of elements, in order of memory, that share a scale: an entry of the
    # scale must be `run` consecutive elements, all entries different. That holds when
    # the axes are counted in full, then one in tiles, then shared.
    seen_partial = False
    for n, c in zip(old, counts, strict=True):
        if seen_partial and c != 1:
            return None
        seen_partial = seen_partial or c != n
    run = math.prod(old) // math.prod(counts)
    # The same runs over the new axes, from the last axis backwards.
    new_counts: list[int] = []
    for n in reversed(new):
        if run % n == 0:
            new_counts.append(1)
            run //= n
        elif n % run == 0:
            new_counts.append(n // run)
            run = 1
        else:
            return None
    return new_counts[::-1]


def take(array: "QArray", index: Any) -> "QArray":
    """Returns ``array[index]``.

    Along axes that share one scale, and along channelwise ones, any index works. An
    axis in tiles takes an integer, a full slice, or a slice of whole tiles.

    Raises:
        ValueError: A tile would be cut.
        IndexError: There are too many indices, or one is out of range.
    """
    entries = _expand(index, array.ndim)
    qvalue = array.qvalue[tuple(entries)]
    taken = functools.partial(_take_part, array.shape, entries)
    return with_parts(array, qvalue, taken)


def _expand(index: Any, ndim: int) -> list[Any]:
    """Returns the index with one entry for each axis, and None for each new one."""
    entries = list(index) if isinstance(index, tuple) else [index]
    if any(_is_boolean(entry) for entry in entries):
        raise ValueError(
            "A QArray cannot be indexed by a Boolean mask. Dequantize it first."
        )
    used = sum(entry is not None and entry is not Ellipsis for entry in entries)
    if used > ndim:
        raise IndexError(f"Too many indices ({used}) for a QArray of rank {ndim}.")
    fill = [slice(None)] * (ndim - used)
    positions = [i for i, entry in enumerate(entries) if entry is Ellipsis]
    if len(positions) > 1:
        raise IndexError("An index can have only one ellipsis.")
    where = positions[0] if positions else len(entries)
    return entries[:where] + fill + entries[where + len(positions) :]


def _is_boolean(entry: Any) -> bool:
    return isinstance(entry, bool) or getattr(entry, "dtype", None) == np.bool_


def _take_part(
    shape: tuple[int, ...], entries: list[Any], part: jax.Array
) -> jax.Array:
    axes = iter(enumerate(zip(shape, part.shape, strict=True)))

    def in_part(entry: Any) -> Any:
        if entry is None:
            return None
        axis, (size, count) = next(axes)
        return _part_entry(size, count, entry, axis)

    return part[tuple(map(in_part, entries))]


def _part_entry(size: int, count: int, entry: Any, axis: int) -> Any:
    """Returns the index into a scale of ``count`` entries along an axis."""
    if count == size:
        return entry
    is_integer = isinstance(entry, int | np.integer)
    if is_integer and not -size <= entry < size:
        raise IndexError(f"Index {entry} is out of range for axis {axis} of {size}.")
    if count == 1:
        if isinstance(entry, slice):
            return slice(None)
        # Zeros in the shape of the index: an index array gives its shape to the axis.
        return 0 if is_integer else np.zeros(np.shape(entry), np.int32)
    tile = -(-size // count)
    if is_integer:
        return entry % size // tile
    if isinstance(entry, slice):
        start, stop, step = entry.indices(size)
        whole = start % tile == 0 and (stop % tile == 0 or stop == size)
        if step == 1 and whole and (size % count == 0 or stop == size):
            return slice(start // tile, -(-stop // tile))
    raise ValueError(
        f"Index {entry!r} cuts tiles of {tile} elements along axis {axis} of a QArray. "
        "Take whole tiles or one element, or dequantize it first."
    )
