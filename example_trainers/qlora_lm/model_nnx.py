"""The same model and train step in Flax NNX."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
from flax import nnx

import qwix_train
from example_trainers import byte_text
from example_trainers.metrics import cross_entropy
from example_trainers.nnx_state import from_tree as from_tree
from example_trainers.nnx_state import to_tree as to_tree
from example_trainers.qlora_lm.attention import attend
from example_trainers.qlora_lm.measure import measure
from qwix_train import lora

Rules = Sequence[qwix_train.QuantizationRule]
TrainState = tuple["LanguageModel", nnx.Optimizer]


class Block(nnx.Module):
    """Causal attention and a feed-forward layer, each added to its input."""

    def __init__(self, features: int, heads: int, *, rngs: nnx.Rngs):
        def dense(inputs: int, outputs: int) -> nnx.Linear:
            return nnx.Linear(inputs, outputs, use_bias=False, rngs=rngs)

        self.heads = heads
        self.attention_norm = nnx.RMSNorm(features, rngs=rngs)
        self.query_key_value = dense(features, 3 * features)
        self.out = dense(features, features)
        self.feed_forward_norm = nnx.RMSNorm(features, rngs=rngs)
        self.up = dense(features, 4 * features)
        self.down = dense(4 * features, features)

    def __call__(self, x):
        y = self.query_key_value(self.attention_norm(x))
        x = x + self.out(attend(y, self.heads))
        return x + self.down(nnx.gelu(self.up(self.feed_forward_norm(x))))


class LanguageModel(nnx.Module):
    """A decoder-only transformer."""

    def __init__(self, features: int, heads: int, layers: int, *, rngs: nnx.Rngs):
        self.embedding = nnx.Embed(byte_text.VOCABULARY, features, rngs=rngs)
        self.layers = nnx.List(
            [Block(features, heads, rngs=rngs) for _ in range(layers)]
        )
        self.norm = nnx.RMSNorm(features, rngs=rngs)
        self.logits = nnx.Linear(
            features, byte_text.VOCABULARY, use_bias=False, rngs=rngs
        )

    def __call__(self, tokens):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.logits(self.norm(x))


def create_train_state(
    config: ml_collections.ConfigDict, tx: optax.GradientTransformation, seed: int
) -> TrainState:
    """A model all of whose weights are trained, newly initialized."""
    model = _create_model(config, seed)
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param)


def create_finetune_state(
    config: ml_collections.ConfigDict,
    trained: TrainState,
    tx: optax.GradientTransformation,
    rules: Rules,
    seed: int,
    like: Any = None,
) -> TrainState:
    """A copy of a model, with adapters if there are rules, and a fresh optimizer.

    Args:
        config: The settings.
        trained: The state after pre-training.
        tx: The optimizer.
        rules: Which weights get adapters; none to train all weights.
        seed: Seed of the adapters.
        like: A state that was made so with another seed, whose compiled steps are to
            serve this one, too.
    """
    # A copy, because an NNX step updates the model that it is given.
    model = nnx.clone(trained[0])
    if not rules:
        return model, nnx.Optimizer(model, tx, wrt=nnx.Param)
    model = qwix_train.apply_lora_to_model(
        model, lora.LoraProvider(rules), _tokens(config), rngs=nnx.Rngs(seed)
    )
    if like is not None:
        adapters = nnx.state(model, nnx.LoRAParam)
        model = nnx.clone(like[0])
        nnx.update(model, adapters)
    return model, nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)


def train_step(model: LanguageModel, optimizer: nnx.Optimizer, batch):
    """One step of SGD, of what the optimizer is for."""

    def loss_fn(model):
        logits = model(batch["input"])
        return cross_entropy(logits, batch["target"]), logits

    trained = nnx.DiffState(0, optimizer.wrt)
    grad_fn = nnx.value_and_grad(loss_fn, has_aux=True, argnums=trained)
    (_, logits), grads = grad_fn(model)
    optimizer.update(model, grads)
    return measure(logits, batch)


def eval_step(model: LanguageModel, batch):
    logits = model(batch["input"])
    return measure(logits, batch)


def compile_steps() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Returns the compiled train and eval steps."""
    train, evaluate = nnx.jit(train_step), nnx.jit(eval_step)

    # The loop's convention: a state goes in, and comes out.
    def train_state_step(state: TrainState, batch):
        return state, train(*state, batch)

    def eval_state_step(state: TrainState, batch):
        return evaluate(state[0], batch)

    return train_state_step, eval_state_step


def arrays(state: TrainState) -> dict[str, Any]:
    """The arrays of a state: those trained, those frozen, and the optimizer's."""
    model, optimizer = state
    trained, frozen = nnx.state(model, optimizer.wrt, nnx.Param)
    return {
        "trained": nnx.to_pure_dict(trained),
        "frozen": qwix_train.ptq.to_tree(frozen, nnx.Param),
        "optimizer": nnx.to_pure_dict(nnx.state(optimizer)),
    }


def export(
    config: ml_collections.ConfigDict,
    state: TrainState,
    rules: Rules,
    path: pathlib.Path,
) -> None:
    """Merges adapters if there are any, quantizes, and writes the model to serve."""
    model = nnx.clone(state[0])
    if state[1].wrt is nnx.LoRAParam:
        model = lora.merge(model, _tokens(config), to_float=True)
    qwix_train.ptq.save(
        path, _quantized(config, model, rules), rules=rules, overwrite=True
    )


def restore(
    config: ml_collections.ConfigDict, rules: Rules, path: pathlib.Path
) -> tuple[Callable[[Any, Any], Any], Any]:
    """Reads an exported model: a function of its params and tokens, and the params."""

    def create():
        return _quantized(config, _create_model(config, 0), rules)

    model = qwix_train.ptq.restore(path, nnx.eval_shape(create))
    graph, params = nnx.split(model)
    return lambda params, tokens: nnx.merge(graph, params)(tokens), params


def _create_model(config: ml_collections.ConfigDict, seed: int) -> LanguageModel:
    return LanguageModel(
        config.features, config.heads, config.layers, rngs=nnx.Rngs(seed)
    )


def _quantized(
    config: ml_collections.ConfigDict, model: LanguageModel, rules: Rules
) -> LanguageModel:
    provider = qwix_train.PtqProvider(list(rules))
    return qwix_train.quantize_model(model, provider, _tokens(config))


def _tokens(config: ml_collections.ConfigDict) -> jax.Array:
    return jnp.zeros((1, config.sequence_length), jnp.int32)
