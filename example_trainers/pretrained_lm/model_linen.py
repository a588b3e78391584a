"""The model in Flax Linen, its layers under `scan`, and its ordinary steps."""

import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.training import train_state

import qwix_train
from example_trainers.metrics import cross_entropy
from example_trainers.pretrained_lm.attention import attend
from example_trainers.pretrained_lm.checkpoint import (
    Architecture,
    Checkpoint,
    example_input,
)
from example_trainers.pretrained_lm.losses import divergence
from example_trainers.qlora_lm.measure import measure
from qwix_train import lora, ptq

Rules = Sequence[qwix_train.QuantizationRule]

jit = jax.jit


class Block(nn.Module):
    """Causal attention and a gated feed-forward layer, each added to its input."""

    sizes: Architecture

    @nn.compact
    def __call__(self, x, _):
        sizes = self.sizes
        dense = functools.partial(nn.Dense, use_bias=False)
        narrow = sizes.key_value_heads * sizes.head_features

        y = nn.RMSNorm(sizes.epsilon, name="attention_norm")(x)
        query = dense(sizes.features, name="query")(y)
        key, value = dense(narrow, name="key")(y), dense(narrow, name="value")(y)
        y = attend(query, key, value, sizes.head_features, sizes.rope_base)
        x = x + dense(sizes.features, name="out")(y)

        y = nn.RMSNorm(sizes.epsilon, name="feed_forward_norm")(x)
        gate, up = (
            dense(sizes.hidden, name="gate")(y),
            dense(sizes.hidden, name="up")(y),
        )
        return x + dense(sizes.features, name="down")(nn.silu(gate) * up), None


class LanguageModel(nn.Module):
    """A Llama whose logits read the table of tokens."""

    sizes: Architecture

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        sizes = self.sizes
        table = nn.Embed(sizes.vocabulary, sizes.features, name="embedding")
        layers = nn.scan(
            # Backward recomputes what a layer does: only its input is kept.
            nn.remat(Block, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=sizes.layers,
        )
        x, _ = layers(sizes, name="layers")(table(tokens), None)
        return table.attend(nn.RMSNorm(sizes.epsilon, name="norm")(x))


def create_state(checkpoint: Checkpoint) -> train_state.TrainState:
    """The float model; there is no optimizer."""
    params = jax.tree.map(jnp.asarray, checkpoint.params())
    return _state(LanguageModel(checkpoint.architecture), params)


def eval_step(state: train_state.TrainState, batch):
    logits = state.apply_fn({"params": state.params}, batch["input"])
    return measure(logits, batch)


def train_step(state: train_state.TrainState, batch):
    """One step of SGD: nothing in here knows what it trains."""

    def loss_fn(params):
        logits = state.apply_fn({"params": params}, batch["input"])
        return cross_entropy(logits, batch["target"]), logits

    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    (_, logits), grads = grad_fn(state.params)
    return state.apply_gradients(grads=grads), measure(logits, batch)


def distill_step(state: train_state.TrainState, teacher: train_state.TrainState, batch):
    """One step towards the probabilities of a teacher, which stays in float."""

    def loss_fn(params):
        logits = state.apply_fn({"params": params}, batch["input"])
        in_float = qwix_train.in_float(teacher.apply_fn)
        target = in_float({"params": teacher.params}, batch["input"])
        return divergence(target, logits), logits

    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    (_, logits), grads = grad_fn(state.params)
    return state.apply_gradients(grads=grads), measure(logits, batch)


def compile_step(step: Callable[..., Any]) -> Any:
    """A compiled step by the convention of the loop: a state goes in and comes out."""
    return jax.jit(step, donate_argnums=0)


def model_of(state: train_state.TrainState) -> train_state.TrainState:
    """What the eval step takes, of what is trained."""
    return state


def trained_state(
    state: train_state.TrainState, tx: optax.GradientTransformation
) -> train_state.TrainState:
    """A state in which all params are trained, copies of those of another."""
    params = jax.tree.map(jnp.copy, state.params)
    return train_state.TrainState.create(apply_fn=state.apply_fn, params=params, tx=tx)


def adapted_state(
    state: train_state.TrainState,
    tx: optax.GradientTransformation,
    rules: Rules,
) -> lora.LoraTrainState:
    """A state in which adapters are trained."""
    # A copy, because a train step takes over the buffers of the state it is given. The
    # optimizer needs no moments of the base.
    params = jax.tree.map(jnp.copy, state.params)
    state = train_state.TrainState(0, state.apply_fn, params, tx, opt_state=())
    return qwix_train.attach(state, rules, example_input(), rng=jax.random.key(0))


def merged(sizes: Architecture, state: lora.LoraTrainState) -> train_state.TrainState:
    """The float model with its adapters added to its params."""
    return _state(LanguageModel(sizes), lora.merge(state, to_float=True))


def save_peft(
    state: lora.LoraTrainState, names: Mapping[str, str], path: pathlib.Path
) -> None:
    lora.save_peft(path, state, names=names, overwrite=True)


def quantize(
    sizes: Architecture,
    state: train_state.TrainState,
    rules: Rules,
    quant_stats: Any = None,
) -> train_state.TrainState:
    """Rounds params to nearest."""
    return _state(
        *ptq.quantize(
            LanguageModel(sizes),
            state.params,
            list(rules),
            example_input(),
            quant_stats=quant_stats,
        )
    )


def quantize_with(
    sizes: Architecture,
    state: train_state.TrainState,
    method: Any,
    quant_stats: Any = None,
) -> train_state.TrainState:
    """The same by a method that looked at the inputs of weights, such as GPTQ."""
    model = qwix_train.quantize_model(LanguageModel(sizes), method.provider)
    params = method.quantize_params(state.params, _abstract(model), quant_stats)
    return _state(model, params)


def save(state: train_state.TrainState, rules: Rules, path: pathlib.Path) -> None:
    ptq.save(path, state.params, rules=rules, overwrite=True)


def restore(
    sizes: Architecture, rules: Rules, path: pathlib.Path
) -> train_state.TrainState:
    provider = qwix_train.PtqProvider(list(rules))
    model = qwix_train.quantize_model(LanguageModel(sizes), provider)
    return _state(model, ptq.restore(path, _abstract(model)))


def logits(state: train_state.TrainState, tokens: jax.Array) -> jax.Array:
    return state.apply_fn({"params": state.params}, tokens)


def params(state: train_state.TrainState) -> Any:
    return state.params, getattr(state, "frozen", {})


def compiled_train_step(
    state: train_state.TrainState, batch
) -> tuple[Callable[..., Any], jax.stages.Compiled]:
    """The train step, compiled ahead of time, and what was compiled."""
    compiled = compile_step(train_step).lower(state, batch).compile()
    return compiled, compiled


def to_tree(state: train_state.TrainState) -> Any:
    """What a checkpoint holds: not the frozen base, which does not change."""
    return {"step": state.step, "params": state.params, "opt_state": state.opt_state}


def from_tree(state: train_state.TrainState, tree: Any) -> train_state.TrainState:
    return state.replace(**tree)


def _state(model: nn.Module, params: Any) -> train_state.TrainState:
    nothing: Any = None
    return train_state.TrainState(0, model.apply, params, nothing, nothing)


def _abstract(model: nn.Module) -> Any:
    return jax.eval_shape(model.init, jax.random.key(0), example_input())["params"]
