"""Attention of the models, for both dialects of Flax."""

import jax
import jax.numpy as jnp


def attend(
    query: jax.Array, key: jax.Array, value: jax.Array, features: int, base: float
) -> jax.Array:
    """Causal attention with rotary positions, several queries to a key.

    Args:
        query: Shape `(batch, length, heads * features)`.
        key: Shape `(batch, length, key_value_heads * features)`.
        value: The same.
        features: The features of a head.
        base: What the longest period grows with.

    Returns:
        The shape of the query.
    """
    query, key, value = (
        x.reshape(*x.shape[:2], -1, features) for x in (query, key, value)
    )
    out = jax.nn.dot_product_attention(
        rotate(query, base), rotate(key, base), value, is_causal=True
    )
    return out.reshape(*out.shape[:2], -1)


def rotate(x: jax.Array, base: float) -> jax.Array:
    """Turns features that are half a head apart by angles that grow with the position.

    RoFormer, arXiv 2104.09864, section 3.2.

    Args:
        x: Shape `(batch, length, heads, features)`.
        base: The first pair turns by one radian for each position, and pair `i` of `n`
            by `base ** (-i / n)`.
    """
    half = x.shape[-1] // 2
    frequencies = base ** (-jnp.arange(half) / half)
    angles = jnp.arange(x.shape[1])[:, None, None] * frequencies
    first, second = jnp.split(x, 2, -1)
    cosine, sine = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate(
        [first * cosine - second * sine, first * sine + second * cosine], -1
    )
