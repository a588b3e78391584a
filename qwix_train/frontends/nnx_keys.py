"""The stream of random keys that a mode keeps in an NNX model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from qwix_train.trace.function import TracedCall

# The attribute of a model that holds the stream.
ATTRIBUTE = "mode_keys"


class KeyStream(nnx.Module):
    """Draws the keys of a mode, such as those of dropout.

    `model.train()` and `model.eval()` switch it, as they do `nnx.Dropout`.
    """

    def __init__(self, stream: str, rngs: nnx.Rngs | None):
        """Takes a stream of keys.

        Args:
          stream: the name of the stream.
          rngs: what it is forked from; from seed 0 if None.
        """
        self.deterministic = False
        self.rngs: nnx.Rngs = nnx.Rngs(0 if rngs is None else rngs[stream]())

    def key(self) -> jax.Array:
        """A new key."""
        return self.rngs()


def hold(model: nnx.Module, stream: str, rngs: nnx.Rngs | None) -> None:
    """Gives a model a stream of keys, in place.

    Args:
      model: the model.
      stream: the name of the stream.
      rngs: what it is forked from; from seed 0 if None.
    """
    setattr(model, ATTRIBUTE, KeyStream(stream, rngs))


def remove(model: nnx.Module) -> None:
    """Takes the stream of keys from a model that has one, in place."""
    if hasattr(model, ATTRIBUTE):
        delattr(model, ATTRIBUTE)


def drawn(
    model: nnx.Module, rewrite: Callable[[TracedCall], Any]
) -> Callable[[TracedCall], Any]:
    """What a mode does to a call of a model, with a key of the stream that it holds.

    Args:
      model: the model.
      rewrite: what the mode does to a traced call.
    """
    held = getattr(model, ATTRIBUTE, None)
    if held is None:
        return rewrite
    off = bool(held.deterministic)
    key = None if off else held.key()

    def rewrite_with_key(traced):
        return rewrite(
            dataclasses.replace(traced, make_rng=lambda name: key, deterministic=off)
        )

    return rewrite_with_key
