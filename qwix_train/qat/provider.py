"""Quantization-aware training: fake quantization of a model's forward pass."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from qwix_train import static_range
from qwix_train.core.fake_quant import fake_quant
from qwix_train.model import QuantizationProvider
from qwix_train.planning import Plan
from qwix_train.rules import QuantizationRule
from qwix_train.trace.carried import Deferred
from qwix_train.trace.function import Param, TracedCall


class QtProvider(QuantizationProvider):
    """Fake-quantizes a model's weights and activations, for training.

    The forward computes what the quantized model will: every weight that a rule
    quantizes is replaced, wherever the model reads it, by the values that its codes
    and scales stand for, and so are the activations that enter the ops. Gradients
    pass straight through (arXiv 1308.3432, section 4): they are those at the
    fake-quantized values, and zero for elements outside of the calibrated range.

    Example:
      >>> from qwix_train import QuantizationRule
      >>> provider = QtProvider([QuantizationRule(weight_qtype="int8")])
    """

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
            `quantize_params` takes. They stay as they are while training.
          allow_unmatched: see `QuantizationProvider`.
        """
        super().__init__(rules, allow_unmatched=allow_unmatched)
        self.quant_stats = quant_stats
        self.takes_static_ranges = quant_stats is not None

    def transform(self, traced: TracedCall, plan: Plan) -> Any:
        """The result of a traced call, with fake quantization as planned."""
        plans = {op.op.key: op for op in plan.quantized_ops}
        ranges = static_range.collected(plan, self.quant_stats or {})
        given = {key: static_range.ranges_of(op, ranges) for key, op in plans.items()}

        def handler(op, operands, run, ranges):
            hows = plans[op.key].activations
            return run(
                *(
                    x
                    if how is None
                    else static_range.fake_quantize_activation(x, how, given)
                    for x, how, given in zip(operands, hows, ranges, strict=True)
                )
            )

        def substitute(param: Param) -> Deferred | None:
            decision = plan.params[param.path]
            if decision.how is None:
                return None
            inner = decision.per_iteration
            return Deferred(
                param.value,
                functools.partial(fake_quant, how=decision.how),
                inner and functools.partial(fake_quant, how=inner),
            )

        ops = [op.op for op in plan.quantized_ops]
        return traced.run(ops, handler, substitute, given)
