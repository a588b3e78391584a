"""A weight with what is known of its inputs, and what a method makes of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
from jax import numpy as jnp

from qwix_train.core.how import HowToQuantize
from qwix_train.core.qarray import QArray, dequantize
from qwix_train.ptq.input_statistics import WeightInput
from qwix_train.ptq.weight_matrices import MatrixView


@dataclasses.dataclass(frozen=True)
class Weight:
    """A weight, with all that a method may look at.

    Attributes:
      param: the stored param, a float array.
      how: how it is to be quantized.
      view: how it is read as matrices, of shape (matrices, rows, channels).
      inputs: the inputs of the products that read it.
      moments: the statistics of all that enters them: ``absmean``, ``min`` and
        ``max``, shape (matrices, channels), and ``second_moment``, shape (matrices,
        channels, channels), if the method collects that.
    """

    param: jax.Array
    how: HowToQuantize
    view: MatrixView
    inputs: tuple[WeightInput, ...]
    moments: Mapping[str, jax.Array]

    @property
    def name(self) -> str:
        """The ops that read it."""
        return ", ".join(found.name for found in self.inputs)


@dataclasses.dataclass(frozen=True)
class Scale:
    """What the input of a weight is multiplied by.

    Attributes:
      channels: the scale, shape (matrices, channels).
      stored: the same, as it is kept among the params (see `pre_quant_scale`).
      range: the statistics of the range of the scaled input, if that is static.
    """

    channels: jax.Array
    stored: jax.Array
    range: dict[str, jax.Array] | None = None


@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
    """What a method makes of a weight.

    Attributes:
      array: its codes and scales.
      scale: what its input is multiplied by, if it is.
      note: what the report says of it.
      errors: the errors of the outputs, as a share of their square, of rounding to
        nearest and of this; None for those of the weight alone.
      reason: why the weight was left as it is; empty if it was not.
    """

    array: QArray
    scale: Scale | None = None
    note: str = ""
    errors: tuple[jax.Array, jax.Array] | None = None
    reason: str = ""


def output_error(
    weight: Weight, array: QArray, scale: jax.Array | None = None
) -> jax.Array:
    """The squared error of the outputs, as a share of their square.

    With the error ``E`` of the weight and the second moment ``M`` of the input, summed
    over matrices, ``trace(E M E^T) / trace(W M W^T)``.

    Args:
      weight: the weight.
      array: what it was quantized to.
      scale: what its input is multiplied by, shape (matrices, channels), or None.
    """
    matrices = weight.view.to_matrices(weight.param).astype(jnp.float32)
    approximate = weight.view.to_matrices(dequantize(array)).astype(jnp.float32)
    if scale is not None:
        approximate *= scale.astype(jnp.float32)[:, None]
    moment = weight.moments["second_moment"]
    total = squared_outputs(matrices, moment).sum()
    return squared_outputs(matrices - approximate, moment).sum() / total


@jax.jit
def squared_outputs(matrices: jax.Array, second_moment: jax.Array) -> jax.Array:
    """The mean square of the outputs, ``trace(W M W^T)``, of each matrix.

    Args:
      matrices: ``W``, shape (matrices, rows, channels).
      second_moment: ``M``, shape (matrices, channels, channels).
    """
    product = jnp.matmul(matrices, second_moment, precision=jax.lax.Precision.HIGHEST)
    return jnp.sum(product * matrices, (1, 2))
