"""The language model and its steps: nothing in here knows of quantization."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import optax
from clu import metrics as clu_metrics
from flax import struct
from flax.training import train_state

from example_trainers import byte_text


class Block(nn.Module):
    """Causal attention and a feed-forward layer, each added to its input."""

    heads: int

    @nn.compact
    def __call__(self, x, _):
        batch, length, features = x.shape
        dense = functools.partial(nn.Dense, use_bias=False)

        y = nn.RMSNorm(name="attention_norm")(x)
        y = dense(3 * features, name="query_key_value")(y)
        query, key, value = jnp.split(y.reshape(batch, length, self.heads, -1), 3, -1)
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
        mask = jnp.tril(jnp.ones((length, length), bool))
        weights = nn.softmax(jnp.where(mask, scores, -1e9))
        y = jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(x.shape)
        x = x + dense(features, name="out")(y)

        y = nn.RMSNorm(name="feed_forward_norm")(x)
        y = nn.gelu(dense(4 * features, name="up")(y))
        return x + dense(features, name="down")(y), None


class LanguageModel(nn.Module):
    """A decoder-only transformer, its layers under `scan`."""

    features: int
    heads: int
    layers: int
    max_length: int

    @nn.compact
    def __call__(self, tokens):
        init = nn.initializers.normal(0.02)
        x = nn.Embed(byte_text.VOCABULARY, self.features, name="embedding")(tokens)
        position = self.param("position", init, (self.max_length, self.features))
        x = x + position[: tokens.shape[1]]
        layers = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.layers,
        )
        x, _ = layers(self.heads, name="layers")(x, None)
        x = nn.RMSNorm(name="norm")(x)
        return nn.Dense(byte_text.VOCABULARY, use_bias=False, name="logits")(x)


@struct.dataclass
class Metrics(clu_metrics.Collection):
    accuracy: clu_metrics.Accuracy
    loss: clu_metrics.Average.from_output("loss")  # pyright: ignore[reportInvalidTypeForm]


def create_model(config: ml_collections.ConfigDict) -> LanguageModel:
    return LanguageModel(
        features=config.features,
        heads=config.heads,
        layers=config.layers,
        max_length=config.sequence_length,
    )


def example_input(config: ml_collections.ConfigDict) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, config.sequence_length), jnp.int32)


def create_params(config: ml_collections.ConfigDict) -> Any:
    tokens = jnp.zeros((1, config.sequence_length), jnp.int32)
    init = jax.jit(create_model(config).init)
    return init(jax.random.key(config.seed), tokens)["params"]


def create_train_state(
    config: ml_collections.ConfigDict, params: Any, tx: optax.GradientTransformation
) -> train_state.TrainState:
    # A copy, because the train step takes over the buffers of the state it is given.
    return train_state.TrainState.create(
        apply_fn=create_model(config).apply,
        params=jax.tree.map(jnp.copy, params),
        tx=tx,
    )


def train_step(state: train_state.TrainState, batch):
    def loss_fn(params):
        logits = state.apply_fn({"params": params}, batch["input"])
        return _loss(logits, batch["target"]), logits

    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, logits), grads = grad_fn(state.params)
    return state.apply_gradients(grads=grads), _metrics(loss, logits, batch)


def eval_step(state: train_state.TrainState, batch):
    logits = state.apply_fn({"params": state.params}, batch["input"])
    return _metrics(_loss(logits, batch["target"]), logits, batch)


def _loss(logits: jax.Array, targets: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def _metrics(loss: jax.Array, logits: jax.Array, batch) -> Metrics:
    # `clu` counts one label for each row of logits.
    return Metrics.single_from_model_output(
        loss=loss,
        logits=logits.reshape(-1, logits.shape[-1]),
        labels=batch["target"].reshape(-1),
    )
