"""Quantize and dequantize at once, with gradients for the scale, too.

The forward value is that of `fake_quant` with the scale at hand, bit for bit, which is
what a quantized model computes that holds this scale. The derivatives are those of the
papers:

- LSQ, learned step size quantization (arXiv 1902.08153, equations 1 to 3 and section
  2.2): codes from ``clip(x / s)``; the derivative by the scale ``s`` is
  ``round(x / s) - x / s`` inside of the range, and the code at its end outside.
- LSQ+ (arXiv 2004.09576, section 3.1) adds an offset: the derivative by it is 0
  inside, and 1 outside.
- PACT (arXiv 1805.06085, equations 1 to 3): the range is ``[0, alpha]``; the derivative
  by ``alpha`` is 1 where ``x >= alpha``, else 0.

The derivative by ``x`` is 1 inside, and 0 outside. An element at an end of the range is
outside, but for PACT's at zero. Each is a `jax.custom_jvp` whose rule is linear in the
tangents, so that every kind of differentiation works, forward and reverse.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwix_train.core import numerics, scaling, tiling
from qwix_train.core.calibration import check_quantizable, smallest_scale


def gradient_scale(elements: float | jax.Array, levels: int) -> float | jax.Array:
    """The factor of the gradients of a scale, ``1 / sqrt(elements * levels)``.

    It makes the updates of a scale as large, in proportion to it, as those of weights
    are (LSQ, section 2.2).

    Args:
        elements: The elements that share the scale; of an activation, those of one
            example. An array where a size is a symbol of `jax.export`.
        levels: The highest code, ``Q_P``; with an offset the number of codes less one.

    >>> gradient_scale(50, 2)
    0.1
    """
    if isinstance(elements, jax.Array):
        return 1 / jnp.sqrt(jnp.maximum(elements, 1) * levels)
    return 1 / math.sqrt(max(elements, 1) * levels)


def positive_scale(scale: jax.Array, dtype: Any) -> jax.Array:
    """The step that a learned scale stands for: its magnitude, in a dtype.

    An optimizer may carry a scale to zero and beyond. A magnitude below
    `smallest_scale` is that; the derivative stays that of the magnitude, so that the
    scale comes back. NaN stays NaN.

    Args:
        scale: Any shape, a float dtype.
        dtype: The dtype that the step is used in.

    Returns:
        The step, in the wider of the two dtypes.

    >>> positive_scale(jnp.array([0.5, -0.25]), jnp.float32).tolist()
    [0.5, 0.25]
    """
    size = jnp.abs(scale.astype(numerics.promote_types(scale.dtype, dtype)))
    raised = smallest_scale(dtype) + size - jax.lax.stop_gradient(size)
    return jnp.where(size >= smallest_scale(dtype), size, raised)


def offset_zero_point(
    scale: jax.Array, offset: jax.Array, qtype: numerics.QType
) -> jax.Array:
    """The zero point of a range that begins at an offset.

    Args:
        scale: The scale.
        offset: The value of the lowest code, in the shape of the scale.
        qtype: An integer type.

    Returns:
        ``round(q_min - offset / scale)``, within the codes of the type, in the dtype
        that stores them.

    >>> offset_zero_point(jnp.array([0.5]), jnp.array([-2.]), 'int4').tolist()
    [-4]
    """
    low, _ = numerics.code_range(qtype)
    wide = numerics.compute_dtype(scale.dtype)
    lowest = offset.astype(wide) / scale.astype(wide)
    return numerics.round_to_qtype(low - lowest, qtype)


def lsq(
    array: jax.Array,
    qtype: numerics.QType,
    scale: jax.Array,
    *,
    gradient_scale: float | jax.Array = 1.0,
) -> jax.Array:
    """Rounds an array to codes of a scale that is trained (LSQ).

    Args:
        array: Any shape, a float dtype.
        qtype: An integer type.
        scale: In a layout for the array, a float dtype; see `positive_scale`.
        gradient_scale: What the gradient of the scale is multiplied by.

    Returns:
        ``clip(round(array / scale), q_min, q_max) * scale``, in the dtype of the array.

    Raises:
        ValueError: A dtype, shape or type does not fit.

    >>> x = jnp.array([0.25, 3.25, 9.])
    >>> lsq(x, 'int4', jnp.array([1.])).tolist()
    [0.0, 3.0, 7.0]
    >>> jax.grad(lambda s: lsq(x, 'int4', s).sum())(jnp.array([1.])).tolist()
    [6.5]
    """
    static = (_checked(array, qtype), gradient_scale)
    return _lsq(static, array, positive_scale(scale, array.dtype), None)


def lsq_plus(
    array: jax.Array,
    qtype: numerics.QType,
    scale: jax.Array,
    offset: jax.Array,
    *,
    gradient_scale: float | jax.Array = 1.0,
) -> jax.Array:
    """Rounds an array to codes of a scale and an offset that are trained (LSQ+).

    The offset is the value of the lowest code: LSQ+'s unsigned asymmetric
    configuration, with codes counted from there. The zero point of a quantized model is
    a code, so that the forward rounds it; the gradients are those of the paper, as if
    it did not.

    Args:
        array: Any shape, a float dtype.
        qtype: An integer type.
        scale: In a layout for the array, a float dtype; see `positive_scale`.
        offset: In the shape of the scale; at most 0 where the range holds 0, which it
            does in any case: see `offset_zero_point`.
        gradient_scale: What the gradients of scale and offset are multiplied by.

    Returns:
        ``(clip(round(array / scale + z), q_min, q_max) - z) * scale``, in the dtype of
        the array.

    Raises:
        ValueError: A dtype, shape or type does not fit.

    >>> x, s = jnp.array([-3., 0.4, 20.]), jnp.array([1.])
    >>> lsq_plus(x, 'int4', s, jnp.array([-2.])).tolist()
    [-2.0, 0.0, 13.0]
    """
    static = (_checked(array, qtype), gradient_scale)
    return _lsq(static, array, positive_scale(scale, array.dtype), offset)


def pact(array: jax.Array, qtype: numerics.QType, alpha: jax.Array) -> jax.Array:
    """Clips an array to ``[0, alpha]``, and rounds it to codes (PACT).

    Args:
        array: Any shape, a float dtype; what a ReLU gives.
        qtype: An integer type.
        alpha: In a layout for the array, a float dtype; its magnitude counts, see
            `positive_scale`.

    Returns:
        ``round(clip(array, 0, alpha) / s) * s`` with ``s`` of `pact_scale`, in the
        dtype of the array.

    Raises:
        ValueError: A dtype, shape or type does not fit.

    >>> x = jnp.array([-1., 0.4, 3.2, 20., 30.])
    >>> pact(x, 'int4', jnp.array([15.])).tolist()
    [0.0, 0.0, 3.0, 15.0, 15.0]
    >>> jax.grad(lambda a: pact(x, 'int4', a).sum())(jnp.array([15.])).tolist()
    [2.0]
    """
    return _pact(_checked(array, qtype), array, positive_scale(alpha, array.dtype))


def pact_scale(alpha: jax.Array, qtype: numerics.QType) -> jax.Array:
    """The scale of PACT's range, ``alpha / (q_max - q_min)``.

    >>> pact_scale(jnp.array([15.]), 'int4').tolist()
    [1.0]
    """
    low, high = numerics.code_range(qtype)
    # A product with the reciprocal, which does not depend on how it is compiled.
    return alpha * (np.float32(1) / np.float32(high - low)).astype(alpha.dtype)


def _checked(array: jax.Array, qtype: numerics.QType) -> Any:
    """The type in its one form, if scales of it can be learned for an array."""
    check_quantizable(array)
    if not numerics.is_integer_qtype(qtype):
        raise ValueError(
            f"A learned scale needs an integer type, not {numerics.qtype_name(qtype)}."
        )
    return numerics.canonical_qtype(qtype)


def _weighted(weights: jax.Array, tangent: jax.Array) -> jax.Array:
    """The tangent of each element, from those of what it shares with others."""
    return tiling.elementwise(
        lambda w, t: w * t, weights, tangent.astype(weights.dtype)
    )


def _lsq_grid(array: jax.Array, scale: jax.Array, offset: Any, qtype: Any):
    scale = numerics.scale_in_dtype(scale, array.dtype)
    return scale, None if offset is None else offset_zero_point(scale, offset, qtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _lsq(
    static: tuple[Any, Any], array: jax.Array, scale: jax.Array, offset: Any
) -> jax.Array:
    """LSQ+, or with the offset None LSQ."""
    grid = _lsq_grid(array, scale, offset, static[0])
    return scaling.round_trip(array, *grid, static[0])


@_lsq.defjvp
def _lsq_jvp(static: Any, primals: Any, tangents: Any) -> Any:
    (array, scale, offset), (array_dot, scale_dot, offset_dot) = primals, tangents
    qtype, factor = static
    y = scaling.scaled_values(array, *_lsq_grid(array, scale, offset, qtype))
    codes = numerics.round_to_level(y, qtype, array.dtype)
    low, high = numerics.code_range(qtype)
    inside = (y > low) & (y < high)
    outside = codes if offset is None else codes - low
    by_scale = jnp.where(inside, codes - y, outside) * factor
    learned = _weighted(by_scale, scale_dot)
    if offset is not None:
        # A selection, not a product with zeros and ones: XLA on a CPU is slow with
        # those.
        learned += tiling.elementwise(
            lambda inside, t: jnp.where(inside, 0, t),
            inside,
            offset_dot.astype(y.dtype) * factor,
        )
    tangent = jnp.where(inside, array_dot, 0) + learned.astype(array.dtype)
    return _lsq(static, array, scale, offset), tangent


def _pact_grid(array: jax.Array, alpha: jax.Array, qtype: Any):
    scale = numerics.scale_in_dtype(pact_scale(alpha, qtype), array.dtype)
    low, _ = numerics.code_range(qtype)
    return scale, jnp.full(scale.shape, low, numerics.storage_dtype(qtype))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _pact(qtype: Any, array: jax.Array, alpha: jax.Array) -> jax.Array:
    return scaling.round_trip(array, *_pact_grid(array, alpha, qtype), qtype)


@_pact.defjvp
def _pact_jvp(qtype: Any, primals: Any, tangents: Any) -> Any:
    (array, alpha), (array_dot, alpha_dot) = primals, tangents

    def beyond(x, alpha):
        return x.astype(alpha.dtype) >= alpha

    above = tiling.elementwise(beyond, array, alpha)
    tangent = jnp.where((array >= 0) & ~above, array_dot, 0)
    tangent += _weighted(above.astype(alpha.dtype), alpha_dot).astype(array.dtype)
    return _pact(qtype, array, alpha), tangent
