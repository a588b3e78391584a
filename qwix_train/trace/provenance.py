"""Where an array came from: a param, an activation, or a constant.

The provenance of an operand answers, exactly and without looking at shapes: is it
a weight, of which param, and which of the param's axes does each of its axes hold?
The answer is carried through the traced function by `propagate`, one equation at a
time. How a weight is quantized is then stated on the axes of the *stored* param,
whatever the model did to it on the way: transposed, reshaped, sliced, cast,
scaled, concatenated with other weights, or scanned over layer by layer.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Atom(NamedTuple):
    """A factor of one axis of the stored param.

    Reshaping an axis of 12 into (3, 4) splits it into the factors (size 3,
    stride 4) and (size 4, stride 1); merging axes puts factors side by side.
    """

    axis: int
    size: int
    stride: int


@dataclasses.dataclass(frozen=True)
class View:
    """A param, as seen through the operations applied to it.

    Attributes:
      path: the path of the param, such as `("Dense_0", "kernel")`.
      shape: the shape of the stored param.
      dims: for each axis of the array at hand, the stored factors it holds, major
        to minor. An axis that was added holds none.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    dims: tuple[tuple[Atom, ...], ...]


@dataclasses.dataclass(frozen=True)
class Activation:
    """An array that depends on an input other than the params."""


@dataclasses.dataclass(frozen=True)
class Constant:
    """An array that depends on no input."""


@dataclasses.dataclass(frozen=True)
class Weight:
    """An array whose elements are elements of one param (or of several, joined).

    Attributes:
      views: one for each param it holds; several after a concatenation.
      selected: whether an activation chose which part of the param this is
        (`table[token]`).
    """

    views: tuple[View, ...]
    selected: bool = False


@dataclasses.dataclass(frozen=True)
class Derived:
    """An array computed from params alone, with no element-by-element map to one.

    Attributes:
      paths: the params it was computed from.
      by: the operation after which the map was lost.
    """

    paths: tuple[tuple[str, ...], ...]
    by: str


Provenance = Activation | Constant | Weight | Derived

ACTIVATION = Activation()
CONSTANT = Constant()


def param(path: tuple[str, ...], shape: Sequence[int]) -> Weight:
    """The provenance of a whole, untouched param."""
    dims = tuple((Atom(axis, size, 1),) for axis, size in enumerate(shape))
    return Weight((View(path, tuple(shape), dims),))


def paths_of(provenance: Provenance) -> tuple[tuple[str, ...], ...]:
    """The params that an array was computed from."""
    match provenance:
        case Weight(views=views):
            return tuple(view.path for view in views)
        case Derived(paths=paths):
            return paths
        case _:
            return ()


def join(a: Provenance, b: Provenance) -> Provenance:
    """The provenance of a value that is `a` on one path and `b` on another."""
    if a == b:
        return a
    if isinstance(a, Activation) or isinstance(b, Activation):
        return ACTIVATION
    return _derived([a, b], "a branch or a loop")


def per_iteration(provenance: Provenance) -> Provenance:
    """One slice, along axis 0, of an array that `scan` iterates over."""
    if isinstance(provenance, Weight):
        return _map_views(provenance, lambda dims: dims[1:])
    return provenance


def propagate(
    primitive: str,
    params: Mapping[str, Any],
    operands: Sequence[Provenance],
    in_shapes: Sequence[tuple[int, ...]],
    out_shapes: Sequence[tuple[int, ...]],
) -> list[Provenance]:
    """The provenance of each result of one equation without bodies.

    Args:
      primitive: the name of the equation's primitive.
      params: its parameters.
      operands: the provenance of each operand.
      in_shapes: the shape of each operand.
      out_shapes: the shape of each result.
    """
    if all(isinstance(operand, Constant) for operand in operands):
        return [CONSTANT] * len(out_shapes)
    rule = _RULES.get(primitive)
    if rule is not None:
        result = rule(params, operands, in_shapes, out_shapes)
        if result is not None:
            return [result] * len(out_shapes)
    elif primitive in _ELEMENTWISE:
        result = _elementwise(operands, in_shapes, out_shapes[0])
        if result is not None:
            return [result]
    return [_derived(operands, primitive)] * len(out_shapes)


# Arrays of one element each in, of one element each out, at the same place.
_ELEMENTWISE = frozenset(
    """abs add and cbrt ceil clamp convert_element_type copy copy_p cos cosh device_put
    div erf exp exp2 expm1 floor integer_pow is_finite log log1p logistic max min mul
    name neg nextafter not or pow pvary reduce_precision rem round rsqrt select_n
    sharding_constraint mesh_cast reshard sign sin sinh sqrt square stop_gradient sub
    tan tanh xor""".split()
)


def _derived(operands: Sequence[Provenance], by: str) -> Provenance:
    if any(isinstance(operand, Activation) for operand in operands):
        return ACTIVATION
    paths = dict.fromkeys(p for operand in operands for p in paths_of(operand))
    if not paths:
        return CONSTANT
    return Derived(tuple(paths), by)


def _map_views(weight: Weight, change) -> Weight:
    views = tuple(
        dataclasses.replace(view, dims=tuple(change(view.dims)))
        for view in weight.views
    )
    return dataclasses.replace(weight, views=views)


def _elementwise(operands, in_shapes, out_shape) -> Provenance | None:
    varying = [
        (operand, shape)
        for operand, shape in zip(operands, in_shapes, strict=True)
        if not isinstance(operand, Constant)
    ]
    if len(varying) == 1 and isinstance(varying[0][0], Weight):
        operand, shape = varying[0]
        if shape == out_shape:
            return operand
    return None


def _transpose(params, operands, in_shapes, out_shapes):
    (operand,) = operands
    if isinstance(operand, Weight):
        order = params["permutation"]
        return _map_views(operand, lambda dims: [dims[axis] for axis in order])
    return operand


def _broadcast(params, operands, in_shapes, out_shapes):
    operand, *_ = operands
    if isinstance(operand, Weight):
        places = {o: i for i, o in enumerate(params["broadcast_dimensions"])}
        return _map_views(
            operand,
            lambda dims: [
                dims[places[axis]] if axis in places else ()
                for axis in range(len(out_shapes[0]))
            ],
        )
    return operand


def _squeeze(params, operands, in_shapes, out_shapes):
    (operand,) = operands
    if isinstance(operand, Weight):
        dropped = set(params["dimensions"])
        return _map_views(
            operand, lambda dims: [d for i, d in enumerate(dims) if i not in dropped]
        )
    return operand


def _expand(params, operands, in_shapes, out_shapes):
    (operand,) = operands
    if isinstance(operand, Weight):
        added = set(params["dimensions"])

        def change(dims):
            rest = iter(dims)
            return [() if i in added else next(rest) for i in range(len(out_shapes[0]))]

        return _map_views(operand, change)
    return operand


def _same_axes(params, operands, in_shapes, out_shapes):
    """Slices, paddings and reversals: each axis still holds what it held."""
    operand, *others = operands
    if isinstance(operand, Weight) and all(isinstance(o, Constant) for o in others):
        return _resize(operand, in_shapes[0], out_shapes[0])
    return None


def _dynamic_slice(params, operands, in_shapes, out_shapes):
    operand, *indices = operands
    if isinstance(operand, Weight):
        selected = any(isinstance(index, Activation) for index in indices)
        operand = _resize(operand, in_shapes[0], out_shapes[0])
        return dataclasses.replace(operand, selected=operand.selected or selected)
    return None


def _resize(weight: Weight, old, new) -> Weight:
    """Part of each axis: a factor that stands alone in its axis shrinks with it."""

    def change(dims):
        return [
            (dim[0]._replace(size=after),) if before != after and len(dim) == 1 else dim
            for dim, before, after in zip(dims, old, new, strict=True)
        ]

    return _map_views(weight, change)


def _gather(params, operands, in_shapes, out_shapes):
    operand, indices = operands
    if not isinstance(operand, Weight):
        return None
    numbers = params["dimension_numbers"]
    dropped = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    offsets = set(numbers.offset_dims)

    def change(dims):
        kept = iter([d for axis, d in enumerate(dims) if axis not in dropped])
        return [
            next(kept) if axis in offsets else () for axis in range(len(out_shapes[0]))
        ]

    selected = operand.selected or isinstance(indices, Activation)
    return dataclasses.replace(_map_views(operand, change), selected=selected)


def _concatenate(params, operands, in_shapes, out_shapes):
    weights = [operand for operand in operands if isinstance(operand, Weight)]
    if not weights or any(
        not isinstance(operand, Weight | Constant) for operand in operands
    ):
        return None
    views = tuple(dict.fromkeys(view for weight in weights for view in weight.views))
    return Weight(views, any(weight.selected for weight in weights))


def _reshape(params, operands, in_shapes, out_shapes):
    operand, *_ = operands
    if not isinstance(operand, Weight):
        return operand if len(operands) == 1 else None
    groups = _reshape_groups(in_shapes[0], out_shapes[0])
    if groups is None:
        return None
    views = []
    for view in operand.views:
        dims = _reshape_dims(view.dims, in_shapes[0], out_shapes[0], groups)
        if dims is None:
            return None
        views.append(dataclasses.replace(view, dims=dims))
    return dataclasses.replace(operand, views=tuple(views))


def _reshape_groups(old, new):
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
            if left < right:
                left, i = left * old[i], i + 1
            else:
                right, j = right * new[j], j + 1
        groups.append((range(first_i, i), range(first_j, j)))
    return groups


def _reshape_dims(dims, old, new, groups):
    result: list[tuple[Atom, ...]] = []
    for before, after in groups:
        if [old[i] for i in before] == [new[j] for j in after]:
            result.extend(dims[i] for i in before)
            continue
        atoms = [atom for i in before for atom in dims[i] if atom.size != 1]
        sizes = [old[i] for i in before if old[i] != 1]
        # An axis that no factor accounts for in full (it was sliced, broadcast, or
        # joined from several params) cannot be split or merged.
        if math.prod(atom.size for atom in atoms) != math.prod(sizes):
            return None
        for j in after:
            taken, atoms = _take(atoms, new[j])
            if taken is None:
                return None
            result.append(taken)
    return tuple(result)


def _take(atoms, size):
    """Splits the first factors whose product is `size` off a list of factors."""
    taken: list[Atom] = []
    while size > 1:
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


_RULES = {
    "transpose": _transpose,
    "broadcast_in_dim": _broadcast,
    "squeeze": _squeeze,
    "expand_dims": _expand,
    "reshape": _reshape,
    "slice": _same_axes,
    "split": lambda params, operands, in_shapes, out_shapes: (
        operands[0] if len(set(out_shapes)) > 1 else
        _same_axes(params, operands, in_shapes, out_shapes)
    ),
    "rev": _same_axes,
    "pad": _same_axes,
    "optimization_barrier": lambda params, operands, *_: (
        operands[0] if len(operands) == 1 else None
    ),
    "dynamic_slice": _dynamic_slice,
    "gather": _gather,
    "concatenate": _concatenate,
}
