"""Shards and boxes new adapters as their params are."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx
from flax.linen import meta
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from qwix_train.lora.layout import AdapterLayout
from qwix_train.planning.leaves import AdapterPart


def placed(
    value: Any, layout: AdapterLayout, part: AdapterPart, param: Any, box: Any
) -> Any:
    """A part of an adapter, placed and boxed as the param that it belongs to.

    Args:
      value: the part.
      layout: the layout of the adapter.
      part: `a`, `b` or `magnitude`.
      param: the param, unboxed. If it is an array on a mesh, so is the result.
      box: the box in which Flax holds the param, such as `nn.Partitioned` or an
        `nnx.Variable`; None if it is in no box.

    Returns:
      The array, in a box of the same kind if there is a box. For an `nnx.Variable` the
      box is an `nnx.LoRAParam`.
    """
    axes = layout.axes_of(part)
    sharding = None
    if isinstance(param, jax.Array) and not isinstance(param, Tracer):
        sharding = param.sharding
    if isinstance(sharding, NamedSharding):
        spec = PartitionSpec(*_names(tuple(sharding.spec), axes))
        value = jax.device_put(value, NamedSharding(sharding.mesh, spec))
    if isinstance(box, nnx.Variable):
        metadata = dict(box.get_metadata())
        if (names := metadata.get("out_sharding")) is not None:
            metadata["out_sharding"] = type(names)(_names(names, axes))
        return nnx.LoRAParam(value, **metadata)
    if isinstance(box, meta.AxisMetadata):
        boxed: Any = box.replace_boxed(value)
        fields = {field.name for field in dataclasses.fields(boxed)}
        names = {
            name: tuple(_names(getattr(boxed, name), axes))
            for name in ("names", "mesh_axes")
            if name in fields
        }
        return dataclasses.replace(boxed, **names)
    return value


def _names(names: Sequence[Any], axes: Sequence[int | None]) -> list[Any]:
    """The names of the axes of a part, from those of the axes of the param."""
    padded = [*names, *[None] * len(axes), *[None] * max([a or 0 for a in axes] + [0])]
    return [None if axis is None else padded[axis] for axis in axes]
