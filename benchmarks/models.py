"""The models that the benchmarks train, and an ordinary Flax train step."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.training import train_state


class Block(nn.Module):
    width: int
    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm(dtype=self.dtype)(x)
        x += nn.MultiHeadDotProductAttention(self.heads, dtype=self.dtype)(y, y)
        y = nn.LayerNorm(dtype=self.dtype)(x)
        y = nn.gelu(nn.Dense(4 * self.width, dtype=self.dtype)(y))
        return x + nn.Dense(self.width, dtype=self.dtype)(y)


class Transformer(nn.Module):
    """A pre-norm transformer; its layers are unrolled."""

    layers: int
    width: int
    vocabulary: int = 1024
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens, train=True):
        x = nn.Embed(self.vocabulary, self.width, dtype=self.dtype)(tokens)
        for _ in range(self.layers):
            x = Block(self.width, max(1, self.width // 64), self.dtype)(x)
        x = nn.LayerNorm(dtype=self.dtype)(x)
        return nn.Dense(self.vocabulary, dtype=self.dtype)(x)


class DecoderBlock(nn.Module):
    """Causal attention with one matrix for query, key and value, then two layers."""

    width: int
    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        def dense(features: int, name: str) -> nn.Dense:
            return nn.Dense(features, use_bias=False, dtype=self.dtype, name=name)

        y = nn.RMSNorm(dtype=self.dtype)(x)
        y = dense(3 * self.width, "query_key_value")(y)
        y = y.reshape(*y.shape[:2], self.heads, -1)
        query, key, value = jnp.split(y, 3, axis=-1)
        y = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        x += dense(self.width, "out")(y.reshape(x.shape))
        y = nn.RMSNorm(dtype=self.dtype)(x)
        y = nn.gelu(dense(4 * self.width, "up")(y))
        return x + dense(self.width, "down")(y)


class Decoder(nn.Module):
    """A decoder-only transformer; its layers are unrolled."""

    layers: int
    width: int
    vocabulary: int = 1024
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(self.vocabulary, self.width, dtype=self.dtype)(tokens)
        for _ in range(self.layers):
            x = DecoderBlock(self.width, max(1, self.width // 64), self.dtype)(x)
        x = nn.RMSNorm(dtype=self.dtype)(x)
        return nn.Dense(self.vocabulary, use_bias=False, dtype=self.dtype)(x)


class ResidualBlock(nn.Module):
    features: int
    strides: int
    dtype: Any

    @nn.compact
    def __call__(self, x, train):
        strides = (self.strides, self.strides)

        def conv(y, kernel, strides):
            y = nn.Conv(
                self.features, kernel, strides, use_bias=False, dtype=self.dtype
            )(y)
            return nn.BatchNorm(use_running_average=not train, dtype=self.dtype)(y)

        y = nn.relu(conv(x, (3, 3), strides))
        y = conv(y, (3, 3), (1, 1))
        if x.shape != y.shape:
            x = conv(x, (1, 1), strides)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """A ResNet for small images: three stages of two blocks, with BatchNorm."""

    width: int = 32
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.Conv(self.width, (3, 3), use_bias=False, dtype=self.dtype)(x)
        for stage in range(3):
            for block in range(2):
                strides = 2 if stage and not block else 1
                x = ResidualBlock(self.width << stage, strides, self.dtype)(x, train)
        return nn.Dense(10, dtype=self.dtype)(x.mean((1, 2)))


class TrainState(train_state.TrainState):
    batch_stats: Any


def train_step(state, batch):
    """One step of a loop that knows nothing of quantization."""

    def loss_fn(params):
        logits, updates = state.apply_fn(
            {"params": params, "batch_stats": state.batch_stats},
            batch["x"],
            mutable=["batch_stats"],
        )
        loss = optax.softmax_cross_entropy_with_integer_labels(
            logits.astype(jnp.float32), batch["y"]
        )
        return loss.mean(), updates

    (loss, updates), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    stats = updates.get("batch_stats", state.batch_stats)
    return state.apply_gradients(grads=grads, batch_stats=stats), loss


@dataclasses.dataclass(frozen=True)
class Task:
    """A model, and a batch to train it on."""

    name: str
    model: nn.Module
    batch: dict[str, jax.Array]

    def state(self) -> TrainState:
        """A fresh train state."""
        variables = jax.jit(self.model.init)(jax.random.key(0), self.batch["x"])
        return TrainState.create(
            apply_fn=self.model.apply,
            params=variables["params"],
            batch_stats=variables.get("batch_stats", {}),
            tx=optax.adam(1e-3),
        )


def transformer(
    layers: int, width: int, batch: int, tokens: int, dtype: Any = jnp.float32
) -> Task:
    model = Transformer(layers, width, dtype=dtype)
    name = f"transformer, {layers} layers, d={width}, {batch}x{tokens} tokens"
    return Task(name, model, _next_tokens(batch, tokens, model.vocabulary))


def decoder(
    layers: int, width: int, batch: int, tokens: int, dtype: Any = jnp.float32
) -> Task:
    model = Decoder(layers, width, dtype=dtype)
    name = f"decoder, {layers} layers, d={width}, {batch}x{tokens} tokens"
    return Task(name, model, _next_tokens(batch, tokens, model.vocabulary))


def _next_tokens(batch: int, tokens: int, vocabulary: int) -> dict[str, jax.Array]:
    x = jax.random.randint(jax.random.key(1), (batch, tokens), 0, vocabulary)
    return {"x": x, "y": jnp.roll(x, -1, axis=1)}


def resnet(width: int, batch: int, size: int, dtype: Any = jnp.float32) -> Task:
    x = jax.random.normal(jax.random.key(1), (batch, size, size, 3), dtype)
    y = jax.random.randint(jax.random.key(2), (batch,), 0, 10)
    name = f"ResNet, 15 convolutions, width {width}, {batch} images of {size}x{size}"
    return Task(name, ResNet(width, dtype), {"x": x, "y": y})
