"""Decides what happens to every tensor of a model that is to run in integers."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from qwix_train import ops as op_kinds
from qwix_train.core.how import HowToQuantize
from qwix_train.odml import ops
from qwix_train.odml.fusion import (
    channelwise,
    find_fusions,
    weight_axes,
    weight_channels,
    weight_side,
)
from qwix_train.odml.graph import Graph, Node, Value, build_graph, statistics_nodes
from qwix_train.odml.masks import find_masks
from qwix_train.odml.ops import Kind, OpSpec
from qwix_train.odml.patterns import find_patterns
from qwix_train.odml.plan import NodePlan, OdmlPlan, TensorPlan, activation_qtype
from qwix_train.planning import weights
from qwix_train.planning.leaves import SIDES, OperandName, Path
from qwix_train.planning.planner import is_whole, param_plans
from qwix_train.planning.rules import QuantizationRule
from qwix_train.trace import bodies, scopes
from qwix_train.trace.analyze import Op, Operand
from qwix_train.trace.function import TracedCall
from qwix_train.trace.provenance import Weight

_Ends = tuple[float, float]


def make_odml_plan(
    traced: TracedCall,
    rules: Sequence[QuantizationRule],
    *,
    fixed_range_for_inputs: _Ends | None = None,
    fixed_range_for_outputs: _Ends | None = None,
    per_tensor_weights: bool = False,
) -> OdmlPlan:
    """Decides what happens to every tensor of a traced call.

    Args:
      traced: the call.
      rules: the rules, in order of precedence.
      fixed_range_for_inputs: the range of the inputs of the model.
      fixed_range_for_outputs: the range of its outputs.
      per_tensor_weights: whether a weight has one scale.
    """
    graph = build_graph(traced)
    find_patterns(graph)
    if fixed_range_for_outputs is not None:
        graph.copy_outputs()
    planner = _NodePlanner(traced, rules, per_tensor_weights)
    plan = OdmlPlan(
        rules=tuple(rules),
        ops=(),
        params=planner.params,
        whole=is_whole(traced),
        graph=graph,
        by_node=planner.plan_nodes(graph),
    )
    fixed = fixed_range_for_inputs, fixed_range_for_outputs
    _TensorPlanner(plan, traced.method, *fixed).plan_tensors()
    return dataclasses.replace(
        plan, ops=tuple(node for node in plan.nodes if not node.moves)
    )


class _NodePlanner:
    """Decides which operations run in integers, and which params they quantize."""

    def __init__(self, traced, rules, per_tensor_weights):
        self.traced: TracedCall = traced
        self.rules: Sequence[QuantizationRule] = rules
        self.per_tensor_weights: bool = per_tensor_weights
        self.params = param_plans(traced)

    def plan_nodes(self, graph: Graph) -> dict[int, NodePlan]:
        ignored = _ignored(graph)
        counts: collections.Counter[tuple[str, str]] = collections.Counter()
        plans: dict[int, NodePlan] = {}
        counted = []
        for node in graph.nodes:
            floats = any(value.is_float for value in (*node.inputs, *node.outputs))
            if not node.is_activation or id(node) in ignored or not floats:
                continue
            counted.append(node)
            path, name = node.place.module_path, ops.op_name(node.name)
            op = _op(node, name, f"{name}{counts[path, name]}")
            plans[id(node)] = self.plan_node(node, op)
            counts[path, name] += 1
        for fusion in find_fusions(counted, ignored):
            key = id(fusion.anchor)
            if not plans[key].in_integers:
                continue
            plans[key] = dataclasses.replace(plans[key], fusion=fusion)
            for node in fusion.rest:
                plans[id(node)] = dataclasses.replace(
                    plans[id(node)],
                    fused_into=fusion.anchor,
                    in_integers=True,
                    unsupported=False,
                    reason="",
                )
        return {key: self.with_params(plan) for key, plan in plans.items()}

    def plan_node(self, node: Node, op: Op) -> NodePlan:
        path = op.module_path.removeprefix(self.traced.module_path).removeprefix("/")
        return NodePlan(op=op, node=node, module_path=path, **self.decide(node, op))

    def decide(self, node: Node, op: Op) -> dict[str, Any]:
        """What the rules do to an operation, as fields of its plan."""
        spec = ops.OPS.get(op.name)
        if spec is None and not any(
            v.is_float and v.is_activation for v in node.inputs
        ):
            return {"spec": OpSpec(Kind.INTEGER, "")}
        found: dict[str, Any] = {"spec": spec}
        if op.name in ops.LAYOUT:
            return found
        if op.in_float:
            return found | {"reason": "its call is in_float"}
        for index, rule in enumerate(self.rules):
            if rule.matches(op.module_path, op.name, op.id):
                found |= {"rule_index": index, "rule": rule}
                break
        else:
            return found | {"reason": "no rule matches"}
        if rule.weight_qtype is None:
            return found | {"reason": "the rule sets no weight_qtype"}
        is_dynamic = rule.act_qtype is not None and rule.act_static_scale is False
        if op.name in ops.PRODUCTS:
            weight = weight_side(node)
            if obstacle := _product_obstacle(node, weight, is_dynamic):
                return found | {"unsupported": True, "reason": obstacle}
            if weight is not None:
                found |= {"weight": weight, "weight_how": self.how(node, weight, rule)}
                if is_dynamic:
                    how = _dynamic_how(node, 1 - weight, rule)
                    acts = (how, None) if weight == 1 else (None, how)
                    found |= {"dynamic": True, "activations": acts}
        if rule.act_qtype is None or is_dynamic:
            if op.name == "take" and node.inputs[0].static:
                reason = "a table is quantized where activations have static ranges"
                return found | {"reason": reason}
            return found
        reason = ""
        if spec is None or spec.kind is Kind.UNSUPPORTED:
            reason = _unsupported_reason(op.name, spec)
        elif spec.kind in (Kind.INTEGER, Kind.FLOAT_INPUT):
            return found
        elif activation_qtype(rule) == "int16" and not spec.int16:
            reason = "LiteRT, or its converter, has no 16-bit form of it"
        if reason:
            return found | {"unsupported": True, "reason": reason}
        return found | {"in_integers": op.name != "take" or node.inputs[0].static}

    def how(self, node: Node, side: int, rule: QuantizationRule) -> HowToQuantize:
        """How a weight is quantized, on the axes of the operand."""
        return HowToQuantize(
            qtype=f"{rule.weight_qtype}_narrow",
            channelwise_axes=() if self.per_tensor_weights else weight_axes(node, side),
            calibration_method=rule.weight_calibration_method,
        )

    def with_params(self, plan: NodePlan) -> NodePlan:
        """The plan of an operation with the params that it reads quantized."""
        hows: dict[int, HowToQuantize] = {}
        notes = [plan.reason]
        if plan.constants and plan.act_qtype == "int8":
            how = HowToQuantize(qtype="int8", calibration_method="minmax")
            hows = dict.fromkeys(plan.constants, how)
        if plan.folds:
            notes.append("its weight is quantized with what follows multiplied in")
        elif plan.weight is not None and plan.weight_how is not None:
            hows[plan.weight] = plan.weight_how
        paths: dict[Path, None] = {}
        for side, how in hows.items():
            value = plan.node.inputs[side]
            origin = value.origin if _is_moved(value) else None
            for view in origin.views if isinstance(origin, Weight) else ():
                paths[view.path] = None
                axes = weights.Axes(tuple(how.channelwise_axes), {})
                axes = weights.stored_axes(view, axes)
                notes.append(self.record(plan, view.path, how, axes))
        reason = "; ".join(dict.fromkeys(filter(None, notes)))
        return dataclasses.replace(plan, weights=tuple(paths), reason=reason)

    def record(self, plan, path, how, axes) -> str:
        """Records how a param is quantized; says so if another op has it otherwise."""
        how = dataclasses.replace(
            how, channelwise_axes=axes.channelwise, tiled_axes=axes.tiled
        )
        param = self.params[path]
        if param.how is None or param.op is None:
            self.params[path] = dataclasses.replace(param, how=how, op=plan)
        elif param.how != how:
            other = param.op.op.where
            return f"{'/'.join(path)} is in the file twice: {other} has another grid"
        return ""


class _TensorPlanner:
    """Decides which tensors have ranges of their own, and which share one."""

    def __init__(self, plan, method, fixed_range_for_inputs, fixed_range_for_outputs):
        self.plan: OdmlPlan = plan
        self.method: str = method
        self.inputs: _Ends | None = fixed_range_for_inputs
        self.outputs: _Ends | None = fixed_range_for_outputs
        self.masks = find_masks(plan.graph)
        self.order = {id(node): i for i, node in enumerate(plan.graph.nodes)}
        self.outputs_at = {id(v): i for i, v in enumerate(plan.graph.outputs)}

    def plan_tensors(self) -> None:
        graph = self.plan.graph
        inputs = [v for v in graph.inputs if v.is_activation]
        for value in (*inputs, *(v for node in graph.nodes for v in node.outputs)):
            if value.is_activation and value.is_float:
                self.plan_tensor(value)
        for plan in self.plan.nodes:
            self.check_types(plan)

    def check_types(self, plan: NodePlan) -> None:
        """Finds what reads codes of another type than it computes with.

        The converter would have the operation before compute the other type, too, which
        LiteRT does not load, or computes wrongly.
        """
        if not plan.in_integers or plan.rule is None or plan.fused_into is not None:
            return
        for value in plan.node.inputs:
            if not value.is_activation or not value.is_float:
                continue
            source = self.plan.range_of(value)
            qtype = source.qtype if isinstance(source, TensorPlan) else "int8"
            if source is not None and qtype != plan.act_qtype:
                reason = (
                    f"it reads {qtype} codes, and computes {plan.act_qtype}; give what "
                    "is before it the same act_qtype"
                )
                self.plan.by_node[id(plan.node)] = dataclasses.replace(
                    plan, unsupported=True, reason=reason
                )

    def plan_tensor(self, value: Value) -> None:
        node = value.producer
        plan = None if node is None else self.plan.of(node)
        if plan is None and node is not None:
            return  # only statistics are made from it
        if plan is not None:
            plan = self.plan.first_of(plan)
            if plan.fusion is not None and self.plan.end_of(plan) is not value:
                return
        if plan is not None and _shares(plan):
            source = next((x for x in plan.node.inputs if x.is_activation), None)
            shared = None if source is None else self.plan.range_of(source)
            if source is not None and shared is not None:
                own = self.range_of_copy(value, plan, shared)
                if own is None:
                    self.plan.shared[id(value)] = source
                else:
                    self.plan.by_value[id(value)] = own
                return
            if source is None or source.is_float:
                return
            plan = None  # integers that become floats, as at an input
        produced = plan if plan is not None and plan.in_integers else None
        if produced is not None and produced.kind is Kind.LOOKUP:
            self.plan.shared[id(value)] = produced.node.inputs[0]
            return
        readers = list(self.readers(value))
        asking = (reader for reader, _ in readers if reader and reader.in_integers)
        owner = produced or next(asking, None)
        if owner is None or self.adopts(value, plan, readers):
            return
        path = self.path_of(value, plan, readers)
        self.plan.by_value[id(value)] = self.make_tensor(value, produced, owner, path)

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
        return TensorPlan(value, path, how, source.rule, source.qtype)

    def gives_outputs(self, value: Value) -> bool:
        """Whether results of the model are all that shares the range of a value."""
        for node in value.consumers:
            plan = self.plan.of(node)
            if plan is None:
                continue  # only statistics are made from it
            if not _shares(plan) or not all(map(self.gives_outputs, node.outputs)):
                return False
        return value.is_output or bool(value.consumers)

    def readers(self, value: Value) -> Iterator[tuple[NodePlan | None, int]]:
        """What reads a value, in order, through what only moves it, and at which side.

        None for a result of the model, and its index.
        """
        found = []
        stack = [value]
        while stack:
            current = stack.pop()
            if current.is_output:
                index = self.outputs_at[id(current)]
                found.append((len(self.order) + index, None, index))
            for node in dict.fromkeys(current.consumers):
                plan = self.plan.of(node)
                if plan is None:
                    continue
                if plan.moves:
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
        if reader is None or not reader.in_integers or reader.kind is not Kind.TIED:
            return False
        if value.consumers[0] is not reader.node:
            return False
        if plan is None:  # an input of the model
            return self.inputs is None
        if not plan.in_integers or plan.act_qtype != reader.act_qtype:
            return False
        return plan.kind is not Kind.FIXED and plan.spec.rounding == "even"

    def path_of(self, value, plan, readers) -> Path:
        """The path of a range: after the first quantized op that reads the tensor.

        An activation function gives its name only where no other op does.
        """
        for reader, side in sorted(readers, key=_is_activation_function):
            if reader is None:
                name = "final" if self.method == "__call__" else self.method
                return OperandName("", name, f"output{self.output_number(side)}").path
            if reader.in_integers:
                operand = _operand_name(reader, side)
                return OperandName(reader.module_path, reader.op.id, operand).path
        assert plan is not None
        return OperandName(plan.module_path, plan.op.id, "output").path

    def output_number(self, index: int) -> int:
        """The number of a result among those that are activations."""
        outputs = self.plan.graph.outputs
        return sum(v.is_activation and v.is_float for v in outputs[:index])

    def make_tensor(self, value, produced, owner, path) -> TensorPlan:
        spec = OpSpec(Kind.QUANTIZED, "") if produced is None else produced.spec
        mask = self.masks.get(id(value))
        fixed = None
        if value.producer is None:
            fixed = None if mask is not None and mask.added else self.inputs
        elif spec.scale is None and (value.is_output or self.gives_outputs(value)):
            fixed = self.outputs
        method = owner.rule.act_calibration_method or "minmax"
        return TensorPlan(
            value,
            path,
            # Ranges of 16 bits are measured as those of 8.
            HowToQuantize(qtype="int8", calibration_method=method)
            if fixed is None
            else _fixed(fixed),
            owner.rule,
            owner.act_qtype,
            spec.scale,
            spec.zero_point,
            mask,
            spec.rounding,
        )


def _is_activation_function(reader: tuple[NodePlan | None, int]) -> bool:
    plan, _ = reader
    return plan is not None and plan.kind in (Kind.ACTIVATION, Kind.CLIP)


def _shares(plan: NodePlan) -> bool:
    """Whether the output of an operation has the range of its input."""
    sharing = (Kind.SAME, Kind.ROUNDED, Kind.CLIP)
    return plan.kind in sharing and (plan.in_integers or plan.moves)


def _ignored(graph: Graph) -> set[int]:
    """The ids of operations that a converted model does not have."""
    # Such as what prints a value.
    return statistics_nodes(graph) | {id(n) for n in graph.nodes if not n.outputs}


def _is_moved(value: Value) -> bool:
    """Whether the elements of a value are those of inputs, and nothing is computed."""
    node = value.producer
    if node is None:
        return value.index is not None
    name = ops.op_name(node.name)
    if name == "concatenate":
        return all(map(_is_moved, node.inputs))
    return name in ops.LAYOUT and _is_moved(node.inputs[0])


def _op(node: Node, name: str, op_id: str) -> Op:
    """An operation of the graph as one of a trace."""
    kind, place = op_kinds.by_name(node.name), node.place
    return Op(
        key=(),
        primitive=node.name if kind is None else kind.primitive,
        name=name,
        id=op_id,
        module_path=place.module_path,
        params=node.params,
        operands=tuple(Operand(v.shape, v.dtype, v.origin) for v in node.inputs),
        out_shape=node.out.shape,
        in_float=scopes.is_in_float(place.scope),
        scans=place.scans,
        name_stack=place.scope,
    )


def _dynamic_how(node: Node, side: int, rule: QuantizationRule) -> HowToQuantize:
    """How an activation is quantized when the model runs.

    It has a range for each index of the axes that LiteRT has ranges for: the rows of a
    matrix, the images of a batch.
    """
    return HowToQuantize(
        qtype=rule.act_qtype,
        channelwise_axes=channelwise(node, side),
        calibration_method=rule.act_calibration_method or "minmax",
    )


def _fixed(ends: _Ends) -> HowToQuantize:
    low, high = ends
    return HowToQuantize(qtype="int8", calibration_method=f"fixed,{low},{high}")


def _product_obstacle(node: Node, weight: int | None, is_dynamic: bool) -> str:
    """Why LiteRT has no quantized form of a product; empty if it has one."""
    if node.name not in op_kinds.CONV.names:
        if is_dynamic and weight is not None and weight_channels(node) is None:
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
