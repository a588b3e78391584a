"""SmoothQuant as `qwix.contrib.smooth_quant` has it; see `ptq.SmoothQuant`."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
from jax import numpy as jnp

from qwix_train.like_qwix.contrib import calibration
from qwix_train.like_qwix.contrib.input_scaling import Quantizer, ScaledInputs
from qwix_train.like_qwix.rules import QuantizationRule
from qwix_train.planning import rules
from qwix_train.ptq.smoothquant import SmoothQuant, smoothing

_SUFFIX = "_sq"


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class SqRule(QuantizationRule):
    """A rule for weights that are quantized by SmoothQuant.

    Attributes:
      alpha: how much of the difficulty moves from the input to the weight.
    """

    scales_inputs: ClassVar[bool] = True
    alpha: float = 0.5


class SqCalibrationProvider(calibration.CalibrationProvider):
    """Collects the smoothing factor of each channel, the mean of those of batches."""

    def get_rule_type(self) -> type[rules.QuantizationRule]:
        """See `CalibrationProvider.get_rule_type`."""
        return SqRule

    def get_stats_suffix(self) -> str:
        """See `CalibrationProvider.get_stats_suffix`."""
        return _SUFFIX

    def stats_of(
        self, lhs: jax.Array, weight: jax.Array, rule: rules.QuantizationRule
    ) -> dict[str, jax.Array]:
        """See `CalibrationProvider.stats_of`.

        Raises:
          ValueError: if the rule quantizes no activations, or the weight has more axes
            than its input and its output.
        """
        assert isinstance(rule, SqRule)
        if rule.act_qtype is None:
            raise ValueError(f"{rule}: SmoothQuant needs an act_qtype.")
        if weight.ndim != 2 or weight.shape[0] != lhs.shape[0]:
            raise ValueError(
                f"{rule}: a weight of shape {weight.shape} is not a matrix of its "
                f"{lhs.shape[0]} inputs and its outputs. Use qwix_train.ptq."
                "SmoothQuant, which takes any."
            )
        largest = jnp.abs(weight.astype(jnp.float32)).max(1)
        inputs = jnp.abs(lhs.astype(jnp.float32)).max(1)
        factors = smoothing(inputs, largest, rule.alpha)
        return {"sq_scale": factors, "inv_sq_scale": 1 / factors}


class SqInferenceProvider(ScaledInputs):
    """A `PtqProvider`; it applies the scales that are among its params."""


def quantize_params(
    params: Any,
    abstract_quantized_params: Any,
    sq_quant_stats: Any,
    *,
    allow_extra_params: bool = False,
) -> Any:
    """Quantizes smoothed weights, and those without statistics as they are.

    Args:
      params: see `qwix_train.quantize_params`.
      abstract_quantized_params: see there. The rules of the model have to have the
        `SqRule`s.
      sq_quant_stats: what a `SqCalibrationProvider` collected.
      allow_extra_params: see there.

    Returns:
      The quantized params, with scales of inputs as leaves beside the weights.
    """
    quantizer = Quantizer(SmoothQuant([]))

    def quantized(found: calibration.CalibratedQuantContext) -> Any:
        return quantizer.scaled(found, found.calibration_stats["sq_scale"])

    return calibration.quantize_params_with_calibration(
        params,
        abstract_quantized_params,
        sq_quant_stats,
        _SUFFIX,
        quantized,
        allow_extra_params=allow_extra_params,
        leaves_beside=quantizer.beside,
    )
