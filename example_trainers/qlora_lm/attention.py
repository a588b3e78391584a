"""Causal attention with rotary positions, for both dialects of Flax."""

import jax
import jax.numpy as jnp


def attend(query_key_value: jax.Array, heads: int) -> jax.Array:
    """Causal attention.

    Args:
        query_key_value: Shape `(batch, length, 3 * features)`: query, key and value,
            each of all heads.
        heads: The number of heads.

    Returns:
        Shape `(batch, length, features)`.
    """
    batch, length, _ = query_key_value.shape
    split = query_key_value.reshape(batch, length, 3, heads, -1)
    query, key, value = (split[:, :, i] for i in range(3))
    out = jax.nn.dot_product_attention(
        rotate(query), rotate(key), value, is_causal=True
    )
    return out.reshape(batch, length, -1)


def rotate(x: jax.Array) -> jax.Array:
    """Turns pairs of features by angles that grow with the position.

    Products of what was turned depend on the distance of positions alone (RoFormer,
    arXiv 2104.09864, section 3.2).

    Args:
        x: Shape `(batch, length, heads, features of a head)`.
    """
    half = x.shape[-1] // 2
    frequencies = 1e4 ** (-jnp.arange(half) / half)
    angles = jnp.arange(x.shape[1])[:, None, None] * frequencies
    first, second = jnp.split(x, 2, -1)
    cosine, sine = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate(
        [first * cosine - second * sine, first * sine + second * cosine], -1
    )
