"""The model and its train step in Flax Linen."""

import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import optax
from flax.training import train_state

import qwix_train
from example_trainers import byte_text
from example_trainers.metrics import cross_entropy
from example_trainers.qlora_lm.attention import attend
from example_trainers.qlora_lm.measure import measure
from qwix_train import lora

Rules = Sequence[qwix_train.QuantizationRule]


class Block(nn.Module):
    """Causal attention and a feed-forward layer, each added to its input."""

    heads: int

    @nn.compact
    def __call__(self, x):
        features = x.shape[-1]
        dense = functools.partial(nn.Dense, use_bias=False)

        y = nn.RMSNorm(name="attention_norm")(x)
        y = dense(3 * features, name="query_key_value")(y)
        x = x + dense(features, name="out")(attend(y, self.heads))

        y = nn.RMSNorm(name="feed_forward_norm")(x)
        y = nn.gelu(dense(4 * features, name="up")(y))
        return x + dense(features, name="down")(y)


class LanguageModel(nn.Module):
    """A decoder-only transformer."""

    features: int
    heads: int
    layers: int

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(byte_text.VOCABULARY, self.features, name="embedding")(tokens)
        for layer in range(self.layers):
            x = Block(self.heads, name=f"layer_{layer}")(x)
        x = nn.RMSNorm(name="norm")(x)
        return nn.Dense(byte_text.VOCABULARY, use_bias=False, name="logits")(x)


# jit compares a state's `apply_fn` by identity: with one module for all seeds, each
# step compiles once.
@functools.cache
def create_model(config: ml_collections.FrozenConfigDict) -> LanguageModel:
    return LanguageModel(config.features, config.heads, config.layers)


def create_train_state(
    config: ml_collections.ConfigDict, tx: optax.GradientTransformation, seed: int
) -> train_state.TrainState:
    """A state of all weights, newly initialized."""
    model = _model(config)
    params = jax.jit(model.init)(jax.random.key(seed), _tokens(config))["params"]
    return train_state.TrainState.create(apply_fn=model.apply, params=params, tx=tx)


def create_finetune_state(
    config: ml_collections.ConfigDict,
    trained: train_state.TrainState,
    tx: optax.GradientTransformation,
    rules: Rules,
    seed: int,
    like: Any = None,
) -> train_state.TrainState:
    """A state of all weights, or of adapters alone where there are rules.

    Args:
        config: The settings.
        trained: The state after pre-training.
        tx: The optimizer.
        rules: Which weights get adapters; none to train all weights.
        seed: Seed of the adapters.
        like: A state that was made so with another seed, whose compiled steps are to
            serve this one, too.
    """
    # Copies, because a train step takes over the buffers of the state it is given.
    params = jax.tree.map(jnp.copy, trained.params)
    apply_fn = _model(config).apply
    if not rules:
        return train_state.TrainState.create(apply_fn=apply_fn, params=params, tx=tx)
    # The optimizer needs no moments of the base.
    state = train_state.TrainState(0, apply_fn, params, tx, opt_state=())
    key = jax.random.key(seed)
    state = qwix_train.attach(state, rules, _tokens(config), rng=key)
    # jit compares the functions of states by identity, too.
    return state if like is None else state.replace(apply_fn=like.apply_fn)


def train_step(state: train_state.TrainState, batch):
    """One step of SGD: nothing in here knows what it trains."""

    def loss_fn(params):
        logits = state.apply_fn({"params": params}, batch["input"])
        return cross_entropy(logits, batch["target"]), logits

    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    (_, logits), grads = grad_fn(state.params)
    return state.apply_gradients(grads=grads), measure(logits, batch)


def eval_step(state: train_state.TrainState, batch):
    logits = state.apply_fn({"params": state.params}, batch["input"])
    return measure(logits, batch)


def compile_steps() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Returns the compiled train and eval steps."""
    return jax.jit(train_step, donate_argnums=0), jax.jit(eval_step)


def arrays(state: train_state.TrainState) -> dict[str, Any]:
    """The arrays of a state: those trained, those frozen, and the optimizer's."""
    return {
        "trained": state.params,
        "frozen": getattr(state, "frozen", {}),
        "optimizer": state.opt_state,
    }


def export(
    config: ml_collections.ConfigDict,
    state: train_state.TrainState,
    rules: Rules,
    path: pathlib.Path,
) -> None:
    """Merges adapters if there are any, quantizes, and writes the model to serve."""
    params = state.params
    if isinstance(state, lora.LoraTrainState):
        params = lora.merge(state, to_float=True)
    _, quantized = qwix_train.ptq.quantize(
        _model(config), params, list(rules), _tokens(config)
    )
    qwix_train.ptq.save(path, quantized, rules=rules, overwrite=True)


def restore(
    config: ml_collections.ConfigDict, rules: Rules, path: pathlib.Path
) -> tuple[Callable[[Any, Any], Any], Any]:
    """Reads an exported model: a function of its params and tokens, and the params."""
    provider = qwix_train.PtqProvider(list(rules))
    model = qwix_train.quantize_model(_model(config), provider)
    tokens = _tokens(config)
    abstract = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    params = qwix_train.ptq.restore(path, abstract)

    def predict(params: Any, tokens: Any) -> Any:
        return model.apply({"params": params}, tokens)

    return predict, params


def to_tree(state: train_state.TrainState) -> Any:
    """What a checkpoint holds: not the frozen base, which does not change."""
    return {"step": state.step, "params": state.params, "opt_state": state.opt_state}


def from_tree(state: train_state.TrainState, tree: Any) -> train_state.TrainState:
    return state.replace(**tree)


def _model(config: ml_collections.ConfigDict) -> LanguageModel:
    return create_model(ml_collections.FrozenConfigDict(config))


def _tokens(config: ml_collections.ConfigDict) -> jax.Array:
    return jnp.zeros((1, config.sequence_length), jnp.int32)
