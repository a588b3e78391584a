"""Noise for stochastic rounding.

A scaled value ``y`` is rounded to ``round(y + noise)``, with noise that is uniform
over one rounding step: to one of its two neighbors, and to ``y`` on average
(arXiv 1502.02551, section 3). `numerics.round_to_qtype` does it for every type.
"""

from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp

from qwix_train.core.numerics import NoiseFn

# The finalizer `lowbias32` of Chris Wellons' hash-prospector (public domain), found by
# search to have the least bias among those with two multiplications.
_SHIFTS = (16, 15, 16)
_FACTORS = (0x21F0AAAD, 0x735A2D97)


def _uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.uniform(key, shape, jnp.float32, -0.5, 0.5)


def _low_bit_uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    # The middles of 256 intervals, so that the mean is 0.
    bits = jax.random.bits(key, shape, jnp.uint8)
    return (bits.astype(jnp.float32) + 0.5) / 256 - 0.5


_NOISES: dict[str, Callable[[jax.Array, tuple[int, ...]], jax.Array]] = {
    "uniform": _uniform,
    "low_bit_uniform": _low_bit_uniform,
}
NOISE_NAMES = tuple(_NOISES)
"""The names of all kinds of noise."""


def noise_fn(
    name: str, key: jax.Array, channelwise_noise_axes: Collection[int] | None = None
) -> NoiseFn:
    """Makes a noise function.

    Args:
        name: ``uniform``: uniform in ``[-0.5, 0.5)``. ``low_bit_uniform``: of 8 random
            bits an element, with 256 values from -0.498 to 0.498; rounding is unbiased
            to 1/512 of a step.
        key: The random key. The same key gives the same noise.
        channelwise_noise_axes: The axes along which each index has noise of its own,
            which all elements along the other axes share. Less to draw, and rounding
            errors that do not average out along those. Negative axes count from the
            last one; those that an array does not have are left out, so that one
            collection will do for several ranks. None for all axes.

    Raises:
        ValueError: The name is unknown.

    >>> noise = noise_fn('uniform', jax.random.key(0), (0,))
    >>> noise((3, 4)).shape
    (3, 1)
    """
    if name not in _NOISES:
        raise ValueError(f"Unknown noise {name!r}; choose from {', '.join(_NOISES)}.")
    draw = _NOISES[name]

    def noise(shape: tuple[int, ...]) -> jax.Array:
        if channelwise_noise_axes is not None:
            ndim, axes = len(shape), channelwise_noise_axes
            kept = {axis + ndim if axis < 0 else axis for axis in axes}
            shape = tuple(n if axis in kept else 1 for axis, n in enumerate(shape))
        return draw(key, shape)

    return noise


def mixed(x: jax.Array, word: Any = 0) -> jax.Array:
    """Returns a hash of each word of an array: every bit depends on all of its bits.

    Args:
        x: Any shape, dtype=jnp.uint32.
        word: A second word, shape=(), that selects one of many hashes.

    Returns:
        The hashes, in the shape and dtype of ``x``.

    >>> mixed(jnp.arange(3, dtype=jnp.uint32)).tolist()
    [0, 2262003975, 229106191]
    """
    word = jnp.uint32(word)
    for shift, factor in zip(_SHIFTS, _FACTORS, strict=False):
        x = (x ^ (x >> shift)) * jnp.uint32(factor) + word
    return x ^ (x >> _SHIFTS[-1])


def key_of_data(key: jax.Array, data: jax.Array) -> jax.Array:
    """Derives a random key from another one, and from the bits of an array.

    The bits of each element are `mixed`, and the results added as integers: the sum is
    the same however the array is sharded.

    Args:
        key: A random key.
        data: Any shape, of a float dtype.

    >>> base = jax.random.key(0)
    >>> a, b = (key_of_data(base, jnp.array(x)) for x in ([1., 2.], [1., 3.]))
    >>> bool(a == b), bool(a == key_of_data(base, jnp.array([1., 2.])))
    (False, True)
    """
    bits = jax.lax.bitcast_convert_type(data.astype(jnp.float32), jnp.uint32)
    return jax.random.fold_in(key, jnp.sum(mixed(bits), dtype=jnp.uint32))
