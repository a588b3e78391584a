"""Text from a language model that sees a fixed number of bytes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def sample(
    predict: Callable[[Any, Any], jax.Array],
    params: Any,
    prompt: Any,
    *,
    length: int,
    temperature: float,
    seed: int,
) -> bytes:
    """Continues a text.

    Args:
        predict: Takes params, and bytes of shape `(1, length of the prompt)`; returns
            the logits of the byte after each.
        params: The params.
        prompt: The bytes to continue, as many as the model sees at once.
        length: How many bytes to write.
        temperature: What logits are divided by.
        seed: Seed of the draws.
    """

    @jax.jit
    def write_all(params, window, keys):
        def step(window, key):
            logits = predict(params, window[None])[0, -1]
            byte = jax.random.categorical(key, logits / temperature)
            byte = byte.astype(window.dtype)
            return jnp.append(window[1:], byte), byte

        return jax.lax.scan(step, window, keys)[1]

    keys = jax.random.split(jax.random.key(seed), length)
    return bytes(write_all(params, jnp.asarray(prompt), keys).tolist())
