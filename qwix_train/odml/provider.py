"""Training for LiteRT: every tensor of a model fake-quantized."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from qwix_train.calib.observe import Tagging
from qwix_train.core.calibration import calibrate
from qwix_train.core.fake_quant import fake_quant
from qwix_train.core.grid import Grid
from qwix_train.core.how import needs_zero_point
from qwix_train.core.numerics import is_int16
from qwix_train.odml import integer_grid
from qwix_train.odml.evaluate import Quantizer, run_plan
from qwix_train.odml.plan import NodePlan, OdmlPlan, TensorPlan, activation_qtype
from qwix_train.odml.planner import make_odml_plan
from qwix_train.planning import static_range
from qwix_train.planning.provider import QuantizationProvider
from qwix_train.planning.rules import QuantizationRule
from qwix_train.planning.running_ranges import RunningRanges
from qwix_train.qat.qt_rule import refuse_backward
from qwix_train.trace.function import TracedCall

_WEIGHT_TYPES = ("int8", "int4")
_ACTIVATION_TYPES = ("int8", "int16")


class OdmlQatProvider(QuantizationProvider):
    """Fake-quantizes every tensor of a model, as LiteRT will quantize it.

    The forward computes what the `.tflite` file of `odml.convert` will, in integers
    throughout
    (https://ai.google.dev/edge/litert/conversion/tensorflow/quantization/quantization_spec):

    * Activations are asymmetric int8 with one scale each. They are quantized at the
      output of the operation that computes them.
    * Weights are symmetric int8 or int4, with a scale for each output channel.
    * Operations that LiteRT runs as one, such as a convolution with its bias, batch
      normalization and ReLU, have no quantization in between.
    * Operations that only move elements share the range of their input.

    `odml.table()` says what becomes of every operation.

    A rule's `act_qtype` is the type of the results of the operations that it matches.
    With `act_static_scale=False` only products are quantized, with the ranges that
    their activations have when the model runs. Without `act_qtype` only weights are
    quantized. Ranges are `minmax` and static, unless a rule says otherwise.

    `quantize_model` and `quantize_fn` take this provider. So do `wrap_train_step`,
    `wrap_eval_step`, `attach`, `calib.Calibrator` and `calib.observe`, instead of
    rules.

    Loops (`scan`) are unrolled, and the values of a `jax.checkpoint` are kept, not
    computed again. Batch normalization in training uses the statistics of the batch.
    With `disable_per_channel_weights`, the weights are quantized with these folded in
    (arXiv 1806.08342, section 3.2.2). With a scale for each channel, that makes no
    difference.

    Example:
      >>> from qwix_train import OdmlQatProvider, QuantizationRule
      >>> rules = [QuantizationRule(weight_qtype="int8", act_qtype="int8")]
      >>> provider = OdmlQatProvider(rules, fixed_range_for_inputs=(0, 1))
    """

    takes_static_ranges = True
    collects_by_default = True

    def __init__(
        self,
        rules: Sequence[QuantizationRule],
        *,
        disable_per_channel_weights: bool = False,
        fixed_range_for_inputs: tuple[float, float] | None = None,
        fixed_range_for_outputs: tuple[float, float] | None = None,
        strict: bool = True,
        quant_stats: Mapping[str, Any] | None = None,
        allow_unmatched: bool = False,
    ):
        """Checks the rules.

        Args:
          rules: the rules, in order of precedence.
          disable_per_channel_weights: whether a weight has one scale.
          fixed_range_for_inputs: the range of the inputs of the model, such as
            `(0, 1)`; measured if None.
          fixed_range_for_outputs: the range of its outputs; measured if None.
          strict: whether an operation that a rule matches, and that LiteRT has no
            integer form of, is an error. It stays in float otherwise, with a warning.
          quant_stats: the ranges of activations, such as those of a
            `calib.Calibrator`; they stay as they are while training. If None, they are
            kept where `QtProvider` keeps them.
          allow_unmatched: see `QuantizationProvider`.

        Raises:
          ValueError: if LiteRT has no such type or range.
        """
        super().__init__(rules, allow_unmatched=allow_unmatched)
        refuse_backward(self.rules, type(self).__name__)
        for index, rule in enumerate(self.rules):
            _check_rule(index, rule)
        for name, fixed in (
            ("fixed_range_for_inputs", fixed_range_for_inputs),
            ("fixed_range_for_outputs", fixed_range_for_outputs),
        ):
            _check_range(name, fixed)
        self.disable_per_channel_weights = disable_per_channel_weights
        self.fixed_range_for_inputs = fixed_range_for_inputs
        self.fixed_range_for_outputs = fixed_range_for_outputs
        self.strict = strict
        self.quant_stats = quant_stats
        self.keeps_quant_stats: bool = quant_stats is None and any(
            map(_static, self.rules)
        )
        # Those that a call may update, of the provider that runs it.
        self._ranges: RunningRanges | None = None

    def plan(self, traced: TracedCall) -> OdmlPlan:
        """What happens to every operation and tensor of a traced call."""
        return make_odml_plan(
            traced,
            self.rules,
            fixed_range_for_inputs=self.fixed_range_for_inputs,
            fixed_range_for_outputs=self.fixed_range_for_outputs,
            per_tensor_weights=self.disable_per_channel_weights,
        )

    def transform(self, traced: TracedCall, plan: OdmlPlan) -> Any:  # type: ignore[override]
        """The result of a traced call, with fake quantization as planned."""
        _check_derivatives(plan)
        return traced.rebuild(self.outputs(plan, traced.inputs))

    def outputs(self, plan: OdmlPlan, values: Sequence[Any]) -> list[Any]:
        """The results of a planned graph, with fake quantization.

        Args:
          plan: the plan.
          values: an array for each input of the traced call.
        """
        ranges = self._ranges
        if ranges is None:
            known = calibrations_in(plan, self.quant_stats or {})
            quantizer = _FakeQuantizer(lambda tensor, _: known[tensor.name])
            return run_plan(plan, values, quantizer)
        states = {t.name: ranges.state(t.path) for t in plan.measured}

        def calibration_of(tensor, observed):
            state = states[tensor.name]
            paths = (tensor.path,)
            return ranges.calibration(paths, tensor.statistics, observed, state)

        return run_plan(plan, values, _FakeQuantizer(calibration_of))

    def tagging(self) -> Tagging:
        """See `QuantizationProvider.tagging`."""
        if not any(map(_static, self.rules)):
            raise ValueError(
                "No rule quantizes activations with static ranges, so there is none to "
                "collect."
            )
        return _Tagging(self)

    def with_ranges(self, ranges: Mapping[str, Any] | RunningRanges) -> OdmlQatProvider:
        """See `QuantizationProvider.with_ranges`."""
        changed = copy.copy(self)
        changed.keeps_quant_stats = False
        if isinstance(ranges, RunningRanges):
            changed._ranges = ranges
        else:
            changed.quant_stats = ranges
        return changed


class _Tagging(Tagging):
    """Tags the tensors of a model that stays in float."""

    collects_by_default = True

    def __init__(self, provider: OdmlQatProvider):
        super().__init__(provider.rules)
        self.provider = provider
        self.strict, self.told = provider.strict, provider.told

    def plan(self, traced: TracedCall) -> OdmlPlan:
        return self.provider.plan(traced)

    def transform(self, traced: TracedCall, plan: OdmlPlan) -> Any:  # type: ignore[override]
        return traced.rebuild(run_plan(plan, traced.inputs, _Tagger(self)))


class _Tagger(Quantizer):
    """Tags what has a range that is to be measured, and leaves all as it is."""

    def __init__(self, tagging: _Tagging):
        self.tagging = tagging

    def tensor(self, plan: TensorPlan, x: Any, observed: Any) -> Any:
        if not plan.measured:
            return x
        tagged = self.tagging.tag(plan.path, plan.statistics, observed, ())
        if observed is x:
            return tagged
        return lax.optimization_barrier((x, tagged))[0]


class _FakeQuantizer(Quantizer):
    """Fake-quantizes what it is given."""

    folds = True

    def __init__(self, calibration_of: Callable[[TensorPlan, Any], Any]):
        # Gives the range of a tensor that has to be measured, from what is observed.
        self.calibration_of = calibration_of
        # The range of each tensor, once it is known.
        self.ranges: dict[int, Any] = {}

    def tensor(self, plan: TensorPlan, x: Any, observed: Any) -> Any:
        if plan.measured:
            self.ranges[id(plan)] = self.calibration_of(plan, observed)
        return self.rounded(plan, x, plan.rounding)

    def rounded(self, plan: TensorPlan, x: Any, rounding: str) -> Any:
        grid = tensor_grid(plan, self.ranges.get(id(plan)))
        return integer_grid.on_grid(x, grid, rounding)

    def operand(self, plan: NodePlan, side: int, x: Any) -> Any:
        if side == plan.weight and plan.weight_how is not None:
            return integer_grid.on_grid(x, integer_grid.of_weight(x, plan.weight_how))
        how = plan.activations[side] if plan.dynamic else None
        if how is not None:
            return fake_quant(x, how)
        grid = integer_grid.of_constant(jnp.asarray(x), plan.act_qtype)
        return integer_grid.on_grid(jnp.asarray(x), grid)


def tensor_grid(tensor: TensorPlan, calibration: Any = None) -> Grid:
    """The grid of a tensor, with one scale.

    Args:
      tensor: what happens to the tensor.
      calibration: its range, if that is measured.
    """
    if tensor.scale is not None:
        if tensor.qtype == "int16":
            return Grid(np.float32(2**-15), np.int32(0), "int16")
        return Grid(np.float32(tensor.scale), np.int32(tensor.zero_point or 0))
    if calibration is None:
        calibration = calibrate(jnp.zeros(1), tensor.how)
    return integer_grid.scalar(integer_grid.of_calibration(calibration, tensor.qtype))


def calibrations_in(
    plan: OdmlPlan, quant_stats: Mapping[str, Any]
) -> dict[str, dict[str, jax.Array]]:
    """The ranges that a plan asks for, of those that were collected, by name.

    Args:
      plan: the plan.
      quant_stats: the statistics.

    Raises:
      ValueError: if one is missing, or empty.
    """
    return {
        tensor.name: static_range.calibration_of(tensor.path, quant_stats)
        for tensor in plan.measured
    }


def _static(rule: QuantizationRule) -> bool:
    return rule.act_qtype is not None and rule.act_static_scale is not False


def _check_derivatives(plan: OdmlPlan) -> None:
    for node in plan.nodes:
        source = node.node.place.derivative
        if source is not None and (node.in_integers or node.weight is not None):
            raise ValueError(
                f"{node.where} is part of {source}, a function with a derivative rule "
                "of its own (custom_jvp or custom_vjp), which would be lost: its "
                "operations are quantized one by one. Leave it in float with a rule "
                "that sets no weight_qtype, or write it without the rule."
            )


def _check_range(name: str, fixed: Any) -> None:
    if fixed is None:
        return
    if not isinstance(fixed, Sequence) or len(fixed) != 2:
        raise ValueError(f"{name}={fixed!r} must be a pair of numbers, such as (0, 1).")
    low, high = fixed
    if not low <= 0 <= high or low == high:
        raise ValueError(
            f"{name}={fixed!r} must go from 0 or less to 0 or more, such as (0, 1)."
        )


def _check_rule(index: int, rule: QuantizationRule) -> None:
    def error(field: str, reason: str) -> ValueError:
        return ValueError(f"Rule {index} ({field}={getattr(rule, field)!r}): {reason}.")

    if rule.weight_qtype is None:
        return
    if rule.weight_qtype not in _WEIGHT_TYPES:
        raise error("weight_qtype", f"LiteRT has {' and '.join(_WEIGHT_TYPES)} weights")
    if rule.act_qtype is not None and activation_qtype(rule) not in _ACTIVATION_TYPES:
        types = " and ".join(_ACTIVATION_TYPES)
        raise error("act_qtype", f"LiteRT has {types} activations")
    if is_int16(rule.act_qtype) and rule.act_static_scale is False:
        raise error(
            "act_qtype", "what LiteRT quantizes when it runs has 8 bits: choose 'int8'"
        )
    for field in ("tile_size", "act_tile_size"):
        if getattr(rule, field) is not None:
            raise error(
                field, "LiteRT has a scale for each channel, and no tiles: leave it out"
            )
    if rule.rotation is not None:
        raise error(
            "rotation", "LiteRT quantizes tensors in their own basis: leave it out"
        )
    if rule.act_axis_names:
        raise error("act_axis_names", "LiteRT's models run on one device: leave it out")
    if rule.disable_channelwise_axes:
        reason = "give the provider disable_per_channel_weights=True"
        raise error("disable_channelwise_axes", reason)
    if rule.learns_scales:
        field = "act" if rule.learned_act_method else "weight"
        raise error(
            f"{field}_calibration_method",
            "LiteRT's tensors are not an op's operands, and have no learned scales. "
            "Train with QtProvider, and give this provider rules of another method and "
            "the ranges that were learned: qwix_train.ranges(params, rules). The "
            "scale of a weight is that of its largest magnitude there",
        )
    if needs_zero_point(rule.weight_calibration_method):
        raise error(
            "weight_calibration_method",
            "weights of LiteRT are symmetric: choose 'absmax'",
        )
    if rule.act_channelwise_axes:
        raise error(
            "act_channelwise_axes", "a tensor of LiteRT has one scale: leave it out"
        )
