"""Decides what happens to every tensor of a model that is to run in integers."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

from qwix_train.core.how import HowToQuantize
from qwix_train.odml import ops
from qwix_train.odml.fusion import find_fusions, weight_channels
from qwix_train.odml.graph import (
    Node,
    Value,
    build_graph,
    ids_of,
    statistics_nodes,
)
from qwix_train.odml.masks import find_masks
from qwix_train.odml.ops import Kind, OpSpec
from qwix_train.odml.patterns import find_patterns
from qwix_train.odml.plan import NodePlan, OdmlPlan, TensorPlan, activation_qtype
from qwix_train.ops import CONV
from qwix_train.planning.leaves import SIDES, OperandName, Path
from qwix_train.planning.plan import is_whole
from qwix_train.planning.rules import QuantizationRule
from qwix_train.trace import bodies
from qwix_train.trace.function import TracedCall


def make_odml_plan(
    traced: TracedCall,
    rules: Sequence[QuantizationRule],
    *,
    fixed_range_for_inputs: tuple[float, float] | None = None,
    fixed_range_for_outputs: tuple[float, float] | None = None,
) -> OdmlPlan:
    """Decides what happens to every tensor of a traced call.

    Args:
      traced: the call.
      rules: the rules, in order of precedence.
      fixed_range_for_inputs: the range of the inputs of the model.
      fixed_range_for_outputs: the range of its outputs.
    """
    graph = build_graph(traced)
    find_patterns(graph)
    if fixed_range_for_outputs is not None:
        graph.copy_outputs()
    planner = _Planner(OdmlPlan(graph, rules, is_whole(traced)), traced)
    planner.inputs, planner.outputs = fixed_range_for_inputs, fixed_range_for_outputs
    planner.plan_nodes()
    planner.plan_tensors()
    return planner.plan


class _Planner:
    inputs: tuple[float, float] | None
    outputs: tuple[float, float] | None

    def __init__(self, plan: OdmlPlan, traced: TracedCall):
        self.plan = plan
        self.traced = traced
        self.ignored = statistics_nodes(plan.graph)
        # Such as what prints a value.
        self.ignored |= {id(n) for n in plan.graph.nodes if not n.outputs}
        self.masks = find_masks(plan.graph)

    def plan_nodes(self) -> None:
        graph = self.plan.graph
        counted = [
            (node, ops.op_name(node.name))
            for node in graph.nodes
            if node.is_activation
            and id(node) not in self.ignored
            and any(value.is_float for value in (*node.inputs, *node.outputs))
        ]
        fusions = find_fusions([n for n, _ in counted], self.ignored)
        for (node, name), op_id in zip(counted, ids_of(counted), strict=True):
            self.plan._node[id(node)] = self.plan_node(node, name, op_id)
        self.plan.nodes = tuple(self.plan._node.values())
        for fusion in fusions:
            first = self.plan._node[id(fusion.anchor)]
            if not first.quantized:
                continue
            first.fusion = fusion
            for node in fusion.rest:
                part = self.plan._node[id(node)]
                part.fused_into, part.quantized = first, True
                part.unsupported, part.reason = False, ""

    def plan_node(self, node: Node, name: str, op_id: str) -> NodePlan:
        path = node.module_path.removeprefix(self.traced.module_path)
        spec = ops.OPS.get(name)
        plan = NodePlan(node, name, op_id, path.removeprefix("/"), spec)
        if spec is None and not any(
            v.is_float and v.is_activation for v in node.inputs
        ):
            plan.spec = OpSpec(Kind.INTEGER, "")
            return plan
        if name in ops.LAYOUT:
            return plan
        if node.in_float:
            plan.reason = "its call is in_float"
            return plan
        for index, rule in enumerate(self.plan.rules):
            if rule.matches(node.module_path, name, op_id):
                plan.rule_index, plan.rule = index, rule
                break
        else:
            plan.reason = "no rule matches"
            return plan
        rule = plan.rule
        if rule.weight_qtype is None:
            plan.reason = "the rule sets no weight_qtype"
            return plan
        if name in ops.PRODUCTS:
            plan.weight = _weight_side(node)
        elif name == "take" and node.inputs[0].static:
            plan.weight = 0
        if obstacle := _product_obstacle(plan):
            plan.unsupported, plan.weight, plan.reason = True, None, obstacle
            return plan
        if rule.act_qtype is None:
            return plan
        if rule.act_static_scale is False:
            plan.dynamic = plan.weight is not None and name in ops.PRODUCTS
            return plan
        if spec is None or spec.kind is Kind.UNSUPPORTED:
            plan.unsupported = True
            plan.reason = _unsupported_reason(name, spec)
            return plan
        if spec.kind is Kind.INTEGER or spec.kind is Kind.FLOAT_INPUT:
            return plan
        if plan.act_qtype == "int16" and not spec.int16:
            plan.unsupported = True
            plan.reason = "LiteRT, or its converter, has no 16-bit form of it"
            return plan
        plan.quantized = name != "take" or plan.weight is not None
        return plan

    def plan_tensors(self) -> None:
        graph = self.plan.graph
        self.order = {id(node): i for i, node in enumerate(graph.nodes)}
        inputs = [v for v in graph.inputs if v.is_activation]
        values = [*inputs, *(v for node in graph.nodes for v in node.outputs)]
        for value in values:
            if value.is_activation and value.is_float:
                self.plan_tensor(value)
        self.plan.tensors = tuple(self.plan._tensor.values())
        for plan in self.plan.nodes:
            self.check_types(plan)

    def check_types(self, plan: NodePlan) -> None:
        """Finds what reads codes of another type than it computes with.

        The converter would have the operation before compute the other type, too, which
        LiteRT does not load, or computes wrongly.
        """
        if not plan.quantized or plan.rule is None or plan.fused_into is not None:
            return
        for value in plan.node.inputs:
            if not value.is_activation or not value.is_float:
                continue
            source = self.plan.range_of(value)
            qtype = source.qtype if isinstance(source, TensorPlan) else "int8"
            if source is not None and qtype != plan.act_qtype:
                plan.unsupported = True
                plan.reason = (
                    f"it reads {qtype} codes, and computes {plan.act_qtype}; give what "
                    "is before it the same act_qtype"
                )

    def plan_tensor(self, value: Value) -> None:
        node = value.producer
        plan = None if node is None else self.plan.of(node)
        if node is not None and plan is None:
            return  # only statistics are made from it
        if plan is not None and self.is_within(plan, value):
            return
        if plan is not None and plan.fused_into is not None:
            plan = plan.fused_into
        kind = None if plan is None or plan.spec is None else plan.spec.kind
        if plan is not None and kind in _SHARING:
            if plan.quantized or plan.name in ops.LAYOUT:
                source = next((x for x in plan.node.inputs if x.is_activation), None)
                shared = None if source is None else self.plan.range_of(source)
                if source is not None and shared is not None:
                    own = self.range_of_copy(value, plan, shared)
                    if own is None:
                        self.plan._shared[id(value)] = source
                    else:
                        self.plan._tensor[id(value)] = own
                    return
                if source is None or source.is_float:
                    return
                plan = None  # integers that become floats, as at an input
        if plan is not None and kind is Kind.LOOKUP and plan.quantized:
            self.plan._shared[id(value)] = plan.node.inputs[0]
            return
        readers = list(self.readers(value))
        asking = [r for r in readers if r[0] is not None and r[0].quantized]
        produced = plan is not None and plan.quantized
        if not produced and not asking:
            return
        if self.adopts(value, plan, readers):
            return
        owner = plan if produced else asking[0][0]
        assert owner is not None and owner.rule is not None
        assert owner.rule_index is not None
        path = self.path_of(value, plan, readers)
        self.plan._tensor[id(value)] = self.make_tensor(value, plan, owner, path)

    def range_of_copy(
        self, value: Value, plan: NodePlan, source: TensorPlan | Value
    ) -> TensorPlan | None:
        """The fixed range of a result that is a copy of a tensor with another range.

        None where the copy shares its range: if that is the fixed one, or the only one
        that LiteRT allows.
        """
        if self.outputs is None or not value.is_output or plan.name != "copy":
            return None
        if not isinstance(source, TensorPlan) or source.scale is not None:
            return None
        how = _fixed(self.outputs)
        if source.how == how:
            return None
        path = self.path_of(value, plan, list(self.readers(value)))
        return TensorPlan(value, path, how, source.rule_index, source.qtype)

    def gives_outputs(self, value: Value) -> bool:
        """Whether results of the model are all that shares the range of a value."""
        for node in value.consumers:
            plan = self.plan.of(node)
            if plan is None:
                continue  # only statistics are made from it
            kind = None if plan.spec is None else plan.spec.kind
            shares = kind in _SHARING and (plan.quantized or plan.name in ops.LAYOUT)
            if not shares or not all(map(self.gives_outputs, node.outputs)):
                return False
        return value.is_output or bool(value.consumers)

    def is_within(self, plan: NodePlan, value: Value) -> bool:
        """Whether a value is computed, and read, within one fused operation."""
        if plan.fusion is not None:
            return True
        first = plan.fused_into
        return first is not None and self.plan.end_of(first) is not value

    def readers(self, value: Value) -> Iterator[tuple[NodePlan | None, int]]:
        """What reads a value, in order, through what only moves it, and at which side.

        None for a result of the model, and its index.
        """
        found = []
        stack = [value]
        while stack:
            current = stack.pop()
            if current.is_output:
                index = next(
                    i for i, v in enumerate(self.plan.graph.outputs) if v is current
                )
                found.append((len(self.order) + index, None, index))
            for node in dict.fromkeys(current.consumers):
                plan = self.plan.of(node)
                if plan is None:
                    continue
                if plan.name in ops.LAYOUT:
                    stack += node.outputs
                    continue
                side = next(i for i, v in enumerate(node.inputs) if v is current)
                found.append((self.order[id(node)], plan, side))
        found.sort(key=lambda entry: entry[0])
        return ((plan, side) for _, plan, side in found)

    def adopts(self, value, plan, readers) -> bool:
        """Whether a tensor takes over the range of the one operation that reads it."""
        if len(readers) != 1 or value.is_output or len(value.consumers) != 1:
            return False
        reader, _ = readers[0]
        if reader is None or not reader.quantized or reader.spec is None:
            return False
        if reader.spec.kind is not Kind.TIED or value.consumers[0] is not reader.node:
            return False
        if plan is None:  # an input of the model
            return self.inputs is None
        if plan.rule is None or plan.act_qtype != reader.act_qtype:
            return False
        if not plan.quantized or plan.spec is None:
            return False
        return plan.spec.kind is not Kind.FIXED and plan.spec.rounding == "even"

    def path_of(self, value, plan, readers) -> Path:
        """The path of a range: after the first quantized op that reads the tensor.

        An activation function gives its name only where no other op does.
        """
        for reader, side in sorted(readers, key=_is_activation_function):
            if reader is None:
                method = self.traced.method
                name = "final" if method == "__call__" else method
                return OperandName("", name, f"output{self.output_number(side)}").path
            if reader.quantized:
                operand = _operand_name(reader, side)
                return OperandName(reader.module_path, reader.id, operand).path
        assert plan is not None
        return OperandName(plan.module_path, plan.id, "output").path

    def output_number(self, index: int) -> int:
        """The number of a result among those that are activations."""
        outputs = self.plan.graph.outputs
        return sum(v.is_activation and v.is_float for v in outputs[:index])

    def make_tensor(self, value, plan, owner, path) -> TensorPlan:
        rule = owner.rule
        method = rule.act_calibration_method or "minmax"
        qtype = activation_qtype(rule)
        # Ranges of 16 bits are measured as those of 8.
        make = functools.partial(HowToQuantize, qtype="int8")
        tensor = TensorPlan(
            value, path, make(calibration_method=method), owner.rule_index, qtype
        )
        spec = plan.spec if plan is not None and plan.quantized else None
        if spec is not None and spec.scale is not None:
            tensor.scale, tensor.zero_point = spec.scale, spec.zero_point
        if spec is not None:
            tensor.rounding = spec.rounding
        tensor.mask = self.masks.get(id(value))
        fixed = None
        if value.producer is None:
            is_mask = tensor.mask is not None and tensor.mask.added
            fixed = None if is_mask else self.inputs
        elif spec is None or spec.scale is None:
            if value.is_output or self.gives_outputs(value):
                fixed = self.outputs
        if fixed is not None:
            tensor.how = _fixed(fixed)
        return tensor


def _is_activation_function(reader: tuple[NodePlan | None, int]) -> bool:
    plan, _ = reader
    return plan is not None and plan.spec is not None and plan.spec.kind in _CLIPPING


_CLIPPING = (Kind.ACTIVATION, Kind.CLIP)
_SHARING = (Kind.SAME, Kind.ROUNDED, Kind.CLIP)


def _fixed(ends: tuple[float, float]) -> HowToQuantize:
    low, high = ends
    return HowToQuantize(qtype="int8", calibration_method=f"fixed,{low},{high}")


def _product_obstacle(plan: NodePlan) -> str:
    """Why LiteRT has no quantized form of a product; empty if it has one."""
    node, rule = plan.node, plan.rule
    if plan.name not in CONV.names:
        dynamic = rule is not None and rule.act_qtype and rule.act_static_scale is False
        if dynamic and plan.weight is not None and weight_channels(node) is None:
            return (
                "LiteRT quantizes no activation when it runs (act_static_scale=False) "
                "whose weight has batch axes"
            )
        return ""
    spatial = len(node.out.shape) - 2
    if spatial not in (1, 2):
        return f"LiteRT has no integer convolution over {spatial} axes"
    if node.params.get("batch_group_count", 1) != 1:
        return "LiteRT has no convolution with batch_group_count"
    if not node.inputs[1].static:
        return "its kernel is computed from the inputs of the model"
    return ""


def _weight_side(node: Node) -> int | None:
    static = [value.static for value in node.inputs[:2]]
    return static.index(True) if sum(static) == 1 else None


def _operand_name(plan: NodePlan, side: int) -> str:
    if plan.name in ("concatenate", "where"):
        return f"input{side}"
    operands = [v for v in plan.node.inputs if v.is_float]
    two = plan.name in (*ops.PRODUCTS, *ops.AFFINE, "truediv", "maximum", "minimum")
    return SIDES[side] if two and len(operands) > 1 else ""


def _unsupported_reason(name: str, spec: OpSpec | None) -> str:
    hints: dict[bodies.Kind | None, str] = {
        bodies.Kind.WHILE: (
            "LiteRT has no quantized loops: use scan, which is unrolled"
        ),
        bodies.Kind.COND: "LiteRT has no quantized branches: use jnp.where",
    }
    hint = hints.get(bodies.kind_of(name)) or (spec.note if spec is not None else "")
    return "LiteRT has no integer form of it" + (f" ({hint})" if hint else "")
