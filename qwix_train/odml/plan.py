"""What happens to every tensor of a model that is to run in integers on LiteRT.

LiteRT quantizes tensors, not operations: the output of each operation has one scale and
zero point, whoever reads it. `planner.make_odml_plan` decides which tensors have a
range of their own, which share one, and which never come to be, because the operations
around them are fused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from qwix_train.core.how import HowToQuantize
from qwix_train.core.numerics import is_int16, qtype_name
from qwix_train.files.text_table import aligned
from qwix_train.odml import ops
from qwix_train.odml.fusion import Fusion
from qwix_train.odml.graph import Graph, Node, Value
from qwix_train.odml.masks import Mask
from qwix_train.odml.ops import OpSpec
from qwix_train.planning.plan import Decision, Path, RuleUse
from qwix_train.planning.rules import QuantizationRule


@dataclasses.dataclass(eq=False)
class TensorPlan:
    """A tensor with a range of its own.

    Attributes:
      value: the tensor.
      path: the path of its range, after the first op that reads it.
      how: how its range is measured.
      rule_index: the rule that asks for it.
      qtype: the type of its codes: `int8` or `int16`.
      scale: its scale as int8, if LiteRT allows only one.
      zero_point: its zero point as int8, if LiteRT allows only one.
      mask: the number that masks an element, which lies outside of its range.
      rounding: how it is rounded to codes.
    """

    value: Value
    path: Path
    how: HowToQuantize
    rule_index: int
    qtype: str = "int8"
    scale: float | None = None
    zero_point: int | None = None
    mask: Mask | None = None
    rounding: str = "even"

    @property
    def name(self) -> str:
        """The path as text."""
        return "/".join(self.path)

    def observed(self, x: Any) -> Any:
        """What its range is to be measured of."""
        return x if self.mask is None else self.mask.observed(x)

    @property
    def measured(self) -> bool:
        """Whether its range is found by running the model."""
        return self.scale is None and not self.how.calibration_method.startswith(
            "fixed"
        )


@dataclasses.dataclass(eq=False)
class NodePlan:
    """What happens to one operation.

    Attributes:
      node: the operation.
      name: the name that rules give it.
      id: the name, and the count within its module.
      module_path: the path of its module.
      spec: what LiteRT makes of it; None if it cannot.
      rule_index: the rule that matched, or None.
      rule: that rule.
      quantized: whether it runs in integers.
      weight: the side of its operand that is a weight, if one is quantized.
      dynamic: whether its activation is quantized when it runs.
      fusion: what it is the first operation of, if several run as one.
      fused_into: the operation that it is a part of.
      reason: why it stays in float, or what else is worth knowing.
      unsupported: whether a rule asked for what cannot be done.
    """

    node: Node
    name: str
    id: str
    module_path: str
    spec: OpSpec | None
    rule_index: int | None = None
    rule: QuantizationRule | None = None
    quantized: bool = False
    weight: int | None = None
    dynamic: bool = False
    fusion: Fusion | None = None
    fused_into: NodePlan | None = None
    reason: str = ""
    unsupported: bool = False

    @property
    def where(self) -> str:
        """The module and the operation."""
        return f"{self.module_path}/{self.id}" if self.module_path else self.id

    @property
    def act_qtype(self) -> str:
        """The type of the activations that it reads and computes, in integers."""
        assert self.rule is not None
        return activation_qtype(self.rule)

    @property
    def constants(self) -> tuple[int, ...]:
        """The operands that are constants, and quantized as a whole."""
        if not self.quantized or self.name not in (*ops.AFFINE, "truediv"):
            return ()
        return tuple(
            side for side, value in enumerate(self.node.inputs) if value.static
        )


class OdmlPlan(RuleUse):
    """What happens to every operation and tensor of a traced call.

    Attributes:
      rules: the rules.
      graph: the operations.
      nodes: what happens to each operation, in order.
      tensors: the tensors with a range of their own, in order.
      whole: whether the call is that of a model as a whole.
    """

    def __init__(self, graph: Graph, rules: Sequence[QuantizationRule], whole: bool):
        self.graph = graph
        self.rules = tuple(rules)
        self.whole = whole
        self.nodes: tuple[NodePlan, ...] = ()
        self.tensors: tuple[TensorPlan, ...] = ()
        self._node: dict[int, NodePlan] = {}
        self._tensor: dict[int, TensorPlan] = {}
        self._shared: dict[int, Value] = {}

    def of(self, node: Node) -> NodePlan | None:
        """What happens to an operation; None if it computes constants, or nothing."""
        return self._node.get(id(node))

    def tensor(self, value: Value) -> TensorPlan | None:
        """The range of its own that a value has."""
        return self._tensor.get(id(value))

    def range_of(self, value: Value) -> TensorPlan | Value | None:
        """The range of a value, its own or shared.

        Returns:
          A table of embeddings, if it holds rows of one.
        """
        shared = self._shared.get(id(value))
        if shared is None:
            return self._tensor.get(id(value))
        return self.range_of(shared) or (shared if shared.static else None)

    @property
    def ops(self) -> tuple[NodePlan, ...]:
        """The operations that a rule may select."""
        return tuple(n for n in self.nodes if n.name not in ops.LAYOUT)

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """The rule that decided for each operation."""
        return tuple(
            Decision(n.rule_index, n.node.module_path, n.name, n.id) for n in self.ops
        )

    @property
    def quantized_ops(self) -> tuple[NodePlan, ...]:
        """The operations that read or compute anything quantized."""
        return tuple(
            n for n in self.ops if n.quantized or n.dynamic or n.weight is not None
        )

    @property
    def unsupported(self) -> tuple[NodePlan, ...]:
        """The operations that a rule matches, and that cannot run in integers."""
        return tuple(n for n in self.ops if n.unsupported)

    @property
    def float_ops(self) -> tuple[NodePlan, ...]:
        """The operations that run in floats, such as what makes floats of integers."""

        def in_float(plan: NodePlan) -> bool:
            if plan.quantized:
                return False
            read, made = (
                [v for v in values if v.is_activation]
                for values in (plan.node.inputs, plan.node.outputs)
            )
            floats = [v for v in (*read, *made) if v.is_float]
            cast = any(v.is_float for v in made) and not any(v.is_float for v in read)
            keeps_codes = plan.name in ops.LAYOUT or (
                plan.spec is not None
                and plan.spec.kind in (ops.Kind.INTEGER, ops.Kind.FLOAT_INPUT)
            )
            if cast or not keeps_codes:
                return bool(floats)
            return any(self.range_of(v) is None for v in floats)

        return tuple(filter(in_float, self.nodes))

    @property
    def measured(self) -> tuple[TensorPlan, ...]:
        """The tensors whose range is found by running the model."""
        return tuple(tensor for tensor in self.tensors if tensor.measured)

    def no_match_message(self) -> str:
        """Says that nothing is quantized, and which module paths exist."""
        paths = dict.fromkeys(n.module_path for n in self.ops)
        return "\n".join(
            [
                f"None of the {len(self.rules)} rules quantizes any op of this model.",
                "Ops exist at these module paths:",
                *(f"  {path!r}" for path in paths),
                "A rule's module_path is a regular expression that must match the "
                "whole path.",
            ]
        )

    def records(self) -> list[dict[str, Any]]:
        """A dictionary for each operation, with the columns of the table as values."""
        records = []
        for plan in self.ops:
            tensor = self.range_of(self.end_of(plan))
            path = tensor.name if isinstance(tensor, TensorPlan) else ""
            note = plan.reason
            if plan.fused_into is not None:
                note = f"part of {plan.fused_into.where}"
            records.append(
                {
                    "module_path": plan.module_path,
                    "op": plan.id,
                    "rule": plan.rule_index,
                    "weight": _weight_text(plan),
                    "activations": _activations_text(plan),
                    "range": "" if plan.fused_into is not None else path,
                    "note": note,
                }
            )
        return records

    def end_of(self, plan: NodePlan) -> Value:
        """The output of an operation, with all that is fused into it."""
        return plan.node.out if plan.fusion is None else plan.fusion.end.out

    def __str__(self) -> str:
        records = self.records()
        if not records:
            return "no ops"
        header = list(records[0])
        rows = [["" if r[k] is None else str(r[k]) for k in header] for r in records]
        return aligned([header, *rows])


def _weight_text(plan: NodePlan) -> str:
    if plan.weight is None or plan.rule is None:
        return ""
    return qtype_name(plan.rule.weight_qtype)


def _activations_text(plan: NodePlan) -> str:
    if plan.rule is None or not (plan.quantized or plan.dynamic):
        return ""
    return plan.act_qtype + (" dynamic" if plan.dynamic else "")


def activation_qtype(rule: QuantizationRule) -> str:
    """The name of the type of the activations of a rule."""
    return "int16" if is_int16(rule.act_qtype) else qtype_name(rule.act_qtype)


def unsupported_message(plan: NodePlan) -> str:
    """Says which operation cannot run in integers, and what to do."""
    shapes = ", ".join(str(tuple(v.shape)) for v in plan.node.inputs)
    where = f"in module {plan.module_path!r}" if plan.module_path else "in the model"
    return (
        f"{plan.where} ({plan.name} of {shapes}, {where}) matches rule "
        f"{plan.rule_index} and cannot be quantized: {plan.reason}. "
        "Leave it in float with a rule before that one which matches it and sets no "
        "weight_qtype, or pass strict=False: it then runs in float, between a "
        "DEQUANTIZE and a QUANTIZE."
    )
