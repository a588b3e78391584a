"""Blends quantization in, for the phases of a schedule that are ramps."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from qwix_train.planning.plan import OpPlan, Plan
from qwix_train.qat.phases import OFF, WHOLE, Amounts
from qwix_train.stages.blend import Blend
from qwix_train.stages.product import in_float
from qwix_train.stages.run import CallStages
from qwix_train.stages.stage import Constant, Stage


def blended(stages: CallStages, plan: Plan, amounts: Amounts) -> CallStages:
    """Stages that quantize by the given amounts.

    Args:
      stages: the stages of a mode that keeps params in float.
      plan: what the mode does to the call.
      amounts: the amounts, by rule.

    Raises:
      ValueError: if something is computed from codes.
    """

    def amount_of(of_rules: Sequence[Any], op: OpPlan | None) -> Any:
        return WHOLE if op is None or op.rule_index is None else of_rules[op.rule_index]

    of_weights, of_activations = (
        [x if x is OFF or x is WHOLE else Constant(x) for x in each]
        for each in (amounts.weights, amounts.activations)
    )
    params, ops = {}, {}
    for path, own in stages.params.items():
        amount = amount_of(of_weights, plan.params[path].op)
        if amount is not WHOLE and not all(
            isinstance(x, Stage) or x.exact for x in own
        ):
            raise ValueError(_no_blend(f"param {'/'.join(path)!r}"))
        params[path] = _blend(own, amount, keep=amount is not OFF)
    planned = {op.op.key: op for op in plan.ops}
    for key, found in stages.ops.items():
        amount = amount_of(of_activations, planned[key])
        if amount is not WHOLE and found.product is not in_float:
            raise ValueError(_no_blend(found.op.where))
        operands = tuple(_blend(own, amount) for own in found.operands)
        ops[key] = dataclasses.replace(found, operands=operands)
    return CallStages(params, ops)


def _blend(stages: Sequence[Any], amount: Any, keep: bool = True) -> tuple[Any, ...]:
    """Stages that are blended in, but for those with which a model is the same.

    Args:
      stages: the stages.
      amount: how much of them there is.
      keep: whether those of which there is nothing are applied all the same.
    """
    if amount is WHOLE:
        return tuple(stages)
    of_blend: Constant | None = None if amount is OFF else amount
    result: list[Any] = []
    for exact, group in itertools.groupby(stages, lambda stage: stage.exact):
        if exact:
            result += group
        elif keep:
            result.append(Blend(tuple(group), of_blend))
    return tuple(result)


def _no_blend(where: str) -> str:
    return (
        f"{where} is computed from codes, which cannot be blended with float values: "
        "give its rule a schedule without ramp_steps, in which weights and activations "
        "start together."
    )
