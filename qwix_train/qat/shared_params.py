"""The ops of a model that are quantized together: those that share a param."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

from qwix_train.core import numerics
from qwix_train.planning.plan import OpPlan, ParamPlan, Path, Plan
from qwix_train.planning.planner import make_plan
from qwix_train.planning.rules import QuantizationRule, check_rules
from qwix_train.trace.function import TracedCall

# An op of any call of the model, as rules name it: the path of its module, and its id.
OpName = tuple[str, str]


@dataclasses.dataclass(frozen=True)
class OpGroup:
    """Ops that are linked by the params that they read, and those params.

    Attributes:
      ops: the ops, in the order in which they run.
      params: the paths of the params.
      plans: for each type, how each of the params is quantized.
      rules: for each type, rules that quantize these ops, and no others, with it.
    """

    ops: tuple[OpName, ...]
    params: tuple[Path, ...]
    plans: tuple[tuple[ParamPlan, ...], ...]
    rules: tuple[tuple[QuantizationRule, ...], ...]

    @property
    def size(self) -> int:
        """The number of elements of the params."""
        return sum(math.prod(plan.shape) for plan in self.plans[0])

    @property
    def quantized_bytes(self) -> tuple[int, ...]:
        """For each type, the bytes of packed codes and of scales."""
        return tuple(sum(p.quantized_bytes for p in plans) for plans in self.plans)


class TypedPlans:
    """What rules do to the calls of a model, with each of several weight types.

    Attributes:
      rules: the rules as they were given.
      qtypes: the names of the types.
    """

    def __init__(self, rules: Sequence[QuantizationRule], qtypes: Sequence[Any]):
        """Checks the rules and the types.

        Args:
          rules: the rules. Their `weight_qtype` must be set, but its value does not
            matter.
          qtypes: the types.

        Raises:
          ValueError: if a type is unknown, listed twice, or does not go with a rule.
        """
        self.rules: tuple[QuantizationRule, ...] = check_rules(rules)
        if isinstance(qtypes, str) or not qtypes:
            raise ValueError(f"qtypes={qtypes!r}: give a list of weight types.")
        self.qtypes: tuple[str, ...] = tuple(
            numerics.qtype_name(qtype) for qtype in qtypes
        )
        if len(set(self.qtypes)) < len(self.qtypes):
            raise ValueError(f"qtypes={self.qtypes}: a type is listed twice.")
        self._typed = [
            [_with_type(rule, qtype) for rule in self.rules] for qtype in self.qtypes
        ]
        self._params: dict[Path, tuple[ParamPlan, ...]] = {}
        self._ops: dict[OpName, tuple[int, set[Path]]] = {}

    def of(self, traced: TracedCall) -> list[Plan]:
        """The plan for each type.

        Args:
          traced: a call of the model.
        """
        return [make_plan(traced, rules) for rules in self._typed]

    def add(self, traced: TracedCall) -> None:
        """Takes note of the ops and the params of a call.

        Args:
          traced: a call of the model.

        Raises:
          ValueError: if a param is quantized in another way than in an earlier call.
        """
        plans = self.of(traced)
        for op in plans[0].quantized_ops:
            if not op.weights:
                continue
            assert op.rule_index is not None
            _, paths = self._ops.setdefault(op_name(op), (op.rule_index, set()))
            paths.update(op.weights)
            for path in op.weights:
                found = tuple(plan.params[path] for plan in plans)
                known = self._params.setdefault(path, found)
                if [_layout(plan) for plan in known] != [_layout(p) for p in found]:
                    raise ValueError(
                        f"Param {'/'.join(path)!r} is quantized in two ways, in two "
                        "calls of a model or in two models of one loss function. Give "
                        "a loss function that calls one of them."
                    )

    def groups(self) -> list[OpGroup]:
        """The ops that were found, those that share a param together.

        Raises:
          ValueError: if no op reads a weight that is quantized.
        """
        if not self._ops:
            raise ValueError(
                "The rules quantize no weight of the model, only products of two "
                "activations: there is no type to choose."
            )
        linked: list[tuple[list[OpName], set[Path]]] = []
        for name, (_, paths) in self._ops.items():
            names, paths, rest = [name], set(paths), []
            for other_names, other_paths in linked:
                if paths & other_paths:
                    names, paths = [*other_names, *names], paths | other_paths
                else:
                    rest.append((other_names, other_paths))
            linked = [*rest, (names, paths)]
        order = {name: index for index, name in enumerate(self._ops)}
        linked = [(sorted(names, key=order.__getitem__), p) for names, p in linked]
        linked.sort(key=lambda group: order[group[0][0]])
        return [self._group(names, paths) for names, paths in linked]

    def _group(self, names: Sequence[OpName], paths: set[Path]) -> OpGroup:
        params = tuple(path for path in self._params if path in paths)
        ids: dict[tuple[str, int], list[str]] = {}
        for name in names:
            ids.setdefault((name[0], self._ops[name][0]), []).append(name[1])
        return OpGroup(
            tuple(names),
            params,
            tuple(zip(*(self._params[path] for path in params), strict=True)),
            tuple(
                tuple(
                    dataclasses.replace(
                        rules[index], module_path=re.escape(path), op_names=tuple(ops)
                    )
                    for (path, index), ops in ids.items()
                )
                for rules in self._typed
            ),
        )


def op_name(plan: OpPlan) -> OpName:
    """The name of a planned op."""
    return plan.op.module_path, plan.op.id


def _with_type(rule: QuantizationRule, qtype: str) -> QuantizationRule:
    if rule.weight_qtype is None:
        return rule
    return dataclasses.replace(rule, weight_qtype=qtype, schedule=None)


def _layout(plan: ParamPlan) -> tuple[Any, ...]:
    return plan.shape, plan.dtype, plan.how
