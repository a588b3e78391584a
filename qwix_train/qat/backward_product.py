"""The products of the backward pass, computed from codes.

The gradient of a product in one operand is a product, too: of the incoming gradient and
the other operand. JAX says which one. It transposes the product as a float function,
and the trace of that is evaluated on codes. So whatever JAX can transpose (groups,
dilations, strides, batch axes) has a quantized form.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax import numpy as jnp

from qwix_train import ops
from qwix_train.core import joined_range, numerics, rotations
from qwix_train.core import stochastic_rounding as noise
from qwix_train.core.calibration import (
    calibrate,
    compute_scale_zero_point,
    shows_nan,
    uncut,
)
from qwix_train.core.errors import located
from qwix_train.core.how import HowToQuantize
from qwix_train.core.operands import as_float, multiplies_codes
from qwix_train.core.qarray import (
    MaybeQArray,
    QArray,
    dequantize,
    quantize_with_scale_zero_point,
    with_nan,
)
from qwix_train.planning import weights
from qwix_train.qat.qt_rule import QtRule
from qwix_train.trace import function, provenance
from qwix_train.trace.analyze import Op
from qwix_train.values import stored
from qwix_train.values.stored_weight import StoredWeight, product


class Groups(NamedTuple):
    """How an operand of a backward product is quantized along the contracted axes.

    Attributes:
      qtype: the type of its codes.
      tile_size: see `weights.operand_axes`.
      calibration_method: how its range is found.
      axis_names: the axes of a mesh over which its range is joined.
    """

    qtype: Any
    tile_size: weights.TileSize
    calibration_method: str
    axis_names: Collection[str] = ()


@dataclasses.dataclass(frozen=True)
class BackwardProduct:
    """The gradient of a product in one of its operands.

    Attributes:
      name: the primitive of the product.
      params: the parameters of its equation.
      side: the operand that the gradient is for: 0 for the left one, 1 for the right.
      of_weight: whether that operand is a weight.
      rule: how gradients are quantized.
      where: the module and the op, for errors.
      again: how the other operand is quantized for this product; None if it is
        multiplied as it comes.
    """

    name: str
    params: Mapping[str, Any]
    side: int
    of_weight: bool
    rule: QtRule
    where: str
    again: Groups | None = None

    def __call__(
        self,
        g: jax.Array,
        residuals: Sequence[MaybeQArray],
        key: jax.Array | None,
        calibration: Mapping[str, Any] | None = None,
    ) -> jax.Array:
        """The gradient.

        Args:
          g: the gradient of the result.
          residuals: the operands, as the forward multiplied them or as they were before
            they were quantized; and behind them what else the product reads.
          key: the random key for stochastic rounding; None to round to nearest.
          calibration: the range of the gradient of the result, arrays of one element;
            None to find it from the gradient itself.

        Raises:
          ValueError: if the tile size for gradients, or the rotation, does not fit.
        """
        # Rounding to nearest before stochastic rounding would add a bias.
        g = g.astype(numerics.compute_dtype(g.dtype))
        other, moved = residuals[1 - self.side], False
        if self.again is not None:
            other = as_float(other).astype(g.dtype)
        elif isinstance(other, QArray) and calibration is None:
            g, other, moved = self._with_scale(g, other, residuals)
        traced = self._traced(residuals, g)

        def handler(op: Op, values: Sequence[Any], run: Any, given: Any) -> jax.Array:
            del run, given
            at = _gradient_side(op)
            factors = list(values)
            if self.of_weight and self.rule.bwd_weight_grad_rotation is not None:
                factors[:2] = self._rotated(op, factors[:2])
            factors[at] = self._quantized_gradient(
                op, at, factors[at], key, calibration
            )
            if self.again is not None:
                factors[1 - at] = self._quantized(
                    op, 1 - at, factors[1 - at], self.again
                )
            elif moved and isinstance(other, QArray):
                # Views of the codes; they have one scale, 1.
                ones = jnp.ones((1,) * factors[1 - at].ndim, g.dtype)
                factors[1 - at] = QArray(factors[1 - at], ones, None, other.qtype)
            elif not isinstance(other, QArray):
                factors[at] = dequantize(factors[at])
            return product(op.primitive, op.params, factors)

        def substitute(param: Any) -> StoredWeight | None:
            if isinstance(other, QArray) and not moved:
                return StoredWeight(other, g.dtype, "/".join(param.path))
            return None

        factor = other.qvalue if isinstance(other, QArray) else other
        arrays = [factor, g, *residuals[2:]]
        return traced.with_inputs(arrays).run(traced.ops, handler, substitute)

    def _with_scale(
        self, g: jax.Array, other: QArray, residuals: Sequence[MaybeQArray]
    ) -> tuple[jax.Array, QArray, bool]:
        """Moves the scale of an operand to the gradient, if that has the same axes."""
        if other.zero_point is None and multiplies_codes(other):
            kind = ops.product_of(self.name)
            scale = other.float_scale.astype(g.dtype)
            scale = kind.on_result(self.params, 1 - self.side, scale, residuals)
            if scale is not None:
                return g * scale, other, True
        return g, other, False

    def _traced(
        self, residuals: Sequence[MaybeQArray], g: jax.Array
    ) -> function.TracedCall:
        """The trace of the transposed product, as a function of floats."""
        arrays = [x.qvalue if isinstance(x, QArray) else x for x in residuals[:2]]
        # On a mesh with explicit axes, the gradient is sharded as its operand is.
        ours, others = (
            stored.shape_of(arrays[side]).update(dtype=g.dtype)
            for side in (self.side, 1 - self.side)
        )
        params = {**self.params, "preferred_element_type": g.dtype}

        def gradient(other, g, *rest):
            def forward(x):
                factors = (x, other) if self.side == 0 else (other, x)
                return product(self.name, params, [*factors, *rest])

            return jax.linear_transpose(forward, ours)(g)[0]

        given = map(stored.shape_of, (g, *residuals[2:]))
        # The other operand is a param of the trace, to tell it from the gradient.
        return function.trace(gradient, (others, *given), lambda path: ("other",))

    def _rotated(self, op: Op, factors: Sequence[jax.Array]) -> list[jax.Array]:
        """Both operands in another basis along the last axis that they contract."""
        rotation = self.rule.bwd_weight_grad_rotation
        assert rotation is not None
        kind, ndims = ops.kind_of(op), [x.ndim for x in factors]
        at = _gradient_side(op)
        axes = max(
            kind.meeting_axes(op.params, ndims), key=lambda x: x[at], default=None
        )
        if axes is None:
            raise ValueError(
                f"{self.where}: bwd_weight_grad_rotation={rotation!r} is set, and "
                f"the rows of {kind.plural} that meet are not those of one axis. Put a "
                "rule without it, for this op, before this one."
            )
        with located(f"{self.where}, gradient of the weight"):
            return [
                rotations.parse(rotation, axis, x.shape[axis]).apply(x)
                for axis, x in zip(axes, factors, strict=True)
            ]

    def _quantized_gradient(
        self, op: Op, at: int, g: jax.Array, key: Any, calibration: Any
    ) -> QArray:
        """The codes of the gradient, as an operand of the backward product."""
        rule = self.rule
        tile = numerics.format_of(rule.bwd_qtype).block or rule.bwd_tile_size
        if self.of_weight and rule.bwd_weight_grad_tile_size is not None:
            tile = rule.bwd_weight_grad_tile_size
        method, names = rule.bwd_calibration_method, rule.bwd_axis_names
        groups = Groups(rule.bwd_qtype, tile, method, names)
        noise_fn = None
        if key is not None:
            assert rule.bwd_stochastic_rounding is not None
            axes = rule.channelwise_noise_axes
            noise_fn = noise.noise_fn(rule.bwd_stochastic_rounding, key, axes)
        if calibration is None:
            return self._quantized(op, at, g, groups, noise_fn)
        whole = jax.tree.map(lambda x: x.reshape((1,) * g.ndim), calibration)
        # An overflow must stay visible, as loss scaling needs it.
        seen = jnp.where(jnp.isfinite(g), g, jnp.nan)
        return with_nan(_with_range(g, rule.bwd_qtype, whole, noise_fn), seen)

    def _quantized(
        self,
        op: Op,
        at: int,
        x: jax.Array,
        groups: Groups,
        noise_fn: numerics.NoiseFn | None = None,
    ) -> QArray:
        """The codes of an operand of the backward product."""
        qtype, tile, method, axis_names = groups
        in_blocks = numerics.format_of(qtype).block is not None
        axes = weights.operand_axes(op, at, tile, in_blocks=in_blocks)
        how = HowToQuantize(
            qtype=qtype,
            channelwise_axes=()
            if self.rule.disable_channelwise_axes
            else axes.channelwise,
            tiled_axes=axes.tiled,
            calibration_method=method,
            pad_tiles=self.rule.pad_tiles,
            axis_names=axis_names,
        )
        with located(self.where):
            joined_range.check_bound(axis_names)
        try:
            found = calibrate(x, how)
        except ValueError as error:
            fields = "tile_size and act_tile_size"
            if at == _gradient_side(op):
                fields = "bwd_tile_size and bwd_weight_grad_tile_size"
            raise ValueError(
                f"{self.where}: an operand of the gradient of operand {self.side}, of "
                f"shape {x.shape}, cannot be quantized with tiles of {tile} along what "
                f"is contracted. {error} The tiles are those of {fields}."
            ) from None
        codes = _with_range(x, how.qtype, found, noise_fn)
        if shows_nan(how.calibration_method):
            return codes
        return with_nan(codes, x)


def _with_range(
    x: jax.Array,
    qtype: Any,
    found: Mapping[str, Any],
    noise_fn: numerics.NoiseFn | None,
) -> QArray:
    """The codes of an array, by a range as `calibrate` gives it."""
    if noise_fn is not None:
        found = uncut(found, qtype)
    parts = compute_scale_zero_point(found, qtype)
    return quantize_with_scale_zero_point(x, qtype, *parts, noise_fn)


def _gradient_side(op: Op) -> int:
    """Which operand of a transposed product is the gradient."""
    is_other = [isinstance(x.provenance, provenance.Weight) for x in op.operands[:2]]
    return is_other.index(False)
