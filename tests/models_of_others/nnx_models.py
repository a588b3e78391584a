"""Small NNX models, written as other projects write theirs."""

import jax
from flax import nnx
from jax import numpy as jnp

from tests.models_of_others.linen_models import causal_attention


class Block(nnx.Module):
    def __init__(self, rngs):
        self.qkv = nnx.LinearGeneral(8, (3, 2, 4), rngs=rngs)
        self.out = nnx.LinearGeneral((2, 4), 8, axis=(-2, -1), rngs=rngs)
        self.norm = nnx.RMSNorm(8, rngs=rngs)
        self.up = nnx.Linear(8, 12, rngs=rngs)
        self.down = nnx.Linear(12, 8, rngs=rngs)

    def __call__(self, x, capture=False):
        q, k, v = jnp.moveaxis(self.qkv(self.norm(x)), -3, 0)
        x = x + self.out(causal_attention(q, k, v))
        x = x + self.down(jax.nn.silu(self.up(x)))
        if capture:
            self.sow(nnx.Intermediate, "hidden", x)
        return x


class Decoder(nnx.Module):
    """Layers in an `nnx.List`, with intermediates, as in flax's `gemma` example."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 8, rngs=rngs)
        self.layers = nnx.List([Block(rngs) for _ in range(2)])
        self.head = nnx.Linear(8, 11, use_bias=False, rngs=rngs)

    def __call__(self, tokens, capture=False):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, capture)
        return self.head(x)
