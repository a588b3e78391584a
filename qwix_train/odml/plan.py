"""What happens to every tensor of a model that is to run in integers on LiteRT.

LiteRT quantizes tensors, not operations: the output of each operation has one scale and
zero point, whoever reads it. `planner.make_odml_plan` decides which tensors have a
range of their own, which share one, and which never come to be, because the operations
around them are fused.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from qwix_train.core.how import HowToQuantize
from qwix_train.core.numerics import is_int16, qtype_name
from qwix_train.observers.statistics import Statistics
from qwix_train.odml import ops
from qwix_train.odml.fusion import Fusion
from qwix_train.odml.graph import Graph, Node, Value
from qwix_train.odml.masks import Mask
from qwix_train.odml.ops import OpSpec
from qwix_train.planning.plan import OpPlan, Path, Plan
from qwix_train.planning.quant_stats import CollectedRange, statistics_by
from qwix_train.planning.rules import QuantizationRule
from qwix_train.planning.table import granularity


@dataclasses.dataclass(eq=False)
class TensorPlan:
    """A tensor with a range of its own.

    Attributes:
      value: the tensor.
      path: the path of its range, after the first op that reads it.
      how: how its range is measured.
      rule: the rule that asks for it.
      qtype: the type of its codes: `int8` or `int16`.
      scale: its scale as int8, if LiteRT allows only one.
      zero_point: its zero point as int8, if LiteRT allows only one.
      mask: the number that masks an element, which lies outside of its range.
      rounding: how it is rounded to codes.
    """

    value: Value
    path: Path
    how: HowToQuantize
    rule: QuantizationRule
    qtype: str = "int8"
    scale: float | None = None
    zero_point: int | None = None
    mask: Mask | None = None
    rounding: str = "even"

    @property
    def name(self) -> str:
        """The path as text."""
        return "/".join(self.path)

    @property
    def statistics(self) -> Statistics:
        """What is collected of it."""
        return statistics_by(self.rule, self.how, self.path)

    def observed(self, x: Any) -> Any:
        """What its range is to be measured of."""
        return x if self.mask is None else self.mask.observed(x)

    @property
    def measured(self) -> bool:
        """Whether its range is found by running the model."""
        return self.scale is None and not self.how.calibration_method.startswith(
            "fixed"
        )


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class NodePlan(OpPlan):
    """What happens to one operation.

    Attributes:
      node: the operation.
      spec: what LiteRT makes of it; None if it cannot.
      rule: the rule that matched, or None.
      in_integers: whether it runs in integers.
      weight: the side of its operand that is a weight, if one is quantized.
      weight_how: how that is quantized, on the axes of the operand.
      dynamic: whether its activation is quantized when it runs.
      fusion: what it is the first operation of, if several run as one.
      fused_into: the first operation of those that it runs as one with, if it is
        another.
    """

    node: Node
    spec: OpSpec | None
    rule: QuantizationRule | None = None
    in_integers: bool = False
    weight: int | None = None
    weight_how: HowToQuantize | None = None
    dynamic: bool = False
    fusion: Fusion | None = None
    fused_into: Node | None = None

    @property
    def name(self) -> str:
        """The name that rules give it."""
        return self.op.name

    @property
    def where(self) -> str:
        """The module and the operation."""
        return self.op.where

    @property
    def kind(self) -> ops.Kind | None:
        """How LiteRT quantizes its output; None if it cannot."""
        return None if self.spec is None else self.spec.kind

    @property
    def moves(self) -> bool:
        """Whether it only changes where elements are."""
        return self.name in ops.LAYOUT

    @property
    def quantized(self) -> bool:
        """Whether it reads or computes anything quantized."""
        return self.in_integers or self.dynamic or self.weight is not None

    @property
    def act_qtype(self) -> str:
        """The type of the activations that it reads and computes, in integers."""
        assert self.rule is not None
        return activation_qtype(self.rule)

    @property
    def constants(self) -> tuple[int, ...]:
        """The operands that are constants, and quantized as a whole."""
        if not self.in_integers or self.fused_into is not None:
            return ()
        if self.kind is ops.Kind.LOOKUP:
            return (0,)
        if self.name not in (*ops.AFFINE, "truediv"):
            return ()
        return tuple(
            side for side, value in enumerate(self.node.inputs) if value.static
        )

    @property
    def quantized_sides(self) -> tuple[int, ...]:
        """The operands that it quantizes itself."""
        dynamic = [i for i, how in enumerate(self.activations) if how is not None]
        weight = () if self.weight is None else (self.weight,)
        return (*self.constants, *weight, *dynamic)

    @property
    def folds(self) -> bool:
        """Whether its weight is quantized with what follows multiplied in.

        It is so where the weight has one scale; of several, each channel has its own
        either way.
        """
        how, fusion = self.weight_how, self.fusion
        if how is None or fusion is None or not fusion.affine:
            return False
        return not how.channelwise_axes


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class OdmlPlan(Plan):
    """What happens to every operation, tensor and param of a traced call.

    The operations are those that a rule may select, each with a `NodePlan`.

    Attributes:
      graph: the operations of the call.
      by_node: what happens to each operation, by its id, in order.
      by_value: the ranges of tensors that have one of their own, by id, in order.
      shared: for other tensors that are quantized, by id, the one whose range it is.
    """

    ops: tuple[NodePlan, ...]
    graph: Graph
    by_node: dict[int, NodePlan]
    by_value: dict[int, TensorPlan] = dataclasses.field(default_factory=dict)
    shared: dict[int, Value] = dataclasses.field(default_factory=dict)

    @property
    def nodes(self) -> tuple[NodePlan, ...]:
        """What happens to each operation, those that move elements among them."""
        return tuple(self.by_node.values())

    @property
    def tensors(self) -> tuple[TensorPlan, ...]:
        """The tensors with a range of their own, in order."""
        return tuple(self.by_value.values())

    def of(self, node: Node) -> NodePlan | None:
        """What happens to an operation; None if it computes constants, or nothing."""
        return self.by_node.get(id(node))

    def first_of(self, plan: NodePlan) -> NodePlan:
        """The first of the operations that run as one with an operation."""
        return plan if plan.fused_into is None else self.by_node[id(plan.fused_into)]

    def end_of(self, plan: NodePlan) -> Value:
        """The output of an operation, with all that is fused into it."""
        return plan.node.out if plan.fusion is None else plan.fusion.end.out

    def tensor(self, value: Value) -> TensorPlan | None:
        """The range of its own that a value has."""
        return self.by_value.get(id(value))

    def range_of(self, value: Value) -> TensorPlan | Value | None:
        """The range of a value, its own or shared.

        Returns:
          A table of embeddings, if it holds rows of one.
        """
        shared = self.shared.get(id(value))
        if shared is None:
            return self.tensor(value)
        return self.range_of(shared) or (shared if shared.static else None)

    @property
    def float_ops(self) -> tuple[NodePlan, ...]:
        """The operations that run in floats, such as what makes floats of integers."""

        def in_float(plan: NodePlan) -> bool:
            if plan.in_integers:
                return False
            read, made = (
                [v for v in values if v.is_activation]
                for values in (plan.node.inputs, plan.node.outputs)
            )
            floats = [v for v in (*read, *made) if v.is_float]
            cast = any(v.is_float for v in made) and not any(v.is_float for v in read)
            keeps_codes = plan.moves or plan.kind in (
                ops.Kind.INTEGER,
                ops.Kind.FLOAT_INPUT,
            )
            if cast or not keeps_codes:
                return bool(floats)
            return any(self.range_of(v) is None for v in floats)

        return tuple(filter(in_float, self.nodes))

    @property
    def measured(self) -> tuple[TensorPlan, ...]:
        """The tensors whose range is found by running the model."""
        return tuple(tensor for tensor in self.tensors if tensor.measured)

    def complaints(self) -> list[str]:
        """See `Plan.complaints`."""
        return [unsupported_message(node) for node in self.unsupported]

    def collected_ranges(self) -> list[CollectedRange]:
        """See `Plan.collected_ranges`."""
        return [
            CollectedRange(x.path, x.statistics, x.value.shape, x.value.dtype)
            for x in self.measured
        ]

    def statistics_at(self, path: Path) -> Statistics:
        """See `Plan.statistics_at`."""
        for tensor in self.measured:
            if tensor.path == path:
                return tensor.statistics
        raise ValueError(
            f"There are quant_stats for {'/'.join(path)!r}, and the plan measures no "
            "such range. Make the plan with the provider that they were collected with."
        )

    def records(self) -> list[dict[str, Any]]:
        """See `Plan.records`; `range` is the name of the range of the result."""
        return [
            record | self._litert_columns(plan)
            for record, plan in zip(super().records(), self.ops, strict=True)
        ]

    def _litert_columns(self, plan: NodePlan) -> dict[str, Any]:
        first = self.first_of(plan)
        found = self.range_of(self.end_of(plan)) if first is plan else None
        columns: dict[str, Any] = {
            "range": found.name if isinstance(found, TensorPlan) else "",
            "reason": plan.reason if first is plan else f"part of {first.where}",
        }
        if plan.weight_how is not None and not plan.weights:
            columns["weight_qtype"] = str(plan.weight_how.qtype)
            columns["weight_granularity"] = granularity(plan.weight_how)
        if plan.in_integers:
            columns |= {
                "act_qtype": plan.act_qtype,
                "act_granularity": "tensor",
                "act_static_scale": True,
            }
        return columns


def activation_qtype(rule: QuantizationRule) -> str:
    """The name of the type of the activations of a rule."""
    return "int16" if is_int16(rule.act_qtype) else qtype_name(rule.act_qtype)


def unsupported_message(plan: OpPlan) -> str:
    """Says which operation cannot run in integers, and what to do."""
    shapes = ", ".join(str(tuple(operand.shape)) for operand in plan.op.operands)
    where = f"in module {plan.module_path!r}" if plan.module_path else "in the model"
    return (
        f"{plan.op.where} ({plan.op.name} of {shapes}, {where}) matches rule "
        f"{plan.rule_index} and cannot be quantized: {plan.reason}. "
        "Leave it in float with a rule before that one which matches it and sets no "
        "weight_qtype, or pass strict=False: it then runs in float, between a "
        "DEQUANTIZE and a QUANTIZE."
    )
