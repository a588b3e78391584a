"""Post-training quantization: a model that runs on quantized weights."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from qwix_train import stored
from qwix_train.core.qarray import QArray, dequantize, quantize_array
from qwix_train.model import QuantizationProvider
from qwix_train.planning import OpPlan, Path, Plan, make_plan
from qwix_train.ptq import static_range
from qwix_train.ptq.weight import Listener, StoredWeight, product
from qwix_train.trace.function import Param, TracedCall


class PtqProvider(QuantizationProvider):
    """Runs a model on quantized weights, with quantized arithmetic.

    Params that a rule quantizes are held as codes and scales, `WithAux(QArray(...))`
    in the place of the float array. Products multiply codes where activations are
    quantized, too. Anywhere else the model reads such a param, it finds the values
    that its codes stand for, so a QAT model and its PTQ model compute the same.

    Example:
      >>> from flax import linen as nn
      >>> from qwix_train import QuantizationRule, quantize_model
      >>> rules = [QuantizationRule(weight_qtype="int4", act_qtype="int8")]
      >>> model = quantize_model(nn.Dense(4), PtqProvider(rules))
      >>> params = model.init(jax.random.key(0), jax.numpy.ones((1, 8)))["params"]
      >>> params["kernel"].array.qvalue.dtype
      dtype(int4)
    """

    stores_params = True
    takes_static_ranges = True

    def store_params(self, traced: TracedCall, plan: Plan) -> dict[Path, Any]:
        """See `QuantizationProvider.store_params`: codes and scales, static ranges."""
        params = {
            param.path: stored.quantize_param(param.value, how)
            for param in traced.params
            if param is not None
            and (how := plan.params[param.path].how) is not None
            and not stored.is_quantized(param.value)
        }
        named = traced.named
        ranges = static_range.initial(plan).items()
        return params | {path: x for path, x in ranges if path not in named}

    def rewrite(self, traced: TracedCall, plan: Plan | None = None) -> Any:
        """See `QuantizationProvider.rewrite`."""
        plan = make_plan(traced, self.rules) if plan is None else plan
        # A model with quantized params cannot run as it is, whatever the rules say.
        if any(p is not None and stored.is_quantized(p.value) for p in traced.params):
            self.check(plan)
            return self.transform(traced, plan)
        return super().rewrite(traced, plan)

    def transform(self, traced: TracedCall, plan: Plan) -> Any:
        """The result of a traced call, computed from quantized params.

        Raises:
          ValueError: if a param that a rule quantizes is a float array, or has codes
            of another type.
        """
        return _run(traced, plan, None)

    def annotate(self, traced: TracedCall, plan: Plan) -> Plan:
        """See `QuantizationProvider.annotate`: adds where params are dequantized."""
        found: dict[str, dict[str, None]] = {}

        def listen(path: str, primitive: str) -> None:
            found.setdefault(path, {})[primitive] = None

        def run(inputs: list[Any]) -> None:
            call = traced.with_inputs(inputs)
            _run(call.with_params(self.store_params(call, plan)), plan, listen)

        jax.eval_shape(run, list(traced.inputs))
        dequantized = {path: tuple(by) for path, by in found.items()}
        return dataclasses.replace(plan, dequantized=dequantized)


def _run(traced: TracedCall, plan: Plan, listener: Listener | None) -> Any:
    _check_params(traced, plan)
    plans = {op.op.key: op for op in plan.quantized_ops}
    named = traced.named

    def handler(op, operands, run):
        plan = plans[op.key]
        if op.name == "gather":
            taken = None
            if isinstance(operands[0], StoredWeight):
                taken = operands[0].apply("gather", op.params, operands)
            return run(*operands) if taken is None else taken[0]
        operands = [
            _operand(operand, plan, side, named)
            for side, operand in enumerate(operands)
        ]
        weights = [x for x in operands if isinstance(x, StoredWeight)]
        quantized = [x for x in operands if isinstance(x, QArray)]
        if weights or len(quantized) == 2:
            name = "dot_general" if op.name == "einsum" else op.name
            return product(name, op.params, operands)
        # The weight was dequantized on the way here, and so the product is in float.
        return run(*(dequantize(x) if isinstance(x, QArray) else x for x in operands))

    def substitute(param: Param) -> StoredWeight | None:
        whole = param.value
        if not stored.is_quantized(whole) or not isinstance(whole.array, QArray):
            return None
        return StoredWeight(
            whole.array, whole.dtype, "/".join(param.path), whole, listener
        )

    return traced.run([op.op for op in plan.quantized_ops], handler, substitute)


def _operand(operand: Any, plan: OpPlan, side: int, named: Any) -> Any:
    how = plan.activations[side] if side < len(plan.activations) else None
    if how is None:
        return operand
    if isinstance(operand, StoredWeight):
        # An activation by the plan, such as the rows that tokens looked up.
        operand = operand.value
    if plan.static:
        return static_range.quantize_activation(operand, plan, side, named)
    return quantize_array(operand, how)


def _check_params(traced: TracedCall, plan: Plan) -> None:
    """Complains of params that are not quantized as the rules say."""
    in_float, other = [], []
    for param in traced.params:
        how = plan.params[param.path].how if param is not None else None
        if param is None or how is None:
            continue
        if not stored.is_quantized(param.value):
            in_float.append("/".join(param.path))
        elif (qtype := param.value.array.qtype) != how.qtype:
            name = "/".join(param.path)
            other.append(f"{name} has codes of {qtype}, a rule asks for {how.qtype}")
    if in_float:
        raise ValueError(
            f"{len(in_float)} params that the rules quantize are float arrays, among "
            f"them {in_float[0]!r}. Quantize them first: "
            "quantize_params(float_params, abstract_quantized_params), or "
            "ptq.quantize(model, params, rules, *inputs)."
        )
    if other:
        raise ValueError(
            f"Params were quantized by other rules: {'; '.join(other[:3])}. Quantize "
            "the float params again, or run the model with the rules that were used."
        )
