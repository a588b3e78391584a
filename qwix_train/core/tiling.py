"""Axes that are cut into tiles, and element-wise operations across tiles.

A scale has the rank of the array it belongs to. Along an axis of ``n`` elements it
has 1 entry (shared), ``n`` entries (channelwise) or ``s`` entries, one for each tile
of ``ceil(n / s)`` elements. The last tile is shorter where ``s`` does not divide
``n``; such a *padded* layout comes only from ``HowToQuantize(pad_tiles=True)``.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp


class TiledAxes(Mapping[int, int | float]):
    """An immutable, hashable mapping from an axis to its tile size.

    The tile sizes 1 (one element) and 1.0 (the whole axis) are different.
    """

    __slots__ = ("_items",)

    def __init__(self, tiled_axes: Mapping[int, int | float] | None = None):
        self._items = tuple(sorted((tiled_axes or {}).items()))

    def __getitem__(self, axis: int) -> int | float:
        return dict(self._items)[axis]

    def __iter__(self) -> Iterator[int]:
        return (axis for axis, _ in self._items)

    def __len__(self) -> int:
        return len(self._items)

    def _key(self) -> tuple:
        return tuple((axis, type(size), size) for axis, size in self._items)

    def __hash__(self) -> int:
        return hash(self._key())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mapping):
            return NotImplemented
        other = other if isinstance(other, TiledAxes) else TiledAxes(other)
        return self._key() == other._key()

    def __repr__(self) -> str:
        return repr(dict(self._items))


def normalize_axis(axis: int, ndim: int) -> int:
    """Returns the axis as a number from 0 to ``ndim - 1``.

    Raises:
        ValueError: There is no such axis.
    """
    if not -ndim <= axis < ndim:
        raise ValueError(f"Axis {axis} is out of range for an array of rank {ndim}.")
    return axis % ndim


def tile_count(
    axis: int, shape: Sequence[int], tile_size: int | float, pad: bool
) -> int:
    """Returns how many tiles an axis is cut into.

    Args:
        axis: The axis, not negative.
        shape: The shape of the array.
        tile_size: The elements of a tile or, as a float, its share of the axis.
        pad: Whether the last tile may be shorter.

    Raises:
        ValueError: The tile size does not divide the axis and ``pad`` is false.
    """
    size = shape[axis]
    tile = round(size * tile_size) if isinstance(tile_size, float) else tile_size
    if size == 0:
        return 0
    if tile < 1 or (size % tile and not pad):
        raise ValueError(
            f"Tile size {tile_size} does not divide axis {axis} of size {size} in an "
            f"array of shape {tuple(shape)}. Choose another tile size, or pad the last "
            "tile (pad_tiles=True)."
        )
    return -(-size // tile)


def is_layout(shape: Sequence[int], scale_shape: Sequence[int]) -> bool:
    """Whether a scale of one shape can belong to an array of another."""
    return len(shape) == len(scale_shape) and all(
        s in (1, n) or (0 < s < n and -(-n // -(-n // s)) == s)
        for n, s in zip(shape, scale_shape, strict=True)
    )


def tile_sizes(shape: Sequence[int], scale_shape: Sequence[int]) -> tuple[int, ...]:
    """Returns the size of a tile along each axis (of a full one, if padded).

    >>> tile_sizes((8, 6, 10), (1, 6, 3))
    (8, 1, 4)
    """
    pairs = zip(shape, scale_shape, strict=True)
    return tuple(-(-n // s) if s else 0 for n, s in pairs)


def padded_axes(shape: Sequence[int], scale_shape: Sequence[int]) -> list[int]:
    """Returns the axes whose last tile is shorter than the others."""
    pairs = enumerate(zip(shape, scale_shape, strict=True))
    return [axis for axis, (n, s) in pairs if s and n % s]


def split_tiled_axes(
    array: jax.Array, counts: Sequence[int]
) -> tuple[jax.Array, tuple[int, ...]]:
    """Splits the axes that are cut into tiles; returns the axes within the tiles.

    Axes that have one entry for each index, or one in all, are left whole: XLA does
    not see through a reshape that splits them, and copies the array. An axis whose
    shards cut tiles is gathered where its sharding belongs to its type.
    """
    array = _whole_tiles(array, counts)
    sizes = zip(array.shape, counts, strict=True)
    split = cut(array, [c if c not in (1, n) else None for n, c in sizes])
    within: list[int] = []
    place = 0
    for size, count in zip(array.shape, counts, strict=True):
        place += count not in (1, size)
        if count != size:
            within.append(place)
        place += 1
    return split, tuple(within)


def pad_to_tiles(array: jax.Array, counts: Sequence[int]) -> jax.Array:
    """Appends zeros along each axis until ``counts[i]`` tiles are full."""
    if not padded_axes(array.shape, counts):
        return array
    array = _whole_tiles(array, counts)
    tiles = tile_sizes(array.shape, counts)
    sizes = zip(array.shape, counts, tiles, strict=True)
    return jnp.pad(array, [(0, c * t - n) for n, c, t in sizes])


def reduced(
    reduce: Callable[..., jax.Array], array: jax.Array, counts: Sequence[int]
) -> jax.Array:
    """Reduces each tile to one entry; the last tile is filled up with zeros.

    >>> reduced(jnp.max, jnp.arange(5), (2,)).tolist()
    [2, 4]
    """
    tiles, within = split_tiled_axes(pad_to_tiles(array, counts), counts)
    return reduce(tiles, axis=within).reshape(counts)


def repeated(tiled: jax.Array, axis: int, size: int) -> jax.Array:
    """Repeats the entry of each tile for all of the ``size`` indices of an axis.

    >>> repeated(jnp.array([7, 8]), 0, 5).tolist()
    [7, 7, 7, 8, 8]
    """
    # Not `jnp.repeat`, which does not know how the result is sharded.
    wide = jnp.expand_dims(tiled, axis + 1)
    shape = [*wide.shape]
    shape[axis + 1] = -(-size // tiled.shape[axis])
    split = [1 if a == axis else None for a in range(tiled.ndim)]
    tiled = _joined(jnp.broadcast_to(wide, shape), split)
    return jax.lax.slice_in_dim(tiled, 0, size, axis=axis)


def elementwise(
    fn: Callable[..., jax.Array], array: jax.Array, *tiled: jax.Array | None
) -> jax.Array:
    """Applies an element-wise function to an array and arrays with one entry a tile.

    Args:
        fn: Called as ``fn(array, *tiled)`` on arrays that broadcast.
        array: The array; the result has its shape.
        *tiled: Scales, zero points or bounds in the layouts above; None stays None.
    """
    shape = array.shape
    present = [t for t in tiled if t is not None]
    for t in present:
        if not is_layout(shape, t.shape):
            raise ValueError(f"A scale of shape {t.shape} does not fit {shape}.")
    tiled = tuple(t if t is None else _spread(t, array) for t in tiled)
    # Per axis, the finest cut that any of the arrays needs.
    counts = _common_counts(shape, [t.shape for t in tiled if t is not None])
    if all(c in (1, n) for c, n in zip(counts, shape, strict=True)):
        return fn(array, *tiled)
    split = [c if c not in (1, n) else None for c, n in zip(counts, shape, strict=True)]
    parts = (t if t is None else cut(t, split) for t in tiled)
    return _joined(fn(cut(array, split), *parts), split)


def cut(array: jax.Array, counts: Sequence[int | None]) -> jax.Array:
    """Splits axes of an array, or of its scale, in two: tiles, and what is in a tile.

    Args:
        array: The array.
        counts: The number of tiles along each axis; None where it is not split.

    >>> cut(jnp.ones((6, 4)), (2, None)).shape, cut(jnp.ones((1, 4)), (2, None)).shape
    ((2, 3, 4), (1, 1, 4))
    """
    if all(count is None for count in counts):
        return array
    shape: list[int] = []
    spec: list[Any] = []
    held = jax.typeof(array).sharding.spec
    for size, count, entry in zip(array.shape, counts, held, strict=True):
        if count is None:
            shape.append(size)
            spec.append(entry)
        else:
            shape += (1, 1) if size == 1 else (count, size // count if count else 0)
            spec += (entry, None)
    return _reshaped(array, shape, spec)


def _joined(array: jax.Array, counts: Sequence[int | None]) -> jax.Array:
    """Joins the axes of an array that `cut` has split."""
    sizes = iter(array.shape)
    shape = [next(sizes) if c is None else next(sizes) * next(sizes) for c in counts]
    held = iter(jax.typeof(array).sharding.spec)
    spec: list[Any] = []
    for count in counts:
        spec.append(next(held))
        if count is not None:
            next(held)
    return _reshaped(array, shape, spec)


def _reshaped(array: jax.Array, shape: Sequence[int], spec: list[Any]) -> jax.Array:
    """An array in another shape, sharded so where its sharding belongs to its type."""
    if all(entry is None for entry in spec):
        return array.reshape(shape)
    # JAX itself follows one axis that is split, or joined, and no more.
    return array.reshape(shape, out_sharding=jax.P(*spec))


def _spread(tiled: jax.Array, array: jax.Array) -> jax.Array:
    """Repeats entries along axes that cannot be split: padded, or cut by shards."""
    shape, counts = array.shape, tiled.shape
    for axis in {*padded_axes(shape, counts), *_cut_by_shards(array, counts)}:
        tiled = repeated(_resharded(tiled, axis, None), axis, shape[axis])
        tiled = _resharded(tiled, axis, jax.typeof(array).sharding.spec[axis])
    return tiled


def _whole_tiles(array: jax.Array, counts: Sequence[int]) -> jax.Array:
    """The array, gathered along the axes whose shards do not hold whole tiles."""
    for axis in _cut_by_shards(array, counts):
        array = _resharded(array, axis, None)
    return array


def _cut_by_shards(array: jax.Array, counts: Sequence[int]) -> list[int]:
    """The axes whose shards do not hold whole tiles.

    Only where shardings belong to types; elsewhere XLA gathers what it must.
    """
    sharding = jax.typeof(array).sharding
    axes = []
    for axis, (entry, count) in enumerate(zip(sharding.spec, counts, strict=True)):
        names = entry if isinstance(entry, tuple) else (entry,) if entry else ()
        pieces = math.prod(sharding.mesh.shape[name] for name in names)
        size = array.shape[axis]
        if pieces > 1 and count not in (1, size) and (count % pieces or size % count):
            axes.append(axis)
    return axes


def _resharded(array: jax.Array, axis: int, entry: Any) -> jax.Array:
    """The array with an axis sharded over other axes of the mesh."""
    sharding = jax.typeof(array).sharding
    if sharding.spec[axis] == entry:
        return array
    spec = [*sharding.spec[:axis], entry, *sharding.spec[axis + 1 :]]
    return jax.sharding.reshard(array, jax.P(*spec))


def _common_counts(
    shape: Sequence[int], scale_shapes: Iterable[Sequence[int]]
) -> tuple[int, ...]:
    counts = [1] * len(shape)
    for scale_shape in scale_shapes:
        for axis, s in enumerate(scale_shape):
            if s == 1 or s == counts[axis]:
                continue
            if counts[axis] != 1:
                raise ValueError(
                    f"Axis {axis} of {tuple(shape)} is cut in {counts[axis]} tiles by "
                    f"one operand and in {s} by another."
                )
            counts[axis] = s
    return tuple(counts)
