"""A traced call with its weights and activations fake-quantized."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qwix_train import stored
from qwix_train.core.fake_quant import fake_quant
from qwix_train.planning import OpPlan, ParamPlan, Plan
from qwix_train.qat.quantized_products import QuantizedProducts
from qwix_train.trace.analyze import Key, Op
from qwix_train.trace.carried import Carried, Deferred
from qwix_train.trace.function import Param, TracedCall

# What becomes of an activation: of an op, its plan, the side of the operand, the array,
# and what is given for that side.
FakeQuantize = Callable[[Op, OpPlan, int, Any, Any], Any]


def run_fake_quantized(
    traced: TracedCall,
    plan: Plan,
    fake_quantize: FakeQuantize,
    given: Mapping[Key, Sequence[Any]],
    products: QuantizedProducts | None = None,
) -> Any:
    """The result of a traced call, with fake-quantized weights and activations.

    Args:
      traced: the call.
      plan: what the rules do to it.
      fake_quantize: called with each activation that is quantized.
      given: for each op, trees of arrays for its operands that `fake_quantize` needs;
        see `trace.evaluate`.
      products: the ops that are computed from codes.
    """
    plans = {op.op.key: op for op in plan.quantized_ops}

    def handler(op, operands, run, given):
        op_plan = plans[op.key]
        if products is not None and products.includes(op):
            return products.run(op, op_plan, operands, given)
        operands = [x.value if isinstance(x, Carried) else x for x in operands]
        return run(
            *(
                x if how is None else fake_quantize(op, op_plan, side, x, given[side])
                for side, (x, how) in enumerate(
                    zip(operands, op_plan.activations, strict=True)
                )
            )
        )

    def substitute(param: Param) -> Carried | None:
        fake = fake_quantized_param(param.value, plan.params[param.path])
        if products is None:
            return fake
        return products.weight(plan.params[param.path], fake)

    ops = [op.op for op in plan.quantized_ops]
    return traced.run(ops, handler, substitute, given)


def fake_quantized_param(array: Any, plan: ParamPlan) -> Deferred | None:
    """A param that is fake-quantized where it is used; None if it stays as it is.

    Args:
      array: the param.
      plan: how it is quantized.
    """
    # The frozen base of adapters may be quantized already.
    if plan.how is None or stored.is_quantized(array):
        return None
    inner = plan.per_iteration
    return Deferred(
        array,
        functools.partial(fake_quant, how=plan.how),
        inner and functools.partial(fake_quant, how=inner),
    )
