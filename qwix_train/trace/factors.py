"""The axes of a stored param as products of factors, and what reshapes do to them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from qwix_train.core.symbolic import is_smaller


class Atom(NamedTuple):
    """A factor of one axis of the stored param.

    Reshaping an axis of 12 into (3, 4) splits it into the factors (size 3,
    stride 4) and (size 4, stride 1); merging axes puts factors side by side.

    Attributes:
      axis: the axis of the stored param.
      size: the number of elements.
      stride: the distance, along the stored axis, from one to the next; 0 where
        the axis at hand holds some of the elements in an order that is not tracked.
      whole: whether the axis at hand holds all of the factor, in order. False
        after a slice or a padding.
    """

    axis: int
    size: int
    stride: int
    whole: bool = True


def untracked(dim: Iterable[Atom]) -> tuple[Atom, ...]:
    """The same factors, where their order in the axis is no longer known."""
    return tuple(Atom(atom.axis, atom.size, 0, False) for atom in dim)


def reshape_groups(
    old: Sequence[Any], new: Sequence[Any]
) -> list[tuple[range, range]] | None:
    """Pairs of runs of axes, old and new, that hold the same elements."""
    if math.prod(old) != math.prod(new) or 0 in old:
        return None
    groups, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        first_i, first_j = i, j
        left = old[i] if i < len(old) else 1
        right = new[j] if j < len(new) else 1
        i, j = min(i + 1, len(old)), min(j + 1, len(new))
        while left != right:
            if is_smaller(left, right):
                left, i = left * old[i], i + 1
            else:
                right, j = right * new[j], j + 1
        groups.append((range(first_i, i), range(first_j, j)))
    return groups


def reshape_dims(
    dims: Sequence[tuple[Atom, ...]],
    old: Sequence[Any],
    new: Sequence[Any],
    groups: Sequence[tuple[range, range]],
) -> tuple[tuple[Atom, ...], ...]:
    """The factors in each axis after a reshape.

    Args:
      dims: the factors in each axis before.
      old: the shape before.
      new: the shape after.
      groups: what `reshape_groups` says of the two shapes.
    """
    result: list[tuple[Atom, ...]] = []
    for before, after in groups:
        if [old[i] for i in before] == [new[j] for j in after]:
            result.extend(dims[i] for i in before)
            continue
        atoms = [atom for i in before for atom in dims[i] if atom.size != 1]
        size = math.prod(old[i] for i in before)
        # Factors that were sliced, repeated, or joined with those of other params do
        # not account for the axes that hold them.
        tracked = math.prod(atom.size for atom in atoms) == size
        parts = []
        if tracked and all(atom.whole for atom in atoms):
            rest = atoms
            for j in after:
                taken, rest = _take(rest, new[j])
                parts.append(taken)
        if not parts or None in parts:
            mixed = untracked(atoms)
            parts = [mixed if new[j] != 1 else () for j in after]
        result.extend(parts)
    return tuple(result)


def _take(atoms, size):
    """Splits the first factors whose product is `size` off a list of factors."""
    taken: list[Atom] = []
    while size != 1:
        if not atoms:
            return None, atoms
        head, *rest = atoms
        if size % head.size == 0:
            taken.append(head)
            size, atoms = size // head.size, rest
        elif head.size % size == 0:
            minor = head.size // size
            taken.append(Atom(head.axis, size, head.stride * minor))
            atoms = [Atom(head.axis, minor, head.stride), *rest]
            size = 1
        else:
            return None, atoms
    return tuple(taken), atoms
