"""What rules do to a model: every op, its rule, its weight, and why.

`plan(model, rules, *inputs)` traces a model, without computing anything, and returns
a `Plan`. Printed, it is a table. QAT and the other modes carry out the same plan, so
the table is what happens.
"""

from __future__ import annotations

import abc
import collections
import dataclasses
import difflib
import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax import numpy as jnp

from qwix_train import ops as op_kinds
from qwix_train.core import numerics, rotations
from qwix_train.core.errors import located
from qwix_train.core.how import (
    HowToQuantize,
    needs_zero_point,
    parse_calibration_method,
)
from qwix_train.core.numerics import is_int16
from qwix_train.core.rotation import Rotation
from qwix_train.observers.statistics import Statistics
from qwix_train.planning import table as plan_table
from qwix_train.planning import weights
from qwix_train.planning.current_rule import was_given
from qwix_train.planning.leaves import SIDES, OperandName, Path
from qwix_train.planning.rules import QuantizationRule, check_rules, statistics_at
from qwix_train.stages.rotate import Rotate, RotateWeight
from qwix_train.stages.stage import Stage
from qwix_train.trace import provenance
from qwix_train.trace.analyze import Op
from qwix_train.trace.function import TracedCall


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
      layer_axis: the axis along which its module stacks the params of the layers that a
        scan goes over; what stands beside them is stacked alike. Negative ones count
        from the last.
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
    layer_axis: int = 0

    def as_stored(self, leaf: Any) -> Any:
        """What stands beside its params, from an array with its layers in front."""
        if not self.layer_axis:
            return leaf
        return jax.tree.map(lambda x: jnp.moveaxis(x, 0, self.layer_axis), leaf)

    def layers_first(self, leaf: Any) -> Any:
        """An array with its layers in front, from what stands beside its params."""
        if not self.layer_axis:
            return leaf
        return jax.tree.map(lambda x: jnp.moveaxis(x, self.layer_axis, 0), leaf)

    def range_path(self, side: int) -> Path:
        """The path of the range of an operand: its module, its op and its side.

        Args:
          side: 0 for the left factor, 1 for the right one.
        """
        return OperandName(self.module_path, self.op.id, SIDES[side]).path

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
        bits = numerics.qtype_bits(self.how.qtype)
        method = self.how.calibration_method
        fixed = parse_calibration_method(method)[0] == "fixed"
        scales = 1 if fixed else math.prod(self.how.scale_shape(self.shape))
        codes = -(-math.prod(self.shape) * bits // 8)
        zero_points = -(-scales * bits // 8) if needs_zero_point(method) else 0
        return codes + scales * self.dtype.itemsize + zero_points


class Decision(NamedTuple):
    """Which rule decided for an op.

    Attributes:
      rule_index: the rule; None if none matched.
      module_path: the path of the op's module.
      name: the name by which rules know the op.
      id: its name and its count within the module.
    """

    rule_index: int | None
    module_path: str
    name: str
    id: str


class RuleUse(abc.ABC):
    """What each of some rules decided for.

    Attributes:
      rules: the rules.
    """

    rules: tuple[QuantizationRule, ...]

    @property
    @abc.abstractmethod
    def decisions(self) -> tuple[Decision, ...]:
        """The rule that decided for each op."""

    @property
    def module_paths(self) -> tuple[str, ...]:
        """The paths of the modules that run ops."""
        return tuple(dict.fromkeys(decision.module_path for decision in self.decisions))

    @property
    def unused_rules(self) -> tuple[int, ...]:
        """The indices of the rules that decided for no op."""
        used = {decision.rule_index for decision in self.decisions}
        return tuple(i for i in range(len(self.rules)) if i not in used)

    def shadowed_by(self, rule_index: int) -> tuple[int, ...]:
        """The earlier rules that decided for all that an unused rule matches."""
        rule = self.rules[rule_index]
        matched = [
            decision.rule_index
            for decision in self.decisions
            if rule.matches(decision.module_path, decision.name, decision.id)
        ]
        return tuple(sorted({i for i in matched if i is not None}))

    def is_default(self, rule_index: int) -> bool:
        """Whether an unused rule is for what earlier, narrower ones leave: nothing."""

        def matched(index):
            rule = self.rules[index]
            return {
                (decision.module_path, decision.id)
                for decision in self.decisions
                if rule.matches(decision.module_path, decision.name, decision.id)
            }

        earlier, own = self.shadowed_by(rule_index), matched(rule_index)
        return bool(earlier) and all(matched(index) < own for index in earlier)

    def unmatched_rules(self) -> dict[int, str]:
        """The rules that match no op, each with a sentence that says so."""
        return {
            index: plan_table.unused(self, index)
            for index in self.unused_rules
            if not self.shadowed_by(index) and not was_given(self.rules[index])
        }

    def near_misses(self, rule_index: int) -> list[str]:
        """Module paths that exist and resemble an unused rule's."""
        return difflib.get_close_matches(
            self.rules[rule_index].module_path, self.module_paths, n=3, cutoff=0.4
        )


class RuleUseInCalls(RuleUse):
    """What each rule decided for in several calls."""

    def __init__(self, plans: Sequence[RuleUse]):
        """Takes the plans of the calls, which have the same rules."""
        self.rules = plans[0].rules
        self._decisions = tuple(d for plan in plans for d in plan.decisions)

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """The rule that decided for each op."""
        return self._decisions


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
        """Whether kernels got a rule, of which not all that are compiled tell."""
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
            f"None of the {len(self.rules)} rules quantizes any op of this model.",
            "Ops exist at these module paths:",
            *(f"  {path!r}" for path in self.module_paths),
        ]
        asked = [
            f"  {op.op.where}: {op.reason}"
            for op in self.ops
            if op.rule_index is not None and op.reason
        ]
        if asked:
            lines += ["Rules matched these, to no effect:", *asked]
        lines.append(
            "A rule's module_path is a regular expression that must match the whole "
            "path. Pass allow_unmatched=True if leaving the model in float is meant."
        )
        return "\n".join(lines)

    def __str__(self) -> str:
        return plan_table.table(self)


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
        # The calls of each phase of a schedule are counted by themselves.
        counts = collections.Counter(call.when for call in self.calls)
        seen: collections.Counter[str] = collections.Counter()
        texts = []
        for call in self.calls:
            seen[call.when] += 1
            title = f"call {seen[call.when]} of {counts[call.when]}"
            when = f"{call.when}, " if call.when else ""
            texts.append(f"{when}{title}:\n\n{call.plan}")
        return "\n\n".join(texts) or "The step calls no model that is quantized."


def is_whole(traced: TracedCall) -> bool:
    """Whether a call is that of a model as a whole: no part of it, no other method."""
    return traced.method == "__call__" and not traced.module_path


def param_plans(traced: TracedCall) -> dict[Path, ParamPlan]:
    """The params of a traced call, before any is quantized, by path."""
    return {
        p.path: ParamPlan(
            p.path,
            tuple(p.value.shape),
            p.value.dtype,
            layer_axes=tuple(sorted(traced.layer_axes.get(p.path, ()))),
            mapped_axes=traced.mapped_axes(p),
        )
        for p in traced.params
        if p is not None
    }


def make_plan(traced: TracedCall, rules: Sequence[QuantizationRule]) -> Plan:
    """Decides what happens to every op of a traced call.

    Args:
      traced: the traced call.
      rules: the rules, in order of precedence.

    Raises:
      ValueError: if a tile size does not divide its axis, if two ops ask for one param
        to be quantized in two ways, or if a rule is for LiteRT alone.
    """
    for index, rule in enumerate(check_rules(rules)):
        if is_int16(rule.act_qtype):
            raise ValueError(
                f"Rule {index} (act_qtype={rule.act_qtype!r}): activations of 16 bits "
                "are for LiteRT alone, with an OdmlQatProvider."
            )
    planner = _Planner(check_rules(rules), traced)
    ops = planner.with_ranges([planner.decide(op) for op in traced.ops])
    planned = tuple(map(planner.annotate, ops))
    return Plan(
        planner.rules,
        planned,
        planner.params,
        whole=is_whole(traced),
        requests=requests_of(traced, planner.rules),
    )


def requests_of(
    traced: TracedCall, rules: Sequence[QuantizationRule]
) -> tuple[Decision, ...]:
    """Which rules kernels got that asked for one while a call was traced."""
    found = []
    for path, name in traced.requests:
        decided = (i for i, rule in enumerate(rules) if rule.matches(path, name, name))
        found.append(Decision(next(decided, None), path, name, name))
    return tuple(found)


class _Planner:
    def __init__(self, rules: tuple[QuantizationRule, ...], traced: TracedCall):
        self.rules = rules
        self.module_path = traced.module_path
        self.params = param_plans(traced)

    def decide(self, op: Op) -> OpPlan:
        if op.in_float:
            return OpPlan(op, reason="its call is in_float")
        kind = op_kinds.kind_of(op)
        where = op.module_path, op.name, op.id
        matching = (i for i, rule in enumerate(self.rules) if rule.matches(*where))
        index = next(matching, None)
        if index is None:
            named = (
                f"{kind.plural} are quantized where a rule's op_names has {op.name!r}"
            )
            return OpPlan(op, reason=named if kind.by_name_only else "no rule matches")
        rule = self.rules[index]
        path = op.module_path.removeprefix(self.module_path).removeprefix("/")
        nothing = (None,) * len(op.operands)
        plan = OpPlan(
            op,
            index,
            activations=nothing,
            rotations=nothing,
            module_path=path,
            layer_axis=self.layer_axis(op, path),
        )
        left = functools.partial(dataclasses.replace, plan)
        if rule.weight_qtype is None:
            return left(reason="the rule sets no weight_qtype")
        if op.moves:
            return left(reason="a product with a constant that only moves elements")
        if op.opaque:
            obstacle = (
                f"inside {op.opaque}, which cannot be rewritten: call the product "
                "outside of it, or leave it out with a rule that sets no weight_qtype"
            )
            return left(reason=obstacle, unsupported=True)
        dtypes = [operand.dtype for operand in op.operands[: kind.sides]]
        if not all(map(numerics.is_quantizable, dtypes)):
            return left(reason=f"operands are {' and '.join(map(str, dtypes))}")
        return self.quantize(plan, rule)

    def layer_axis(self, op: Op, module_path: str) -> int:
        """See `OpPlan.layer_axis`: where all stacked params of a module have it."""
        if len(op.layers) != 1:
            return 0
        module = tuple(filter(None, module_path.split("/")))
        axes = [
            {param.layer_axes[0], param.layer_axes[0] - len(param.shape)}
            for param in self.params.values()
            if param.path[:-1] == module and len(param.layer_axes) == 1
        ]
        common = set.intersection(*axes) if axes else {0}
        if 0 in common or not common:
            return 0
        return -1 if -1 in common else max(common)

    def quantize(self, plan: OpPlan, rule: QuantizationRule) -> OpPlan:
        op = plan.op
        kind, origins = op_kinds.kind_of(op), weights.roles(op)
        derived = [o for o in origins if isinstance(o, provenance.Derived)]
        if derived:
            names = plan_table.some(["/".join(p) for p in derived[0].paths], most=3)
            return dataclasses.replace(
                plan,
                reason=f"an operand is computed from {names} by {derived[0].by}: "
                "its elements are not elements of one param",
            )
        if all(isinstance(o, provenance.Constant) for o in origins):
            return dataclasses.replace(plan, reason="both operands are constants")
        has_weight = any(isinstance(o, provenance.Weight) for o in origins)
        if not has_weight and rule.act_qtype is None:
            reason = "a product without a weight, and the rule sets no act_qtype"
            return dataclasses.replace(plan, reason=reason)
        if not has_weight and not rule.act_act:
            reason = "a product without a weight, and the rule sets act_act=False"
            return dataclasses.replace(plan, reason=reason)
        if rule.tile_size is not None and not kind.has_tiles:
            raise ValueError(
                f"{op.where}: tile_size={rule.tile_size} is set, but {kind.plural} "
                "have no sub-channel quantization. Put a rule without tile_size, for "
                f"op_names=({op.name!r},), before this one."
            )
        rotations = self.rotations(op, rule, origins)
        plan = dataclasses.replace(plan, rotations=rotations)
        paths: dict[Path, None] = {}
        notes: list[str] = []
        activations: list[HowToQuantize | None] = [None] * len(op.operands)
        # Weights first, so that an error names the param.
        for side, origin in enumerate(origins):
            if isinstance(origin, provenance.Weight):
                for view in origin.views:
                    paths[view.path] = None
                    notes += self.quantize_param(plan, rule, side, view)
        for side, origin in enumerate(origins):
            if not isinstance(origin, provenance.Weight) and rule.act_qtype is not None:
                activations[side] = self.quantize_activation(op, side, rule)
        notes += [rule.note] if rule.note else []
        notes += [f"rotated by {rule.rotation}"] if any(rotations) else []
        return dataclasses.replace(
            plan,
            weights=tuple(paths),
            activations=tuple(activations),
            static=rule.static_act_ranges and any(activations),
            learned=rule.learned_act_method if any(activations) else "",
            reason="; ".join(dict.fromkeys(notes)),
        )

    def with_ranges(self, plans: Sequence[OpPlan]) -> list[OpPlan]:
        """Names the ranges of activations.

        Ops of one region that quantize an array alike share its range.
        """
        settings = [[getattr(rule, f) for f in _RANGE_FIELDS] for rule in self.rules]
        readers: dict[Any, list[Path]] = collections.defaultdict(list)

        def range_of(plan, side, how):
            """The names of a range, to which those of later readers are added."""
            if how is None:
                return ()
            array, key = plan.op.operands[side].provenance, (plan.op.key, side)
            if isinstance(array, provenance.Activation):
                alike = settings.index(settings[plan.rule_index])
                method = how, plan.rotations[side], plan.static, plan.learned, alike
                key = plan.op.region, id(array), method
            readers[key].append(plan.range_path(side))
            return readers[key]

        found = [
            [range_of(plan, *activation) for activation in enumerate(plan.activations)]
            for plan in plans
        ]
        return [
            _with_ranges(plan, tuple(map(tuple, names)))
            for plan, names in zip(plans, found, strict=True)
        ]

    def annotate(self, plan: OpPlan) -> OpPlan:
        """Adds to an op left in float which of the params that it reads are not."""
        if plan.quantized:
            return plan
        read = dict.fromkeys(
            path
            for operand in plan.op.operands[:2]
            for path in provenance.paths_of(operand.provenance)
        )
        notes = [
            f"it reads {'/'.join(path)}, which is quantized because of "
            f"{param.op.op.where}"
            for path in read
            if (param := self.params[path]).op is not None
        ]
        return dataclasses.replace(plan, reason="; ".join([plan.reason, *notes]))

    def quantize_activation(self, op, side, rule) -> HowToQuantize:
        axes = weights.operand_axes(op, side, rule.tile_size)
        channelwise = () if rule.disable_channelwise_axes else axes.channelwise
        if rule.static_act_ranges:
            # A range must not depend on the size of the batch, nor on the length of a
            # sequence, which products of two activations may contract.
            channelwise = _static_axes(op, side, rule, channelwise)
            if not any(isinstance(o, provenance.Weight) for o in weights.roles(op)):
                axes = weights.operand_axes(op, side, None)
        _check_tiles(op.where, op.operands[side].shape, axes, rule)
        return HowToQuantize(
            qtype=rule.act_qtype,
            channelwise_axes=channelwise,
            tiled_axes=axes.tiled,
            calibration_method=rule.act_method,
            pad_tiles=rule.pad_tiles,
        )

    def rotations(
        self, op: Op, rule: QuantizationRule, origins: Sequence[provenance.Provenance]
    ) -> tuple[Rotation | None, ...]:
        """The rotation of each operand: along what a weight and its input contract.

        Of several such axes it is the longest, and of equal ones the last.
        """
        found: list[Rotation | None] = [None] * len(op.operands)
        sides = [s for s, o in enumerate(origins) if isinstance(o, provenance.Weight)]
        kind = op_kinds.kind_of(op)
        if rule.rotation is None or not kind.is_product or not sides:
            return tuple(found)
        shapes = [operand.shape for operand in op.operands[: kind.sides]]
        pairs = kind.meeting_axes(op.params, list(map(len, shapes)))
        views = [view for side, view in weights.weights_of(op) if side == sides[0]]
        whole = [
            axes
            for axes in pairs
            if len(sides) == 1
            and all(_is_whole(view, axes[sides[0]]) for view in views)
        ]
        if not whole:
            raise ValueError(
                f"{op.where}: rotation={rule.rotation!r} is set, and it contracts no "
                "axis of an input with a whole axis of one param. Put a rule without "
                "rotation, for this op, before this one."
            )
        axes = max(whole, key=lambda axes: (shapes[0][axes[0]], axes[0]))
        for side, axis in enumerate(axes):
            with located(op.where):
                found[side] = rotations.parse(rule.rotation, axis, shapes[side][axis])
        return tuple(found)

    def quantize_param(self, plan, rule, side, view) -> list[str]:
        """Records how a param is quantized; returns notes for the op's reason."""
        op = plan.op
        where = f"{op.where}, param {'/'.join(view.path)!r}"
        axes = weights.operand_axes(op, side, rule.tile_size)
        if rule.disable_channelwise_axes:
            axes = dataclasses.replace(axes, channelwise=())
        _check_tiles(where, op.operands[side].shape, axes, rule)
        try:
            axes = weights.stored_axes(view, axes)
        except ValueError as error:
            raise ValueError(f"{where}: {error}.") from None
        _check_tiles(where, view.shape, axes, rule)
        rotation = plan.rotations[side]
        how = HowToQuantize(
            qtype=rule.weight_qtype,
            channelwise_axes=axes.channelwise,
            tiled_axes=axes.tiled,
            calibration_method=rule.weight_calibration_method,
            pad_tiles=rule.pad_tiles,
            rotation=rotation and rotation.at(view.dims[rotation.axis][0].axis),
        )
        param = self.params[view.path]
        if param.how is None or param.op is None:
            self.params[view.path] = dataclasses.replace(param, how=how, op=plan)
            return []
        if param.how == how:
            return []
        first = param.op
        other = self.rules[first.rule_index] if first.rule_index is not None else rule
        if _weight_fields(other) != _weight_fields(rule):
            raise ValueError(
                f"Param {'/'.join(view.path)!r} is asked to be quantized in two ways: "
                f"by rule {first.rule_index} at {first.op.where} "
                f"({_weight_fields(other)}), and by rule {plan.rule_index} at "
                f"{op.where} ({_weight_fields(rule)}). A param has one quantization: "
                "give both ops the same weight settings."
            )
        return [f"its weight is quantized along the axes of {first.op.where}"]


def _is_whole(view: provenance.View, axis: int) -> bool:
    """Whether an axis of an operand is one whole axis of the param."""
    atoms = view.dims[axis]
    return (
        len(atoms) == 1
        and atoms[0].whole
        and atoms[0].size == view.shape[atoms[0].axis]
    )


# What rules say of a range, beside how the array is quantized, and when.
_RANGE_FIELDS = (
    "act_observer",
    "act_averaging",
    "act_batch_axes",
    "act_finite_only",
    "schedule",
)


def _with_ranges(plan: OpPlan, ranges: tuple[tuple[Path, ...], ...]) -> OpPlan:
    """The plan of an op with its ranges, which says whose trained ones it shares."""
    notes = [
        f"its {SIDES[side]} has the learned range of {'/'.join(names[0])}"
        for side, names in enumerate(ranges)
        if plan.learned and names and names[0] != plan.range_path(side)
    ]
    reason = "; ".join(filter(None, [plan.reason, *notes]))
    return dataclasses.replace(plan, ranges=ranges, reason=reason)


def _weight_fields(rule: QuantizationRule) -> str:
    names = """weight_qtype weight_calibration_method tile_size pad_tiles
        disable_channelwise_axes rotation"""
    return ", ".join(f"{name}={getattr(rule, name)!r}" for name in names.split())


def _static_axes(
    op: Op, side: int, rule: QuantizationRule, channelwise: Collection[int]
) -> tuple[int, ...]:
    """The axes along which each index of an activation keeps a static range."""
    ndim = len(op.operands[side].shape)
    axes = {axis % ndim for axis in rule.act_channelwise_axes if -ndim <= axis < ndim}
    if len(axes) < len(set(rule.act_channelwise_axes)) or axes - set(channelwise):
        raise ValueError(
            f"{op.where}: act_channelwise_axes={rule.act_channelwise_axes} does not "
            f"fit its {SIDES[side]}, of shape "
            f"{tuple(op.operands[side].shape)}: axes that may have ranges of their own "
            f"are {tuple(channelwise)}."
        )
    return tuple(sorted(axes))


def _check_tiles(where, shape, axes, rule) -> None:
    for axis, tile in axes.tiled.items():
        if shape[axis] % tile and not rule.pad_tiles:
            raise ValueError(
                f"{where}: a tile of {tile} does not divide axis {axis}, of length "
                f"{shape[axis]}, of the shape {tuple(shape)}. Choose "
                f"a tile_size that does (it is {rule.tile_size}), or set "
                "pad_tiles=True in the rule."
            )
