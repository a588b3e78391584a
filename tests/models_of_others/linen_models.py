"""Small Linen models, written as other projects write theirs."""

import dataclasses
import functools
from typing import Any

import jax
from flax import linen as nn
from jax import numpy as jnp


@dataclasses.dataclass(frozen=True)
class Config:
    vocab: int = 11
    width: int = 8
    heads: int = 2
    layers: int = 2


def causal_attention(q, k, v):
    """Of heads on the second last axis."""
    scores = jnp.einsum("BTNH,BSNH->BNTS", q, k) / q.shape[-1] ** 0.5
    mask = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    weights = jax.nn.softmax(jnp.where(mask, scores, -1e30))
    return jnp.einsum("BNTS,BSNH->BTNH", weights, v)


class Einsum(nn.Module):
    """A product with a weight of any shape, as in DeepMind's `gemma`."""

    shape: tuple[int, ...]

    @nn.compact
    def __call__(self, equation, x):
        w = self.param("w", nn.initializers.normal(0.3), self.shape)
        return jnp.einsum(equation, x, w)


class GemmaBlock(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x):
        c = self.config
        size = c.width // c.heads
        y = nn.RMSNorm()(x)
        # Query, key and value are one weight.
        qkv = Einsum((3, c.heads, c.width, size), name="qkv_einsum")(
            "BTD,SNDH->SBTNH", y
        )
        out = causal_attention(*qkv)
        vector = Einsum((c.heads, size, c.width), name="attn_vec_einsum")
        x = x + vector("BTNH,NHD->BTD", out)
        gate, up = Einsum((2, c.width, 16), name="gating_einsum")("BTD,CDF->CBTF", x)
        return x + Einsum((16, c.width), name="linear")(
            "BTF,FD->BTD", nn.gelu(gate) * up
        )


class Gemma(nn.Module):
    """A decoder whose fields and whose top method are not what Linen gives.

    Attributes of the config are found on the model, and the top method is jitted.
    """

    config: Config = Config()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.config, name)

    @functools.partial(nn.jit, static_argnames="last_only")
    @nn.compact
    def __call__(self, tokens, last_only=False):
        table = self.param(
            "embedding", nn.initializers.normal(1.0), (self.vocab, self.width)
        )
        x = table[tokens]
        for i in range(self.layers):
            x = GemmaBlock(self.config, name=f"layer_{i}")(x)
        x = nn.RMSNorm(name="final_norm")(x)
        if last_only:
            x = x[:, -1:]
        return x @ table.T


class Experts(nn.Module):
    """A mixture of experts: raw stacked params, tokens sent out by one-hot products."""

    experts: int = 3
    width: int = 8
    hidden: int = 12

    @nn.compact
    def __call__(self, x):
        router = nn.Dense(self.experts, use_bias=False, name="router")
        gates = jax.nn.softmax(router(x))
        # Each expert has room for every token.
        chosen = jax.nn.one_hot(jnp.argmax(gates, -1), self.experts, dtype=x.dtype)
        sent = jnp.einsum("BTE,BTD->EBTD", chosen, x)
        init = nn.initializers.normal(0.4)
        w_in = self.param("w_in", init, (self.experts, self.width, self.hidden))
        w_out = self.param("w_out", init, (self.experts, self.hidden, self.width))
        hidden = nn.relu(jnp.einsum("EBTD,EDF->EBTF", sent, w_in))
        out = jnp.einsum("EBTF,EFD->EBTD", hidden, w_out)
        return x + jnp.einsum("EBTD,BTE->BTD", out, chosen * gates)


class ScannedBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        y = nn.Dense(12, name="up")(nn.LayerNorm(name="norm")(x))
        return x + nn.Dense(8, name="down")(nn.gelu(y)), None


class ScannedDecoder(nn.Module):
    """Layers that are stacked on axis 1 of each param, as MaxText has them."""

    @nn.compact
    def __call__(self, x):
        stack = nn.scan(
            nn.remat(ScannedBlock),
            variable_axes={"params": 1},
            split_rngs={"params": True},
            length=3,
        )
        x, _ = stack(name="layers")(x, None)
        return nn.Dense(5, name="logits")(x)


class Vae(nn.Module):
    """Several methods, as in flax's example; training calls the first."""

    def setup(self):
        self.hidden = nn.Dense(10)
        self.mean = nn.Dense(4)
        self.log_variance = nn.Dense(4)
        self.up = nn.Dense(10)
        self.out = nn.Dense(8)

    def __call__(self, x):
        mean, log_variance = self.encode(x)
        # The draw of a run that repeats itself.
        noise = jnp.linspace(-1, 1, mean.size).reshape(mean.shape)
        return self.decode(mean + noise * jnp.exp(log_variance / 2))

    def encode(self, x):
        x = nn.relu(self.hidden(x))
        return self.mean(x), self.log_variance(x)

    def decode(self, z):
        return self.out(nn.relu(self.up(z)))


class PaddedEncoder(nn.Module):
    """Self-attention over sequences of different lengths, padded to one."""

    @nn.compact
    def __call__(self, x, lengths):
        inside = jnp.arange(x.shape[1]) < lengths[:, None]
        mask = nn.make_attention_mask(inside, inside)
        y = nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(x, mask=mask)
        x = nn.LayerNorm(name="norm")(x + y)
        pooled = jnp.sum(x * inside[..., None], 1) / lengths[:, None]
        return nn.Dense(3, name="head")(pooled)
