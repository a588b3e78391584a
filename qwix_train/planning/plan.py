"""What rules do to a model: every op, its rule, its weight, and why.

`plan(model, rules, *inputs)` traces a model, without computing anything, and returns
a `Plan`. Printed, it is a table. QAT and the other modes carry out the same plan, so
the table is what happens.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax import numpy as jnp

from qwix_train import ops as op_kinds
from qwix_train.core import numerics
from qwix_train.core.formats import Scales
from qwix_train.core.how import (
    HowToQuantize,
    needs_zero_point,
    parse_calibration_method,
)
from qwix_train.core.rotation import Rotation
from qwix_train.observers.statistics import Statistics
from qwix_train.planning import table as plan_table
from qwix_train.planning import weights
from qwix_train.planning.current_rule import was_given
from qwix_train.planning.leaves import GRADIENT, SIDES, OperandName, Path
from qwix_train.planning.quant_stats import (
    CollectedRange,
    statistics_at,
    statistics_by,
)
from qwix_train.planning.rule_use import Decision, RuleUse
from qwix_train.planning.rules import QuantizationRule
from qwix_train.stages.rotate import Rotate, RotateWeight
from qwix_train.stages.stage import Stage
from qwix_train.trace.analyze import Op

_NO_CALL = "The step calls no model that is quantized."


@dataclasses.dataclass(frozen=True)
class OpPlan:
    """What happens to one op.

    Attributes:
      op: the op.
      rule_index: the rule that matched it, or None.
      weights: the params that it reads quantized.
      activations: for each operand, how it is quantized when the op runs; None for
        a weight, and for what stays in float.
      rotations: for each operand, the basis that it is quantized in, if not its own.
      module_path: the path of its module among the params of the traced call.
      ranges: for each operand, the names of the range of its array: that of the first
        op which reads it, and those of others that read it alike. Empty for what is not
        quantized when the op runs.
      static: whether activations have ranges that were collected, or are trained.
      learned: the method that trains the ranges of its activations; empty if none does.
      reason: why it, or part of it, stays in float, or what else is worth knowing.
      unsupported: whether a rule asked for what cannot be done.
      product: the forms in which it is computed, for the shapes of the call, as far as
        they are known. Filled in for `PtqProvider`s.
      layer_axis: the axis along which its module stacks the params of the layers that a
        scan goes over; what stands beside them is stacked alike. Negative ones count
        from the last.
      members: the axes of the params of its module that a `vmap` around it goes over,
        with the length of each. All members of the `vmap` share one range. It is stored
        once for each of them, because `vmap` takes these axes off all leaves alike.
    """

    op: Op
    rule_index: int | None = None
    weights: tuple[Path, ...] = ()
    activations: tuple[HowToQuantize | None, ...] = (None, None)
    rotations: tuple[Rotation | None, ...] = (None, None)
    module_path: str = ""
    ranges: tuple[tuple[Path, ...], ...] = ()
    static: bool = False
    learned: str = ""
    reason: str = ""
    unsupported: bool = False
    product: str = ""
    layer_axis: int = 0
    members: tuple[tuple[int, int], ...] = ()

    def as_stored(self, leaf: Any) -> Any:
        """What stands beside its params, from an array with its layers in front."""
        if self.layer_axis:
            leaf = jax.tree.map(lambda x: jnp.moveaxis(x, 0, self.layer_axis), leaf)
        for axis, length in self.members:
            copies = functools.partial(jnp.stack, axis=axis)
            leaf = jax.tree.map(lambda x: copies([x] * length), leaf)
        return leaf

    def layers_first(self, leaf: Any) -> Any:
        """An array with its layers in front, from what stands beside its params."""
        for axis, _ in reversed(self.members):
            leaf = jax.tree.map(lambda x: jnp.take(x, 0, axis), leaf)
        if self.layer_axis:
            leaf = jax.tree.map(lambda x: jnp.moveaxis(x, self.layer_axis, 0), leaf)
        return leaf

    def range_path(self, side: int) -> Path:
        """The path of the range of an operand: its module, its op and its side.

        Args:
          side: 0 for the left factor, 1 for the right one.
        """
        return OperandName(self.module_path, self.op.id, SIDES[side]).path

    @property
    def gradient_path(self) -> Path:
        """The path of the range of the gradient of its result."""
        return OperandName(self.module_path, self.op.id, GRADIENT).path

    def range_owner(self, side: int) -> Path:
        """The path of the range that an operand is quantized with in training.

        It is that of the first op that reads the same array alike.

        Args:
          side: 0 for the left factor, 1 for the right one.
        """
        return self.ranges[side][0]

    def operands(
        self, quantize: Callable[[int, HowToQuantize], tuple[Stage, ...]]
    ) -> tuple[tuple[Stage, ...], ...]:
        """The stages of each operand.

        Args:
          quantize: gives those that an activation has in the basis that it is quantized
            in, from its side and how it is quantized.
        """
        return tuple(
            (*self.before(side), *(() if how is None else quantize(side, how)))
            for side, how in enumerate(self.activations)
        )

    def before(self, side: int) -> tuple[Stage, ...]:
        """The stages of an operand that bring it into the basis it is quantized in.

        Args:
          side: 0 for the left factor, 1 for the right one.
        """
        rotation = self.rotations[side]
        if rotation is None:
            return ()
        is_weight = any(side == own for own, _ in weights.weights_of(self.op))
        return (RotateWeight(rotation) if is_weight else Rotate(rotation),)

    @property
    def collected(self) -> bool:
        """Whether ranges of its activations are collected."""
        return self.static and not self.learned

    @property
    def quantized(self) -> bool:
        """Whether the op reads anything that a rule quantizes."""
        return bool(self.weights) or any(how is not None for how in self.activations)


@dataclasses.dataclass(frozen=True)
class ParamPlan:
    """How one param is quantized, and by which op's rule.

    Attributes:
      path: the path of the param.
      shape: its shape.
      dtype: its dtype.
      how: how it is quantized, on its own axes. None if it stays in float.
      op: the op that decided.
      layer_axes: the axes that stack layers which the model scans over.
      mapped_axes: those that a `vmap` around the module goes over; None if there are
        such, and it is not known which.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: Any
    how: HowToQuantize | None = None
    op: OpPlan | None = None
    layer_axes: tuple[int, ...] = ()
    mapped_axes: tuple[int, ...] | None = ()

    @property
    def is_matrix(self) -> bool:
        """Whether it has two axes or more, but for those that stack layers."""
        return len(self.shape) - len(self.layer_axes) >= 2

    @property
    def float_bytes(self) -> int:
        """The size of the param as it is, in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def quantized_bytes(self) -> int:
        """The size with codes packed, and scales in the param's own dtype, in bytes."""
        if self.how is None:
            return self.float_bytes
        entry = numerics.format_of(self.how.qtype)
        bits, method = entry.bits, self.how.calibration_method
        fixed = parse_calibration_method(method)[0] == "fixed"
        scales = 1 if fixed else math.prod(self.how.scale_shape(self.shape))
        codes = -(-math.prod(self.shape) * bits // 8)
        zero_points = -(-scales * bits // 8) if needs_zero_point(method) else 0
        of_scale = 1 if entry.coded_scales else self.dtype.itemsize
        of_tensors = 0
        if entry.scales is Scales.TWO_LEVELS:
            of_tensors = 4 * math.prod(self.shape[a] for a in self.how.tensor_axes)
        return codes + scales * of_scale + of_tensors + zero_points


@dataclasses.dataclass(frozen=True)
class Plan(RuleUse):
    """What rules do to every op and param of a traced call.

    Attributes:
      rules: the rules.
      ops: what happens to each op, in the order in which they run.
      params: what happens to each param, by its path.
      dequantized: the quantized params that something reads which has no quantized
        form, each with the primitives that do. Filled in for `PtqProvider`s.
      whole: whether the call is that of a model as a whole: not that of a part of one,
        nor of one of several methods.
      requests: what kernels of the model asked for; see `current_rule`.
    """

    rules: tuple[QuantizationRule, ...]
    ops: tuple[OpPlan, ...]
    params: Mapping[Path, ParamPlan]
    dequantized: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    whole: bool = False
    requests: tuple[Decision, ...] = ()

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """The rule that decided for each op, and for what kernels asked for."""
        ops = (
            Decision(op.rule_index, op.op.module_path, op.op.name, op.op.id)
            for op in self.ops
        )
        return (*ops, *self.requests)

    @property
    def has_answers(self) -> bool:
        """Whether a kernel got a rule. Kernels that are compiled already do not ask."""
        answered = any(x.rule_index is not None for x in self.requests)
        return answered or any(map(was_given, self.rules))

    @property
    def quantized_ops(self) -> tuple[OpPlan, ...]:
        """The ops that read anything quantized."""
        return tuple(op for op in self.ops if op.quantized)

    @property
    def unsupported(self) -> tuple[OpPlan, ...]:
        """The ops that a rule matches and that cannot be quantized."""
        return tuple(op for op in self.ops if op.unsupported)

    @property
    def float_bytes(self) -> int:
        """The size of all params as they are, in bytes."""
        return sum(param.float_bytes for param in self.params.values())

    @property
    def quantized_bytes(self) -> int:
        """The size of all params after quantization, in bytes."""
        return sum(param.quantized_bytes for param in self.params.values())

    @property
    def has_effect(self) -> bool:
        """Whether the rules do anything to the model."""
        return bool(self.quantized_ops or self.has_answers)

    def complaints(self) -> list[str]:
        """What the rules ask for that cannot be done, a sentence each."""
        return [
            f"{op.op.where} matches rule {op.rule_index} but stays in float: it is "
            f"{op.reason}."
            for op in self.unsupported
        ]

    def collected_ranges(self) -> list[CollectedRange]:
        """The ranges of activations that are to be collected."""
        return [
            CollectedRange(
                op.range_path(side),
                self.statistics_of(op, side),
                op.op.operands[side].shape,
                op.op.operands[side].dtype,
                op.op.layers,
            )
            for op in self.ops
            for side, how in enumerate(op.activations)
            if op.collected and how is not None
        ]

    def statistics_of(self, op: OpPlan, side: int) -> Statistics:
        """What is collected of an activation, as the rule of its op says.

        Args:
          op: what happens to the op.
          side: 0 for its left operand, 1 for its right one.
        """
        how = op.activations[side]
        assert how is not None and op.rule_index is not None
        return statistics_by(self.rules[op.rule_index], how, op.range_path(side))

    def gradient_statistics(self, op: OpPlan) -> Statistics | None:
        """What is collected of the gradient of the result of an op; None if nothing is.

        Args:
          op: what happens to the op.
        """
        if op.rule_index is None or not op.quantized:
            return None
        if not op_kinds.kind_of(op.op).is_product:
            return None
        return self.rules[op.rule_index].gradient_statistics

    def statistics_at(self, path: Path) -> Statistics:
        """What is collected for the range at a path.

        Raises:
          ValueError: if it asks for none.
        """
        return statistics_at(self.rules, path)

    def records(self) -> list[dict[str, Any]]:
        """A dictionary for each op, with the columns of the table as values."""
        return [
            plan_table.record(op, [self.params[path] for path in op.weights])
            for op in self.ops
        ]

    def no_match_message(self) -> str:
        """Says that nothing is quantized, and which module paths exist."""
        if not self.ops:
            return "The model runs no matrix product and no convolution to quantize."
        lines = [
            "No rule quantizes an op of this model. Its module paths, and their ops:",
            *(f"  {path!r}: {ops}" for path, ops in self._ops_by_module().items()),
        ]
        asked = [
            f"  {op.op.where}: {op.reason}"
            for op in self.ops
            if op.rule_index is not None and op.reason
        ]
        if asked:
            lines += ["A rule matches these, and they stay in float:", *asked]
        lines.append(
            "A rule's module_path is a regular expression that must match the whole "
            "path. To leave the model in float, pass allow_unmatched=True."
        )
        return "\n".join(lines)

    def _ops_by_module(self) -> dict[str, str]:
        """The ids of the ops of each module, as text."""
        found: dict[str, list[str]] = collections.defaultdict(list)
        for decision in self.decisions:
            found[decision.module_path].append(decision.id)
        return {path: plan_table.some(ids) for path, ids in found.items()}

    def __str__(self) -> str:
        return plan_table.table(self)

    def _repr_html_(self) -> str:
        return plan_table.html(self)


@dataclasses.dataclass(frozen=True)
class PlannedCall:
    """A call of a model in a step, and what happens in it.

    Attributes:
      when: the steps of a schedule that it is of, such as `"from step 100"`, or
        `"from step 100 (blended in)"` during a ramp; empty without a schedule.
      plan: what happens in the call.
    """

    when: str
    plan: Any


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """What happens in each call of a model in a wrapped step.

    Attributes:
      calls: the calls, in the order in which the step makes them.
    """

    calls: tuple[PlannedCall, ...]

    def records(self) -> list[dict[str, Any]]:
        """A dictionary for each op, as `Plan.records`, with the number of its call."""
        return [
            {"call": number, "when": call.when, **record}
            for number, call in enumerate(self.calls)
            for record in call.plan.records()
        ]

    def __str__(self) -> str:
        texts = [f"{title}:\n\n{call.plan}" for title, call in self._titled()]
        return "\n\n".join(texts) or _NO_CALL

    def _repr_html_(self) -> str:
        texts = [
            f"<p><b>{title}</b></p>\n{plan_table.html(call.plan)}"
            for title, call in self._titled()
        ]
        return "\n".join(texts) or f"<p>{_NO_CALL}</p>"

    def _titled(self) -> list[tuple[str, PlannedCall]]:
        # The calls of each phase of a schedule are counted by themselves.
        counts = collections.Counter(call.when for call in self.calls)
        seen: collections.Counter[str] = collections.Counter()
        titled = []
        for call in self.calls:
            seen[call.when] += 1
            when = f"{call.when}, " if call.when else ""
            title = f"{when}call {seen[call.when]} of {counts[call.when]}"
            titled.append((title, call))
        return titled
