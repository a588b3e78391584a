"""GPTQ: codes that make up for each other's errors on the inputs that were seen."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from qwix_train.core import numerics
from qwix_train.core.formats import CodedScale
from qwix_train.core.how import HowToQuantize
from qwix_train.core.operands import is_concrete
from qwix_train.core.qarray import (
    QArray,
    calibrate,
    compute_scale_zero_point,
    dequantize,
    quantize_with_scale_zero_point,
)
from qwix_train.files import processes
from qwix_train.planning.rules import QuantizationRule
from qwix_train.ptq.weight_matrices import row_tile
from qwix_train.ptq.weight_method import (
    Finding,
    QuantizedWeight,
    Weight,
    WeightMethod,
)


class Gptq(WeightMethod):
    """Quantizes weights one input channel after the other, and corrects later channels.

    Let ``H = 2 X^T X`` be the Hessian of the squared error of a product ``x @ w``, and
    ``U`` the upper triangular matrix with ``U^T U = H^-1``. When channel ``j`` of ``w``
    is rounded, the channels ``k > j`` take up its error:

        w[k] -= (w[j] - rounded(w[j])) / U[j, j] * U[j, k]

    Codes and scales have the layout of rounding to nearest, so the same models run
    them. Channels that no input reached are rounded to nearest.

    References:
      Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative
      Pre-trained Transformers", algorithm 1, https://arxiv.org/abs/2210.17323

    Example:
      >>> import jax
      >>> from flax import linen as nn
      >>> from qwix_train import QuantizationRule, quantize_model
      >>> from qwix_train.ptq import Gptq
      >>> x = jax.random.normal(jax.random.key(0), (64, 16)).cumsum(1)
      >>> model = nn.Dense(8)
      >>> variables = model.init(jax.random.key(1), x)
      >>> method = Gptq([QuantizationRule(weight_qtype='int3')])
      >>> out = method.wrap(jax.jit(model.apply))(variables, x)
      >>> quantized_model = quantize_model(model, method.provider)
      >>> abstract = jax.eval_shape(quantized_model.init, jax.random.key(0), x)
      >>> quantized = method.quantize_params(variables, abstract)
      >>> quantized['params']['kernel'].array.qvalue.dtype
      dtype(int4)
      >>> (record,) = method.report.weights
      >>> record.error < record.rounding_error / 2
      True
    """

    title = "GPTQ"

    def __init__(
        self,
        rules: Sequence[QuantizationRule],
        *,
        damping: float = 0.01,
        block_size: int = 128,
        act_order: bool = False,
        static_groups: bool | None = None,
    ):
        """Checks the options.

        Args:
          rules: the rules by which the model is to be quantized.
          damping: what is added to the diagonal of the Hessian, as a share of its
            mean.
          block_size: how many channels are corrected one by one before all later ones
            are corrected at once. It changes only the speed.
          act_order: whether channels with the largest inputs come first.
          static_groups: whether the scales of tiles (`tile_size`) are found from the
            weights before any correction. Otherwise the scale of a tile is found from
            the corrected weights, when its first channel is reached. That needs tiles
            that lie one after the other in the order of channels; the report says where
            they do not. If None, only with `act_order`, which needs it.

        Raises:
          ValueError: if an option is out of bounds, or `act_order` comes with
            `static_groups=False`.
        """
        super().__init__(rules)
        if damping < 0:
            raise ValueError(f"damping={damping} must not be negative.")
        if block_size < 1:
            raise ValueError(f"block_size={block_size} must be positive.")
        if act_order and static_groups is False:
            raise ValueError(
                "act_order=True visits channels in an order in which tiles do not lie "
                "one after the other, so their scales must be known before: leave out "
                "static_groups=False."
            )
        self.damping = damping
        self.block_size = block_size
        self.act_order = act_order
        self.static_groups: bool = act_order if static_groups is None else static_groups

    def quantize_weight(self, weight: Weight) -> QuantizedWeight:
        """See `WeightMethod.quantize_weight`.

        Raises:
          ValueError: if the damped Hessian is not positive definite.
        """
        how, size, note = weight.how, None, ""
        if how.tiled_axes and not self.static_groups:
            size = row_tile(weight.view, how)
            if size is None:
                note = "tiles are not in the order of channels: "
                note += "scales from the float weight"
        return QuantizedWeight(self._codes(weight, size), Finding(note))

    def codes_on(self, weight: Weight, grid: QArray) -> QArray:
        """The codes of a weight with the scales that another method chose.

        Args:
          weight: the weight.
          grid: what the other method made of it.

        Raises:
          ValueError: if the damped Hessian is not positive definite.
        """
        return self._codes(weight, None, grid)

    def _codes(
        self, weight: Weight, tile: int | None, grid: QArray | None = None
    ) -> QArray:
        options = Options(self.damping, self.block_size, self.act_order, tile)
        array, ok = _quantize(weight, options, grid)
        if is_concrete(ok) and not np.all(processes.whole(ok)):
            raise ValueError(
                f"The Hessian of {weight.name} is not positive definite with "
                f"damping={self.damping}: too few inputs were collected for its "
                f"{weight.view.channels} channels. Collect more, or raise damping."
            )
        return array


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of `gptq_matrix`.

    Attributes:
      damping: see `Gptq`.
      block_size: see `Gptq`.
      act_order: see `Gptq`.
      tile: the number of channels that share a scale, if it is found when the first of
        them is reached; None if scales are given.
    """

    damping: float = 0.01
    block_size: int = 128
    act_order: bool = False
    tile: int | None = None


def gptq_matrix(
    matrix: jax.Array,
    hessian: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array | None,
    how: HowToQuantize,
    options: Options,
    tensor_absmax: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array]:
    """Corrects each channel of a matrix, in order, for the rounding of earlier ones.

    Args:
      matrix: shape (rows, channels), float32.
      hessian: shape (channels, channels), float32, up to a factor.
      scale: the scale of each element, shape (rows, channels); with `options.tile`
        only its dtype counts.
      zero_point: the zero point of each element, or None.
      how: the type of the codes and, with `options.tile`, the range of a tile.
      options: the options.
      tensor_absmax: the largest magnitude of the tensor, for types that have a scale
        for it.

    Returns:
      The matrix that, rounded to nearest, gives the codes; the scale and the zero point
      of each element; and whether the damped Hessian was positive definite.
    """
    order = None
    if options.act_order:
        order = jnp.argsort(-jnp.diag(hessian), stable=True)
        matrix, scale = matrix[:, order], scale[:, order]
        zero_point = None if zero_point is None else zero_point[:, order]
        hessian = hessian[order][:, order]
    factor = inverse_factor(hessian, options.damping)
    of_tile = functools.partial(
        tile_scale, how=how, dtype=scale.dtype, tensor_absmax=tensor_absmax
    )
    rounded = _correct(matrix, factor, scale, zero_point, how, options, of_tile)
    if order is not None:
        back = jnp.argsort(order)
        rounded = jax.tree.map(lambda x: x[:, back], rounded)
    return *rounded, jnp.isfinite(factor).all()


def inverse_factor(hessian: jax.Array, damping: float) -> jax.Array:
    """The upper triangular ``U`` with ``U^T U = (H + damping * mean(diag H))^-1``.

    For channels without any input, rows and columns of zeros become those of the
    identity.

    Args:
      hessian: ``H``, shape (channels, channels).
      damping: what is added to the diagonal, as a share of its mean.

    Returns:
      ``U``, with NaN if the sum is not positive definite.
    """
    diagonal = jnp.diag(hessian)
    added = jnp.where(diagonal > 0, damping * diagonal.mean(), 1)
    hessian = hessian + jnp.diag(added)
    # With the order of channels reversed, H = R R^T for an upper triangular R.
    lower = jnp.linalg.cholesky(hessian[::-1, ::-1])
    identity = jnp.eye(len(hessian), dtype=hessian.dtype)
    return jax.scipy.linalg.solve_triangular(lower[::-1, ::-1], identity, lower=False)


def _correct(matrix, factor, scale, zero_point, how, options, of_tile):
    """The loop over channels of `gptq_matrix`, in blocks."""
    rows, channels = matrix.shape
    block, tile = _block(channels, options)
    padding = -channels % block
    matrix = jnp.pad(matrix, ((0, 0), (0, padding)))
    scale = jnp.pad(scale, ((0, 0), (0, padding)), constant_values=1)
    if zero_point is not None:
        zero_point = jnp.pad(zero_point, ((0, 0), (0, padding)))
    factor = jnp.pad(factor, (0, padding))
    factor = factor + jnp.diag(
        (jnp.arange(len(factor)) >= channels).astype(jnp.float32)
    )
    columns = jnp.arange(len(factor))

    def columns_of(array, start, size: int = block):
        return lax.dynamic_slice_in_dim(array, start, size, axis=1)

    def put(array, part, start):
        return lax.dynamic_update_slice_in_dim(array, part, start, axis=1)

    def with_tile_scale(start, size: int, matrix, parts):
        # For all channels of the tile, even those that later blocks hold.
        own = of_tile(columns_of(matrix, start, size))
        each = jax.tree.map(lambda x: jnp.broadcast_to(x, (rows, size)), own)
        return jax.tree.map(lambda whole, part: put(whole, part, start), parts, each)

    def one_block(number, carry):
        matrix, scale, zero_point = carry
        start = number * block
        if tile is not None:
            scale, zero_point = lax.cond(
                start % tile == 0,
                functools.partial(with_tile_scale, start, tile, matrix),
                lambda parts: parts,
                (scale, zero_point),
            )
        inner = lax.dynamic_slice(factor, (start, start), (block, block))
        scales = columns_of(scale, start)
        zeros = None if zero_point is None else columns_of(zero_point, start)

        def one_column(i, carry):
            part, errors = carry
            column = columns_of(part, i, 1)
            code = quantize_with_scale_zero_point(
                column,
                how.qtype,
                columns_of(scales, i, 1),
                None if zeros is None else columns_of(zeros, i, 1),
            )
            row = lax.dynamic_slice_in_dim(inner, i, 1, axis=0)
            error = (column - dequantize(code)) / row[:, i][:, None]
            later = jnp.where(jnp.arange(block) > i, row, 0)
            return part - error * later, put(errors, error, i)

        part, errors = lax.fori_loop(
            0, block, one_column, (columns_of(matrix, start), jnp.zeros((rows, block)))
        )
        across = lax.dynamic_slice_in_dim(factor, start, block, axis=0)
        across = jnp.where(columns >= start + block, across, 0)
        matrix = put(matrix, part, start)
        matrix = matrix - jnp.matmul(errors, across, precision=lax.Precision.HIGHEST)
        return matrix, scale, zero_point

    count = (channels + padding) // block
    done = lax.fori_loop(0, count, one_block, (matrix, scale, zero_point))
    return jax.tree.map(lambda x: x[:, :channels], done)


def _block(channels: int, options: Options) -> tuple[int, int | None]:
    """The sizes of blocks and tiles: a tile starts where a block does."""
    tile = options.tile
    if tile is None:
        return min(options.block_size, channels), None
    largest = min(options.block_size, tile)
    return next(n for n in range(largest, 0, -1) if tile % n == 0), tile


def tile_scale(
    tile: jax.Array,
    how: HowToQuantize,
    dtype: Any,
    tensor_absmax: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """The scale, as a float, and the zero point of each row of a tile.

    Args:
      tile: shape (rows, channels of the tile).
      how: the type and the range.
      dtype: the dtype that the scale is kept in.
      tensor_absmax: the largest magnitude of the tensor, for types that have a scale
        for it.
    """
    own = dataclasses.replace(how, channelwise_axes=(0,), tiled_axes={}, tensor_axes=())
    found = calibrate(tile, own)
    if tensor_absmax is not None:
        found["tensor_absmax"] = jnp.full_like(found["tensor_absmax"], tensor_absmax)
    scale, zero_point = compute_scale_zero_point(found, how.qtype)
    scale = scale.value if isinstance(scale, CodedScale) else scale
    return numerics.scale_in_dtype(scale, dtype), zero_point


@functools.partial(jax.jit, static_argnames="options")
def _quantize(
    weight: Weight, options: Options, grid: QArray | None
) -> tuple[QArray, jax.Array]:
    """The codes of a stored param, and which Hessians were positive definite."""
    param, how, view = weight.param, weight.how, weight.view
    found = calibrate(param, how)
    stored, zero_point = compute_scale_zero_point(found, how.qtype)
    is_coded = isinstance(stored, CodedScale)
    if grid is not None:
        stored, zero_point = grid.scale, grid.zero_point
        stored = CodedScale(stored, grid.tensor_scale) if is_coded else stored
    coded = stored if isinstance(stored, CodedScale) else None
    scale: Any = stored if coded is None else coded.value

    def one(parts):
        *parts, tensor = parts
        tensor = None if tensor is None else tensor[0, 0]
        return gptq_matrix(*parts, how=how, options=options, tensor_absmax=tensor)

    spread = functools.partial(jax.tree.map, view.spread)
    matrices, scales, zeros, ok = lax.map(
        one,
        (
            weight.matrices(),
            2 * weight.moments["second_moment"],
            *spread((scale, zero_point, found.get("tensor_absmax"))),
        ),
    )
    if options.tile is not None:
        scale = view.gathered(scales, scale.shape)
        zero_point = None if zeros is None else view.gathered(zeros, scale.shape)
    # In float32, so that the weight is not rounded before it is rounded to codes.
    array = quantize_with_scale_zero_point(
        view.from_matrices(matrices),
        how.qtype,
        scale.astype(jnp.float32) if coded is None else coded.recoded(scale),
        zero_point,
    )
    return array.astype(param.dtype), ok
