"""Which params get adapters, of which shapes, and what an adapter adds to its param.

An adapter belongs to a param, not to an op: wherever the model reads the param, it gets
``W + scaling * A @ B``. The first op that a rule matches decides which axes of ``W``
are the rows of ``A``, and which are the columns of ``B``: it contracts those of ``A``.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from qwix_train import ops
from qwix_train.core import numerics
from qwix_train.lora.rules import LoraRule
from qwix_train.ops.low_rank import contract
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
      layers: axes of the param along which each index has its own adapter, such as the
        layers of a scan. In each part they stand where they stand in the param, or last
        if the part has fewer axes. So whatever maps over the param maps over them, too.
      a_axes: the other axes of the param that ``A`` has, in the order of ``A``.
      b_axes: the other axes of the param that ``B`` has, in the order of ``B``. With a
        batched `dot_general` some axes are in both.
      contracted: the axes that the op contracts.
      flat: whether the contracted axes are one axis of ``A``, and the kept ones one of
        ``B``, as for `dot_general`.
      particulars: what ops do with the param that a plain linear layer, convolution or
        lookup does not do, in words: that another op contracts other axes of it, or
        that a convolution has groups. Other libraries adapt only plain layers.
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
        """The shape of ``A``. Its last axis, but for axes of layers, is the rank."""
        return self._in_place(self.one_shape("a"), self.lead)

    @property
    def b_shape(self) -> tuple[int, ...]:
        """The shape of ``B``, with the rank before the axes of `b_axes`."""
        return self._in_place(self.one_shape("b"), self.lead)

    @property
    def magnitude_shape(self) -> tuple[int, ...]:
        """The shape of the magnitude: the axes that are not contracted."""
        return self._in_place(self.one_shape("magnitude"), self.lead)

    @property
    def lead(self) -> tuple[int, ...]:
        """The sizes of the axes of layers."""
        return tuple(map(self.size, self.layers))

    @property
    def rank_axis(self) -> int:
        """The number of the axis of the rank: it follows the axes of the param."""
        return len(self.shape)

    def one_shape(self, part: AdapterPart) -> tuple[int, ...]:
        """The shape of a part of one layer."""
        return tuple(self.size(*axes) for axes in self._grouped(part))

    def size(self, *axes: int) -> int:
        """The number of elements along axes of the param, or along that of the rank."""
        return math.prod((*self.shape, self.rank)[axis] for axis in axes)

    def axes_of(self, part: AdapterPart) -> list[int | None]:
        """For each axis of a part, the axis of the param that it is, or starts with.

        Args:
          part: `a`, `b` or `magnitude`.

        Returns:
          Axes of the param; None for the axis of the rank.
        """
        firsts = [axes[0] if axes else None for axes in self._grouped(part)]
        own = [None if axis == self.rank_axis else axis for axis in firsts]
        return list(self._in_place(own, self.layers))

    def layers_in_place(self, part: jax.Array) -> jax.Array:
        """A part of an adapter, from one with its axes of layers in front."""
        return jnp.moveaxis(part, range(len(self.layers)), self._places(part.ndim))

    def spread(self, array: Any, axes: Sequence[int]) -> Any:
        """An array with all axes of the param, and the rank behind them.

        Args:
          array: an array with some of these axes, of which neighbors may be merged.
          axes: the axes that it has, in its order.

        Returns:
          The array with one entry along each axis that it does not have.
        """
        array = array.reshape(tuple(map(self.size, axes)))
        missing = [axis for axis in range(self.rank_axis + 1) if axis not in axes]
        return jnp.expand_dims(array.transpose(np.argsort(axes).tolist()), missing)

    def gathered(self, whole: Any, axes: Sequence[int]) -> Any:
        """The inverse of `spread`: an array with some axes, in their order."""
        missing = [axis for axis in range(self.rank_axis + 1) if axis not in axes]
        held = sorted(axes)
        return whole.squeeze(tuple(missing)).transpose([held.index(a) for a in axes])

    def on_param(self, part: AdapterPart, array: jax.Array) -> jax.Array:
        """A part of an adapter as `spread` gives it."""
        first = jnp.moveaxis(array, self._places(array.ndim), range(len(self.layers)))
        return self.spread(first, self._axes(part))

    def as_part(self, part: AdapterPart, whole: jax.Array) -> jax.Array:
        """The inverse of `on_param`."""
        gathered = self.gathered(whole, self._axes(part))
        shape = (*self.lead, *self.one_shape(part))
        return self.layers_in_place(gathered.reshape(shape))

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """The rows and columns of one of the matrices that ``A @ B`` has."""
        columns = [a for a in self.b_axes if a not in self.a_axes]
        return self.size(*self.contracted), self.size(*columns)

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
        """``A`` and ``B`` with all axes of the param, and the rank behind them.

        Args:
          a: shape `a_shape`.
          b: shape `b_shape`.

        Returns:
          Two arrays, each with one entry along the axes that it does not have. Their
          product, summed over the last axis, is ``A @ B`` in the shape of the param.
        """
        return self.on_param("a", a), self.on_param("b", b)

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
        norm = jnp.sqrt(jnp.sum(squares, axis=self.contracted, keepdims=True))
        return self.as_part("magnitude", norm[..., None]).astype(weight.dtype)

    def gain(self, magnitude: jax.Array, norm: jax.Array) -> jax.Array:
        """What the adapted weight is multiplied by, with all axes of the param.

        Args:
          magnitude: shape `magnitude_shape`.
          norm: the norm of each output channel, shape `magnitude_shape`.
        """
        return self.on_param("magnitude", magnitude / norm)[..., 0]

    def merged(
        self,
        base: jax.Array,
        a: jax.Array,
        b: jax.Array,
        magnitude: jax.Array | None = None,
    ) -> jax.Array:
        """The param with its adapter merged in, in the dtype of the param.

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

    def _grouped(self, part: AdapterPart) -> list[tuple[int, ...]]:
        """For each axis of a part of one layer, the axes that are merged in it."""
        if part == "magnitude":
            others = {*self.contracted, *self.layers}
            return [(axis,) for axis in range(len(self.shape)) if axis not in others]
        batch = [axis for axis in self.b_axes if axis in self.a_axes]
        own = self.a_axes if part == "a" else self.b_axes
        own = tuple(axis for axis in own if axis not in batch)
        merged = [own] if self.flat else [(axis,) for axis in own]
        rank = [(self.rank_axis,)]
        ends = [*merged, *rank] if part == "a" else [*rank, *merged]
        return [*((axis,) for axis in batch), *ends]

    def _axes(self, part: AdapterPart) -> list[int]:
        """The axes of a part, those of layers first."""
        return [*self.layers, *itertools.chain(*self._grouped(part))]

    def _in_place(self, own: Sequence[Any], layers: Sequence[Any]) -> tuple[Any, ...]:
        """Puts the entries of the axes of layers among those of the other axes."""
        whole = list(own)
        for axis, layer in zip(self.layers, layers, strict=True):
            whole.insert(axis, layer)
        return tuple(whole)

    def _places(self, ndim: int) -> list[int]:
        """The axes of layers of a part."""
        own = [None] * (ndim - len(self.layers))
        whole = self._in_place(own, self.layers)
        return [whole.index(axis) for axis in self.layers]


def find_layouts(plan: Plan) -> dict[Path, tuple[AdapterLayout, LoraRule]]:
    """The adapters that the rules of a plan ask for, by the path of the param.

    Args:
      plan: what the rules do to a model.

    Returns:
      The layout of each param, and the rule that decided.

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
    """For each param whose matrix is smaller than the rank of its adapter, says so."""
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
            f"shape {view.shape}, which the op contracts, so nothing maps over it. "
            "Leave it out."
        )
    roles = {axis: found for axis, found in roles.items() if axis not in mapped}
    mixed = [axis for axis, found in roles.items() if len(found) > 1]
    if mixed:
        raise ValueError(
            f"{where}: the op contracts a part of axis {mixed[0]} of the shape "
            f"{view.shape} and keeps the rest, so that no adapter of that axis is one "
            "of its product. Leave it out with a rule of its own before this one."
        )
    # An axis of size 1 may have no factors. It does not matter where it stands.
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
            f"param has the shape {view.shape}. Name axes from {-ndim} to {ndim - 1}."
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
    """What an op does with a param that a plain layer does not do, in words."""
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
