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
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from jax import lax

from qwix_train.trace import factors
from qwix_train.trace.factors import Atom


@dataclasses.dataclass(frozen=True)
class View:
    """A param, as seen through the operations applied to it.

    Attributes:
      path: the path of the param, such as `("Dense_0", "kernel")`.
      shape: the shape of the stored param.
      dims: for each axis of the array at hand, the stored factors it holds, major
        to minor. An axis that was added, or of which one element was taken, holds
        none.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    dims: tuple[tuple[Atom, ...], ...]


@dataclasses.dataclass(frozen=True)
class Activation:
    """An array that depends on an input other than the params.

    All of these are equal. Each array has an object of its own, so where two operands
    have the same one, they are the same array.
    """


@dataclasses.dataclass(frozen=True)
class Constant:
    """An array that depends on no input."""


@dataclasses.dataclass(frozen=True)
class Weight:
    """An array whose elements are elements of one param (or of several, joined).

    Attributes:
      views: one for each param it holds; several after a concatenation or a choice.
      selected: whether an activation chose which elements of the param these are
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


def own(provenance: Provenance) -> Provenance:
    """The provenance of an array that is not the one that `provenance` came from."""
    return Activation() if isinstance(provenance, Activation) else provenance


def paths_of(provenance: Provenance) -> tuple[tuple[str, ...], ...]:
    """The params that an array was computed from."""
    match provenance:
        case Weight(views=views):
            return tuple(view.path for view in views)
        case Derived(paths=paths):
            return paths
        case _:
            return ()


def is_activation(provenance: Provenance) -> bool:
    """Whether an array depends on more than params and constants."""
    selected = isinstance(provenance, Weight) and provenance.selected
    return selected or isinstance(provenance, Activation)


def join(a: Provenance, b: Provenance) -> Provenance:
    """The provenance of a value that is `a` on one path and `b` on another."""
    if a == b:
        return a
    if isinstance(a, Weight) and isinstance(b, Weight):
        views = tuple(dict.fromkeys((*a.views, *b.views)))
        # One param seen in two ways has no one map to its axes, and a loop that
        # changes the view each time would never come to an end.
        if len({view.path for view in views}) == len(views):
            return Weight(views, a.selected or b.selected)
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
    result = None
    if primitive in _RULES:
        result = _RULES[primitive](params, operands, in_shapes, out_shapes)
    elif primitive in _ELEMENTWISE:
        result = _elementwise(operands, in_shapes, out_shapes[0])
    if isinstance(result, list):
        return result
    return [result or _derived(operands, primitive)] * len(out_shapes)


def restated(primitive: str, operands: Sequence[Provenance]) -> Activation | None:
    """The activation whose elements an equation only casts, or arranges anew.

    What it makes follows from its parameters: two such equations of one array make the
    same array.
    """
    if primitive in _RESTATEMENTS and len(operands) == 1:
        (operand,) = operands
        return operand if isinstance(operand, Activation) else None
    return None


def shard(weight: Weight, shape: Sequence[int], local: Sequence[int]) -> Weight:
    """The provenance of one device's part of an array."""
    return _map_views(weight, lambda dims: _shards(dims, shape, local))


def _shards(dims, old, new):
    return [
        dim
        if before == after
        else tuple(atom._replace(size=after, whole=False) for atom in dim)
        for dim, before, after in zip(dims, old, new, strict=True)
    ]


_RESTATEMENTS = frozenset(
    """broadcast_in_dim convert_element_type expand_dims reshape squeeze
    transpose""".split()
)

# Arrays of one element each in, of one element each out, at the same place.
_ELEMENTWISE = frozenset(
    """abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp
    convert_element_type copy copy_p cos cosh device_put div erf erf_inv erfc exp exp2
    expm1 floor integer_pow is_finite log log1p log2 logistic max min mul name neg
    nextafter not one_minus_square or pcast polynomial pow pvary reduce_precision rem
    round rsqrt sharding_constraint mesh_cast reshard sign sin sinh sqrt square
    stop_gradient sub tan tanh xor""".split()
)


def _derived(operands: Sequence[Provenance], by: str) -> Provenance:
    if any(map(is_activation, operands)):
        return ACTIVATION
    paths = dict.fromkeys(p for operand in operands for p in paths_of(operand))
    if not paths:
        return CONSTANT
    return Derived(tuple(paths), by)


def _map_views(weight: Weight, change) -> Any:
    """A weight with the axes of its views changed; None if one has no such axes."""
    dims = [change(view.dims) for view in weight.views]
    if None in dims:
        return None
    views = zip(weight.views, dims, strict=True)
    views = tuple(View(view.path, view.shape, tuple(held)) for view, held in views)
    return Weight(views, weight.selected)


def _elementwise(operands, in_shapes, out_shape) -> Provenance | None:
    varying = [i for i, o in enumerate(operands) if not isinstance(o, Constant)]
    if len(varying) != 1 or not isinstance(operands[varying[0]], Weight):
        return None
    weight = operands[varying[0]]
    if in_shapes[varying[0]] != out_shape:
        return None
    constants = [shape for i, shape in enumerate(in_shapes) if i != varying[0]]
    return weight if _may_vary(weight, constants, out_shape) else None


def _may_vary(weight, constants, out_shape) -> bool:
    """Whether a weight stays one when combined with constants of some shapes.

    An array of constants may differ along an axis that was added to the weight, as
    in `x * scale`, where `x` happens not to depend on an input. What comes out is
    then no element of the param.
    """
    added = any(
        not dim and size != 1
        for view in weight.views
        for dim, size in zip(view.dims, out_shape, strict=True)
    )
    return not added or all(shape == () for shape in constants)


def _select(params, operands, in_shapes, out_shapes):
    """`where(mask, weight, 0)`, and a choice between weights."""
    which, *cases = operands
    weights = _beside_constants(cases)
    result = functools.reduce(join, weights) if weights else None
    if not isinstance(result, Weight):
        return None
    shapes = zip(cases, in_shapes[1:], strict=True)
    constants = [shape for case, shape in shapes if isinstance(case, Constant)]
    # A mask that is constant along an added axis cannot be told from one that is
    # not; an activation's choice may differ there, as between the tokens of a batch.
    if isinstance(which, Constant) and not _may_vary(
        result, [in_shapes[0], *constants], out_shapes[0]
    ):
        return None
    return dataclasses.replace(result, selected=result.selected or is_activation(which))


def _concatenate(params, operands, in_shapes, out_shapes):
    weights = _beside_constants(operands)
    views = tuple(dict.fromkeys(view for weight in weights for view in weight.views))
    return Weight(views, any(x.selected for x in weights)) if weights else None


def _stack(params, operands, in_shapes, out_shapes):
    joined = _concatenate(params, operands, in_shapes, out_shapes)
    axis = params["axis"]
    return joined and _map_views(joined, lambda dims: [*dims[:axis], (), *dims[axis:]])


def _beside_constants(operands) -> list[Weight]:
    """The weights among operands, if all others are constants."""
    weights = [operand for operand in operands if isinstance(operand, Weight)]
    constants = [operand for operand in operands if isinstance(operand, Constant)]
    return weights if len(weights) + len(constants) == len(operands) else []


def _moving(change: Any, chosen: bool = False):
    """The rule for equations that move elements of their first operand.

    Args:
      change: gives the factors in each axis of a result, from those before, the
        parameters of the equation, and the shapes before and after; None if the
        elements are moved in another way.
      chosen: whether the other operands say which elements are moved. Otherwise they
        have to be constants, such as that of a padding.
    """

    def rule(params, operands, in_shapes, out_shapes):
        operand, *others = operands
        if not (chosen or all(isinstance(other, Constant) for other in others)):
            return None
        if not isinstance(operand, Weight):
            return None if chosen else [operand] * len(out_shapes)
        selected = operand.selected or any(map(is_activation, others))
        weight = dataclasses.replace(operand, selected=selected)

        def moved(shape):
            return _map_views(weight, lambda d: change(d, params, in_shapes[0], shape))

        results = list(map(moved, out_shapes))
        return None if None in results else results

    return rule


def _transpose(dims, params, old, new):
    return [dims[axis] for axis in params["permutation"]]


def _broadcast(dims, params, old, new):
    places = {o: i for i, o in enumerate(params["broadcast_dimensions"])}
    return [dims[places[axis]] if axis in places else () for axis in range(len(new))]


def _squeeze(dims, params, old, new):
    return [dim for axis, dim in enumerate(dims) if axis not in params["dimensions"]]


def _expand(dims, params, old, new):
    rest, added = iter(dims), params["dimensions"]
    return [() if axis in added else next(rest) for axis in range(len(new))]


def _resize(dims, params, old, new):
    """Part of each axis, or more than all of it."""

    def part(dim, before, after, step):
        if before == after:
            return dim
        if after == 1:
            return ()
        if len(dim) == 1:
            (atom,) = dim
            return (Atom(atom.axis, after, atom.stride * step, False),)
        return factors.untracked(dim)

    return list(map(part, dims, old, new, params.get("strides") or (1,) * len(old)))


def _gather(dims, params, old, new):
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    dropped = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    kept = [axis for axis in range(len(old)) if axis not in dropped]
    offsets = dict(zip(numbers.offset_dims, kept, strict=True))
    indexed = [axis for axis in numbers.start_index_map if axis in dropped]
    indexed += numbers.operand_batching_dims
    sizes = [old[a] if a in dropped else size for a, size in enumerate(sizes)]
    dims = _resize(dims, {}, old, sizes)
    # Along the axes of the indices lie elements that differ in the axes that are
    # indexed, in any order.
    chosen = tuple(atom for axis in indexed for atom in factors.untracked(dims[axis]))
    return [
        dims[offsets[axis]] if axis in offsets else chosen if size != 1 else ()
        for axis, size in enumerate(new)
    ]


def _unstack(dims, params, old, new):
    return [dim for axis, dim in enumerate(dims) if axis != params["axis"]]


def _tile(dims, params, old, new):
    return [
        dim if before == after else factors.untracked(dim)
        for dim, before, after in zip(dims, old, new, strict=True)
    ]


def _all_gather(dims, params, old, new):
    return _shards(dims, old, new) if params["tiled"] else None


def _reshape(dims, params, old, new):
    order = params["dimensions"]
    if order is not None:  # a transpose comes first
        dims, old = [dims[axis] for axis in order], [old[axis] for axis in order]
    groups = factors.reshape_groups(old, new)
    return None if groups is None else factors.reshape_dims(dims, old, new, groups)


_RULES = {
    "transpose": _moving(_transpose),
    "broadcast_in_dim": _moving(_broadcast),
    "squeeze": _moving(_squeeze),
    "expand_dims": _moving(_expand),
    "reshape": _moving(_reshape),
    "select_n": _select,
    **dict.fromkeys(("slice", "split", "rev", "pad"), _moving(_resize)),
    "optimization_barrier": lambda params, operands, *_: list(operands),
    "dynamic_slice": _moving(_resize, chosen=True),
    lax.gather_p.name: _moving(_gather, chosen=True),
    "concatenate": _concatenate,
    "stack": _stack,
    "unstack": _moving(_unstack),
    "tile": _moving(_tile),
    **dict.fromkeys(("all_gather", "all_gather_invariant"), _moving(_all_gather)),
}
