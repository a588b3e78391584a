"""Which operands are weights, and how they are quantized.

It is stated on the axes of the stored param. An op says which axes of its operand are
contracted. Through the operand's provenance that becomes a statement about the param:
axes that are contracted share a scale (or have one per tile), and all the others, those
that were sliced or scanned over included, have a scale for each element.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TypeAlias, TypeGuard

from qwix_train import ops
from qwix_train.core import tiling
from qwix_train.core.errors import located
from qwix_train.trace import provenance
from qwix_train.trace.analyze import Op
from qwix_train.trace.factors import Atom
from qwix_train.trace.provenance import View


@dataclasses.dataclass(frozen=True)
class Axes:
    """Axes that have a scale for each element, and axes that have one per tile."""

    channelwise: tuple[int, ...]
    tiled: Mapping[int, int]


def roles(op: Op) -> list[provenance.Provenance]:
    """What each of the operands that can be quantized counts as.

    Next to a weight, what is computed from other params is an input like any other:
    a learned query that was normalized, or the row of a table that a token looked
    up, though each element of that is one of the table's.
    """
    origins = [operand.provenance for operand in op.operands[: ops.kind_of(op).sides]]
    is_weight = [_is_weight(origin, op) for origin in origins]

    def role(side, origin):
        is_input = isinstance(origin, provenance.Derived | provenance.Weight)
        is_input = is_input and not is_weight[side]
        beside_weight = any(is_weight[:side] + is_weight[side + 1 :])
        return provenance.ACTIVATION if is_input and beside_weight else origin

    return [role(side, origin) for side, origin in enumerate(origins)]


def weights_of(op: Op) -> list[tuple[int, View]]:
    """The params that an op reads as weights, each with the side of the operand."""
    return [
        (side, view)
        for side, operand in enumerate(op.operands[: ops.kind_of(op).sides])
        if _is_weight(operand.provenance, op)
        for view in operand.provenance.views
    ]


def _is_weight(origin: provenance.Provenance, op: Op) -> TypeGuard[provenance.Weight]:
    """Whether an operand is a weight; a row of a table is one of lookups alone."""
    is_weight = isinstance(origin, provenance.Weight)
    return is_weight and not (origin.selected and ops.kind_of(op).is_product)


TileSize: TypeAlias = int | float | Mapping[int, int | float] | None
"""What rules say of tiles; see `QuantizationRule.tile_size`."""


def operand_axes(
    op: Op, side: int, tile_size: TileSize, *, in_blocks: bool = False
) -> Axes:
    """The axes of an op's own operand, before any mapping to a param.

    A tile is cut from the last of the axes that the op contracts, in the order in which
    the operand has them: the order in which an equation or `dimension_numbers` names
    them means nothing. A tile that is larger takes whole axes, and is cut from the one
    before; axes that it does not reach share its scale.

    Args:
      op: the op.
      side: 0 for its left operand, 1 for its right one.
      tile_size: elements per tile, or one over the number of tiles along the last
        contracted axis; or, by axis, the elements of a tile or its share. Not every
        kind of operation has tiles.
      in_blocks: whether a tile is no longer than it says: axes that it does not reach
        then have a scale for each element.

    Raises:
      ValueError: if it names an axis that the operand does not have.
    """
    kind, shape = ops.kind_of(op), op.operands[side].shape
    channelwise = kind.channelwise(op.params, side, len(shape))
    if not kind.has_tiles:
        return Axes(channelwise, {})
    if isinstance(tile_size, Mapping):
        with located(f"{op.where}: tile sizes {tile_size!r}"):
            sizes = [
                (tiling.normalize_axis(axis, len(shape)), size)
                for axis, size in tile_size.items()
            ]
        tiled = {axis: absolute_tile(size, shape[axis]) for axis, size in sizes}
        return Axes(tuple(axis for axis in channelwise if axis not in tiled), tiled)
    shared = [axis for axis in range(len(shape)) if axis not in channelwise]
    tiled = _tiles(shape, shared, tile_size)
    if in_blocks:
        reached = min(tiled, default=0)
        channelwise = (*channelwise, *(axis for axis in shared if axis < reached))
    return Axes(channelwise, tiled)


def _tiles(shape, shared: Sequence[int], tile_size) -> dict[int, int]:
    """The part of a tile along each axis that it reaches, of those that share a scale.

    Where there is no such tile, the tile size is the last axis's, which it does not
    divide.
    """
    if tile_size is None or not shared:
        return {}
    tile = absolute_tile(tile_size, shape[shared[-1]])
    parts, rest = {}, tile
    for axis in reversed(shared):
        length = max(shape[axis], 1)
        if rest <= length:
            return {**parts, axis: rest}
        if rest % length:
            break
        parts[axis], rest = length, rest // length
    return {shared[-1]: tile}


def absolute_tile(tile_size: int | float, length: int) -> int:
    """The number of elements in a tile of an axis."""
    if isinstance(tile_size, float):
        return max(1, round(length * tile_size))
    return tile_size


def stored_axes(view: View, axes: Axes) -> Axes:
    """Maps axes of an operand to axes of the param that it is a view of.

    Where only part of a stored axis is contracted, it is tiled if the parts are
    contiguous, and shares one scale if they are not: a scale that is constant along
    everything that is contracted is always right, if coarser than it could be.

    Args:
      view: how the operand maps to the param.
      axes: the axes of the operand.

    Raises:
      ValueError: if a tile does not divide into the factors of a reshaped axis.
    """
    # For each stored axis, its factors, each with the part of it (1: none, its size:
    # all) that shares a scale.
    shared: dict[int, list[tuple[Atom, int]]] = {}
    contracted: set[int] = set()
    for dim, atoms in enumerate(view.dims):
        if dim in axes.channelwise:
            parts = [1] * len(atoms)
        elif dim in axes.tiled and all(atom.stride for atom in atoms):
            parts = _divide(atoms, axes.tiled[dim])
        else:
            parts = [atom.size for atom in atoms]
        for atom, part in zip(atoms, parts, strict=True):
            shared.setdefault(atom.axis, []).append((atom, part))
            if dim not in axes.channelwise:
                contracted.add(atom.axis)
    channelwise, tiled = [], {}
    for axis, length in enumerate(view.shape):
        if axis not in contracted:
            channelwise.append(axis)
            continue
        tile = _contiguous(shared[axis])
        if tile is not None and tile < length:
            tiled[axis] = tile
    return Axes(tuple(channelwise), tiled)


def _divide(atoms: tuple[Atom, ...], tile: int) -> list[int]:
    """Spreads a tile over the factors of an axis, minor first."""
    if len(atoms) == 1:
        return [tile]
    parts, rest = [], tile
    for atom in reversed(atoms):
        part = min(rest, atom.size)
        if rest % part or atom.size % part:
            sizes = tuple(atom.size for atom in atoms)
            raise ValueError(
                f"a tile of {tile} does not fit the factors {sizes} that a reshape "
                "merged into the contracted axis"
            )
        parts.append(part)
        rest //= part
    return parts[::-1]


def _contiguous(factors: list[tuple[Atom, int]]) -> int | None:
    """The length of the contiguous run that shares a scale; None if there is none.

    The run must start at a multiple of its length: a slice that is contracted in
    full may start anywhere, and has none.
    """
    tile, complete = 1, True
    for atom, part in sorted(factors, key=lambda factor: factor[0].stride):
        if part > 1 and (not complete or atom.stride != tile):
            return None
        if part >= atom.size and not atom.whole:
            return None
        tile *= part
        complete = complete and part >= atom.size
    return tile
