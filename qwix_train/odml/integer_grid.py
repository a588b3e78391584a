"""Integers with a scale and a zero point, as LiteRT has them.

Activations have codes from -128 to 127 and a zero point; weights are symmetric, with
codes from -127 to 127 (`narrow range`), as LiteRT's specification of 8-bit quantization
asks for. Rounding is to the nearest code.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from qwix_train.core.calibration import calibrate, compute_scale_zero_point
from qwix_train.core.grid import Grid
from qwix_train.core.how import HowToQuantize
from qwix_train.core.numerics import is_int16, qtype_name

# An eager call, as a conversion makes for each tensor, is one program, and not one for
# each operation in it.
_compiled = functools.partial(jax.jit, inline=True)


@functools.partial(_compiled, static_argnames="qtype")
def of_calibration(calibration: Mapping[str, Any], qtype: Any) -> Grid:
    """The grid of the range of an activation.

    Args:
      calibration: `{"min": ..., "max": ...}` or `{"absmax": ...}`.
      qtype: the type of the codes.
    """
    if is_int16(qtype):
        # LiteRT's have no zero point.
        absmax = functools.reduce(
            jnp.maximum, (jnp.abs(jnp.asarray(end)) for end in calibration.values())
        )
        # Of nothing but zeros any scale would do, but for how LiteRT multiplies scales.
        scale = jnp.where(absmax > 0, absmax, 1) / (2**15 - 1)
        return Grid(scale, jnp.zeros(scale.shape, jnp.int32), "int16")
    scale, zero_point = compute_scale_zero_point(calibration, qtype)
    if zero_point is None:
        zero_point = jnp.zeros(scale.shape, jnp.int32)
    return Grid(scale, zero_point, qtype_name(qtype))


@functools.partial(_compiled, static_argnames="how")
def of_weight(w: jax.Array, how: HowToQuantize, least: Any = 0) -> Grid:
    """The grid of a weight: symmetric, without the lowest code.

    Args:
      w: the weight.
      how: how it is quantized, to a narrow type.
      least: the smallest scales.
    """
    grid = of_calibration(calibrate(w, how), how.qtype)
    scale = jnp.maximum(grid.scale, jnp.asarray(least, grid.scale.dtype))
    return dataclasses.replace(grid, scale=scale)


@functools.partial(_compiled, static_argnames="qtype")
def of_constant(x: jax.Array, qtype: Any) -> Grid:
    """The grid of a constant: from its smallest to its largest value, and zero."""
    how = HowToQuantize(qtype="int8", calibration_method="minmax")
    x = jnp.reshape(x, (-1,))
    return scalar(of_calibration(calibrate(x, how), qtype))


@_compiled
def scalar(grid: Grid) -> Grid:
    """A grid with one scale, which has no axes."""
    scale, zero_point = (jnp.reshape(x, ()) for x in (grid.scale, grid.zero_point))
    return dataclasses.replace(grid, scale=scale, zero_point=zero_point)


@functools.partial(_compiled, static_argnames="rounding")
def on_grid(x: jax.Array, grid: Grid, rounding: str = "even") -> jax.Array:
    """The nearest values of a grid, with straight-through gradients.

    The gradient is that of `x` where its code is within the range, and zero outside
    (arXiv 1712.05877, section 3; arXiv 1308.3432, section 4).

    Args:
      x: the values.
      grid: the grid.
      rounding: what a value between two of the grid becomes: `"even"` for the nearest,
        and halfway between them that an even number of steps from zero; `"away"` for
        the nearest, and halfway that whose code is further from zero, as LiteRT's
        average pooling does, which averages codes; `"floor"` for the
        lower, as its square root does.
    """
    scale = lax.stop_gradient(jnp.asarray(grid.scale, x.dtype))
    zero = jnp.asarray(grid.zero_point, x.dtype)
    low, high = grid.codes
    scaled = x / scale
    if rounding == "away":
        # A little more than half, for what is halfway but for the rounding of floats.
        code = scaled + zero
        code = jnp.sign(code) * jnp.floor(jnp.abs(code) + 0.5 + 1e-4)
    elif rounding == "floor":
        code = jnp.floor(scaled) + zero
    else:
        code = jnp.round(scaled) + zero
    nearest = jnp.clip(code, low, high)
    inside = code == nearest
    # No clip of `x`: at an end, as the largest weight of each channel is, its gradient
    # is one half.
    passed = jnp.where(inside, x - lax.stop_gradient(x), 0)
    return lax.stop_gradient((nearest - zero) * scale) + passed


def codes_of(x: np.ndarray, grid: Grid) -> np.ndarray:
    """The codes of concrete values, as int32."""
    low, high = grid.codes
    x = np.asarray(x, np.float64)
    code = np.round(x / np.asarray(grid.scale)) + np.asarray(grid.zero_point)
    return np.clip(code, low, high).astype(np.int32)
