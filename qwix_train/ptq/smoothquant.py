"""SmoothQuant: outliers of inputs, moved into the weights."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
from jax import core, lax
from jax import numpy as jnp

from qwix_train.core.calibration import calibrate, compute_scale_zero_point
from qwix_train.core.how import HowToQuantize
from qwix_train.core.qarray import (
    dequantize,
    quantize_array,
    quantize_with_scale_zero_point,
)
from qwix_train.files import processes
from qwix_train.planning.rules import QuantizationRule
from qwix_train.ptq.gptq import Gptq
from qwix_train.ptq.input_scaling import InputScaling, input_scale
from qwix_train.ptq.weight_method import Finding, Weight


class SmoothQuant(InputScaling):
    """Divides each input channel, and multiplies the weight, by a smoothing factor.

    The factor of channel ``j`` of the input ``x`` of a weight ``w`` is

        s[j] = max|x[j]|^alpha / max|w[j]|^(1 - alpha)

    where the maxima are over all inputs and all outputs. So a channel with outliers
    does not cost the other channels their precision if activations are quantized with
    one scale. The factor is 1 for channels that are always zero.

    Smoothing does not help every weight. So each matrix gets the best of alpha = 0.1,
    0.2, ... 0.9 and no smoothing: that with the smallest error of its outputs when
    weight and activations are quantized as the rules say. The error is that on 256
    vectors, drawn from all inputs of the matrix. `report` has the strength, both
    errors, and which weights were left as they are.

    References:
      Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for
      Large Language Models", equation 4, https://arxiv.org/abs/2211.10438

    Example:
      >>> import jax
      >>> from flax import linen as nn
      >>> from jax import numpy as jnp
      >>> from qwix_train import QuantizationRule, quantize_model
      >>> from qwix_train.ptq import SmoothQuant
      >>> x = jnp.array([[1., -16.], [-1., 4.]])
      >>> params = {'kernel': jnp.array([[1., -0.5], [0.25, 0.125]])}
      >>> model = nn.Dense(2, use_bias=False)
      >>> rules = [QuantizationRule(weight_qtype='int8', act_qtype='int8')]
      >>> method = SmoothQuant(rules, alpha=0.5)
      >>> out = method.wrap(jax.jit(model.apply))({'params': params}, x)
      >>> quantized_model = quantize_model(model, method.provider)
      >>> abstract = jax.eval_shape(quantized_model.init, jax.random.key(0), x)
      >>> quantized = method.quantize_params(params, abstract['params'])
      >>> quantized['dot_general0_lhs_pre_quant_scale'].tolist()  # 1 / s
      [[1.0, 0.125]]
    """

    title = "SmoothQuant"
    second_moment = False
    rows = 256

    def __init__(
        self,
        rules: Sequence[QuantizationRule],
        *,
        alpha: float | None = None,
        rounding: Gptq | None = None,
    ):
        """Checks the options.

        Args:
          rules: the rules by which the model is to be quantized.
          alpha: the migration strength: how much of the difficulty moves from the
            input to the weight, from 0 to 1. If None, it is chosen for each matrix.
            Otherwise every weight is smoothed with it, and the report says where that
            made the outputs worse.
          rounding: chooses the codes once the inputs are smoothed: `Gptq` with the same
            rules. If None, each element is rounded to nearest.

        Raises:
          ValueError: if `alpha` is out of bounds, or `rounding` has other rules.
        """
        super().__init__(rules, rounding)
        if alpha is not None and not 0 <= alpha <= 1:
            raise ValueError(f"alpha={alpha} must be from 0 to 1.")
        self.alpha = alpha

    def channel_scale(self, weight: Weight) -> tuple[jax.Array, Finding]:
        """See `InputScaling.channel_scale`."""
        (found,) = weight.inputs
        moments = weight.moments
        inputs = jnp.maximum(jnp.abs(moments["min"]), jnp.abs(moments["max"]))
        largest = jnp.max(jnp.abs(weight.matrices()), 1)
        alphas = _ALPHAS if self.alpha is None else (self.alpha,)
        smoothed = [smoothing(inputs, largest, alpha) for alpha in alphas]
        candidates = jnp.stack([jnp.ones_like(inputs), *smoothed])
        how = found.activation
        each = how is not None and found.static is None and bool(how.channelwise_axes)
        errors, total = _errors(
            weight,
            jax.vmap(lambda factors: input_scale(factors, found))(candidates),
            activation=how,
            per_row=each,
            layers=math.prod(found.layers),
        )
        # If all are equal, this is the first: no smoothing.
        best = jnp.argmin(errors, 0)
        if self.alpha is not None:
            best = jnp.ones_like(best)
        factors = jnp.take_along_axis(candidates, best[None, :, None], 0)[0]
        after = jnp.take_along_axis(errors, best[None], 0)[0].sum()
        total = jnp.where(total.sum() > 0, total.sum(), 1)
        before, after = errors[0].sum() / total, after / total
        return factors, self._said(best, alphas, (before, after))

    def _said(self, best, alphas, errors) -> Finding:
        """What the report says."""
        if isinstance(best, core.Tracer):
            return Finding(errors=errors)
        best = processes.whole(best)
        if not best.any():
            reason = "no smoothing makes its outputs better"
            return Finding(errors=errors, reason=reason)
        chosen = [alphas[i - 1] for i in best if i]
        low, high = f"{min(chosen):.2g}", f"{max(chosen):.2g}"
        note = f"alpha={low}" + (f" to {high}" if high != low else "")
        if (left := int((best == 0).sum())) > 0:
            note += f"; {left} of {best.size} matrices are left as they are"
        if errors[1] > errors[0]:
            note += "; it makes the outputs worse"
        return Finding(note, errors)


_ALPHAS = tuple(i / 10 for i in range(1, 10))


@functools.partial(jax.jit, static_argnames=("activation", "per_row", "layers"))
def _errors(
    weight: Weight,
    scales: jax.Array,
    activation: HowToQuantize | None,
    per_row: bool,
    layers: int,
) -> tuple[jax.Array, jax.Array]:
    """The squared errors of outputs, for each of several scales of the input.

    Args:
      weight: the weight.
      scales: what the input is multiplied by, shape (candidates, matrices, channels).
      activation: how the input is quantized; None if it is not.
      per_row: whether each vector has a scale of its own.
      layers: the number of layers, each of which has an input of its own.

    Returns:
      The errors, shape (candidates, matrices); and the squares of the outputs.
    """
    moments = weight.moments
    rows = moments["rows"] * (moments["priority"] >= 0)[..., None]

    def outputs(rows, matrices):
        return jnp.einsum(
            "mnc,mrc->mnr", rows, matrices, precision=lax.Precision.HIGHEST
        )

    def rounded_rows(scale):
        x = rows * scale[:, None]
        if activation is None:
            return x
        if per_row:
            tile = next(iter(activation.tiled_axes.values()), None)
            each = dataclasses.replace(
                activation,
                channelwise_axes=(0, 1),
                tiled_axes={} if tile is None else {2: tile},
                pad_tiles=True,
            )
            return dequantize(quantize_array(x, each))
        low, high = (moments[name] * scale for name in ("min", "max"))
        low, high = low.reshape(layers, -1).min(-1), high.reshape(layers, -1).max(-1)
        whole = dataclasses.replace(activation, channelwise_axes=(), tiled_axes={})
        found = jax.vmap(lambda ends: calibrate(ends, whole), 1)(jnp.stack([low, high]))
        spread = functools.partial(
            jax.tree.map, lambda end: jnp.repeat(end[..., None], len(x) // layers, 0)
        )
        scales = spread(compute_scale_zero_point(found, whole.qtype))
        return dequantize(quantize_with_scale_zero_point(x, whole.qtype, *scales))

    exact = outputs(rows, weight.matrices())

    def error(scale):
        scale = scale.astype(jnp.float32)
        array = quantize_array(weight.divided(scale), weight.how)
        found = outputs(rounded_rows(scale), weight.matrices(array))
        return jnp.square(found - exact).sum((1, 2))

    return lax.map(error, scales), jnp.square(exact).sum((1, 2))


def smoothing(inputs: jax.Array, weights: jax.Array, alpha: float) -> jax.Array:
    """The smoothing factor ``inputs^alpha / weights^(1 - alpha)``.

    Args:
      inputs: the largest magnitude of each input channel, any shape.
      weights: that of the weights of each channel, in the same shape.
      alpha: the migration strength.

    Returns:
      The factors; 1 where either is 0.

    >>> smoothing(jnp.array([4., 0.]), jnp.array([0.25, 1.]), 0.5).tolist()
    [4.0, 1.0]
    """
    known = (inputs > 0) & (weights > 0)
    inputs, weights = (jnp.where(known, x, 1) for x in (inputs, weights))
    return inputs**alpha / weights ** (1 - alpha)
