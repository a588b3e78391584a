"""A traced call with its weights and activations fake-quantized."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax import lax

from qwix_train.core.fake_quant import fake_quant, fake_quant_with_scale
from qwix_train.planning import learned_scale
from qwix_train.planning.plan import OpPlan, ParamPlan, Plan
from qwix_train.qat.quantized_products import QuantizedProducts
from qwix_train.trace.analyze import Key, Op
from qwix_train.trace.carried import Carried, Deferred, value_of
from qwix_train.trace.function import Param, TracedCall
from qwix_train.values import stored

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
        see `trace.evaluate`. Ops whose ranges are trained need none.
      products: the ops that are computed from codes.

    Raises:
      ValueError: if a scale that is trained is not among the params.
    """
    plans = {op.op.key: op for op in plan.quantized_ops}
    named = traced.named
    given = learned_scale.with_leaves(given, plan, named)

    def handler(op, operands, run, given):
        op_plan = plans[op.key]
        if products is not None and products.includes(op):
            return products.run(op, op_plan, operands, given)

        def quantized(side, x):
            how = op_plan.activations[side]
            x = value_of(x)
            if how is None:
                return x
            if op_plan.learned:
                leaves = given[side]
                return learned_scale.fake_quantize_activation(x, how, leaves)
            return fake_quantize(op, op_plan, side, x, given[side])

        return run(*(quantized(side, x) for side, x in enumerate(operands)))

    def substitute(param: Param) -> Carried | None:
        param_plan = plan.params[param.path]
        scale = None
        if learned_scale.has_learned_scale(param_plan):
            scale = learned_scale.weight_scale(param_plan, named)
        elif parts := learned_scale.given_parts(param.path, traced):
            fake = _on_given_grid(param, param_plan, parts)
            if products is not None and fake is not None:
                products.check_has_no_grid(param.path)
            return fake
        fake = fake_quantized_param(param.value, param_plan, scale)
        return fake if products is None else products.weight(param_plan, fake)

    ops = [op.op for op in plan.quantized_ops]
    return traced.run(ops, handler, substitute, given)


def _on_given_grid(
    param: Param, plan: ParamPlan, parts: tuple[Any, Any]
) -> Deferred | None:
    """A param on the grid that stands beside it, as a quantized model will have it."""
    how = plan.how
    if how is None or stored.is_quantized(param.value):
        return None
    shape, dtype = plan.shape, param.value.dtype
    found = learned_scale.given_range(plan.path, parts, how, shape, dtype)
    others = tuple(x for x in lax.stop_gradient(found) if x is not None)

    def change(array, scale, zero_point=None):
        return fake_quant_with_scale(array, how.qtype, scale, zero_point)

    return Deferred(param.value, change, plan.per_iteration and change, others)


def fake_quantized_param(
    array: Any, plan: ParamPlan, scale: Any = None
) -> Deferred | None:
    """A param that is fake-quantized where it is used; None if it stays as it is.

    Args:
      array: the param.
      plan: how it is quantized.
      scale: its scale, if that is trained.
    """
    # The frozen base of adapters may be quantized already.
    if plan.how is None or stored.is_quantized(array):
        return None
    inner = plan.per_iteration
    if scale is not None:
        change = learned_scale.weight_transform
        return Deferred(array, change(plan.how), inner and change(inner), (scale,))
    return Deferred(
        array,
        functools.partial(fake_quant, how=plan.how),
        inner and functools.partial(fake_quant, how=inner),
    )
