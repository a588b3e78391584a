"""Providers with the signatures of `qwix`, which warn where ours refuse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qwix_train.like_qwix.rules import LoraRule, as_qt_rule
from qwix_train.lora import provider as lora_provider
from qwix_train.odml import conversion_provider
from qwix_train.odml import provider as odml_provider
from qwix_train.planning.plan import Plan
from qwix_train.planning.provider import QuantizationProvider, warn_of_unmatched
from qwix_train.planning.rules import QuantizationRule
from qwix_train.ptq import provider as ptq_provider
from qwix_train.qat import provider as qat_provider
from qwix_train.trace.function import TracedCall


class Lenient(QuantizationProvider):
    """A mode that warns of rules without effect, and remembers which had one.

    `disable_jit` is taken and has no effect: no function of JAX is patched, so that
    none has to be traced anew.
    """

    disable_jit: bool = False
    _used: set[int] | None = None

    def plan(self, traced: TracedCall) -> Plan:
        """See `QuantizationProvider.plan`: warns of rules that match nothing."""
        plan = super().plan(traced)
        self.remember(plan)
        if not plan.has_effect:
            self.told.warn(plan.no_match_message())
        elif plan.whole:
            warn_of_unmatched(self, plan)
        return plan

    def remember(self, plan: Plan) -> None:
        """Takes down which rules decided for an op."""
        used = {x.rule_index for x in plan.decisions if x.rule_index is not None}
        self._used = (self._used or set()) | used

    def get_unused_rules(self) -> Sequence[QuantizationRule]:
        """The rules that decided for no op in the calls of the model so far.

        Raises:
          ValueError: if there was none.
        """
        if self._used is None:
            raise ValueError(
                "No model was called with this provider yet, so that no rule was used. "
                "Quantize one: quantize_model(model, provider, *inputs), and, if it is "
                "a Linen model, call init or apply of that."
            )
        return [rule for i, rule in enumerate(self.rules) if i not in self._used]


class QtProvider(Lenient, qat_provider.QtProvider):
    """`qwix_train.QtProvider`, with the signature of `qwix`."""

    def __init__(self, rules: Sequence[QuantizationRule], *, disable_jit: bool = False):
        """Checks the rules.

        Args:
          rules: the rules, in order of precedence.
          disable_jit: has no effect.
        """
        super().__init__([*map(as_qt_rule, rules)], allow_unmatched=True)
        self.disable_jit = disable_jit


class PtqProvider(Lenient, ptq_provider.PtqProvider):
    """`qwix_train.PtqProvider`, with the signature of `qwix`."""

    def __init__(self, rules: Sequence[QuantizationRule], *, disable_jit: bool = False):
        """Checks the rules.

        Args:
          rules: the rules, in order of precedence.
          disable_jit: has no effect.
        """
        # The params of the model have a place for the scales of inputs where a rule
        # is for a method that finds such.
        scaled = any(getattr(rule, "scales_inputs", False) for rule in rules)
        super().__init__(rules, allow_unmatched=True, pre_quant_scale=scaled)
        self.disable_jit = disable_jit


class LoraProvider(Lenient, lora_provider.LoraProvider):
    """`qwix_train.LoraProvider`, with the signature of `qwix`."""

    def __init__(
        self,
        rules: Sequence[QuantizationRule] | None = None,
        *,
        disable_jit: bool = False,
        **kwargs: Any,
    ):
        """Checks the rules.

        Args:
          rules: the rules, in order of precedence.
          disable_jit: has no effect.
          **kwargs: the fields of one `LoraRule`, in the place of `rules`.
        """
        if rules is None and kwargs:
            rules, kwargs = [LoraRule(**kwargs)], {}
        super().__init__(rules, allow_unmatched=True, **kwargs)
        self.disable_jit = disable_jit


class OdmlQatProvider(Lenient, odml_provider.OdmlQatProvider):
    """`qwix_train.OdmlQatProvider`, which warns where that refuses."""

    def __init__(
        self,
        rules: Sequence[QuantizationRule],
        *,
        disable_jit: bool = False,
        **kwargs: Any,
    ):
        """Checks the rules; see `qwix_train.OdmlQatProvider`."""
        super().__init__(rules, allow_unmatched=True, **kwargs)
        self.disable_jit = disable_jit


class OdmlConversionProvider(Lenient, conversion_provider.OdmlConversionProvider):
    """`qwix_train.OdmlConversionProvider`, which warns where that refuses."""

    def __init__(
        self,
        rules: Sequence[QuantizationRule],
        params: Any,
        quant_stats: Any,
        *,
        disable_jit: bool = False,
        **kwargs: Any,
    ):
        """Checks the rules; see `qwix_train.OdmlConversionProvider`."""
        super().__init__(rules, params, quant_stats, **kwargs)
        self.disable_jit = disable_jit
