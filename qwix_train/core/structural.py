"""What moves the elements of a quantized array, applied to its codes and scales.

Each function takes the parameters of an equation and gives quantized arrays whose
values are, bit for bit, what the equation makes of the dequantized array; or None where
there are none, as when a reshape would separate elements from their scale.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from qwix_train.core import formats, numerics, tiling
from qwix_train.core.operands import with_sharding
from qwix_train.core.qarray import QArray
from qwix_train.core.shape_ops import with_parts

Params = Mapping[str, Any]
Change = Callable[[Params, QArray, Sequence[Any]], list[QArray] | None]


def spread(array: QArray, axis: int) -> QArray:
    """The same values, with a scale for every index along an axis."""
    size = array.shape[axis]

    def change(part):
        if part.shape[axis] == size:
            return part
        if part.shape[axis] != 1:
            return tiling.repeated(part, axis, size)
        shape = (*part.shape[:axis], size, *part.shape[axis + 1 :])
        return jnp.broadcast_to(part, shape)

    return with_parts(array, array.qvalue, change)


def constrained(array: QArray, sharding: Any) -> QArray:
    """The same array with the sharding of its codes constrained.

    Scales follow where they can: what is gathered for a product is then the codes, and
    not what is dequantized of them.
    """
    return jax.tree.map(lambda part: constrained_part(part, sharding), array)


def constrained_part(part: jax.Array, sharding: Any) -> jax.Array:
    """An array with axes that another one has, in the sharding of that one.

    Args:
      part: codes or scales, which may have fewer entries along an axis.
      sharding: the sharding of the other array.

    Returns:
      The array, not sharded along axes that their mesh axes do not divide.
    """
    if not isinstance(sharding, NamedSharding):
        return with_sharding(part, sharding)

    def fits(size, names):
        if names is None or names is PartitionSpec.UNCONSTRAINED:
            return True
        names = names if isinstance(names, tuple) else (names,)
        return size % math.prod(sharding.mesh.shape[name] for name in names) == 0

    pairs = zip(part.shape, sharding.spec, strict=False)
    spec = [names if fits(size, names) else None for size, names in pairs]
    where = NamedSharding(sharding.mesh, PartitionSpec(*spec))
    return with_sharding(part, where)


def _every_part(change) -> Change:
    """A change that is the same for codes and scales."""

    def changed(params, array, others):
        return [jax.tree.map(lambda part: change(params, part), array)]

    return changed


def _transpose(params, part):
    return lax.transpose(part, params["permutation"])


def _squeeze(params, part):
    return lax.squeeze(part, params["dimensions"])


def _expand_dims(params, part):
    return lax.expand_dims(part, params["dimensions"])


def _broadcast(params, array, others):
    shape, places = params["shape"], params["broadcast_dimensions"]
    if others:  # a dynamic shape
        return None
    operand_axis = {place: axis for axis, place in enumerate(places)}

    def change(part):
        # Along a new axis, and along one that grows, all share what is there.
        sizes = [
            part.shape[operand_axis[axis]] if axis in operand_axis else 1
            for axis in range(len(shape))
        ]
        return lax.broadcast_in_dim(part, sizes, places)

    qvalue = lax.broadcast_in_dim(array.qvalue, shape, places)
    return [with_parts(array, qvalue, change)]


def _reshape(params, array, others):
    if others or params["dimensions"] is not None:
        return None
    return _attempt(lambda: [array.reshape(params["new_sizes"])])


def _slice(params, array, others):
    strides = params["strides"] or (1,) * array.ndim
    bounds = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    return _attempt(lambda: [array[tuple(slice(*bound) for bound in bounds)]])


def _attempt(change: Callable[[], list[QArray]]) -> list[QArray] | None:
    """A change by a method of the array, which raises where there is none."""
    try:
        return change()
    except ValueError:
        return None


def _rev(params, array, others):
    axes = params["dimensions"]
    parts = array.layouts.values()
    if any(array.shape[axis] % part.shape[axis] for part in parts for axis in axes):
        return None  # the last tile is shorter
    return [jax.tree.map(lambda part: lax.rev(part, axes), array)]


def _split(params, array, others):
    before = (slice(None),) * params["axis"]
    bounds = itertools.pairwise(itertools.accumulate(params["sizes"], initial=0))
    return _attempt(lambda: [array[(*before, slice(*bound))] for bound in bounds])


def _unstack(params, array, others):
    axis = params["axis"]
    index = (slice(None),) * axis
    return [array[(*index, i)] for i in range(array.shape[axis])]


def _dynamic_slice(params, array, others):
    sizes = params["slice_sizes"]
    cut = [axis for axis in range(array.ndim) if sizes[axis] != array.shape[axis]]
    if any(_is_tiled(array, axis) for axis in cut):
        return None

    def change(part):
        whole = [axis not in cut or part.shape[axis] == 1 for axis in range(part.ndim)]
        indices = [
            jnp.zeros_like(index) if whole[axis] else index
            for axis, index in enumerate(others)
        ]
        part_sizes = [
            part.shape[axis] if whole[axis] else size for axis, size in enumerate(sizes)
        ]
        # The equation clamps negative indices; those from the end are added already.
        return lax.dynamic_slice(
            part, indices, part_sizes, allow_negative_indices=False
        )

    return [with_parts(array, change(array.qvalue), change)]


def _gather(params, array, others):
    """Rows of a table, each with its own scale."""
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    indexed = {*numbers.start_index_map, *numbers.operand_batching_dims}
    for axis, size in enumerate(sizes):
        if axis in indexed and _is_tiled(array, axis):
            return None
        if axis not in indexed and size != array.shape[axis]:
            return None
    (indices,) = others
    for axis in indexed:
        array = spread(array, axis)

    def take(part, fill_value):
        return lax.gather(
            part,
            indices,
            numbers,
            [
                size if axis in indexed else part.shape[axis]
                for axis, size in enumerate(sizes)
            ],
            unique_indices=params["unique_indices"],
            indices_are_sorted=params["indices_are_sorted"],
            mode=params["mode"],
            fill_value=fill_value,
        )

    # Out of bounds, the code that stands for 1 is scaled by what the float array is
    # filled with. Scales that are codes know NaN, and not any number.
    fill_value = params["fill_value"]
    fill_value = jnp.nan if fill_value is None else fill_value
    one = numerics.format_of(array.qtype).one
    is_nan = isinstance(fill_value, float) and math.isnan(fill_value)
    if not is_nan and (formats.is_coded(array.scale) or one is None):
        return None
    fill = {"scale": fill_value, "zero_point": 0, "tensor_scale": 1}
    parts = {name: take(part, fill[name]) for name, part in array.layouts.items()}
    codes = take(array.qvalue, 0 if one is None else one)  # Each of them is NaN.
    return [dataclasses.replace(array, qvalue=codes, **parts)]


def _concatenate(params, arrays):
    """One array of several: of one type, all or none with zero points."""
    axis, first = params["dimension"], arrays[0]
    if len({(x.qtype, x.dtype, x.scale.dtype, *x.layouts) for x in arrays}) > 1:
        return None
    sizes = [x.shape[axis] for x in arrays]
    parts = [x.layouts for x in arrays]
    for values in zip(*map(jax.tree.leaves, parts), strict=True):
        counts = [{value.shape[a] for value in values} for a in range(first.ndim)]
        # Along other axes, one scale is repeated where another array has more.
        if any(len(c - {1}) > 1 for a, c in enumerate(counts) if a != axis):
            return None

    def joined(*values):
        most = [max(counts) for counts in zip(*(v.shape for v in values), strict=True)]
        values = _aligned(sizes, values, axis)
        full = [(*most[:axis], v.shape[axis], *most[axis + 1 :]) for v in values]
        values = [jnp.broadcast_to(v, n) for v, n in zip(values, full, strict=True)]
        return lax.concatenate(values, axis)

    codes = lax.concatenate([x.qvalue for x in arrays], axis)
    return dataclasses.replace(first, qvalue=codes, **jax.tree.map(joined, *parts))


def _stack(params, arrays):
    axis = params["axis"]
    arrays = [jax.tree.map(lambda x: lax.expand_dims(x, [axis]), x) for x in arrays]
    return _concatenate({"dimension": axis}, arrays)


def _aligned(sizes, values, axis):
    """Scales such that those of the joined array all share equally many elements."""
    tile = math.gcd(
        *(
            size // value.shape[axis] if size % value.shape[axis] == 0 else 1
            for size, value in zip(sizes, values, strict=True)
        )
    )
    aligned = []
    for size, value in zip(sizes, values, strict=True):
        each = -(-size // value.shape[axis]) // tile
        value = jnp.repeat(value, each, axis) if each > 1 else value
        aligned.append(lax.slice_in_dim(value, 0, size // tile, axis=axis))
    return aligned


def _is_tiled(array: QArray, axis: int) -> bool:
    parts = array.layouts.values()
    return any(part.shape[axis] not in (1, array.shape[axis]) for part in parts)


def _negate(params, array, others):
    if formats.is_coded(array.scale):  # They have no sign that is used.
        codes = numerics.negated(array.qvalue, array.qtype)
        return [dataclasses.replace(array, qvalue=codes)]
    return [dataclasses.replace(array, scale=-array.scale)]


# The equations that say how an array is sharded, and the parameter that says it.
CONSTRAINTS = {"sharding_constraint": "sharding", "reshard": "dst_sharding"}


def _constrain(params, array, others):
    (sharding,) = (params[key] for key in CONSTRAINTS.values() if key in params)
    return [constrained(array, sharding)]


def _unchanged(params, array, others):
    return [array]


CHANGES: dict[str, Change] = {
    "transpose": _every_part(_transpose),
    "squeeze": _every_part(_squeeze),
    "expand_dims": _every_part(_expand_dims),
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "slice": _slice,
    "rev": _rev,
    "split": _split,
    "unstack": _unstack,
    "dynamic_slice": _dynamic_slice,
    lax.gather_p.name: _gather,
    "neg": _negate,
    **dict.fromkeys(CONSTRAINTS, _constrain),
    "copy": _unchanged,
    "copy_p": _unchanged,
    "stop_gradient": _unchanged,
}
"""By primitive: the results of an equation whose first operand is quantized."""

JOINS: dict[str, Callable[[Params, Sequence[QArray]], QArray | None]] = {
    "concatenate": _concatenate,
    "stack": _stack,
}
"""By primitive: the result of an equation of which all operands are quantized."""
