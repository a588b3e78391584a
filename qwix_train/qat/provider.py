"""Quantization-aware training: fake quantization of a model's forward pass."""

from __future__ import annotations

import functools
from typing import Any

from qwix_train.core.fake_quant import fake_quant
from qwix_train.model import QuantizationProvider
from qwix_train.planning import OpPlan, Plan
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

    def transform(self, traced: TracedCall, plan: Plan) -> Any:
        """The result of a traced call, with fake quantization as planned."""
        plans = {op.op.key: op for op in plan.quantized_ops}

        def handler(op, operands, run, given):
            return run(*_fake_quant_activations(plans[op.key], operands))

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

        return traced.run([op.op for op in plan.quantized_ops], handler, substitute)


def _fake_quant_activations(plan: OpPlan, operands):
    return [
        operand if how is None else fake_quant(operand, how)
        for operand, how in zip(
            operands,
            (*plan.activations, *(None for _ in operands[2:])),
            strict=True,
        )
    ]
