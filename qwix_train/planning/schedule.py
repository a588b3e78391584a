"""Schedules: when in training quantization begins, and what stays from when on."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import core

from qwix_train.core import numerics

OF_WHOLE_STEPS = (
    "quant_stats_warmup",
    "quant_stats_freeze_step",
    "batch_stats_freeze_step",
)
"""The fields of a schedule that say nothing of single ops."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    r"""When fake quantization begins, with how many bits, and when statistics freeze.

    Let ``Q`` be fake quantization. At step ``t``, counted from 0, the forward computes
    with this blend of a weight ``x``

    .. math:: x + a_t (Q(x) - x), \quad
      a_t = \min(\max((t - \mathrm{start}) / \mathrm{ramp}, 0), 1)

    Without a ramp, ``a_t`` is 0 before the start, and 1 from then on. The gradient is
    that of this sum, with the straight-through gradient of ``Q``. Activations begin at
    `act_start_step`.

    Starting activations later than weights, when their ranges have settled, is from
    arXiv 1712.05877, section 3.1. The blend is from arXiv 1903.01061, which uses no
    straight-through gradient.

    Only `wrap_train_step` follows schedules. Everything else takes the rules as
    training ends with them: `wrap_eval_step`, `plan`, `quantize_model`, PTQ, export. A
    rule may have a schedule of its own, which says when its ops are quantized. The last
    three attributes are for a whole step, so a rule refuses them.

    Attributes:
      start_step: the first step in which weights are quantized.
      ramp_steps: the number of steps over which quantization comes in, from each start.
      weight_qtypes: the type of weights by step, such as `{0: "int8", 300: "int4"}`.
        Each is for its step and those after it. The last one has to be the type of the
        rule. If None, weights have that type throughout. A trained scale (`"lsq"`,
        `"lsq+"`) belongs to one type, so a rule refuses several then.
      act_qtypes: the same for activations.
      act_start_step: the first step in which activations are quantized; `start_step` if
        None. Static ranges are measured from the first step in which weights or
        activations are quantized.
      quant_stats_warmup: the number of batches that a static range in the state has to
        have seen before it is used. Until then, each batch has its own range.
      quant_stats_freeze_step: the first step in which the static ranges in the state
        stay as they are; never if None.
      batch_stats_freeze_step: the first step in which the statistics of batch
        normalization stay as they are; never if None.

    Raises:
      TypeError: if a step is no int.
      ValueError: if a step is negative, or larger than an int32; if types are not in
        the order of their steps, the first comes after the start, or a type is unknown.

    Example:
      >>> from qwix_train import Schedule
      >>> Schedule(start_step=100, ramp_steps=50).ends_at
      150
      >>> halving = Schedule(weight_qtypes={0: "int8", 300: "int4", 600: "int2"})
      >>> halving.weight_qtype_at(299), halving.weight_qtype_at(600)
      ('int8', 'int2')
    """

    start_step: int = 0
    ramp_steps: int = 0
    weight_qtypes: Mapping[int, Any] | None = None
    act_qtypes: Mapping[int, Any] | None = None
    act_start_step: int | None = None
    quant_stats_warmup: int = 0
    quant_stats_freeze_step: int | None = None
    batch_stats_freeze_step: int | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not field.name.endswith("qtypes") and value is not field.default:
                self._check_step(field.name, value)
        for field, start in (
            ("weight_qtypes", self.start_step),
            ("act_qtypes", self.act_start),
        ):
            qtypes = getattr(self, field)
            if qtypes is not None:
                self._check_qtypes(field, qtypes, start)
                # Hashable, as rules are.
                object.__setattr__(self, field, core.FrozenDict(qtypes))
        last, most = max(self.ends_at, self.quant_stats_warmup), np.iinfo(np.int32).max
        if last > most:
            raise ValueError(
                f"Schedule: step {last} is never reached, as steps are counted in "
                f"int32, up to {most}."
            )

    @property
    def act_start(self) -> int:
        """The first step in which activations are quantized."""
        return self.start_step if self.act_start_step is None else self.act_start_step

    @property
    def ends_at(self) -> int:
        """The first step from which on the schedule changes nothing."""
        freezing = (self.quant_stats_freeze_step, self.batch_stats_freeze_step)
        return max(*self.boundaries, *(step or 0 for step in freezing))

    @property
    def boundaries(self) -> tuple[int, ...]:
        """The steps at which what the rules do changes, in order."""
        starts = (self.start_step, self.act_start)
        changes = (self.weight_qtypes or {}, self.act_qtypes or {})
        return tuple(
            sorted(
                {*starts, *(s + self.ramp_steps for s in starts)}.union(
                    *(qtypes.keys() for qtypes in changes)
                )
            )
        )

    @property
    def of_rules(self) -> Schedule:
        """What it says of the ops of a rule, without what is for the whole step."""
        whole = {field: getattr(Schedule, field) for field in OF_WHOLE_STEPS}
        return dataclasses.replace(self, **whole)

    def until(self, step: int) -> Schedule:
        """The schedule without the types that come after a step.

        Args:
          step: the step.
        """

        def begun(qtypes):
            if qtypes is None:
                return None
            first = next(iter(qtypes))
            return {at: x for at, x in qtypes.items() if at <= max(step, first)}

        qtypes = {f: begun(getattr(self, f)) for f in ("weight_qtypes", "act_qtypes")}
        return dataclasses.replace(self, **qtypes)

    def weight_qtype_at(self, step: int) -> Any:
        """The type of weights at a step; None if it is that of the rule throughout."""
        return _at(self.weight_qtypes, step)

    def act_qtype_at(self, step: int) -> Any:
        """The type of activations at a step, as `weight_qtype_at`."""
        return _at(self.act_qtypes, step)

    def check_last(self, field: str, qtype: Any) -> None:
        """Complains if the types by step do not end with the type of a rule.

        Args:
          field: `"weight_qtypes"` or `"act_qtypes"`.
          qtype: the type of the rule.

        Raises:
          ValueError: if they do not.
        """
        qtypes = getattr(self, field)
        if qtypes is None:
            return
        last = numerics.qtype_name(list(qtypes.values())[-1])
        end = None if qtype is None else numerics.qtype_name(qtype)
        if last != end:
            raise ValueError(
                f"the last of {field}={dict(qtypes)} is {last!r}, and the rule has "
                f"{field.removesuffix('s')}={end!r}, which is what the model is to end "
                "with: make the two the same"
            )

    def _check_step(self, field: str, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise TypeError(f"Schedule({field}={value!r}): it must be an int.")
        if value < 0:
            raise ValueError(
                f"Schedule({field}={value!r}): steps are counted from 0, so it must "
                "not be negative."
            )

    def _check_qtypes(self, field: str, qtypes: Any, start: int) -> None:
        def error(reason):
            return ValueError(f"Schedule({field}={qtypes!r}): {reason}.")

        if not isinstance(qtypes, Mapping) or not qtypes:
            raise error("it must map steps to types, such as {0: 'int8', 300: 'int4'}")
        for step, qtype in qtypes.items():
            self._check_step(f"a step of {field}", step)
            try:
                numerics.qtype_name(qtype)
            except ValueError as unknown:
                raise error(str(unknown).rstrip(".")) from None
        if any(a >= b for a, b in itertools.pairwise(qtypes)):
            raise error("the steps must be in increasing order")
        first = next(iter(qtypes))
        if first > start:
            raise error(
                f"quantization starts at step {start}, and there is no type before "
                f"step {first}"
            )


def _at(qtypes: Mapping[int, Any] | None, step: int) -> Any:
    found = None
    for begins, qtype in (qtypes or {}).items():
        if found is None or begins <= step:
            found = qtype
    return found
