"""GPTQ as `qwix.contrib.gptq` has it; see `qwix_train.ptq.Gptq`."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp

from qwix_train.like_qwix.contrib import calibration
from qwix_train.like_qwix.rules import QuantizationRule
from qwix_train.ptq.gptq import Gptq

_SUFFIX = "_gptq"


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class GptqRule(QuantizationRule):
    """A rule for weights that are quantized by GPTQ."""


class GptqCalibrationProvider(calibration.SinglePassCalibrationProvider):
    """Collects the Hessian of the squared error of each weight's outputs."""

    def get_rule_type(self) -> type[QuantizationRule]:
        """See `CalibrationProvider.get_rule_type`."""
        return GptqRule

    def get_stats_suffix(self) -> str:
        """See `CalibrationProvider.get_stats_suffix`."""
        return _SUFFIX

    def compute_stats(self, lhs: jax.Array) -> dict[str, Any]:
        """See `SinglePassCalibrationProvider.compute_stats`."""
        lhs = lhs.astype(jnp.float32)
        product = jnp.matmul(lhs, lhs.T, precision=lax.Precision.HIGHEST)
        return {"hessian": 2 / lhs.shape[1] * product}


def quantize_params(
    params: Any,
    abstract_quantized_params: Any,
    gptq_quant_stats: Any,
    *,
    allow_extra_params: bool = False,
    gptq_block_size: int = 128,
    gptq_damping_factor: float = 0.01,
) -> Any:
    """Quantizes weights by GPTQ, and those that it has no statistics of by rounding.

    Args:
      params: see `qwix_train.quantize_params`.
      abstract_quantized_params: see there.
      gptq_quant_stats: what a `GptqCalibrationProvider` collected.
      allow_extra_params: see there.
      gptq_block_size: see `qwix_train.ptq.Gptq`.
      gptq_damping_factor: the `damping` of that.
    """
    method = Gptq([], damping=gptq_damping_factor, block_size=gptq_block_size)

    def quantized(found: calibration.CalibratedQuantContext) -> Any:
        hessian = found.calibration_stats["hessian"]
        weight = found.with_moments(second_moment=hessian / 2)
        return method.quantize_weight(weight).array

    return calibration.quantize_params_with_calibration(
        params,
        abstract_quantized_params,
        gptq_quant_stats,
        _SUFFIX,
        quantized,
        allow_extra_params=allow_extra_params,
    )
