"""The products of the backward pass, computed from codes.

The gradient of a product in one operand is a product again, of the incoming gradient
and the other operand. JAX itself says which: the product is transposed, as a float
function, and traced; then the trace is evaluated on codes. So whatever JAX can
transpose (groups, dilations, strides, batch axes) has its quantized form.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax import numpy as jnp

from qwix_train import ops
from qwix_train.core import calibration, numerics
from qwix_train.core import stochastic_rounding as noise
from qwix_train.core.how import HowToQuantize
from qwix_train.core.operands import multiplies_codes
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
from qwix_train.values.stored_weight import product


@dataclasses.dataclass(frozen=True)
class BackwardProduct:
    """The gradient of a product in one of its operands.

    Attributes:
      name: the primitive of the product.
      params: the parameters of its equation.
      side: the operand that the gradient is for: 0 for the left one, 1 for the right.
      of_weight: whether that is a weight.
      rule: how gradients are quantized.
      where: the module and the op, for errors.
    """

    name: str
    params: Mapping[str, Any]
    side: int
    of_weight: bool
    rule: QtRule
    where: str

    def __call__(
        self,
        g: jax.Array,
        operands: Sequence[MaybeQArray],
        key: jax.Array | None,
    ) -> jax.Array:
        """The gradient.

        Args:
          g: the gradient of the result.
          operands: what the forward has multiplied.
          key: the random key for stochastic rounding; None to round to nearest.

        Raises:
          ValueError: if the tile size for gradients of weights does not fit.
        """
        # Rounding to nearest before the stochastic one would be a bias.
        g = g.astype(numerics.compute_dtype(g.dtype))
        other = operands[1 - self.side]
        if isinstance(other, QArray):
            g, other = self._with_scale(g, other, operands)
        traced = self._traced(operands, g)

        def handler(op: Op, values: Sequence[Any], run: Any, given: Any) -> jax.Array:
            del run, given
            at = _gradient_side(op)
            codes = self._quantized(op, at, values[at], key)
            factors = list(values)
            if isinstance(other, QArray):
                # Views of the codes; they have one scale, 1.
                ones = jnp.ones((1,) * factors[1 - at].ndim, g.dtype)
                factors[1 - at] = QArray(factors[1 - at], ones, None, other.qtype)
                factors[at] = codes
            else:
                factors[at] = dequantize(codes)
            return product(op.primitive, op.params, factors)

        factor = other.qvalue if isinstance(other, QArray) else other
        arrays = [factor, g, *operands[2:]]
        return traced.with_inputs(arrays).run(traced.ops, handler, lambda _: None)

    def _with_scale(
        self, g: jax.Array, other: QArray, operands: Sequence[MaybeQArray]
    ) -> tuple[jax.Array, MaybeQArray]:
        """Moves the scale of an operand to the gradient, where that has its axes."""
        if other.zero_point is None and multiplies_codes(other):
            kind = ops.product_of(self.name)
            scale = other.float_scale.astype(g.dtype)
            scale = kind.on_result(self.params, 1 - self.side, scale, operands)
            if scale is not None:
                return g * scale, other
        return g, dequantize(other).astype(g.dtype)

    def _traced(
        self, operands: Sequence[MaybeQArray], g: jax.Array
    ) -> function.TracedCall:
        """The trace of the transposed product, as a function of floats."""
        arrays = [x.qvalue if isinstance(x, QArray) else x for x in operands[:2]]
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

        given = map(stored.shape_of, (g, *operands[2:]))
        # The other operand is a param to the trace, to be told from the gradient.
        return function.trace(gradient, (others, *given), lambda path: ("other",))

    def _quantized(self, op: Op, at: int, g: jax.Array, key: Any) -> QArray:
        """The codes of the gradient, as an operand of the backward product."""
        rule = self.rule
        tile = numerics.format_of(rule.bwd_qtype).block
        if self.of_weight and rule.bwd_weight_grad_tile_size is not None:
            tile = rule.bwd_weight_grad_tile_size
        in_blocks = numerics.format_of(rule.bwd_qtype).block is not None
        axes = weights.operand_axes(op, at, tile, in_blocks=in_blocks)
        channelwise = () if rule.disable_channelwise_axes else axes.channelwise
        how = HowToQuantize(
            qtype=rule.bwd_qtype,
            channelwise_axes=channelwise,
            tiled_axes=axes.tiled,
            calibration_method=rule.bwd_calibration_method,
            pad_tiles=rule.pad_tiles,
        )
        try:
            found = calibration.calibrate(g, how)
        except ValueError as error:
            raise ValueError(
                f"{self.where}: the gradient cannot be quantized with "
                f"bwd_weight_grad_tile_size={tile}. {error}"
            ) from None
        noise_fn = None
        if key is not None:
            assert rule.bwd_stochastic_rounding is not None
            noise_fn = noise.noise_fn(
                rule.bwd_stochastic_rounding, key, rule.channelwise_noise_axes
            )
            found = _uncut(found, how.qtype)
        parts = calibration.compute_scale_zero_point(found, how.qtype)
        codes = quantize_with_scale_zero_point(g, how.qtype, *parts, noise_fn)
        if calibration.shows_nan(how.calibration_method):
            return codes
        return with_nan(codes, g)


def _gradient_side(op: Op) -> int:
    """Which operand of a transposed product is the gradient."""
    is_other = [isinstance(x.provenance, provenance.Weight) for x in op.operands[:2]]
    return is_other.index(False)


def _uncut(found: Mapping[str, Any], qtype: Any) -> dict[str, Any]:
    """A range whose ends are codes.

    Those of a range centered at zero lie half a step beyond. Rounded to nearest they
    get the outermost code; at random, half of them would get the code behind it, which
    does not exist.
    """
    if "absmax" not in found or not numerics.is_integer_qtype(qtype):
        return dict(found)
    factor = numerics.symmetric_bound(qtype) / numerics.code_range(qtype)[1]
    return {"absmax": found["absmax"] * factor}
