"""The stages of a traced call that is fake-quantized."""

from __future__ import annotations

from collections.abc import Callable

from jax import lax

from qwix_train.core.how import HowToQuantize
from qwix_train.planning import learned_scale, static_range
from qwix_train.planning.plan import OpPlan, Path, Plan
from qwix_train.planning.running_ranges import RunningRange
from qwix_train.qat.quantized_products import KeepCodes, NoRange, QuantizedProducts
from qwix_train.stages.fake_quantize import FakeQuantize, Quantize, RangeOf
from qwix_train.stages.learned import LearnedActivation, LearnedWeight
from qwix_train.stages.product import in_float
from qwix_train.stages.rotate import in_basis
from qwix_train.stages.run import CallStages, OpStages
from qwix_train.stages.stage import ParamStage, Stage
from qwix_train.trace.function import Param, TracedCall
from qwix_train.values import stored


def fake_quantized(
    traced: TracedCall,
    plan: Plan,
    range_of: Callable[[static_range.StaticOperand], RangeOf],
    gradient_of: Callable[[OpPlan], RunningRange | None],
) -> CallStages:
    """The stages of a traced call, with fake-quantized weights and activations.

    Args:
      traced: the call.
      plan: what the rules do to it.
      range_of: gives the range of an activation whose range is collected.
      gradient_of: gives the range of the gradient of an op's result; None if it is not
        collected.

    Raises:
      ValueError: if a scale that is trained is not among the params.
    """
    products = QuantizedProducts(traced, plan)
    named = traced.named

    def op_stages(op: OpPlan) -> OpStages:
        product = products.product(op)
        quantized = Quantize if product else FakeQuantize

        def activation(side: int, how: HowToQuantize) -> tuple[Stage, ...]:
            if op.learned:
                leaves = learned_scale.act_leaves(op, side, named)
                return (LearnedActivation(how, leaves),)
            static = static_range.StaticOperand(op, side, how)
            return (quantized(how, range_of(static) if op.static else None),)

        operands, gradient = op.operands(activation), None
        if product and plan.gradient_statistics(op) is not None:
            gradient = gradient_of(op) or NoRange("/".join(op.gradient_path))
        return OpStages(op.op, operands, product or in_float, gradient=gradient)

    ops = {op.op.key: op_stages(op) for op in plan.quantized_ops}
    params = {
        param.path: _param_stages(param, traced, plan, products)
        for param in traced.params
        if param is not None
    }
    return CallStages(params, ops)


def _param_stages(
    param: Param, traced: TracedCall, plan: Plan, products: QuantizedProducts
) -> tuple[Stage | ParamStage, ...]:
    planned = plan.params[param.path]
    how, value = planned.how, param.value
    if how is None:
        return ()
    if learned_scale.has_learned_scale(planned):
        scale = learned_scale.weight_scale(planned, traced.named)
        if not stored.is_quantized(value):
            return (LearnedWeight(how, scale),)
    # The frozen base of adapters may be quantized already.
    if stored.is_quantized(value):
        return ()
    path: Path = param.path
    if parts := learned_scale.given_parts(path, traced):
        # The param is rounded to the grid that stands beside it, as a quantized model
        # will have it.
        products.check_has_no_grid(path)
        found = learned_scale.given_range(path, parts, how, planned.shape, value.dtype)
        stages = (FakeQuantize(how.in_basis, lax.stop_gradient(found)),)
    elif path in products.weights:
        keep = KeepCodes(how, path, keeps_floats=path in products.original)
        stages = FakeQuantize(how.in_basis), keep
    else:
        stages = (FakeQuantize(how.in_basis),)
    return in_basis(how, *stages)
