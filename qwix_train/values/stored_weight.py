"""A quantized weight on its way through a traced function.

What a model does to a weight before a product (transposes, casts, slices it, looks up
rows of it) is done to its codes and scales where that gives exactly the elements that
the float array would have. Elsewhere the weight is dequantized first.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax import numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from qwix_train import ops
from qwix_train.core import formats, numerics, structural
from qwix_train.core.dequantized_product import dequantized_product
from qwix_train.core.packed_array import PackedQArray, unpack
from qwix_train.core.qarray import QArray, WithAux, dequantize_stored
from qwix_train.trace.carried import Carried
from qwix_train.trace.function import Param

_CAST = "convert_element_type"

# Called with the path of a param and the name of the primitive that it was
# dequantized for.
Listener = Callable[[str, str], None]


@dataclasses.dataclass(frozen=True, eq=False)
class StoredWeight(Carried):
    """A quantized weight, or a view of one.

    Attributes:
      array: the codes and scales.
      dtype: the dtype that the model cast it to.
      path: the path of the param.
      origin: the param as it is stored, if this is the whole of it, untouched.
      listener: told where it is dequantized.
    """

    array: QArray
    dtype: Any
    path: str
    origin: WithAux | None = None
    listener: Listener | None = None

    follows = True

    @functools.cached_property
    def value(self) -> jax.Array:
        """The dequantized array."""
        return dequantize_stored(self.array).astype(self.dtype)

    @property
    def next_to_floats(self) -> QArray | jax.Array:
        """The operand of a product with a float array, in the dtype of the model."""
        # In float16, unlike in bfloat16, the scales of ordinary weights have few bits
        # left, or none.
        narrowed = self.dtype != self.array.dtype
        if narrowed and self.dtype == jnp.float16:
            return self.value
        return self.array.astype(self.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return self.array.shape

    @property
    def arrays(self) -> tuple[Any, ...]:
        """The codes, the scale, and the zero point if there is one."""
        return tuple(jax.tree.leaves(self.array))

    def inside(self, arrays: Sequence[Any]) -> StoredWeight:
        """The same weight, within a body."""
        structure = jax.tree.structure(self.array)
        return self._with(jax.tree.unflatten(structure, arrays))

    @property
    def returned(self) -> Any:
        """The param as it is stored, or the dequantized array of a view."""
        if self.origin is not None:
            return self.origin
        self.read_by("return")
        return self.value

    def sliced(self) -> tuple[Sequence[Any], Callable[..., StoredWeight]]:
        """The codes and scales of each slice along axis 0."""
        array = structural.spread(self.array, 0)

        def one(*parts):
            structure = jax.tree.structure(array)
            return self._with(jax.tree.unflatten(structure, parts))

        return self._with(array).arrays, one

    def apply(
        self,
        primitive: str,
        params: Mapping[str, Any],
        operands: Sequence[Any],
        run: Callable[..., list[Any]],
    ) -> list[Any] | None:
        """See `Carried.apply`."""
        del run
        if ops.is_product(primitive):
            return [product(primitive, params, operands)]
        if primitive == _CAST:
            return self.moved(primitive, params)
        if primitive in structural.JOINS:
            if not all(isinstance(x, StoredWeight) for x in operands):
                return None
            if any(x.dtype != self.dtype for x in operands):
                return None
            arrays = [x.array for x in operands]
            joined = structural.JOINS[primitive](params, arrays)
            return None if joined is None else [self._with(joined)]
        if primitive in ("mul", "div"):
            return self._scaled(primitive, operands)
        if primitive in structural.CHANGES and operands[0] is self:
            if any(isinstance(x, StoredWeight) for x in operands[1:]):
                return None
            return self.moved(primitive, params, operands[1:])
        return None

    def moved(
        self, primitive: str, params: Mapping[str, Any], others: Sequence[Any] = ()
    ) -> list[StoredWeight] | None:
        """The results of an equation that moves the elements of this, or casts them.

        Args:
          primitive: the name of its primitive.
          params: its parameters.
          others: its operands but for the first, which is this.
        """
        if primitive == _CAST:
            return self._cast(params["new_dtype"])
        results = structural.CHANGES[primitive](params, self.array, others)
        return None if results is None else [self._with(array) for array in results]

    def read_by(self, primitive: str) -> None:
        """Tells the listener that the weight is dequantized."""
        if self.listener is not None:
            self.listener(self.path, primitive)

    def constrained(self, sharding: Any) -> StoredWeight:
        """The weight with the sharding of its codes constrained."""
        return self._with(structural.constrained(self.array, sharding))

    def _with(self, array: QArray) -> StoredWeight:
        return StoredWeight(array, self.dtype, self.path, listener=self.listener)

    def _scaled(self, primitive: str, operands) -> list[StoredWeight] | None:
        # A product with one number is one with the scales, to float rounding.
        left, right = operands
        if left is not self:
            left, right = right, left
        if isinstance(right, StoredWeight) or jnp.shape(right) != ():
            return None
        if self.dtype != jnp.float32 or self.array.dtype != jnp.float32:
            return None
        if primitive == "div" and operands[0] is not self:
            return None
        name, scale = "scale", self.array.scale
        if formats.is_coded(scale):
            name, scale = "tensor_scale", self.array.tensor_scale
            if scale is None:
                scale = jnp.ones((1,) * self.array.ndim, jnp.float32)
        scale = scale * right if primitive == "mul" else scale / right
        return [self._with(dataclasses.replace(self.array, **{name: scale}))]

    def _cast(self, dtype) -> list[StoredWeight] | None:
        # The scale keeps its dtype, so that the weight is rounded once, to the last
        # dtype. After a cast to fewer bits, one to more would have to round twice.
        narrowed = self.dtype != self.array.dtype
        if not numerics.is_quantizable(dtype) or (narrowed and dtype != self.dtype):
            return None
        dtype = jnp.dtype(dtype)
        return [StoredWeight(self.array, dtype, self.path, listener=self.listener)]


class PackedWeight(StoredWeight):
    """A quantized weight whose codes are packed, or a view of one.

    It is unpacked where it is read. A product does that within itself, forward and
    backward, so that no float weight is kept in between; and what moves the elements
    on the way to a product, or casts them, is done there, too.

    Attributes:
      packed: the packed array.
      view: what was done to it since: primitives, and their parameters.
    """

    packed: PackedQArray
    view: tuple[tuple[str, Mapping[str, Any]], ...]

    def __init__(
        self,
        packed: PackedQArray,
        path: str,
        origin: WithAux | None = None,
        listener: Listener | None = None,
        view: tuple[tuple[str, Mapping[str, Any]], ...] = (),
    ):
        fields = dict(packed=packed, path=path, view=view)
        for name, value in {**fields, "origin": origin, "listener": listener}.items():
            object.__setattr__(self, name, value)  # Its class is frozen.
        dtypes = [p["new_dtype"] for name, p in view if name == _CAST]
        object.__setattr__(self, "dtype", jnp.dtype([packed.dtype, *dtypes][-1]))

    @functools.cached_property
    def array(self) -> QArray:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The codes and scales, unpacked."""
        return self._unpacked(self.packed).array

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        if not self.view:
            return self.packed.shape
        unpacked = jax.eval_shape(lambda x: self._unpacked(x).array, self.packed)
        return unpacked.shape

    @property
    def arrays(self) -> tuple[Any, ...]:
        """The packed codes, and what stands for the scales and zero points."""
        return tuple(jax.tree.leaves(self.packed))

    def inside(self, arrays: Sequence[Any]) -> PackedWeight:
        """The same weight, within a body."""
        packed = jax.tree.unflatten(jax.tree.structure(self.packed), arrays)
        return PackedWeight(packed, self.path, listener=self.listener, view=self.view)

    def sliced(self) -> tuple[Sequence[Any], Callable[..., StoredWeight]]:
        """The packed arrays of each slice along axis 0, where that is one of layers."""
        if self.view or not self.packed.layer_axes:
            return super().sliced()
        return self.arrays, lambda *parts: self.inside(parts)

    def apply(
        self,
        primitive: str,
        params: Mapping[str, Any],
        operands: Sequence[Any],
        run: Callable[..., list[Any]],
    ) -> list[Any] | None:
        """See `Carried.apply`."""
        moves = primitive in structural.CHANGES and len(operands) == 1
        if not moves and primitive != _CAST:
            return super().apply(primitive, params, operands, run)
        view = (*self.view, (primitive, params))
        later = PackedWeight(self.packed, self.path, listener=self.listener, view=view)
        try:
            jax.eval_shape(lambda packed: later._unpacked(packed).arrays, self.packed)
        except _NoView:
            return None
        return [later]

    def multiplied(
        self, name: str, params: Mapping[str, Any], operands: Sequence[Any]
    ) -> jax.Array:
        """The product of this and an array, which are the factors in any order."""
        side = 0 if operands[0] is self else 1

        def weight_of(packed):
            weight = self._unpacked(packed).next_to_floats
            return dequantize_stored(weight) if isinstance(weight, QArray) else weight

        def of_arrays(x, weight, *others):
            factors = [weight, x] if side == 0 else [x, weight]
            return product(name, params, [*factors, *others])

        x, others = operands[1 - side], operands[2:]
        return dequantized_product(of_arrays, weight_of, x, self.packed, *others)

    def _unpacked(self, packed: PackedQArray) -> StoredWeight:
        for primitive, params in self.view:
            if primitive in structural.CONSTRAINTS:  # What is gathered is the bytes.
                sharding = params[structural.CONSTRAINTS[primitive]]
                bytes_, scales = (
                    structural.constrained_part(part, sharding)
                    for part in (packed.packed, packed.scale_codes)
                )
                packed = dataclasses.replace(packed, packed=bytes_, scale_codes=scales)
            elif primitive != _CAST:
                break
        array = unpack(packed)
        weight = StoredWeight(array, packed.dtype, self.path, listener=self.listener)
        for primitive, params in self.view:
            results = weight.moved(primitive, params)
            if results is None or len(results) > 1:
                raise _NoView
            (weight,) = results
        return weight


class _NoView(Exception):
    """An equation makes of a quantized array what is not one."""


def stored_weight(param: Param, listener: Listener | None = None) -> Carried | None:
    """What an evaluation carries for a param that is stored quantized.

    Args:
      param: the param; its value is a `WithAux`.
      listener: told where it is dequantized.

    Returns:
      The weight; None for what is no weight, such as the range of an activation.
    """
    whole, path = param.value, "/".join(param.path)
    if isinstance(whole.array, PackedQArray):
        return PackedWeight(whole.array, path, whole, listener)
    if not isinstance(whole.array, QArray):
        return None
    return StoredWeight(whole.array, whole.dtype, path, whole, listener)


def product(name: str, params: Mapping[str, Any], operands: Sequence[Any]) -> jax.Array:
    """A product whose operands may be quantized.

    Args:
      name: the name of its primitive.
      params: the parameters of its equation.
      operands: the factors, arrays, `QArray`s or `StoredWeight`s; and what else the
        equation reads.
    """
    kind = ops.product_of(name)
    operands = _gathered(kind, params, operands)
    left, right = operands[: kind.sides]
    for x, other in ((left, right), (right, left)):
        if isinstance(x, PackedWeight) and _is_float_array(other):
            return x.multiplied(name, params, operands)
    preferred = params["preferred_element_type"]
    preferred = preferred or numerics.promote_types(left.dtype, right.dtype)
    factors = _product_operand(left, right), _product_operand(right, left)
    # The stored scale may be wider than what the model cast it to; some products
    # cannot give a result that is narrower than an operand.
    wide = numerics.promote_types(preferred, *(x.dtype for x in factors))
    values = [*factors, *operands[kind.sides :]]
    return kind.product(params, values, wide).astype(preferred)


def _gathered(
    kind: ops.OpKind, params: Mapping[str, Any], operands: Sequence[Any]
) -> list[Any]:
    """The operands of a product, with the codes of weights gathered that have to be.

    Where a mesh is explicit, types say how arrays are sharded: a device that has a part
    of the batch needs all of what the product contracts, which it is to be sent as
    codes, not as what is dequantized from them.
    """
    found, mesh = list(operands), jax.sharding.get_abstract_mesh()
    if AxisType.Explicit not in mesh.axis_types:
        return found
    for side, (weight, x) in enumerate([operands[:2], operands[1::-1]]):
        if not isinstance(weight, StoredWeight) or isinstance(x, StoredWeight):
            continue
        held, given = _spec(weight), _spec(x)
        kept = kind.axes(params, 1 - side, len(given)).kept
        names = {name for axis in kept for name in given[axis]}
        contracted = kind.axes(params, side, len(held)).contracted
        if not names & {name for axis in contracted for name in held[axis]}:
            continue
        rest = [tuple(name for name in axis if name not in names) for axis in held]
        spec = PartitionSpec(*(axis or None for axis in rest))
        where = {"dst_sharding": NamedSharding(mesh, spec)}
        (found[side],) = weight.apply("reshard", where, [weight], list) or [weight]
    return found


def _spec(value: Any) -> list[tuple[str, ...]]:
    """For each axis of an operand the mesh axes that it is sharded over."""
    shape = jax.eval_shape(lambda: value.array if hasattr(value, "array") else value)
    codes = shape.qvalue if isinstance(shape, QArray) else shape
    spec = getattr(codes.sharding, "spec", ())
    named = [(x,) if isinstance(x, str) else tuple(x or ()) for x in spec]
    return named + [()] * (codes.ndim - len(named))


def _is_float_array(value: Any) -> bool:
    if isinstance(value, StoredWeight | QArray):
        return False
    return jnp.issubdtype(value.dtype, jnp.floating)


def _product_operand(value: Any, other: Any) -> Any:
    if not isinstance(value, StoredWeight):
        return value
    # The sums of codes are scaled in the dtype of the stored scale, which is at least
    # as exact. Next to a float array the weight has the dtype that the model gave it.
    in_codes = isinstance(other, StoredWeight | QArray)
    return value.array if in_codes else value.next_to_floats
