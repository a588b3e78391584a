"""Quantizes whole params, compiled, so that no intermediate of their size is made."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from jax.core import Tracer

from qwix_train.core import numerics
from qwix_train.core.how import HowToQuantize
from qwix_train.core.qarray import (
    QArray,
    quantize_array,
    quantize_with_scale_zero_point,
)


def quantize_compiled(
    array: Any, how: HowToQuantize, scale: Any = None, zero_point: Any = None
) -> QArray:
    """What `quantize_array` gives, bit for bit.

    Args:
      array: any shape, a float dtype.
      how: how to quantize it.
      scale: its scale, in the place of that of its range; see
        `quantize_with_scale_zero_point`.
      zero_point: its zero point, next to the scale.

    Raises:
      ValueError: `how` does not fit the array.

    Example:
      >>> how = HowToQuantize(qtype="int4", calibration_method="fixed,-7.5,7.5")
      >>> quantize_compiled(jnp.array([0.4, 3.2, 9.0]), how).qvalue.tolist()
      [0, 3, 7]
    """
    array = jnp.asarray(array)
    dtype = numerics.storage_dtype(how.qtype)
    if isinstance(array, Tracer) or not wants_bytes(dtype, array.devices()):
        return _quantize(array, how, scale, zero_point)
    quantized = _quantize_to_bytes(array, how, scale, zero_point)
    return dataclasses.replace(quantized, qvalue=of_bytes(quantized.qvalue, dtype))


def wants_bytes(dtype: Any, devices: Collection[Any]) -> bool:
    """Whether codes are to be computed in bytes on some devices, for `of_bytes`.

    XLA for CPUs writes half bytes one by one, with JAX 0.10 some twenty times slower
    than whole bytes.

    Args:
      dtype: the dtype that stores the codes.
      devices: the devices.
    """
    on_one_cpu = len(devices) == 1 and next(iter(devices)).platform == "cpu"
    return dtype in (jnp.int4, jnp.uint4) and on_one_cpu


def of_bytes(codes: jax.Array, dtype: Any) -> jax.Array:
    """Codes of 4 bits that are in bytes, on the same device.

    JAX packs them in a loop of its own when it takes them over from NumPy, which holds
    each code in a byte.
    """
    target = codes.sharding if codes.committed else None
    return jax.device_put(np.asarray(codes).view(dtype), target)


@functools.partial(jax.jit, static_argnums=1)
def _quantize(array: jax.Array, how: HowToQuantize, scale: Any, zero: Any) -> QArray:
    if scale is None:
        return quantize_array(array, how)
    return quantize_with_scale_zero_point(array, how.qtype, scale, zero)


@functools.partial(jax.jit, static_argnums=1)
def _quantize_to_bytes(
    array: jax.Array, how: HowToQuantize, scale: Any, zero: Any
) -> QArray:
    """The array with codes of 4 bits, each in a byte."""
    quantized = _quantize(array, how, scale, zero)
    codes = quantized.qvalue.astype(jnp.int8)
    return dataclasses.replace(quantized, qvalue=codes)
