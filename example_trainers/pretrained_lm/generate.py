"""Text from a model, one token at a time."""

from types import ModuleType
from typing import Any

import jax.numpy as jnp

from example_trainers.pretrained_lm.checkpoint import Tokenizer


def answer(
    framework: ModuleType, state: Any, tokenizer: Tokenizer, prompt: str, count: int
) -> str:
    """Returns the most likely answer to a message, without a cache.

    Args:
        framework: The dialect of Flax.
        state: The model.
        tokenizer: Its tokenizer.
        prompt: The message.
        count: The number of tokens to write.
    """
    start = tokenizer.encode(
        f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    )
    # The model sees no token that follows: those to come may be anything.
    tokens = jnp.zeros((1, len(start) + count), jnp.int32)
    tokens = tokens.at[0, : len(start)].set(jnp.asarray(start))

    @framework.jit
    def next_token(state, tokens, position):
        return framework.logits(state, tokens)[0, position].argmax()

    for position in range(len(start) - 1, len(start) + count - 1):
        found = next_token(state, tokens, position)
        tokens = tokens.at[0, position + 1].set(found)
    return tokenizer.decode(tokens[0, len(start) :].tolist())
