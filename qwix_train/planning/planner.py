"""Decides what rules do to every op and param of a traced call."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Collection, Sequence
from typing import Any

from qwix_train import ops as op_kinds
from qwix_train.core import numerics, rotations
from qwix_train.core.errors import located
from qwix_train.core.formats import Scales
from qwix_train.core.how import (
    HowToQuantize,
)
from qwix_train.core.numerics import is_int16
from qwix_train.core.rotation import Rotation
from qwix_train.planning import table as plan_table
from qwix_train.planning import weights
from qwix_train.planning.leaves import SIDES, Path
from qwix_train.planning.plan import OpPlan, ParamPlan, Plan
from qwix_train.planning.rule_use import Decision
from qwix_train.planning.rules import QuantizationRule, check_rules
from qwix_train.trace import provenance
from qwix_train.trace.analyze import Op
from qwix_train.trace.function import TracedCall


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
                "are for LiteRT alone. Choose 'int8', or pass "
                "odml.OdmlQatProvider(rules)."
            )
    planner = _Planner(check_rules(rules), traced)
    ops = planner.share_ranges([planner.decide(op) for op in traced.ops])
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
            members=() if op.layers else self.members(path),
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

    def members(self, module_path: str) -> tuple[tuple[int, int], ...]:
        """See `OpPlan.members`."""
        module = tuple(filter(None, module_path.split("/")))
        mapped = {
            tuple((axis, param.shape[axis]) for axis in param.mapped_axes)
            for param in self.params.values()
            if param.path[:-1] == module and param.mapped_axes
        }
        return mapped.pop() if len(mapped) == 1 else ()

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
        tiles = [rule.weight_tiles, *([rule.act_tiles] if rule.act_qtype else [])]
        if any(tile is not None for tile in tiles) and not kind.has_tiles:
            tile = next(tile for tile in tiles if tile is not None)
            raise ValueError(
                f"{op.where}: rule {plan.rule_index} gives each {tile} elements a "
                f"scale (by tile_size, or by its type), and {kind.plural} have no such "
                f"tiles. Put a rule with op_names=({op.name!r},), and without tiles, "
                "before it."
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
        if rule.act_axis_names and any(activations):
            notes.append(f"ranges joined over {', '.join(rule.act_axis_names)}")
        return dataclasses.replace(
            plan,
            weights=tuple(paths),
            activations=tuple(activations),
            static=rule.static_act_ranges and any(activations),
            learned=rule.learned_act_method if any(activations) else "",
            reason="; ".join(dict.fromkeys(notes)),
        )

    def share_ranges(self, plans: Sequence[OpPlan]) -> list[OpPlan]:
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
        in_blocks = numerics.format_of(rule.act_qtype).block is not None
        axes = weights.operand_axes(op, side, rule.act_tiles, in_blocks=in_blocks)
        channelwise = () if rule.disable_channelwise_axes else axes.channelwise
        has_weight = any(isinstance(o, provenance.Weight) for o in weights.roles(op))
        if rule.static_act_ranges:
            # A range must not depend on the size of the batch, nor on the length of a
            # sequence, which products of two activations may contract.
            channelwise = _static_axes(op, side, rule, channelwise)
            if not has_weight:
                axes = weights.operand_axes(op, side, None)
        other_way = "" if has_weight else _WITHOUT_ACT_ACT
        _check_tiles(op.where, op.operands[side].shape, axes, rule, other_way)
        how = HowToQuantize(
            qtype=rule.act_qtype,
            channelwise_axes=channelwise,
            tiled_axes=axes.tiled,
            calibration_method=rule.act_method,
            pad_tiles=rule.pad_tiles,
            axis_names=rule.act_axis_names,
        )
        _check_blocks(op.where, op.operands[side].shape, how)
        return how

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
                f"{op.where}: its rule sets rotation={rule.rotation!r}, and the op "
                "contracts no axis of an input with a whole axis of one param. Put a "
                "rule without rotation, for this op, before it."
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
        in_blocks = numerics.format_of(rule.weight_qtype).block is not None
        axes = weights.operand_axes(op, side, rule.weight_tiles, in_blocks=in_blocks)
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
        if numerics.format_of(how.qtype).scales is Scales.TWO_LEVELS:
            how = dataclasses.replace(how, tensor_axes=param.layer_axes)
        _check_blocks(where, view.shape, how)
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
    names = """weight_qtype weight_calibration_method weight_tiles pad_tiles
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
            f"{tuple(op.operands[side].shape)}. Choose from {tuple(channelwise)}, the "
            "axes that are not contracted."
        )
    return tuple(sorted(axes))


def _check_blocks(where: str, shape: Sequence[int], how: HowToQuantize) -> None:
    if numerics.format_of(how.qtype).block is not None:
        with located(where):
            how.scale_shape(shape)


_WITHOUT_ACT_ACT = (
    " To leave products without a weight in float, such as those of attention, set "
    "act_act=False."
)


def _check_tiles(where, shape, axes, rule, other_way="") -> None:
    for axis, tile in axes.tiled.items():
        if shape[axis] % tile and not rule.pad_tiles:
            choice = f"a tile_size that does, instead of {rule.tile_size}"
            if rule.tile_size is rule.act_tile_size is None:
                choice = "a type without blocks"
            raise ValueError(
                f"{where}: a tile of {tile} does not divide axis {axis}, of length "
                f"{shape[axis]}, of the shape {tuple(shape)}. Choose {choice}, or set "
                f"pad_tiles=True in the rule.{other_way}"
            )
