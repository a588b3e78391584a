"""The phases of a schedule: what the rules do from one change to the next.

In a phase, types do not change. Each operand is quantized, left in float, or blended by
an amount that depends on the step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from jax import numpy as jnp

from qwix_train.planning.rules import QuantizationRule
from qwix_train.planning.schedule import Schedule

OFF, WHOLE = 0, 1
"""The amount of an operand that stays in float, and of one that is quantized."""


class Ramp(NamedTuple):
    """An amount that grows from 0 to 1, in `steps` steps from step `start` on."""

    start: int
    steps: int

    def at(self, step: Any) -> Any:
        """The amount at a step, an int scalar: a float32 scalar."""
        # Some counts are unsigned.
        past = jnp.asarray(step).astype(jnp.int32) - self.start
        return jnp.clip(past.astype(jnp.float32) / self.steps, 0, 1)


@dataclasses.dataclass(frozen=True)
class Amounts:
    """How much operands are quantized, for each rule by its index.

    Attributes:
      weights: for the weights that a rule quantizes: `OFF`, `WHOLE`, a `Ramp`, or the
        amount that a ramp gives at a step.
      activations: the same for activations.
    """

    weights: tuple[Any, ...]
    activations: tuple[Any, ...]

    @property
    def whole(self) -> bool:
        """Whether all is quantized, and nothing blended."""
        return all(x is WHOLE for x in self._all)

    @property
    def ramps(self) -> bool:
        """Whether an amount depends on the step."""
        return any(isinstance(x, Ramp) for x in self._all)

    def at(self, step: Any) -> Amounts:
        """The amounts at a step."""
        changed = [x.at(step) if isinstance(x, Ramp) else x for x in self._all]
        count = len(self.weights)
        return Amounts(tuple(changed[:count]), tuple(changed[count:]))

    @property
    def _all(self) -> tuple[Any, ...]:
        return (*self.weights, *self.activations)


@dataclasses.dataclass(frozen=True)
class Phase:
    """What happens from one step on.

    Attributes:
      begins_at: the first step.
      rules: the rules, with the types of the phase. A rule whose ops stay in float sets
        no type. Each has its schedule until then: if the ops that read an array have
        followed different schedules, the array has a range for each.
      amounts: how much operands are quantized.
    """

    begins_at: int
    rules: tuple[QuantizationRule, ...]
    amounts: Amounts

    @property
    def in_float(self) -> bool:
        """Whether nothing is quantized."""
        return all(rule.weight_qtype is None for rule in self.rules)


def phases_of(
    rules: Sequence[QuantizationRule], schedule: Schedule | None
) -> list[Phase]:
    """The phases of training with rules.

    Args:
      rules: the rules. If a rule has a schedule of its own, that counts.
      schedule: the schedule of the other rules.

    Returns:
      The phases, in order. The first begins at step 0. If there is no schedule, it is
      the only one.

    Raises:
      TypeError: if the schedule is not a `Schedule`.
      ValueError: if the types of a schedule do not end with the type of a rule, or no
        rule quantizes the operands that they are for.
    """
    if not isinstance(schedule, Schedule | None):
        raise TypeError(
            f"Expected a qat.Schedule, got schedule={schedule!r}: "
            "schedule=Schedule(start_step=100)."
        )
    schedule = None if schedule is None else schedule.of_rules
    scheduled = [_with_schedule(i, rule, schedule) for i, rule in enumerate(rules)]
    if schedule not in (None, Schedule()):
        _check_used(rules, schedule)
    boundaries = {
        step
        for rule in scheduled
        if rule.schedule is not None
        for step in rule.schedule.boundaries
    }
    phases: list[Phase] = []
    for step in sorted({0, *boundaries}):
        phase = _phase_at(step, scheduled)
        before = phases[-1] if phases else None
        if before is None or (before.rules, before.amounts) != (
            phase.rules,
            phase.amounts,
        ):
            phases.append(phase)
    return phases


def _with_schedule(
    index: int, rule: QuantizationRule, schedule: Schedule | None
) -> QuantizationRule:
    if rule.weight_qtype is None or rule.schedule is not None or schedule is None:
        return rule
    if rule.act_qtype is None:
        schedule = dataclasses.replace(schedule, act_qtypes=None)
    try:
        return dataclasses.replace(rule, schedule=schedule)
    except ValueError as error:
        raise ValueError(
            f"The schedule does not fit rule {index}, which may have one of its own: "
            f"{error}"
        ) from None


def _check_used(rules: Sequence[QuantizationRule], schedule: Schedule) -> None:
    takes = [
        rule
        for rule in rules
        if rule.weight_qtype is not None and rule.schedule is None
    ]
    if not takes:
        raise ValueError(
            "schedule is given, and no rule takes it: each has a schedule of its own, "
            "or sets no weight_qtype."
        )
    if schedule.act_qtypes and all(rule.act_qtype is None for rule in takes):
        raise ValueError(
            f"The schedule has act_qtypes={dict(schedule.act_qtypes)}, and no rule "
            "that takes it sets an act_qtype."
        )


def _phase_at(step: int, rules: Sequence[QuantizationRule]) -> Phase:
    found, weights, activations = [], [], []
    for rule in rules:
        schedule = rule.schedule
        weight = act = WHOLE
        if schedule is not None:
            weight = _amount(step, schedule.start_step, schedule.ramp_steps)
            act = _amount(step, schedule.act_start, schedule.ramp_steps)
            rule = _rule_at(step, rule, schedule, in_float=weight is act is OFF)
        if rule.act_qtype is None:
            act = WHOLE
        found.append(rule)
        weights.append(WHOLE if rule.weight_qtype is None else weight)
        activations.append(act)
    return Phase(step, tuple(found), Amounts(tuple(weights), tuple(activations)))


def _amount(step: int, start: int, ramp: int) -> Any:
    if step < start:
        return OFF
    return Ramp(start, ramp) if step < start + ramp else WHOLE


def _rule_at(
    step: int, rule: QuantizationRule, schedule: Schedule, in_float: bool
) -> QuantizationRule:
    if in_float:
        return QuantizationRule(module_path=rule.module_path, op_names=rule.op_names)
    qtypes = {
        "weight_qtype": schedule.weight_qtype_at(step),
        "act_qtype": schedule.act_qtype_at(step),
    }
    changed = {name: qtype for name, qtype in qtypes.items() if qtype is not None}
    return dataclasses.replace(rule, schedule=schedule.until(step), **changed)
