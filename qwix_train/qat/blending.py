"""A mode whose quantization is blended in: the stages of a schedule that are ramps."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax import numpy as jnp

from qwix_train.core import numerics
from qwix_train.planning.plan import Plan
from qwix_train.planning.provider import QuantizationProvider
from qwix_train.qat.stages import OFF, WHOLE, Amounts
from qwix_train.trace.analyze import Key, Op
from qwix_train.trace.carried import Carried, Deferred
from qwix_train.trace.evaluate import Handler
from qwix_train.trace.function import Param, TracedCall


def blend(x: jax.Array, quantized: jax.Array, amount: jax.Array) -> jax.Array:
    """``x + amount * (quantized - x)``, computed in float32 or wider.

    Args:
      x: any shape.
      quantized: in the shape and dtype of `x`.
      amount: a scalar from 0 to 1.

    Returns:
      The sum, in the dtype of `x`. The gradient goes through both terms.

    Example:
      >>> blend(jnp.array([0.4, 1.8]), jnp.array([0.0, 2.0]), 0.5)
      Array([0.2, 1.9], dtype=float32)
    """
    wide = numerics.compute_dtype(x.dtype)
    start = x.astype(wide)
    step = jnp.asarray(amount, wide) * (quantized.astype(wide) - start)
    return (start + step).astype(x.dtype)


class BlendingProvider(QuantizationProvider):
    """Another mode, of whose quantization there is as much as amounts say."""

    def __init__(self, provider: QuantizationProvider, amounts: Amounts):
        """Takes over what the other mode is.

        Args:
          provider: a mode that keeps params in float, and plans by rules alone.
          amounts: the amounts, by rule.
        """
        super().__init__(provider.rules, allow_unmatched=provider.allow_unmatched)
        self.provider = provider
        self.amounts = amounts
        self.takes_static_ranges = provider.takes_static_ranges
        self.keeps_quant_stats = provider.keeps_quant_stats

    def plan(self, traced: TracedCall) -> Plan:
        """See `QuantizationProvider.plan`."""
        return self.provider.plan(traced)

    def check(self, plan: Plan) -> None:
        """See `QuantizationProvider.check`."""
        self.provider.check(plan)

    def matches(self, plan: Plan) -> bool:
        """See `QuantizationProvider.matches`."""
        return self.provider.matches(plan)

    def no_match_message(self, plan: Plan) -> str:
        """See `QuantizationProvider.no_match_message`."""
        return self.provider.no_match_message(plan)

    def running(self, ranges: Any) -> QuantizationProvider:
        """See `QuantizationProvider.running`."""
        return BlendingProvider(self.provider.running(ranges), self.amounts)

    def transform(self, traced: TracedCall, plan: Plan) -> Any:
        """The result of a traced call, with quantization blended in."""
        fields = {
            field.name: getattr(traced, field.name)
            for field in dataclasses.fields(TracedCall)
        }
        call = _BlendedCall(**fields, call=traced, plan=plan, amounts=self.amounts)
        return self.provider.transform(call, plan)


@dataclasses.dataclass(frozen=True)
class _BlendedCall(TracedCall):
    """A traced call that blends what a mode makes of operands into the operands.

    Attributes:
      call: the call. It may have adapters.
      plan: what the mode does to it.
      amounts: the amounts, by rule.
    """

    call: Any = None
    plan: Any = None
    amounts: Any = None

    def run(
        self,
        replace: Sequence[Op],
        handler: Handler,
        substitute: Callable[[Param], Carried | None],
        given: Mapping[Key, Any] | None = None,
    ) -> Any:
        """See `TracedCall.run`."""
        plans = {op.op.key: op for op in self.plan.ops}

        def blended_handler(op, operands, run, given):
            plan = plans[op.key]
            amount = self.amounts.activations[plan.rule_index]
            if amount is WHOLE:
                return handler(op, operands, run, given)
            reached = False

            def blended_run(*values):
                nonlocal reached
                reached = True
                return run(
                    *(
                        value if how is None else _blend(amount, operand, value)
                        for operand, value, how in zip(
                            operands, values, plan.activations, strict=True
                        )
                    )
                )

            result = handler(op, operands, blended_run, given)
            if not reached:
                raise ValueError(_no_blend(op.where))
            return result

        def blended_param(param):
            carried = substitute(param)
            decision = self.plan.params[param.path]
            if carried is None or decision.op is None:
                return carried
            amount = self.amounts.weights[decision.op.rule_index]
            if amount is WHOLE:
                return carried
            if not isinstance(carried, Deferred):
                raise ValueError(_no_blend(f"param {'/'.join(param.path)!r}"))
            return None if amount is OFF else _blended(carried, amount)

        return self.call.run(replace, blended_handler, blended_param, given)

    def with_inputs(self, inputs: Sequence[Any]) -> TracedCall:
        """See `TracedCall.with_inputs`."""
        changed = super().with_inputs(inputs)
        return dataclasses.replace(changed, call=self.call.with_inputs(inputs))  # type: ignore[call-arg]


def _blend(amount: Any, x: Any, quantized: Any) -> Any:
    return x if amount is OFF else blend(x, quantized, amount)


def _blended(param: Deferred, amount: Any) -> Deferred:
    """A param that is blended where it is used."""

    def change(transform: Callable[..., Any]) -> Callable[..., Any]:
        return lambda x, *others: blend(x, transform(x, *others), amount)

    result = copy.copy(param)
    result.transform = change(param.transform)
    if param.per_iteration is not None:
        result.per_iteration = change(param.per_iteration)
    return result


def _no_blend(where: str) -> str:
    return (
        f"{where} is computed from codes, which cannot be blended with float values: "
        "give its rule a schedule without ramp_steps, in which weights and activations "
        "start together."
    )
