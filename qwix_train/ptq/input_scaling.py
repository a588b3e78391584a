"""Methods that scale the input channels of a weight before it is rounded."""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from qwix_train.core.calibration import calibrate
from qwix_train.core.how import HowToQuantize, parse_calibration_method
from qwix_train.core.qarray import QArray
from qwix_train.ops.vectors import Channels
from qwix_train.planning.rules import QuantizationRule
from qwix_train.ptq.gptq import Gptq
from qwix_train.ptq.input_statistics import WeightInput
from qwix_train.ptq.weight_method import (
    Finding,
    QuantizedWeight,
    Scale,
    Weight,
    WeightMethod,
)
from qwix_train.values import stored


class InputScaling(WeightMethod):
    """A method that multiplies the input of a weight by ``p``, and divides the weight.

    The products stay the same, ``x @ w = (x * p) @ (w / p)``, but the numbers that
    are rounded differ. See `pre_quant_scale` for where ``p`` is kept.
    """

    scales_inputs = True

    def __init__(self, rules: Sequence[QuantizationRule], rounding: Gptq | None):
        """Checks the options.

        Args:
          rules: the rules by which the model is to be quantized.
          rounding: chooses the codes once the scales are found; None to round to
            nearest. It collects nothing itself, and keeps the scales of tiles.

        Raises:
          TypeError: if `rounding` is not a `Gptq`.
          ValueError: if `rounding` has other rules.
        """
        if rounding is not None:
            if not isinstance(rounding, Gptq):
                raise TypeError(
                    f"{self.title}: rounding={rounding!r} is not a ptq.Gptq. Give "
                    "ptq.Gptq(rules), or leave it out to round to nearest."
                )
            self.second_moment: bool = True
            self.title: str = f"{self.title} and {rounding.title}"
        super().__init__(rules)
        if rounding is not None and rounding.rules != self.rules:
            raise ValueError(
                f"{self.title}: rounding has other rules, {list(rounding.rules)}. Give "
                f"it the same: {list(self.rules)}."
            )
        self.rounding = rounding

    def obstacle(self, weight: Weight) -> str:
        """See `WeightMethod.obstacle`: other ops would read the scaled weight."""
        found, *others = weight.inputs
        if others:
            return "several ops read it, and would read it scaled"
        if found.channels.unscaled:
            return found.channels.unscaled
        if found.layers and not weight.view.layers:
            return "all layers that are scanned over read it"
        return ""

    @abc.abstractmethod
    def channel_scale(self, weight: Weight) -> tuple[jax.Array, Finding]:
        """What each channel of a weight is multiplied by, and what the report says.

        Returns:
          A positive number for each channel, shape (matrices, channels), float32; and
          the finding.
        """

    def rounded(self, scaled: jax.Array, weight: Weight, scale: jax.Array) -> QArray:
        """The codes of a scaled weight.

        Args:
          scaled: the param, divided by `scale`.
          weight: the weight as it was.
          scale: the scale of the input, shape (matrices, channels).
        """
        del scale
        array = stored.quantize_param(scaled, weight.how).array
        assert isinstance(array, QArray)
        return array

    def quantize_weight(self, weight: Weight) -> QuantizedWeight:
        """See `WeightMethod.quantize_weight`.

        Raises:
          ValueError: if the range of the scaled input cannot be told from what was
            collected; or see `Gptq.codes_on`.
        """
        (found,) = weight.inputs
        factors, said = self.channel_scale(weight)
        scale = input_scale(factors, found)
        ranges = None
        if found.static is not None:
            ranges = scaled_range(found, weight, scale)
        kept = Scale(scale, stored_scale(found, scale), ranges)
        array = self.rounded(weight.divided(scale), weight, scale)
        if self.rounding is not None:
            array = self.rounding.codes_on(weight.scaled(scale), array)
            # The method measured errors of weights that are rounded to nearest.
            notes = filter(None, (said.note, said.reason))
            said = Finding(
                "; ".join(f"before {self.rounding.title}: {note}" for note in notes)
            )
        return QuantizedWeight(array, said, kept)


def input_scale(factors: jax.Array, found: WeightInput) -> jax.Array:
    """What an input is multiplied by, from what its weight is multiplied by.

    It is rounded to the dtype in which the model will read it, before the weight is
    divided by it.
    """
    return (1 / factors).astype(found.dtype)


def stored_scale(found: WeightInput, scale: jax.Array) -> jax.Array:
    """The scale of an input, in the shape in which it is stored.

    Args:
      found: the input.
      scale: shape (matrices, channels).

    Returns:
      The scale with the axes of layers, and then those of the input, of size 1 where
      the scale is the same for every entry. If there is an axis along which the model
      stacks its layers, the axis of layers is moved there.
    """
    assert isinstance(found.channels, Channels)
    axes = *found.channels.groups, *found.channels.contracting
    rest = [axis for axis in range(len(found.shape)) if axis not in axes]
    sizes = *(found.shape[axis] for axis in axes), *(1 for _ in rest)
    scale = scale.reshape(*found.layers, *sizes)
    order = np.argsort((*axes, *rest)) + len(found.layers)
    scale = scale.transpose((*range(len(found.layers)), *order))
    scale = jnp.broadcast_to(scale, (*found.layers, *found.scaled_shape))
    return jnp.moveaxis(scale, 0, found.layer_axis) if found.layer_axis else scale


def scaled_range(
    found: WeightInput, weight: Weight, scale: jax.Array
) -> dict[str, jax.Array]:
    """The statistics of the range that a scaled input had over all batches.

    Args:
      found: the input.
      weight: the weight that it meets.
      scale: what it is multiplied by, shape (matrices, channels).

    Returns:
      What `quantize_params` takes as `quant_stats`.

    Raises:
      ValueError: if the range is not one of smallest and largest values.
    """
    how = found.static
    assert how is not None
    _check_range(found, how)
    scale = scale.astype(jnp.float32)
    layers = (*found.layers, -1)
    low = (weight.moments["min"] * scale).reshape(layers).min(-1)
    high = (weight.moments["max"] * scale).reshape(layers).max(-1)
    ends = jnp.stack([low, high]).reshape(2, math.prod(found.layers))
    ends = ends.astype(found.dtype)
    calibration: dict[str, Any] = jax.vmap(lambda x: calibrate(x, how), 1)(ends)
    shape = (*found.layers, *(1 for _ in found.shape))
    return {
        "count": jnp.ones(found.layers, jnp.int32),
        **{f"sum_of_{key}": end.reshape(shape) for key, end in calibration.items()},
    }


def _check_range(found: WeightInput, how: HowToQuantize) -> None:
    if how.tiled_axes or how.channelwise_axes:
        raise ValueError(
            f"The input {found.name!r} is scaled, and has more than one static range: "
            "leave tile_size and act_channelwise_axes out of its rule."
        )
    method = found.observer or how.calibration_method
    name = method.split(",")[0].strip().lower() if isinstance(method, str) else method
    if name in ("absmax", "minmax") and (
        found.observer is None
        or parse_calibration_method(method)
        == parse_calibration_method(how.calibration_method)
    ):
        return
    raise ValueError(
        f"The input {found.name!r} is scaled, and its range measured by {method!r} is "
        "not known: from the smallest and the largest value of each channel follow "
        "those of the scaled input, which act_calibration_method='absmax' and 'minmax' "
        "take. Set one of these, and no other act_observer."
    )
