"""Which params get adapters, of which shapes, and what an adapter adds to its param.

An adapter belongs to a param, not to an op: wherever the model reads the param it finds
``W + scaling * A @ B``. What of ``W`` are the rows of ``A`` and the columns of ``B`` is
decided by the first op that a rule matches: it contracts the axes of ``A``.
"""

from __future__ import annotations

import dataclasses
import math
import string
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from qwix_train import ops
from qwix_train.core import numerics
from qwix_train.lora.rules import LoraRule
from qwix_train.planning import weights
from qwix_train.planning.leaves import AdapterPart, adapter_path
from qwix_train.planning.plan import OpPlan, Path, Plan
from qwix_train.trace.analyze import Op
from qwix_train.trace.provenance import View


@dataclasses.dataclass(frozen=True)
class AdapterLayout:
    """The shapes of the adapter of one param, and how they map to its axes.

    Attributes:
      path: the path of the param.
      shape: its shape.
      rank: the number of columns of ``A`` and rows of ``B``.
      alpha: the numerator of the scaling.
      scaling: what ``A @ B`` is multiplied by.
      dora: whether there is a magnitude.
      op: the name of the op that decided.
      layers: axes of the param of which each index has an adapter of its own, such as
        the layers of a scan. They stand in each part where they stand in the param, or
        last where it has fewer axes, so that what maps over the param maps over them.
      a_axes: the other axes of the param that ``A`` has, in its order.
      b_axes: the other axes of the param that ``B`` has, in its order. Of a batched
        `dot_general` some are in both.
      contracted: the axes that the op contracts.
      flat: whether the contracted axes are one axis of ``A``, and the kept ones one of
        ``B``, as for `dot_general`.
      particulars: what ops do with the param that a plain linear layer, convolution or
        lookup does not, in words: that another op contracts other axes of it, or that
        a convolution has groups. Other libraries adapt plain layers alone.
    """

    path: Path
    shape: tuple[int, ...]
    rank: int
    alpha: float
    scaling: float
    dora: bool
    op: str
    layers: tuple[int, ...]
    a_axes: tuple[int, ...]
    b_axes: tuple[int, ...]
    contracted: tuple[int, ...]
    flat: bool
    particulars: tuple[str, ...] = ()

    @property
    def a_shape(self) -> tuple[int, ...]:
        """The shape of ``A``; its last axis, but for those of layers, is the rank."""
        return self._in_place(self.one_a_shape, self.lead)

    @property
    def b_shape(self) -> tuple[int, ...]:
        """The shape of ``B``, with the rank before the axes of `b_axes`."""
        return self._in_place(self.one_b_shape, self.lead)

    @property
    def magnitude_shape(self) -> tuple[int, ...]:
        """The shape of the magnitude: the axes that are not contracted."""
        return self._in_place(self._full(self._channels), self.lead)

    @property
    def lead(self) -> tuple[int, ...]:
        """The sizes of the axes of layers."""
        return self._full(self.layers)

    @property
    def one_a_shape(self) -> tuple[int, ...]:
        """The shape of ``A`` of one layer."""
        return (*self._sizes(self.a_axes), self.rank)

    @property
    def one_b_shape(self) -> tuple[int, ...]:
        """The shape of ``B`` of one layer."""
        batch = self._sizes(self._batch, flat=False)
        kept = [axis for axis in self.b_axes if axis not in self._batch]
        return (*batch, self.rank, *self._sizes(kept))

    def axes_of(self, part: str) -> list[int | None]:
        """For each axis of a part the axis of the param that it is, or starts with.

        Args:
          part: `a`, `b` or `magnitude`. The axis of the rank is not an axis
            of the param, and is None.
        """
        kept = [axis for axis in self.b_axes if axis not in self._batch]
        rows = list(self.a_axes)
        if self.flat:
            rows = [*self._batch, *[a for a in rows if a not in self._batch][:1]]
            kept = kept[:1]
        if part == "a":
            missing = len(self.one_a_shape) - len(rows) - 1
            own = [*rows, *[None] * missing, None]
        elif part == "b":
            own = [*self._batch, None, *kept]
            own += [None] * (len(self.one_b_shape) - len(own))
        else:
            own = self._channels
        return list(self._in_place(own, self.layers))

    def layers_first(self, part: jax.Array) -> jax.Array:
        """A part of an adapter with its axes of layers in front."""
        return jnp.moveaxis(part, self._places(part.ndim), range(len(self.layers)))

    def layers_in_place(self, part: jax.Array) -> jax.Array:
        """A part of an adapter, from one with its axes of layers in front."""
        return jnp.moveaxis(part, range(len(self.layers)), self._places(part.ndim))

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """The rows and columns of one of the matrices that ``A @ B`` has."""
        rows = math.prod(self.shape[axis] for axis in self.contracted)
        columns = [a for a in self.b_axes if a not in self.a_axes]
        return rows, math.prod(self.shape[axis] for axis in columns)

    def name(self, part: AdapterPart) -> Path:
        """The path of a part of the adapter: `a`, `b` or `magnitude`."""
        return adapter_path(self.path, part)

    @property
    def shapes(self) -> dict[Path, tuple[int, ...]]:
        """The shape of each part, by its path."""
        shapes = {self.name("a"): self.a_shape, self.name("b"): self.b_shape}
        if self.dora:
            shapes[self.name("magnitude")] = self.magnitude_shape
        return shapes

    def factors(self, a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
        """``A`` and ``B`` on the axes of the param, and the rank behind them.

        Args:
          a: shape `a_shape`.
          b: shape `b_shape`.

        Returns:
          Two arrays, each with one entry along an axis that it does not have; the sum
          over the last axis of their product is ``A @ B`` in the shape of the param.
        """
        a, b = self.layers_first(a), self.layers_first(b)
        a = a.reshape(*self.lead, *self._full(self.a_axes), self.rank)
        batch = self._full(self._batch)
        kept = tuple(axis for axis in self.b_axes if axis not in self._batch)
        b = b.reshape(*self.lead, *batch, self.rank, *self._full(kept))
        b = jnp.moveaxis(b, len(self.lead) + len(batch), -1)
        b_axes = (*self._batch, *kept)
        return self._spread(a, self.a_axes), self._spread(b, b_axes)

    def delta(self, a: jax.Array, b: jax.Array, precision: Any = None) -> jax.Array:
        """``scaling * A @ B`` in the shape of the param.

        Args:
          a: shape `a_shape`.
          b: shape `b_shape`.
          precision: as in `jax.lax.dot_general`.
        """
        return self.scaling * contract(*self.factors(a, b), self.shape, precision)

    def norm(self, weight: jax.Array) -> jax.Array:
        """The norm of each output channel of the param, shape `magnitude_shape`.

        Args:
          weight: an array of the shape of the param.
        """
        squares = jnp.square(weight.astype(jnp.float32))
        norm = jnp.sqrt(jnp.sum(squares, axis=self.contracted))
        return self.as_magnitude(norm).astype(weight.dtype)

    def as_magnitude(self, norm: jax.Array) -> jax.Array:
        """A number for each channel in the shape of a magnitude.

        Args:
          norm: an array with the axes of the param that are not contracted.
        """
        held = [a for a in range(len(self.shape)) if a not in self.contracted]
        order = [held.index(axis) for axis in (*self.layers, *self._channels)]
        return self.layers_in_place(norm.transpose(order))

    def on_param(self, magnitude: jax.Array) -> jax.Array:
        """A magnitude on the axes of the param, of size 1 where they are contracted.

        Args:
          magnitude: shape `magnitude_shape`.
        """
        held = [*self.layers, *self._channels]
        whole = self.layers_first(magnitude).transpose(np.argsort(held).tolist())
        return jnp.expand_dims(whole, self.contracted)

    def gain(self, magnitude: jax.Array, norm: jax.Array) -> jax.Array:
        """What the adapted weight is multiplied by, on the axes of the param.

        Args:
          magnitude: shape `magnitude_shape`.
          norm: the same.
        """
        return self.on_param(magnitude / norm)

    def merged(
        self,
        base: jax.Array,
        a: jax.Array,
        b: jax.Array,
        magnitude: jax.Array | None = None,
    ) -> jax.Array:
        """The param with its adapter in it, in its dtype.

        Args:
          base: the param, shape `shape`, a float dtype.
          a: shape `a_shape`.
          b: shape `b_shape`.
          magnitude: shape `magnitude_shape`, for DoRA.
        """
        wide = numerics.compute_dtype(base.dtype)
        delta = self.delta(a.astype(wide), b.astype(wide), jax.lax.Precision.HIGHEST)
        weight = base.astype(wide) + delta
        if magnitude is not None:
            weight *= self.gain(magnitude.astype(wide), self.norm(weight))
        return weight.astype(base.dtype)

    @property
    def _channels(self) -> list[int]:
        """The axes of the param that are neither contracted nor of layers."""
        others = {*self.contracted, *self.layers}
        return [axis for axis in range(len(self.shape)) if axis not in others]

    def _in_place(self, own: Sequence[Any], layers: Sequence[Any]) -> tuple[Any, ...]:
        """What is said of each axis of a part, from that of one layer and of layers."""
        whole = list(own)
        for axis, layer in zip(self.layers, layers, strict=True):
            whole.insert(axis, layer)
        return tuple(whole)

    def _places(self, ndim: int) -> list[int]:
        """The axes of layers of a part."""
        own = [None] * (ndim - len(self.layers))
        whole = self._in_place(own, self.layers)
        return [whole.index(axis) for axis in self.layers]

    @property
    def _batch(self) -> tuple[int, ...]:
        return tuple(axis for axis in self.b_axes if axis in self.a_axes)

    def _full(self, axes: Sequence[int]) -> tuple[int, ...]:
        return tuple(self.shape[axis] for axis in axes)

    def _sizes(self, axes: Sequence[int], flat: bool | None = None) -> tuple[int, ...]:
        sizes = self._full(axes)
        if not (self.flat if flat is None else flat):
            return sizes
        batch = [self.shape[axis] for axis in axes if axis in self._batch]
        return (*batch, math.prod(sizes) // math.prod(batch))

    def _spread(self, factor: jax.Array, axes: Sequence[int]) -> jax.Array:
        """A factor with axes `layers`, then `axes`, then the rank, on those of W."""
        held = [*self.layers, *axes]
        order = [*np.argsort(held).tolist(), len(held)]
        missing = [axis for axis in range(len(self.shape)) if axis not in held]
        return jnp.expand_dims(factor.transpose(order), missing)


def contract(
    a: jax.Array, b: jax.Array, shape: Sequence[int], precision: Any = None
) -> jax.Array:
    """The sum over the last axis of the product of two factors.

    Args:
      a: along each other axis the size in `shape`, or 1.
      b: the same.
      shape: the shape of the result.
      precision: as in `jax.lax.dot_general`.
    """
    letters = string.ascii_lowercase[: len(shape)]
    names, parts = [], []
    for factor in (a, b):
        dropped = [axis for axis in range(len(shape)) if factor.shape[axis] == 1]
        kept = [axis for axis in range(len(shape)) if axis not in dropped]
        parts.append(factor.squeeze(dropped))
        names.append("".join(letters[axis] for axis in kept) + "Z")
    out = [axis for axis in range(len(shape)) if letters[axis] in names[0] + names[1]]
    subscripts = f"{names[0]},{names[1]}->{''.join(letters[axis] for axis in out)}"
    product = jnp.einsum(subscripts, *parts, precision=precision)
    missing = [axis for axis in range(len(shape)) if axis not in out]
    return jnp.broadcast_to(jnp.expand_dims(product, missing), shape)


def find_layouts(plan: Plan) -> dict[Path, tuple[AdapterLayout, LoraRule]]:
    """The adapters that the rules of a plan ask for, by the path of the param.

    Args:
      plan: what the rules do to a model.

    Returns:
      For each param its layout, and the rule that decided.

    Raises:
      ValueError: if two rules give one param adapters of different settings; if an op
        contracts a part of an axis; or if a rule maps axes that it lacks.
    """
    found: dict[Path, tuple[AdapterLayout, OpPlan, LoraRule]] = {}
    for op_plan in plan.ops:
        index = op_plan.rule_index
        rule = None if index is None else plan.rules[index]
        if not isinstance(rule, LoraRule):
            continue
        for side, view in weights.weights_of(op_plan.op):
            if view.path in found:
                _check_same(view.path, found[view.path], op_plan, rule)
                continue
            axes = plan.params[view.path].mapped_axes
            layout = _layout(op_plan.op, side, view, rule, axes)
            found[view.path] = (layout, op_plan, rule)
    particulars: dict[Path, dict[str, None]] = {path: {} for path in found}
    for op in (op_plan.op for op_plan in plan.ops):
        for side, view in weights.weights_of(op):
            if view.path in found:
                layout, *_ = found[view.path]
                notes = _particulars(op, side, view, layout)
                particulars[view.path] |= dict.fromkeys(notes)
    return {
        path: (dataclasses.replace(layout, particulars=tuple(particulars[path])), rule)
        for path, (layout, _, rule) in found.items()
    }


def too_large(layouts: Mapping[Path, AdapterLayout]) -> dict[Path, str]:
    """Names the params whose matrix is smaller than the rank of their adapter."""
    found = {}
    for path, layout in layouts.items():
        rows, columns = layout.matrix_shape
        if layout.rank > min(rows, columns):
            found[path] = (
                f"the adapter of {'/'.join(path)!r} has rank {layout.rank}, and the "
                f"{rows} x {columns} matrix has at most {min(rows, columns)}"
            )
    return found


def rules_without_weight(plan: Plan) -> list[int]:
    """The indices of the `LoraRule`s that match no op which reads a weight."""
    used = {op.rule_index for op in plan.ops if weights.weights_of(op.op)}
    return [
        index
        for index, rule in enumerate(plan.rules)
        if isinstance(rule, LoraRule) and index not in used
    ]


def _layout(
    op: Op, side: int, view: View, rule: LoraRule, axes: tuple[int, ...] | None
) -> AdapterLayout:
    where = f"{op.where}, param {'/'.join(view.path)!r}"
    mapped = _mapped_axes(where, view, rule, axes)
    roles = _roles(op, side, view)
    if wrong := [axis for axis in mapped if "contracted" in roles.get(axis, ())]:
        raise ValueError(
            f"{where}: mapped_axes={rule.mapped_axes} names axis {wrong[0]} of the "
            f"shape {view.shape}, which the op contracts, so nothing maps over it."
        )
    roles = {axis: found for axis, found in roles.items() if axis not in mapped}
    mixed = [axis for axis, found in roles.items() if len(found) > 1]
    if mixed:
        raise ValueError(
            f"{where}: the op contracts a part of axis {mixed[0]} of the shape "
            f"{view.shape} and keeps the rest, so that no adapter of that axis is one "
            "of its product. Leave it out with a rule of its own before this one."
        )
    # A size of 1 may have lost its factors; it makes no difference where it stands.
    lost = [axis for axis, size in enumerate(view.shape) if axis not in roles]
    layers = [axis for axis in lost if view.shape[axis] > 1 and axis not in mapped]
    # A param that the model reads one layer at a time has layers of size 1, too.
    if len(layers) < len(op.layers):
        layers = [axis for axis in lost if axis not in mapped][: len(op.layers)]
    layers = tuple(sorted([*layers, *mapped]))
    ones = [axis for axis in lost if axis not in layers]
    kind = {axis: next(iter(found)) for axis, found in roles.items()}
    contracted = [axis for axis in roles if kind[axis] == "contracted"]
    batch = [axis for axis in range(len(view.shape)) if kind.get(axis) == "batch"]
    kept = [axis for axis in roles if kind[axis] == "kept"]
    flat = ops.kind_of(op).flattens(op.name)
    if flat:
        a_axes, b_axes = [*batch, *contracted, *ones], [*batch, *kept]
    else:
        # The axes of a batch are in A alone: its product with B has them all the same.
        a_axes, b_axes = sorted([*batch, *contracted, *ones]), sorted(kept)
    return AdapterLayout(
        path=view.path,
        shape=view.shape,
        rank=rule.rank,
        alpha=float(rule.alpha),
        scaling=rule.scaling,
        dora=rule.dora,
        op=op.name,
        layers=layers,
        a_axes=tuple(a_axes),
        b_axes=tuple(b_axes),
        contracted=tuple(sorted([*contracted, *ones])),
        flat=flat,
    )


def _mapped_axes(
    where: str, view: View, rule: LoraRule, found: tuple[int, ...] | None
) -> set[int]:
    if not rule.mapped_axes:
        if found is None:
            raise ValueError(
                f"{where}: a transformation around the module maps over the param of "
                f"shape {view.shape}, whose axes have sizes that do not tell over "
                "which. Say it in a rule for this module, such as "
                "LoraRule(mapped_axes=(0,), ...)."
            )
        return set(found)
    ndim = len(view.shape)
    if wrong := [axis for axis in rule.mapped_axes if not -ndim <= axis < ndim]:
        raise ValueError(
            f"{where}: mapped_axes={rule.mapped_axes} names axis {wrong[0]}, and the "
            f"param has the shape {view.shape}."
        )
    return {axis % ndim for axis in rule.mapped_axes}


def _roles(op: Op, side: int, view: View) -> dict[int, set[str]]:
    """What an op does with the axes of a param, contracted ones first."""
    dims = ops.kind_of(op).axes(op.params, side, len(view.dims))
    roles: dict[int, set[str]] = {}
    for dim in (*dims.contracted, *sorted((*dims.batch, *dims.kept))):
        role = "batch" if dim in dims.batch else "kept"
        role = "contracted" if dim in dims.contracted else role
        for atom in view.dims[dim]:
            roles.setdefault(atom.axis, set()).add(role)
    return roles


def _particulars(op: Op, side: int, view: View, layout: AdapterLayout) -> list[str]:
    """What an op does with a param that a plain layer does not, in words."""
    roles = _roles(op, side, view)
    contracted = sorted(axis for axis, found in roles.items() if "contracted" in found)
    usual = [axis for axis in layout.contracted if layout.shape[axis] > 1]
    notes = []
    if [axis for axis in contracted if layout.shape[axis] > 1] != usual:
        notes.append(f"contracts its axes {tuple(contracted)}, not {tuple(usual)}")
    notes += ops.kind_of(op).particulars(op.params, side)
    return [f"{op.where} {note}" for note in notes]


def _check_same(path, first, op_plan: OpPlan, rule: LoraRule) -> None:
    layout, other, before = first
    names = ("rank", "alpha", "rank_stabilized", "dora", "dropout", "init")
    names = (*names, "mapped_axes", "param_dtype")
    settings = [
        ", ".join(f"{name}={getattr(r, name)!r}" for name in names)
        for r in (before, rule)
    ]
    if settings[0] != settings[1]:
        raise ValueError(
            f"Param {'/'.join(path)!r} is asked to have two adapters: by rule "
            f"{other.rule_index} at {other.op.where} ({settings[0]}), and by rule "
            f"{op_plan.rule_index} at {op_plan.op.where} ({settings[1]}). A param "
            "has one adapter: give both ops the same settings."
        )
