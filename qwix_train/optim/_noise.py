"""Random bits for rounding, from a hash of the place of each element.

A bit generator that passes every test, such as JAX's, takes longer than the whole
update of an optimizer, and keeps its bits in memory. Rounding needs 16 bits an element
that are uniform and independent of what is rounded. A hash gives them within the loop
that rounds, and for each shard of an array without the others.
"""

import jax
import jax.numpy as jnp

from qwix_train.core.stochastic_rounding import mixed

# 2**32 divided by the golden ratio: the bits of neighbors differ from the start.
_GOLDEN = 0x9E3779B9


def bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns uniform bits for each element of an array.

    Args:
        key: The data of a key that `jax.random.split` or `jax.random.fold_in` made:
            its bits must be random themselves. Only the first two words count.
            shape=(n,) with n >= 2, dtype=jnp.uint32.
        shape: The shape of the array.

    Returns:
        The bits, dtype=jnp.uint32. The same key and shape give the same bits.

    >>> x = bits(jnp.array([1, 2], jnp.uint32), (1000, 1000))
    >>> bool(abs(x.astype(jnp.float32).mean() * 2.0**-32 - 0.5) < 0.002)
    True
    """
    index = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        index = index * jnp.uint32(size)
        index += jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    # Both words: with one, two keys would give the same bits, to other elements.
    return mixed(index * jnp.uint32(_GOLDEN) ^ key[0], key[1])
