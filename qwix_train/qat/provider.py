"""Quantization-aware training: fake quantization of a model's forward pass."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from qwix_train.calib.observe import RangeTagging
from qwix_train.planning import static_range
from qwix_train.planning.plan import OpPlan, Path, Plan
from qwix_train.planning.provider import QuantizationProvider
from qwix_train.planning.rules import QuantizationRule
from qwix_train.planning.running_ranges import RunningRange, RunningRanges
from qwix_train.qat.fake_quantized import fake_quantized
from qwix_train.qat.initial_scales import initial_leaves
from qwix_train.stages.fake_quantize import RangeOf
from qwix_train.stages.run import CallStages
from qwix_train.trace.function import TracedCall


class QtProvider(QuantizationProvider):
    """Fake-quantizes a model's weights and activations, for training.

    The forward computes what the quantized model will compute. Wherever the model reads
    a weight that a rule quantizes, it gets the values that the weight's codes and
    scales stand for. The activations that enter the ops are replaced alike. Gradients
    pass straight through (arXiv 1308.3432, section 4): they are those at the
    fake-quantized values, and zero for elements outside of the calibrated range.

    `quantize_model` and `quantize_fn` take it. `wrap_train_step`, `wrap_eval_step`,
    `attach`, `calib.Calibrator` and `calib.observe` take it instead of rules.

    Example:
      >>> from qwix_train import QtProvider, QuantizationRule
      >>> provider = QtProvider([QuantizationRule(weight_qtype="int8")])
    """

    follows_schedules = True

    def __init__(
        self,
        rules: Sequence[QuantizationRule],
        *,
        quant_stats: Mapping[str, Any] | None = None,
        allow_unmatched: bool = False,
    ):
        """Checks the rules.

        Args:
          rules: the rules, in order of precedence.
          quant_stats: the ranges of activations, for rules with
            `act_static_scale=True`: those of a `calib.Calibrator`, or any that
            `quantize_params` takes. Training does not change them. If None, a Linen
            model holds statistics in a collection `quant_stats`: `init` makes it, and
            `apply` updates it if it is mutable. An NNX model holds them in
            `QuantStat`s, which its calls update.
          allow_unmatched: see `QuantizationProvider`.

        Raises:
          TypeError: if `quant_stats` is not a nested dictionary.
          ValueError: if there are `quant_stats`, and no rule asks for static ranges.
        """
        super().__init__(rules, allow_unmatched=allow_unmatched)
        self.takes_static_ranges: bool = any(
            rule.static_act_ranges for rule in self.rules
        )
        self.quant_stats: Any = self._checked(quant_stats)
        collects = any(
            rule.act_static_scale or rule.gradient_statistics for rule in self.rules
        )
        self.keeps_quant_stats: bool = collects and quant_stats is None
        self.adds_params: bool = any(rule.learns_scales for rule in self.rules)
        # The ranges of one call, if training keeps them.
        self._running: RunningRanges | None = None

    def stages(self, traced: TracedCall, plan: Plan) -> CallStages:
        """See `QuantizationProvider.stages`: fake quantization as planned."""
        ranges, running = {}, self._running
        if running is None:
            ranges = static_range.collected(plan, self.quant_stats or {})

        def range_of(static: static_range.StaticOperand) -> RangeOf:
            if running is None:
                return static_range.find(static.op, static.side, ranges)
            return running.range_of(static, plan, traced.once)

        def gradient_of(op: OpPlan) -> RunningRange | None:
            return running and running.range_of_gradient(op, plan)

        return fake_quantized(traced, plan, range_of, gradient_of)

    @property
    def rewrite_key(self) -> Hashable | None:  # pyright: ignore
        """See `QuantizationProvider`."""
        own = self.quant_stats, self._running
        if type(self) is not QtProvider or self.changes or own != (None, None):
            return None
        try:
            hash(self.rules)
        except TypeError:  # a schedule has dictionaries
            return None
        return (QtProvider, self.rules)

    def store_params(self, traced: TracedCall, plan: Plan) -> dict[Path, Any]:
        """See `QuantizationProvider.store_params`: scales that are trained."""
        return initial_leaves(traced, plan)

    def tagging(self) -> RangeTagging:
        """See `QuantizationProvider.tagging`."""
        return RangeTagging(self.rules)

    def with_ranges(self, ranges: Mapping[str, Any] | RunningRanges) -> QtProvider:
        """See `QuantizationProvider.with_ranges`."""
        changed = copy.copy(self)
        changed.keeps_quant_stats = False
        if isinstance(ranges, RunningRanges):
            changed._running = ranges
        else:
            changed.quant_stats = self._checked(ranges)
        return changed

    def _checked(self, quant_stats: Any) -> Any:
        static_range.check_quant_stats(quant_stats)
        if quant_stats and not self.takes_static_ranges:
            raise ValueError(
                "There are quant_stats, and no rule asks for static ranges: set "
                "act_static_scale=True in the rules that they were collected with, or "
                "leave them out."
            )
        return quant_stats
