"""Rules with the defaults of `qwix`, which warn where ours refuse."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Collection

from qwix_train.lora import rules as lora_rules
from qwix_train.planning import rules
from qwix_train.qat import qt_rule


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class QuantizationRule(rules.QuantizationRule):
    """`qwix_train.QuantizationRule`, which warns of what has no effect.

    Attributes:
      act_batch_axes: see there. The ranges of a batch that each of its elements has
        are averaged, by default.
    """

    act_batch_axes: Collection[int] | None = (0,)

    def refuse(self, field: str, reason: str) -> None:
        """Warns of what ours refuses."""
        if field == "act_batch_axes":  # which everywhere is set by default
            return
        value = getattr(self, field)
        # To who made the rule: past `__init__` and `__post_init__`.
        warnings.warn(
            f"{type(self).__name__}({field}={value!r}): {reason}. It has no effect.",
            stacklevel=4,
        )


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class QtRule(QuantizationRule, qt_rule.QtRule):
    """`qwix_train.QtRule`, which warns of what has no effect."""


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class LoraRule(QuantizationRule, lora_rules.LoraRule):
    """`qwix_train.LoraRule`, which warns of what has no effect."""


def as_qt_rule(rule: rules.QuantizationRule) -> rules.QuantizationRule:
    """A rule as a `QtRule`, which `qwix.QtProvider` makes of all of its rules.

    Kernels that ask for their rule may expect one.
    """
    if isinstance(rule, qt_rule.QtRule):
        return rule
    held = {field.name: getattr(rule, field.name) for field in dataclasses.fields(rule)}
    known = {field.name for field in dataclasses.fields(QtRule)}
    with warnings.catch_warnings():  # it was warned of when the rule was made
        warnings.simplefilter("ignore")
        return QtRule(**{name: x for name, x in held.items() if name in known})
