"""Quantize and dequantize at once, with straight-through gradients.

The forward value is ``dequantize(quantize(x))``, bit for bit. The derivative is the
straight-through estimator (arXiv 1308.3432, section 4): the identity where the value
lies in the range, zero outside; ranges, scales and zero points count as constants.

It is a `jax.custom_jvp` whose rule is linear in the tangent, so that every kind of
differentiation works, forward and reverse, of any order. The backward pass keeps
nothing if the range covers the array, else one Boolean for each element.
"""

import contextlib
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from qwix_train.core import calibration as calib
from qwix_train.core import numerics
from qwix_train.core.formats import CodedScale
from qwix_train.core.how import HowToQuantize
from qwix_train.core.scaling import round_trip
from qwix_train.core.traced_once import traced_once


def fake_quant(array: jax.Array, how: HowToQuantize) -> jax.Array:
    """Rounds an array to what ``how`` can represent.

    Args:
        array: Any shape, a float dtype.
        how: How to quantize it.

    Returns:
        ``dequantize(quantize_array(array, how))``, in the shape and dtype of the
        array. Its gradient is that of the array, and zero for elements outside of
        the range (with ``rms``, ``fixed``, or a factor below 1).

    Raises:
        ValueError: ``how`` does not fit the array.

    >>> how = HowToQuantize(qtype='int4', calibration_method='fixed,-7.5,7.5')
    >>> x = jnp.array([0.4, 3.2, 9.])
    >>> fake_quant(x, how).tolist()
    [0.0, 3.0, 7.0]
    >>> jax.grad(lambda x: fake_quant(x, how).sum())(x).tolist()
    [1.0, 1.0, 0.0]
    """
    calib.check_quantizable(array)
    return _quantized(how, array)


def fake_quant_with_calibration(
    array: jax.Array,
    qtype: numerics.QType,
    calibration: dict[str, Any],
    noise_fn: numerics.NoiseFn | None = None,
    *,
    clip_gradient: bool = True,
) -> jax.Array:
    """Rounds an array to codes of a range that is given, such as a collected one.

    Args:
        array: Any shape, a float dtype.
        qtype: The type.
        calibration: ``{'absmax': ...}`` or ``{'min': ..., 'max': ...}``, in a layout
            for the array.
        noise_fn: Noise for stochastic rounding.
        clip_gradient: Whether the gradient is zero outside of the range.

    Raises:
        ValueError: The range does not fit the array or the type.

    >>> x = jnp.array([0.4, 3.2, 9.])
    >>> fake_quant_with_calibration(x, 'int4', {'absmax': jnp.array([7.5])}).tolist()
    [0.0, 3.0, 7.0]
    """
    calib.check_quantizable(array)
    calibration = {
        key: numerics.scale_in_dtype(jnp.asarray(v), array.dtype)
        for key, v in calibration.items()
    }
    qtype = numerics.canonical_qtype(qtype)
    scale, zero_point = _float_scale(calibration, qtype)
    bounds = calib.range_ends(calibration) if clip_gradient else None
    return _quantized_scaled((qtype, noise_fn), array, scale, zero_point, bounds)


def fake_quant_with_scale(
    array: jax.Array,
    qtype: numerics.QType,
    scale: jax.Array,
    zero_point: jax.Array | None = None,
    noise_fn: numerics.NoiseFn | None = None,
    *,
    clip_gradient: bool = True,
) -> jax.Array:
    """Rounds an array to codes of a scale and zero point that are given.

    Args:
        array: Any shape, a float dtype.
        qtype: The type.
        scale: In a layout for the array.
        zero_point: None, or in the shape of the scale.
        noise_fn: Noise for stochastic rounding.
        clip_gradient: Whether the gradient is zero outside of the range that the
            scale and zero point stand for.

    Raises:
        ValueError: The scale does not fit the array.

    >>> fake_quant_with_scale(jnp.array([0.4, 3.2]), 'int4', jnp.array([0.5])).tolist()
    [0.5, 3.0]
    """
    calib.check_quantizable(array)
    qtype = numerics.canonical_qtype(qtype)
    scale = numerics.scale_in_dtype(jnp.asarray(scale), array.dtype)
    bounds = None
    if clip_gradient:
        high, zero = numerics.symmetric_bound(qtype), 0
        low = -high
        if zero_point is not None:
            low, high = numerics.asymmetric_bound(qtype)
            zero = zero_point.astype(scale.dtype)
        bounds = ((low - zero) * scale, (high - zero) * scale)
    return _quantized_scaled((qtype, noise_fn), array, scale, zero_point, bounds)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _fake_quant(how: HowToQuantize, array: jax.Array) -> jax.Array:
    calibration = calib.calibrate(array, how)
    scale, zero_point = _float_scale(calibration, how.qtype)
    return round_trip(array, scale, zero_point, how.qtype, how.noise_fn)


def _float_scale(
    calibration: dict[str, Any], qtype: numerics.QType
) -> tuple[jax.Array, jax.Array | None]:
    """The scale, as the float that it stands for if it is coded, and the zero point."""
    scale, zero_point = calib.compute_scale_zero_point(calibration, qtype)
    return scale.value if isinstance(scale, CodedScale) else scale, zero_point


@_fake_quant.defjvp
def _fake_quant_jvp(how: HowToQuantize, primals: Any, tangents: Any) -> Any:
    (array,), (tangent,) = primals, tangents
    out = _quantized(how, array)
    if not calib.passes_gradients(how.calibration_method):
        how = dataclasses.replace(how, noise_fn=None)
        with _known_mesh():
            covered = _is_covered(how, jax.lax.stop_gradient(array))
        tangent = jnp.where(covered, tangent, 0)
    return out, tangent


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _fake_quant_scaled(
    static: tuple[numerics.QType, numerics.NoiseFn | None],
    array: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array | None,
    bounds: tuple[jax.Array, jax.Array] | None,
) -> jax.Array:
    del bounds
    return round_trip(array, scale, zero_point, *static)


@_fake_quant_scaled.defjvp
def _fake_quant_scaled_jvp(static: Any, primals: Any, tangents: Any) -> Any:
    out = _quantized_scaled(static, *primals)
    array, bounds, tangent = primals[0], primals[3], tangents[0]
    if bounds is not None:
        with _known_mesh():
            inside = _is_inside(*jax.lax.stop_gradient((array, bounds)))
        tangent = jnp.where(inside, tangent, 0)
    return out, tangent


_cached_fake_quant = traced_once(0)(_fake_quant)
_cached_scaled = traced_once(0)(_fake_quant_scaled)
_is_inside = traced_once()(calib.is_inside)


@traced_once(0)
def _is_covered(how: HowToQuantize, array: jax.Array) -> jax.Array:
    return calib.is_inside(array, calib.range_ends(calib.calibrate(array, how)))


# Noise is not to be cached: each call may have its own. The derivatives come here, too,
# and find the trace of the value.
def _quantized(how: HowToQuantize, array: jax.Array) -> jax.Array:
    with _known_mesh():
        return (_cached_fake_quant if how.noise_fn is None else _fake_quant)(how, array)


def _quantized_scaled(static: Any, *operands: Any) -> jax.Array:
    cached = static[1] is None
    with _known_mesh():
        return (_cached_scaled if cached else _fake_quant_scaled)(static, *operands)


def _known_mesh() -> contextlib.AbstractContextManager[Any]:
    # Where no mesh is set, JAX sets an empty one while it computes derivatives, and
    # that is part of the key of a trace.
    return jax.sharding.use_abstract_mesh(jax.sharding.get_abstract_mesh())
