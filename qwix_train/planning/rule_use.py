"""Which rules decide for which ops, and which for none."""

from __future__ import annotations

import abc
import difflib
from collections.abc import Sequence
from typing import NamedTuple

from qwix_train.planning import table as plan_table
from qwix_train.planning.current_rule import was_given
from qwix_train.planning.rules import QuantizationRule


class Decision(NamedTuple):
    """Which rule decided for an op.

    Attributes:
      rule_index: the rule; None if none matched.
      module_path: the path of the op's module.
      name: the name by which rules know the op.
      id: its name and its count within the module.
    """

    rule_index: int | None
    module_path: str
    name: str
    id: str


class RuleUse(abc.ABC):
    """What each of some rules decided for.

    Attributes:
      rules: the rules.
    """

    rules: tuple[QuantizationRule, ...]

    @property
    @abc.abstractmethod
    def decisions(self) -> tuple[Decision, ...]:
        """The rule that decided for each op."""

    @property
    def module_paths(self) -> tuple[str, ...]:
        """The paths of the modules that run ops."""
        return tuple(dict.fromkeys(decision.module_path for decision in self.decisions))

    @property
    def unused_rules(self) -> tuple[int, ...]:
        """The indices of the rules that decided for no op."""
        used = {decision.rule_index for decision in self.decisions}
        return tuple(i for i in range(len(self.rules)) if i not in used)

    def shadowed_by(self, rule_index: int) -> tuple[int, ...]:
        """The earlier rules that decided for all that an unused rule matches."""
        rule = self.rules[rule_index]
        matched = [
            decision.rule_index
            for decision in self.decisions
            if rule.matches(decision.module_path, decision.name, decision.id)
        ]
        return tuple(sorted({i for i in matched if i is not None}))

    def is_default(self, rule_index: int) -> bool:
        """Whether an unused rule is for what earlier, narrower ones leave: nothing."""

        def matched(index):
            rule = self.rules[index]
            return {
                (decision.module_path, decision.id)
                for decision in self.decisions
                if rule.matches(decision.module_path, decision.name, decision.id)
            }

        earlier, own = self.shadowed_by(rule_index), matched(rule_index)
        return bool(earlier) and all(matched(index) < own for index in earlier)

    def unmatched_rules(self) -> dict[int, str]:
        """The rules that match no op, each with a sentence that says so."""
        return {
            index: plan_table.unused(self, index)
            for index in self.unused_rules
            if not self.shadowed_by(index) and not was_given(self.rules[index])
        }

    def at_module_paths(self, rule_index: int) -> list[str]:
        """The ids of the ops of other names where a rule's module path matches."""
        rule = self.rules[rule_index]
        found = [d.id for d in self.decisions if rule.matches_module(d.module_path)]
        return list(dict.fromkeys(found)) if rule.op_names else []

    def near_misses(self, rule_index: int) -> list[str]:
        """Module paths that exist and resemble an unused rule's."""
        return difflib.get_close_matches(
            self.rules[rule_index].module_path, self.module_paths, n=3, cutoff=0.4
        )


class RuleUseInCalls(RuleUse):
    """What each rule decided for in several calls."""

    def __init__(self, plans: Sequence[RuleUse]):
        """Takes the plans of the calls, which have the same rules."""
        self.rules: tuple[QuantizationRule, ...] = plans[0].rules
        self._decisions = tuple(d for plan in plans for d in plan.decisions)

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """The rule that decided for each op."""
        return self._decisions
