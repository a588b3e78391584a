"""Post-training quantization: a model that runs on quantized weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from qwix_train import ops
from qwix_train.core import product_forms
from qwix_train.core.how import HowToQuantize
from qwix_train.planning import static_range
from qwix_train.planning.leaves import LEFT_OUT, Path
from qwix_train.planning.plan import Plan
from qwix_train.planning.provider import QuantizationProvider
from qwix_train.planning.rules import QuantizationRule
from qwix_train.ptq import given_scales, pre_quant_scale
from qwix_train.stages.fake_quantize import Quantize
from qwix_train.stages.product import Product, of_codes
from qwix_train.stages.run import CallStages, OpStages, run
from qwix_train.stages.scale import Scale
from qwix_train.trace.analyze import Op
from qwix_train.trace.function import TracedCall
from qwix_train.values import stored


class PtqProvider(QuantizationProvider):
    """Runs a model on quantized weights, with quantized arithmetic.

    A param that a rule quantizes is held as codes and scales: a `WithAux(QArray(...))`
    takes the place of the float array. If activations are quantized, too, products
    multiply codes. Wherever else the model reads such a param, it gets the values that
    the codes stand for. So a QAT model and its PTQ model compute the same.

    Example:
      >>> import jax
      >>> from flax import linen as nn
      >>> from qwix_train import PtqProvider, QuantizationRule, quantize_model
      >>> rules = [QuantizationRule(weight_qtype="int4", act_qtype="int8")]
      >>> model = quantize_model(nn.Dense(4), PtqProvider(rules))
      >>> params = model.init(jax.random.key(0), jax.numpy.ones((1, 8)))["params"]
      >>> params["kernel"].array.qvalue.dtype
      dtype(int4)
    """

    stores_params = True
    takes_static_ranges = True

    def __init__(
        self,
        rules: Sequence[QuantizationRule],
        *,
        allow_unmatched: bool = False,
        pre_quant_scale: bool = False,
    ):
        """Checks the rules.

        Args:
          rules: the rules, in order of precedence.
          allow_unmatched: see `QuantizationProvider`.
          pre_quant_scale: whether the params of the model have a place for the scales
            of input channels that `Awq` and `SmoothQuant` give. These scales are 1 at
            first. Scales that are among the params of a call are always applied.
        """
        super().__init__(rules, allow_unmatched=allow_unmatched)
        self.pre_quant_scale = pre_quant_scale

    def store_params(self, traced: TracedCall, plan: Plan) -> dict[Path, Any]:
        """See `QuantizationProvider.store_params`.

        They are codes and scales, static ranges, and scales of input channels. Trained
        scales are part of the codes and ranges, so their own leaves are left out.

        Raises:
          ValueError: if a scale that a rule trains is not among the params.
        """
        given = given_scales.among_inputs(traced, plan)
        params: dict[Path, Any] = {}
        for param in traced.params:
            how = None if param is None else plan.params[param.path].how
            if param is None or how is None or stored.is_quantized(param.value):
                continue
            value = given.quantized(param.path, param.value, how)
            if value is None:
                is_shape = isinstance(param.value, jax.ShapeDtypeStruct)
                # Random params have no learned scales: they are quantized with the
                # scales at which learning begins.
                if not (is_shape or traced.initializing):
                    given_scales.check_learned(param.path, how)
                value = stored.quantize_param(param.value, how)
            params[param.path] = value
        params |= given.ranges
        named = {**traced.named, **given.ranges}
        added = static_range.initial(plan)
        if self.pre_quant_scale:
            added |= pre_quant_scale.initial(plan)
        params |= {path: x for path, x in added.items() if path not in named}
        left_out = () if traced.initializing else given.used
        return dict.fromkeys(left_out, LEFT_OUT) | params

    def stages(self, traced: TracedCall, plan: Plan) -> CallStages:
        """See `QuantizationProvider.stages`.

        Raises:
          ValueError: if a param that a rule quantizes is a float array, or has codes
            of another type.
        """
        check_params(traced, plan)
        return on_codes(traced, plan)

    def annotate(self, traced: TracedCall, plan: Plan) -> Plan:
        """See `QuantizationProvider.annotate`.

        Adds where params are dequantized, and in which form products are computed.
        """
        found: dict[str, dict[str, None]] = {}
        forms: dict[Any, dict[str, None]] = {}

        def listen(path: str, primitive: str) -> None:
            found.setdefault(path, {})[primitive] = None

        def find(inputs: list[Any]) -> None:
            call = dataclasses.replace(traced.with_inputs(inputs), initializing=True)
            # Without what derived modes add, such as adapters: the plan must be shown
            # even if their rules match nothing.
            call = call.with_params(PtqProvider.store_params(self, call, plan))
            stages = on_codes(call, plan)
            told = {
                key: dataclasses.replace(
                    op, product=_telling(forms.setdefault(key, {}))
                )
                for key, op in stages.ops.items()
            }
            run(call, dataclasses.replace(stages, ops=told), listen)

        jax.eval_shape(find, list(traced.inputs))
        dequantized = {path: tuple(by) for path, by in found.items()}
        ops = tuple(
            dataclasses.replace(
                op, product="; ".join(sorted(forms.get(op.op.key, ()), key=_on_one))
            )
            for op in plan.ops
        )
        return dataclasses.replace(plan, ops=ops, dequantized=dequantized)


def on_codes(traced: TracedCall, plan: Plan) -> CallStages:
    """The stages of a traced call that is computed from quantized params.

    Args:
      traced: the call.
      plan: what happens to its ops.
    """
    named, found = traced.named, {}
    unknown = static_range.initial(plan) if traced.initializing else None
    for op in plan.quantized_ops:
        # An op that takes elements of a weight, such as a lookup, is done by the stored
        # weight itself.
        if not ops.is_product(op.op.primitive):
            continue
        ranges = static_range.ranges_of(op, named, unknown)
        scales = pre_quant_scale.scales_of(op, named)

        def activation(side: int, how: HowToQuantize, ranges=ranges):
            # A model is also initialized outside of the shard_map of its step.
            if traced.initializing:
                how = dataclasses.replace(how, axis_names=())
            return (Quantize(how, ranges[side]),)

        operands = tuple(
            own if scale is None else (Scale(scale), *own)
            for scale, own in zip(scales, op.operands(activation), strict=True)
        )
        found[op.op.key] = OpStages(op.op, operands, of_codes)
    return CallStages({}, found)


def _on_one(form: str) -> bool:
    return form.endswith("CPU")


def _telling(forms: dict[str, None]) -> Product:
    """A product of codes that adds the forms that it takes."""

    def telling(op: Op, operands: Sequence[Any], run: Callable[..., Any]) -> Any:
        with product_forms.listening(lambda form: forms.setdefault(form)):
            return of_codes(op, operands, run)

    return telling


def check_params(traced: TracedCall, plan: Plan) -> None:
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
