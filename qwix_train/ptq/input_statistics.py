"""Statistics of the inputs of products that read a weight, for each channel.

They are collected like the ranges of activations, inside an unmodified step. Each is a
state of arrays that can be saved, merged and set again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp

from qwix_train import ops
from qwix_train.calib.observe import Tagged, Tagging
from qwix_train.core.how import HowToQuantize
from qwix_train.observers.statistics import Statistics
from qwix_train.ops.vectors import Vectors
from qwix_train.planning.leaves import SIDES, OperandName, Path
from qwix_train.planning.plan import OpPlan, Plan
from qwix_train.planning.rules import QuantizationRule
from qwix_train.ptq import pre_quant_scale
from qwix_train.ptq.provider import PtqProvider
from qwix_train.ptq.weight_matrices import (
    MatrixView,
    input_vectors,
    matrix_view,
)
from qwix_train.stages.observe import ObserveSeen
from qwix_train.stages.run import CallStages, OpStages
from qwix_train.trace import provenance
from qwix_train.trace.analyze import Op
from qwix_train.trace.function import TracedCall


@dataclasses.dataclass(frozen=True)
class InputMoments:
    """Collects the moments of an input, seen as vectors of channels.

    An observer of streams (see `observers.statistics`). Its state is, in float32,

    * ``samples``: the number of vectors, shape (),
    * ``absmean``, ``min``, ``max``: of each channel, shape (groups, channels),
    * ``second_moment``: the mean of ``x x^T``, shape (groups, channels, channels),
    * ``rows``: some of the vectors, drawn at random from all, shape (groups, number,
      channels), and the random ``priority`` of each, shape (groups, number). The
      vectors with the highest priority are kept. It is negative where there is no
      vector yet.

    Attributes:
      channels: how the input is seen as vectors.
      second_moment: whether the second moment is collected.
      rows: how many vectors are kept.

    Example:
      >>> from qwix_train.ops.vectors import Channels
      >>> moments = InputMoments(Channels(contracting=(1,)))
      >>> how = HowToQuantize(qtype='int8')
      >>> state = moments.init((2, 3), how)
      >>> for x in jnp.ones((2, 3)), -3 * jnp.ones((6, 3)):
      ...     state = moments.update(state, x, how)
      >>> [state[name][0, 0].item() for name in ('absmean', 'min', 'max')]
      [2.5, -3.0, 1.0]
      >>> state['second_moment'][0, 0].tolist(), state['samples'].item()
      ([7.0, 7.0, 7.0], 8.0)
    """

    channels: Vectors
    second_moment: bool = True
    rows: int = 0

    def init(self, shape: tuple[int, ...], how: HowToQuantize) -> dict[str, jax.Array]:
        """The state before any batch, for inputs of a shape."""
        del how
        x = jax.ShapeDtypeStruct(shape, jnp.float32)
        groups, _, channels = jax.eval_shape(self.channels.samples, x).shape
        if (members := jax.eval_shape(self.channels.members, x)) is not None:
            groups = members.shape[0]
        one = jnp.zeros((groups, channels), jnp.float32)
        state = {"absmean": one, "min": one, "max": one}
        if self.second_moment:
            state["second_moment"] = jnp.zeros((groups, channels, channels))
        if self.rows:
            state["rows"] = jnp.zeros((groups, self.rows, channels))
            state["priority"] = jnp.full((groups, self.rows), -1.0)
        return {"samples": jnp.zeros((), jnp.float32), **state}

    def update(
        self,
        state: Mapping[str, jax.Array],
        x: jax.Array,
        how: HowToQuantize,
        counts: jax.Array | None = None,
    ) -> dict[str, jax.Array]:
        """Adds a batch.

        Args:
          state: the state before.
          x: the batch.
          how: not used.
          counts: which elements count; None for all. A vector with an element that does
            not count is left out.

        Raises:
          ValueError: if the input has another rank than when the model was traced, as
            it has where the model is called in `jax.vmap`.
        """
        del how
        members = self.channels.members(x)
        x = self.channels.samples(x.astype(jnp.float32))
        kept = jnp.ones(x.shape[1], bool)
        if counts is not None:
            # What a convolution pads with counts, and is zero. So those that do not
            # count are marked with ones, and sampled.
            lost = self.channels.samples((~counts).astype(jnp.float32))
            kept = lost.max((0, 2)) == 0
            x = jnp.where(kept[:, None], x, 0)
        count = kept.sum(dtype=jnp.float32)
        some = jnp.maximum(count, 1)
        # The number of vectors so far gives each batch its own draws.
        key = jax.random.fold_in(jax.random.key(0), state["samples"].astype(jnp.uint32))
        drawn = jnp.where(kept, jax.random.uniform(key, kept.shape), -1)
        priority, first = lax.top_k(drawn, min(self.rows, len(kept)))

        def of_group(x):
            found = {
                "absmean": jnp.sum(jnp.abs(x), 0) / some,
                "min": jnp.min(x, 0, where=kept[:, None], initial=jnp.inf),
                "max": jnp.max(x, 0, where=kept[:, None], initial=-jnp.inf),
            }
            if self.second_moment:
                product = jnp.matmul(x.T, x, precision=lax.Precision.HIGHEST)
                found["second_moment"] = product / some
            if self.rows:
                found |= {"rows": x[first], "priority": priority}
            return found

        if members is None:
            batch = jax.vmap(of_group)(x)
        else:  # one after the other, since each has as many vectors as all together
            batch = lax.map(
                lambda own: of_group(jnp.where(own[:, None], x[0], 0)), members
            )
        batch["samples"] = count
        merged = self.merge(state, batch)
        # A batch without any vector has no minimum, and must change nothing.
        return {k: jnp.where(count > 0, v, state[k]) for k, v in merged.items()}

    def merge(
        self, a: Mapping[str, jax.Array], b: Mapping[str, jax.Array]
    ) -> dict[str, jax.Array]:
        """The state of the batches of both, in which each vector counts the same."""
        samples = a["samples"] + b["samples"]
        weight = b["samples"] / jnp.maximum(samples, 1)
        merged = {"samples": samples}
        for name in ("absmean", *(["second_moment"] if self.second_moment else [])):
            merged[name] = a[name] + (b[name] - a[name]) * weight
        for name, widest in (("min", jnp.minimum), ("max", jnp.maximum)):
            both = (a["samples"] > 0) & (b["samples"] > 0)
            either = jnp.where(a["samples"] > 0, a[name], b[name])
            merged[name] = jnp.where(both, widest(a[name], b[name]), either)
        if self.rows:
            rows, priority = (
                jnp.concatenate([a[name], b[name]], 1) for name in ("rows", "priority")
            )
            merged["priority"], first = jax.lax.top_k(priority, self.rows)
            merged["rows"] = jnp.take_along_axis(rows, first[..., None], 1)
        return merged

    def calibration(
        self, state: Mapping[str, jax.Array], how: HowToQuantize
    ) -> dict[str, jax.Array]:
        """The range of each channel, widened to hold 0."""
        del how
        return {
            "min": jnp.minimum(state["min"], 0),
            "max": jnp.maximum(state["max"], 0),
        }


@dataclasses.dataclass(frozen=True)
class WeightInput(Tagged):
    """The input of a product that reads a weight.

    Attributes:
      channels: the input as vectors.
      view: the weight as matrices.
      layers: the sizes of the axes of layers that the op is run for.
      scaled_shape: the shape of a stored scale of its channels, in one layer.
      activation: how the input is quantized; None if it is not.
      static: the same if its range is static; None otherwise.
      observer: the observer that the rule names for a static range; None if it names
        none.
      layer_axis: the axis along which layers are stacked; see `OpPlan.layer_axis`.
    """

    channels: Vectors
    view: MatrixView
    layers: tuple[int, ...]
    scaled_shape: tuple[int, ...]
    activation: HowToQuantize | None
    static: HowToQuantize | None
    observer: Any
    layer_axis: int = 0


# For each quantized param, the ops that read it, each with its input or, as text, why
# that input cannot be used.
Reads = dict[Path, dict[str, WeightInput | str]]


class InputTagging(Tagging):
    """Tags the inputs of products that read quantized weights, in a float model.

    Attributes:
      ranges: the inputs that were found so far, by name.
      reads: by which ops each param is read.
    """

    def __init__(
        self,
        rules: Sequence[QuantizationRule],
        *,
        second_moment: bool,
        rows: int = 0,
        takes: Callable[[Path], bool] = lambda path: True,
    ):
        """Takes what is collected.

        Args:
          rules: the rules.
          second_moment: see `InputMoments`.
          rows: see there.
          takes: says of the path of a quantized param whether the inputs that it is
            multiplied by are tagged. It is called in the order in which the model reads
            its params.
        """
        super().__init__(rules)
        self.second_moment = second_moment
        self.rows = rows
        self.takes = takes
        self.ranges: dict[str, WeightInput] = {}
        self.reads: Reads = {}

    def stages(self, traced: TracedCall, plan: Plan) -> CallStages:
        """See `QuantizationProvider.stages`: inputs of weights are tagged."""
        plan = PtqProvider(self.rules).annotate(traced, plan)
        tagged: dict[Any, WeightInput] = {}
        for op in plan.ops:
            paths = dict.fromkeys(
                path
                for operand in op.op.operands[:2]
                for path in provenance.paths_of(operand.provenance)
                if plan.params[path].how is not None and self.takes(path)
            )
            for path in paths:
                found = self._found(op, path, plan)
                reads = self.reads.setdefault(path, {})
                name = "/".join(OperandName(op.module_path, op.op.id).path)
                before = reads.setdefault(name, found)
                if _differ(before, found):
                    raise ValueError(
                        f"{name!r} reads the param {'/'.join(path)!r} in two ways: "
                        "the step calls two models that have params of this name. "
                        "Collect for one model at a time."
                    )
                if isinstance(found, WeightInput):
                    tagged[op.op.key] = found
                    self.ranges[found.name] = found

        def observed(op: Op) -> tuple[tuple[ObserveSeen, ...], ...]:
            found = tagged[op.key]
            mine = SIDES.index(OperandName.parse(found.path).side)
            stages = (ObserveSeen(found.name),)
            return tuple(
                stages if side == mine else () for side in range(len(op.operands))
            )

        found = [op.op for op in plan.ops if op.op.key in tagged]
        return CallStages({}, {op.key: OpStages(op, observed(op)) for op in found})

    def _found(self, plan: OpPlan, path: Path, whole: Plan) -> WeightInput | str:
        """The input of an op that reads a param; or why it cannot be used, as text."""
        op = plan.op
        if "/".join(path) in whole.dequantized:
            by = ", ".join(whole.dequantized["/".join(path)])
            return f"it is dequantized for {by}"
        if path not in plan.weights:
            return f"{op.where} reads it, too, and does not multiply by its codes"
        side = pre_quant_scale.weight_side(op)
        if side is None:
            return f"{op.where} does not read it as its only weight"
        views = [
            view
            for view in op.operands[side].provenance.views  # type: ignore[union-attr]
            if view.path == path
        ]
        if len(views) > 1:
            return f"{op.where} reads it more than once"
        try:
            view = matrix_view(views[0], op, side)
            channels = input_vectors(views[0], op, side)
        except ValueError as error:
            return f"{op.where}: {error}"
        assert plan.rule_index is not None
        rule: QuantizationRule = whole.rules[plan.rule_index]
        operand = jax.eval_shape(
            lambda *x: ops.kind_of(op).seen(op.params, 1 - side, x),
            *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in op.operands),
        )
        how = whole.params[path].how
        assert how is not None
        moments = InputMoments(channels, self.second_moment, self.rows)
        return WeightInput(
            path=plan.range_path(1 - side),
            statistics=Statistics(moments, None, how, (), rule.act_finite_only),
            shape=operand.shape,
            dtype=operand.dtype,
            channels=channels,
            view=view,
            layers=op.layers,
            scaled_shape=pre_quant_scale.scale_shape(op, 1 - side)[len(op.layers) :],
            activation=plan.activations[1 - side],
            static=plan.activations[1 - side] if plan.static else None,
            observer=rule.act_observer,
            layer_axis=plan.layer_axis,
        )


def _differ(a: WeightInput | str, b: WeightInput | str) -> bool:
    if isinstance(a, str) or isinstance(b, str):
        return a != b
    return (a.path, a.view, a.layers) != (b.path, b.view, b.layers)
