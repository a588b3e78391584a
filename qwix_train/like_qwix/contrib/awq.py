"""AWQ as `qwix.contrib.awq` has it; see `qwix_train.ptq.Awq`."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
from jax import lax
from jax import numpy as jnp

from qwix_train.like_qwix.contrib import calibration
from qwix_train.like_qwix.contrib.input_scaling import Quantizer, ScaledInputs
from qwix_train.like_qwix.rules import QuantizationRule
from qwix_train.ptq.awq import Awq

_SUFFIX = "_awq"


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class AwqRule(QuantizationRule):
    """A rule for weights that are quantized by AWQ.

    Attributes:
      n_grid: has no effect, as in `qwix`: that of `quantize_params` counts.
    """

    scales_inputs: ClassVar[bool] = True
    n_grid: int = 20


class AwqCalibrationProvider(calibration.SinglePassCalibrationProvider):
    """Collects the mean magnitude of each channel, and the second moment of all."""

    def get_rule_type(self) -> type[QuantizationRule]:
        """See `CalibrationProvider.get_rule_type`."""
        return AwqRule

    def get_stats_suffix(self) -> str:
        """See `CalibrationProvider.get_stats_suffix`."""
        return _SUFFIX

    def compute_stats(self, lhs: jax.Array) -> dict[str, Any]:
        """See `SinglePassCalibrationProvider.compute_stats`."""
        lhs = lhs.astype(jnp.float32)
        product = jnp.matmul(lhs, lhs.T, precision=lax.Precision.HIGHEST)
        return {
            "act_scale": jnp.abs(lhs).mean(1),
            "second_moment": product / lhs.shape[1],
        }


class AwqInferenceProvider(ScaledInputs):
    """A `PtqProvider`; it applies the scales that are among its params."""


def quantize_params(
    params: Any,
    abstract_quantized_params: Any,
    awq_quant_stats: Any,
    *,
    allow_extra_params: bool = False,
    n_grid: int = 20,
) -> Any:
    """Quantizes weights by AWQ, and those that it has no statistics of by rounding.

    Args:
      params: see `qwix_train.quantize_params`.
      abstract_quantized_params: see there. The rules of the model have to have the
        `AwqRule`s.
      awq_quant_stats: what an `AwqCalibrationProvider` collected.
      allow_extra_params: see there.
      n_grid: how many exponents are tried.

    Returns:
      The quantized params, with scales of inputs as leaves beside the weights.
    """
    quantizer = Quantizer(Awq([], grid_size=n_grid))

    def quantized(found: calibration.CalibratedQuantContext) -> Any:
        stats = found.calibration_stats
        moments = {
            "absmean": stats["act_scale"],
            "second_moment": stats["second_moment"],
        }
        factors, _ = quantizer.method.channel_scale(found.with_moments(**moments))
        return quantizer.scaled(found, factors, **moments)

    return calibration.quantize_params_with_calibration(
        params,
        abstract_quantized_params,
        awq_quant_stats,
        _SUFFIX,
        quantized,
        allow_extra_params=allow_extra_params,
        leaves_beside=quantizer.beside,
    )
