"""Quantized params in a tree: their metadata, and the arrays that they stand for.

A quantized param is a `WithAux` in the place of an array. Flax keeps metadata, such as
the names of axes for sharding, in boxes around arrays (`nn.Partitioned`,
`nnx.Variable`); around the param's own parts here, so that each part is sharded by its
own shape.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Collection
from typing import Any

import jax
from flax import linen as nn
from flax import nnx
from flax.linen import meta
from jax import numpy as jnp
from jax.core import Tracer

from qwix_train.core.compiled import quantize_compiled
from qwix_train.core.how import HowToQuantize
from qwix_train.core.operands import is_concrete, with_sharding
from qwix_train.core.packed_array import PackedQArray, pack, quantize_packed, unpack
from qwix_train.core.qarray import QArray, WithAux, dequantize, quantize_array
from qwix_train.core.rotation import Rotation
from qwix_train.trace import function

# Where boxes keep the names of axes.
_LINEN_NAMES = ("names", "mesh_axes")
_NNX_NAMES = "out_sharding"


QUANTIZED_ARRAYS = (QArray, PackedQArray)
"""The classes of arrays of codes."""


def is_quantized(leaf: Any) -> bool:
    """Whether a leaf of a tree of params is quantized."""
    return isinstance(leaf, WithAux)


def is_box(leaf: Any) -> bool:
    """Whether a leaf is an array in a box that Flax keeps metadata in."""
    return isinstance(leaf, meta.AxisMetadata | nnx.Variable)


def is_whole(leaf: Any) -> bool:
    """Whether a node of a tree of params is one param, boxed or quantized."""
    return is_quantized(leaf) or is_box(leaf)


def by_path(tree: Any) -> dict[tuple[str, ...], Any]:
    """The params of a tree, by path; a quantized one is one."""
    return function.by_path(tree, is_quantized)


def quantize_param(
    param: Any, how: HowToQuantize, scale: Any = None, zero_point: Any = None
) -> WithAux:
    """Quantizes one param.

    Args:
      param: a float array, or the shape of one (`jax.ShapeDtypeStruct`), unboxed.
      how: how to quantize it.
      scale: its scale, in the place of that of its range.
      zero_point: its zero point, next to the scale.

    Returns:
      The quantized param; of shapes, too, if that is what `param` is.
    """
    if isinstance(param, jax.ShapeDtypeStruct):
        change = functools.partial(quantize_array, how=how.in_basis)
        return WithAux(jax.eval_shape(change, param), how)
    array = _rotated(param, how)
    return WithAux(quantize_compiled(array, how.in_basis, scale, zero_point), how)


def packed(quantized: WithAux, layers: Collection[int] = ()) -> WithAux:
    """A quantized param with its codes packed and its scales quantized.

    Args:
      quantized: the param, unboxed; or the shapes of one. One that is packed already
        stays as it is.
      layers: the axes that stack layers. Those that are not in front are packed as any
        other.

    Raises:
      ValueError: its codes do not have 4 bits.
    """
    if isinstance(quantized.array, PackedQArray):
        return quantized
    change = functools.partial(pack, layer_axes=_leading(layers))
    return WithAux(result_of(change, quantized.array), quantized.how)


def packed_as(quantized: WithAux, target: WithAux) -> WithAux:
    """A quantized param, packed if another one is, with the same axes of layers.

    Args:
      quantized: the param, or its shapes.
      target: the other one, or its shapes.
    """
    if not isinstance(target.array, PackedQArray):
        return quantized
    return packed(quantized, range(target.array.layer_axes))


def quantize_param_packed(
    param: Any, how: HowToQuantize, layers: Collection[int] = ()
) -> WithAux:
    """`packed(quantize_param(param, how), layers)`, faster and in less memory."""
    in_basis, leading = how.in_basis, _leading(layers)

    def change(array):
        return quantize_packed(_rotated(jnp.asarray(array), how), in_basis, leading)

    return WithAux(result_of(change, param), how)


def _rotated(param: Any, how: HowToQuantize) -> Any:
    """A param in the basis that it is quantized in, on the devices that it is on."""
    if how.rotation is None:
        return param
    array = jnp.asarray(param)
    known = is_concrete(array) and array.committed
    return _in_basis(array, how.rotation, array.sharding if known else None)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _in_basis(array: jax.Array, rotation: Rotation, sharding: Any) -> jax.Array:
    result = rotation.apply(array)
    # A block that is longer than a shard would make a copy of the axis on each device.
    return result if sharding is None else with_sharding(result, sharding)


def check_own_basis(leaf: Any) -> None:
    """Complains of a param whose codes are those of a rotated array.

    Raises:
      ValueError: if it is one; the message begins with "it".
    """
    if is_quantized(leaf) and leaf.how.rotation is not None:
        raise ValueError(
            f"it is quantized in a basis of its own (rotation={leaf.how.rotation.name})"
            ", which can be held and run by this library alone"
        )


def result_of(function: Callable[[Any], Any], array: Any) -> Any:
    """The result of a function of an array; the shape of it for that of an array."""
    is_shape = isinstance(jax.tree.leaves(array)[0], jax.ShapeDtypeStruct)
    return jax.eval_shape(function, array) if is_shape else function(array)


def _leading(layers: Collection[int]) -> int:
    """How many axes of layers stand in front."""
    count = 0
    while count in layers:
        count += 1
    return count


def parts(array: QArray | PackedQArray) -> dict[str, Any]:
    """The arrays that stand for one, by name.

    Example:
      >>> list(parts(QArray(jnp.ones((4, 2), jnp.int8), jnp.ones((1, 2)))))
      ['qvalue', 'scale']
    """
    held = {
        field.name: getattr(array, field.name)
        for field in dataclasses.fields(array)  # pyright: ignore[reportArgumentType]
        if field.metadata.get("pytree_node", True)
    }
    return {name: part for name, part in held.items() if part is not None}


def dequantized(quantized: WithAux) -> jax.Array:
    """The array that a quantized param stands for, or the shape of it."""
    array, rotation = unbox(quantized).array, quantized.how.rotation
    if not isinstance(array, QUANTIZED_ARRAYS):
        raise TypeError(f"Expected a quantized weight, got {type(array).__name__}.")

    def change(array):
        array = unpack(array) if isinstance(array, PackedQArray) else array
        values = dequantize(array)
        return values if rotation is None else rotation.undo(values)

    return result_of(change, array)


def unbox(tree: Any) -> Any:
    """A tree without boxes. No sharding is applied."""

    def value(leaf):
        while is_box(leaf):
            if isinstance(leaf, nnx.Variable):
                leaf = leaf.get_raw_value()
            elif isinstance(leaf, meta.Partitioned):
                leaf = leaf.unbox(apply_constraint=False)
            else:
                leaf = leaf.unbox()
        return leaf

    return jax.tree.map(value, tree, is_leaf=is_box)


def box(quantized: Any, boxed: Any) -> Any:
    """Puts the parts of a quantized param in boxes such as its array has.

    Args:
      quantized: the param, unboxed; or a float array that takes the place of another.
      boxed: the array that it stands for, in its box; or any other object.

    Returns:
      The param, with the name of an axis dropped from the parts that have one entry
      along it, or tiles that the mesh does not divide. See `box_part`.
    """
    if not is_box(boxed):
        return quantized
    if not is_quantized(quantized):
        return _reboxed(quantized, boxed)
    array = quantized.array
    if not isinstance(array, PackedQArray):
        return jax.tree.map(lambda part: box_part(part, boxed), quantized)
    # What stands for the scales of a layer has its axes of layers, and one of its own.
    named = array.layer_axes
    by_layer = {
        name: box_part(getattr(array, name), boxed, named)
        for name in ("scale_steps", "scale_mean")
        if getattr(array, name) is not None
    }
    whole = jax.tree.map(lambda part: box_part(part, boxed), array)
    return WithAux(whole.replace(**by_layer), quantized.how)


def aval(quantized: WithAux) -> jax.ShapeDtypeStruct:
    """The shape and dtype of the array that a quantized param stands for.

    Its sharding is that of the codes; see `shape_of`.
    """
    codes = shape_of(_codes(quantized))
    return codes.update(shape=quantized.shape, dtype=quantized.dtype)


def shape_of(array: Any) -> jax.ShapeDtypeStruct:
    """The shape and dtype of an array, concrete, traced or abstract.

    On a mesh with explicit axes also the sharding, which belongs to the type there: a
    model that reshards its weights must find what there is to reshard.
    """
    sharding = None
    if isinstance(array, jax.Array):
        found = jax.typeof(array).sharding
        if jax.sharding.AxisType.Explicit in found.mesh.axis_types:
            sharding = found
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)


def box_of(quantized: WithAux) -> Any:
    """The box around the codes of a quantized param; None if there is none."""
    codes = _codes(quantized)
    return codes if is_box(codes) else None


def _codes(quantized: WithAux) -> Any:
    array = quantized.array
    if isinstance(array, PackedQArray):
        return array.packed
    return array.qvalue if isinstance(array, QArray) else array


def box_array(quantized: WithAux, array: Any) -> Any:
    """An array in the box that a quantized param has around its codes."""
    outer = box_of(quantized)
    return array if outer is None else _reboxed(array, outer)


def _reboxed(array: Any, boxed: Any) -> Any:
    """An array in the box of another one of its shape."""
    if isinstance(boxed, nnx.Variable):
        return boxed.replace(array)
    return boxed.replace_boxed(array)


def box_part(part: Any, boxed: Any, named: int | None = None) -> Any:
    """Puts an array with the axes of another one in a box such as that one has.

    Args:
      part: the array, or its shape.
      boxed: the other one, in its box.
      named: how many axes of `part`, from the first, are those of the other one; all
        if None.

    Returns:
      The array, with the name of an axis dropped where it has one entry along it, or
      a number of tiles that the mesh does not divide: that of the box, of its array, or
      of `jax.set_mesh`.
    """

    def kept(names):
        if not isinstance(names, tuple | list | jax.sharding.PartitionSpec):
            return names
        own = names[:named]
        sizes = (*part.shape, *(1 for _ in range(len(own) - part.ndim)))
        pieces = _pieces(boxed, own)
        masked = [
            None if size == 1 or size % count else name
            for name, size, count in zip(own, sizes, pieces, strict=False)
        ]
        # Linen wants a name for each axis.
        masked += [None] * (min(len(names), part.ndim) - len(masked))
        is_spec = isinstance(names, jax.sharding.PartitionSpec)
        return jax.sharding.PartitionSpec(*masked) if is_spec else tuple(masked)

    def kept_in(metadata):
        names = {key: kept(metadata[key]) for key in metadata if key == _NNX_NAMES}
        return {**metadata, **names}

    if isinstance(boxed, nnx.Variable):
        metadata = kept_in(boxed.get_metadata())
        if isinstance(part, jax.ShapeDtypeStruct):
            # The constructor would shard it, which a shape cannot be.
            return type(boxed).from_metadata(part, metadata)
        return type(boxed)(part, **metadata)
    new = boxed.replace_boxed(part)
    if isinstance(new, nnx.bridge.NNXMeta):
        return dataclasses.replace(new, metadata=kept_in(new.metadata))
    fields = {field.name for field in dataclasses.fields(new)}  # type: ignore[arg-type]
    names = {key: kept(getattr(new, key)) for key in _LINEN_NAMES if key in fields}
    return dataclasses.replace(new, **names)  # type: ignore[type-var]


def _pieces(boxed: Any, names: Any) -> list[int]:
    """Into how many parts a mesh cuts each axis of a box, 1 where that is not known.

    Where rules give a logical name several choices, their least common multiple.
    """
    array, mesh = unbox(boxed), jax.sharding.get_abstract_mesh()
    if isinstance(array, jax.Array) and not isinstance(array, Tracer):
        mesh = getattr(array.sharding, "mesh", mesh)
    is_variable = isinstance(boxed, nnx.Variable)
    metadata = boxed.get_metadata() if is_variable else vars(boxed)
    mesh = metadata.get("mesh") or mesh
    own = metadata.get("rules") or metadata.get("sharding_rules") or ()
    rules = [*own, *nn.get_logical_axis_rules()]

    def count(name):
        choices = [axes for alias, axes in rules if alias == name] or [name]
        return math.lcm(*(size(axes) for axes in choices))

    def size(axes):
        return math.prod(mesh.shape.get(axis, 1) for axis in jax.tree.leaves(axes))

    return [math.prod(map(count, jax.tree.leaves(entry))) for entry in names]


# So that traced models find an array where their param is a quantized one, and
# attributes of NNX modules may be quantized arrays.
function.register_stored_type(
    WithAux, function.StoredType(unbox=unbox, aval=aval, box=box_array)
)
for _cls in (QArray, PackedQArray, WithAux):
    nnx.register_data_type(_cls)
