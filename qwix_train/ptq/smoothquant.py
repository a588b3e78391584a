"""SmoothQuant: outliers of inputs, moved into the weights."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax import numpy as jnp

from qwix_train.ptq.calibrated_weight import Weight
from qwix_train.ptq.input_scaling import InputScaling
from qwix_train.rules import QuantizationRule


class SmoothQuant(InputScaling):
    """Divides each input channel, and multiplies the weight, by a smoothing factor.

    For channel ``j`` of the input ``x`` of a weight ``w`` that is

        s[j] = max|x[j]|^alpha / max|w[j]|^(1 - alpha)

    over all inputs and all outputs, so that a channel with outliers does not cost all
    others their precision where activations are quantized with one scale. It is 1 for
    channels that are zero throughout.

    References:
      Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for
      Large Language Models", equation 4, https://arxiv.org/abs/2211.10438

    Example:
      >>> from flax import linen as nn
      >>> from qwix_train import quantize_model
      >>> x = jnp.array([[1., -16.], [-1., 4.]])
      >>> params = {'kernel': jnp.array([[1., -0.5], [0.25, 0.125]])}
      >>> model = nn.Dense(2, use_bias=False)
      >>> rules = [QuantizationRule(weight_qtype='int8', act_qtype='int8')]
      >>> method = SmoothQuant(rules)
      >>> out = method.wrap(jax.jit(model.apply))({'params': params}, x)
      >>> quantized_model = quantize_model(model, method.provider)
      >>> abstract = jax.eval_shape(quantized_model.init, jax.random.key(0), x)
      >>> quantized = method.quantize_params(params, abstract['params'])
      >>> quantized['dot_general0_lhs_pre_quant_scale'].tolist()  # 1 / s
      [[1.0, 0.125]]
    """

    title = "SmoothQuant"
    second_moment = False

    def __init__(self, rules: Sequence[QuantizationRule], *, alpha: float = 0.5):
        """Checks the options.

        Args:
          rules: the rules, those that the model is to be quantized by.
          alpha: the migration strength: how much of the difficulty moves from the
            input to the weight, from 0 to 1.

        Raises:
          ValueError: if `alpha` is out of bounds.
        """
        super().__init__(rules)
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha={alpha} must be from 0 to 1.")
        self.alpha = alpha

    def channel_scale(self, weight: Weight) -> tuple[jax.Array, str]:
        """See `InputScaling.channel_scale`."""
        moments = weight.moments
        inputs = jnp.maximum(jnp.abs(moments["min"]), jnp.abs(moments["max"]))
        matrices = weight.view.to_matrices(weight.param).astype(jnp.float32)
        return smoothing(inputs, jnp.max(jnp.abs(matrices), 1), self.alpha), ""


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
