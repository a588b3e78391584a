"""AWQ: weights of large inputs are scaled up before they are rounded."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
from jax import lax
from jax import numpy as jnp

from qwix_train.core.formats import CodedScale
from qwix_train.core.qarray import (
    QArray,
    calibrate,
    compute_scale_zero_point,
    quantize_array,
    quantize_with_scale_zero_point,
)
from qwix_train.planning.rules import QuantizationRule
from qwix_train.ptq.gptq import Gptq
from qwix_train.ptq.input_scaling import InputScaling
from qwix_train.ptq.weight_matrices import row_tile
from qwix_train.ptq.weight_method import Finding, Weight, squared_outputs


class Awq(InputScaling):
    """Multiplies the weights of each input channel by a power of the input's size.

    For channel ``j`` of the input ``x`` the factor is ``s[j] = mean|x[j]|^a``, up to a
    factor that all channels share. The exponent ``a`` is chosen for each matrix, from a
    grid from 0 to 1, to make the error of its outputs smallest:

        |(rounded(w * s) / s - w)^T x|^2

    The second moment of the input gives this error, so no input is kept. With ``a = 0``
    the weight is rounded to nearest, so the error is never larger than that. Then the
    range of each group that shares a scale is narrowed, to between 1 and 0.5 times what
    it was, as far as that lowers the error of the group's own part of the output.

    References:
      Lin et al., "AWQ: Activation-aware Weight Quantization for On-Device LLM
      Compression and Acceleration", section 3.2 with equations 4 and 5, and the
      clipping of weights at its end, https://arxiv.org/abs/2306.00978

    Example:
      >>> import jax
      >>> from flax import linen as nn
      >>> from jax import numpy as jnp
      >>> from qwix_train import QuantizationRule, quantize_model
      >>> from qwix_train.ptq import Awq
      >>> sizes = jnp.where(jnp.arange(32) % 8 == 0, 10, 1)
      >>> x = jax.random.normal(jax.random.key(0), (64, 32)) * sizes
      >>> model = nn.Dense(16)
      >>> variables = model.init(jax.random.key(1), x)
      >>> method = Awq([QuantizationRule(weight_qtype='int3')])
      >>> out = method.wrap(jax.jit(model.apply))(variables, x)
      >>> quantized_model = quantize_model(model, method.provider)
      >>> abstract = jax.eval_shape(quantized_model.init, jax.random.key(0), x)
      >>> quantized = method.quantize_params(variables, abstract)
      >>> (record,) = method.report.weights
      >>> record.error < 0.7 * record.rounding_error
      True
    """

    title = "AWQ"

    def __init__(
        self,
        rules: Sequence[QuantizationRule],
        *,
        grid_size: int = 20,
        clip: bool = True,
        rounding: Gptq | None = None,
    ):
        """Checks the options.

        Args:
          rules: the rules by which the model is to be quantized.
          grid_size: how many exponents are tried, evenly spaced from 0 to 1.
          clip: whether ranges are narrowed. They are not, and the report says so, where
            the elements that share a scale are not a row of a weight, or consecutive
            channels of a row.
          rounding: chooses the codes once the scales are found: `Gptq` with the same
            rules. If None, each element is rounded to nearest.

        Raises:
          ValueError: if `grid_size` is less than 2, or `rounding` has other rules.
        """
        super().__init__(rules, rounding)
        if grid_size < 2:
            raise ValueError(f"grid_size={grid_size} must be at least 2.")
        self.grid_size = grid_size
        self.clip = clip

    def channel_scale(self, weight: Weight) -> tuple[jax.Array, Finding]:
        """See `InputScaling.channel_scale`."""
        factors = _search(weight, self.grid_size)
        unclipped = self.clip and row_tile(weight.view, weight.how) is None
        return factors, Finding("ranges are not narrowed" if unclipped else "")

    def rounded(self, scaled: jax.Array, weight: Weight, scale: jax.Array) -> QArray:
        """See `InputScaling.rounded`."""
        tile = row_tile(weight.view, weight.how) if self.clip else None
        if tile is None:
            return super().rounded(scaled, weight, scale)
        return _clipped(scaled, weight, scale, tile)


def candidate(absmean: jax.Array, exponent: jax.Array | float) -> jax.Array:
    """The factors of channels for one exponent.

    Args:
      absmean: the mean magnitude of each channel, shape (..., channels). A mean below
        1e-4 of the largest counts as 1e-4 of it, so that channels that are hardly used
        are not scaled to nothing.
      exponent: the exponent.

    Returns:
      The factors, such that the largest times the smallest is 1.

    >>> candidate(jnp.array([1., 16.]), 0.5).tolist()
    [0.5, 2.0]
    """
    largest = absmean.max(-1, keepdims=True)
    shares = jnp.maximum(absmean / jnp.where(largest > 0, largest, 1), 1e-4)
    factors = shares**exponent
    extremes = factors.max(-1, keepdims=True) * factors.min(-1, keepdims=True)
    return factors / jnp.sqrt(extremes)


@functools.partial(jax.jit, static_argnames="grid_size")
def _search(weight: Weight, grid_size: int) -> jax.Array:
    """The best factors for each matrix, shape (matrices, channels)."""
    matrices, absmean = weight.matrices(), weight.moments["absmean"]

    def error(exponent):
        factors = candidate(absmean, exponent)
        rounded = quantize_array(weight.divided(1 / factors), weight.how)
        rounded = weight.matrices(rounded) / factors[:, None]
        return squared_outputs(rounded - matrices, weight.moments["second_moment"])

    exponents = jnp.linspace(0, 1, grid_size)
    best = jnp.argmin(lax.map(error, exponents), 0)
    return jax.vmap(candidate)(absmean, exponents[best])


@functools.partial(jax.jit, static_argnames="tile")
def _clipped(scaled: jax.Array, weight: Weight, scale: jax.Array, tile: int) -> QArray:
    """The codes of a scaled weight, where each tile has the best of several ranges."""
    how, view = weight.how, weight.view
    widest, zero_point = compute_scale_zero_point(calibrate(scaled, how), how.qtype)
    count, rows, channels = view.shape
    tiles = channels // tile
    # The second moment of the channels of each tile: the blocks on the diagonal.
    blocks = weight.moments["second_moment"].reshape(count, tiles, tile, tiles, tile)
    blocks = jnp.moveaxis(jnp.diagonal(blocks, axis1=1, axis2=3), -1, 1)
    back = scale.astype(jnp.float32)[:, None]
    exact = weight.matrices(scaled) * back

    def narrowed(share):
        if isinstance(widest, CodedScale):  # The nearest scale that there is.
            scale = widest.recoded(widest.value * share)
        else:
            scale = widest * share.astype(widest.dtype)
        return quantize_with_scale_zero_point(scaled, how.qtype, scale, zero_point)

    def error(share):
        parts = weight.matrices(narrowed(share)) * back - exact
        parts = parts.reshape(count, rows, tiles, tile)
        return jnp.einsum(
            "mrti,mtij,mrtj->mrt", parts, blocks, parts, precision=lax.Precision.HIGHEST
        )

    shares = 1 - jnp.arange(10) / 20
    best = shares[jnp.argmin(lax.map(error, shares), 0)]
    best = view.gathered(jnp.repeat(best, tile, axis=-1), how.scale_shape(view.stored))
    return narrowed(best)
