"""How well a weight fits its type, measured for each of the layers stacked in it."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp

from qwix_train.core import numerics, tiling
from qwix_train.core.calibration import calibrate, range_ends
from qwix_train.core.how import HowToQuantize
from qwix_train.core.qarray import (
    QArray,
    dequantize,
    quantize_array,
    quantize_with_scale_zero_point,
)
from qwix_train.planning.plan import ParamPlan
from qwix_train.trace.provenance import Weight


class WeightMeasures(NamedTuple):
    """What is measured of a weight; all but the scale have an entry for each layer.

    Attributes:
      signal: the sum of the squares of its elements.
      noise: the sum of the squares of their quantization errors.
      outside: how many elements are outside of the range.
      at_ends: how many have the lowest or the highest code.
      scale: the scales.
    """

    signal: Any
    noise: Any
    outside: Any
    at_ends: Any
    scale: Any


def measure(
    x: jax.Array,
    how: HowToQuantize,
    layer_axes: tuple[int, ...],
    scale: jax.Array | None = None,
    zero_point: jax.Array | None = None,
) -> WeightMeasures:
    """Measures a weight.

    Args:
      x: the weight.
      how: how it is quantized.
      layer_axes: see `layer_axes`.
      scale: the scale of the weight; computed from `x` if None.
      zero_point: the zero point that belongs to that scale; None for 0.
    """
    if how.rotation is not None:
        x, how = how.rotation.apply(x), how.in_basis
    if scale is None:
        quantized = quantize_array(x, how)
        ends = range_ends(calibrate(x, how))
    else:
        if zero_point is not None:
            zero_point = numerics.round_to_qtype(zero_point, how.qtype)
        quantized = quantize_with_scale_zero_point(x, how.qtype, scale, zero_point)
        ends = _ends_of_scale(quantized)
    outside = tiling.elementwise(
        lambda x, low, high: (x < low) | (x > high), x, *map(jnp.asarray, ends)
    )
    noise = x.astype(jnp.float32) - dequantize(quantized).astype(jnp.float32)
    low, high = _end_codes(how.qtype)
    codes = quantized.qvalue.astype(jnp.float32)
    axes = tuple(axis for axis in range(x.ndim) if axis not in layer_axes)
    return WeightMeasures(
        jnp.sum(jnp.square(x.astype(jnp.float32)), axes),
        jnp.sum(jnp.square(noise), axes),
        jnp.sum(outside.astype(jnp.float32), axes),
        jnp.sum(((codes <= low) | (codes >= high)).astype(jnp.float32), axes),
        quantized.float_scale,
    )


def layer_axes(planned: ParamPlan) -> tuple[int, ...]:
    """The axes of a param along which `scan` takes one layer after the other."""
    assert planned.op is not None
    op = planned.op.op
    for operand in op.operands:
        if not isinstance(operand.provenance, Weight):
            continue
        for view in operand.provenance.views:
            if view.path != planned.path:
                continue
            held = {atom.axis for dim in view.dims for atom in dim}
            axes = tuple(a for a in range(len(planned.shape)) if a not in held)
            # Other axes may be missing, too, such as one that was indexed.
            if tuple(planned.shape[a] for a in axes) == op.layers:
                return axes
    return ()


def drift(scale: Any, before: Any, layer_axes: tuple[int, ...]) -> tuple[Any, Any]:
    """How far scales have moved, and how large they were: sums of squares, by layer.

    Args:
      scale: the scales of a weight.
      before: its scales at an earlier time.
      layer_axes: the axes of the weight that stack layers. Both sums have an entry for
        each scale along these axes: one alone where layers share a scale.
    """
    scale, before = np.asarray(scale, np.float64), np.asarray(before, np.float64)
    axes = tuple(axis for axis in range(scale.ndim) if axis not in layer_axes)
    return ((scale - before) ** 2).sum(axes), (before**2).sum(axes)


def _ends_of_scale(quantized: QArray) -> tuple[Any, Any]:
    """The ends of the range that a scale and a zero point stand for."""
    scale, zero_point = quantized.float_scale, quantized.zero_point
    if zero_point is None:
        bound = numerics.symmetric_bound(quantized.qtype)
        return -bound * scale, bound * scale
    low, high = numerics.asymmetric_bound(quantized.qtype)
    zero = zero_point.astype(scale.dtype)
    return (low - zero) * scale, (high - zero) * scale


def _end_codes(qtype: Any) -> tuple[float, float]:
    entry = numerics.format_of(qtype)
    if entry.integers is not None:
        return entry.integers.low, entry.integers.high
    if entry.table is not None:
        return 0, len(entry.table) - 1
    return -entry.bound, entry.bound
