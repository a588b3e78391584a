"""The same model and steps in Flax NNX."""

import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import qwix_train
from example_trainers.metrics import cross_entropy
from example_trainers.nnx_state import from_tree as from_tree
from example_trainers.nnx_state import to_tree as to_tree
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

jit = nnx.jit


class Block(nnx.Module):
    """Causal attention and a gated feed-forward layer, each added to its input."""

    def __init__(self, sizes: Architecture, *, rngs: nnx.Rngs):
        def dense(inputs: int, outputs: int) -> nnx.Linear:
            return nnx.Linear(inputs, outputs, use_bias=False, rngs=rngs)

        def norm() -> nnx.RMSNorm:
            return nnx.RMSNorm(sizes.features, epsilon=sizes.epsilon, rngs=rngs)

        self.sizes = sizes
        features, hidden = sizes.features, sizes.hidden
        narrow = sizes.key_value_heads * sizes.head_features
        self.attention_norm, self.feed_forward_norm = norm(), norm()
        self.query, self.out = dense(features, features), dense(features, features)
        self.key, self.value = dense(features, narrow), dense(features, narrow)
        self.gate, self.up = dense(features, hidden), dense(features, hidden)
        self.down = dense(hidden, features)

    def __call__(self, x):
        sizes = self.sizes
        y = self.attention_norm(x)
        query, key, value = self.query(y), self.key(y), self.value(y)
        x = x + self.out(
            attend(query, key, value, sizes.head_features, sizes.rope_base)
        )
        y = self.feed_forward_norm(x)
        return x + self.down(nnx.silu(self.gate(y)) * self.up(y))


class LanguageModel(nnx.Module):
    """A Llama whose logits read the table of tokens."""

    def __init__(self, sizes: Architecture, *, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=sizes.layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def create(rngs: nnx.Rngs) -> Block:
            return Block(sizes, rngs=rngs)

        self.embedding = nnx.Embed(sizes.vocabulary, sizes.features, rngs=rngs)
        self.layers = create(rngs)
        self.norm = nnx.RMSNorm(sizes.features, epsilon=sizes.epsilon, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        # Backward recomputes what a layer does: only its input is kept.
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        @functools.partial(nnx.remat, prevent_cse=False)
        def through(x, layer):
            return layer(x)

        x = through(self.embedding(tokens), self.layers)
        return self.embedding.attend(self.norm(x))


TrainState = tuple[LanguageModel, nnx.Optimizer]


def create_state(checkpoint: Checkpoint) -> LanguageModel:
    """The float model; there is no optimizer."""
    model = _abstract(checkpoint.architecture)
    nnx.update(model, jax.tree.map(jnp.asarray, checkpoint.params()))
    return model


def eval_step(model: LanguageModel, batch):
    return measure(model(batch["input"]), batch)


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


def distill_step(
    model: LanguageModel, optimizer: nnx.Optimizer, teacher: LanguageModel, batch
):
    """One step towards the probabilities of a teacher, which stays in float."""

    def loss_fn(model, teacher):
        logits = model(batch["input"])
        target = qwix_train.in_float(teacher)(batch["input"])
        return divergence(target, logits), logits

    grad_fn = nnx.value_and_grad(loss_fn, has_aux=True)
    (_, logits), grads = grad_fn(model, teacher)
    optimizer.update(model, grads)
    return measure(logits, batch)


def compile_step(step: Callable[..., Any]) -> Callable[..., Any]:
    """A compiled step by the convention of the loop: a state goes in and comes out."""
    compiled = nnx.jit(step)

    def with_state(state: TrainState, *inputs):
        return state, compiled(*state, *inputs)

    return with_state


def model_of(state: TrainState) -> LanguageModel:
    """What the eval step takes, of what is trained."""
    return state[0]


def trained_state(model: LanguageModel, tx: optax.GradientTransformation) -> TrainState:
    """A model all of whose params are trained, a copy of another."""
    model = nnx.clone(model)
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param)


def adapted_state(
    model: LanguageModel, tx: optax.GradientTransformation, rules: Rules
) -> TrainState:
    """A copy of a model with adapters, which are what is trained."""
    model = qwix_train.apply_lora_to_model(
        nnx.clone(model), lora.LoraProvider(rules), example_input(), rngs=nnx.Rngs(0)
    )
    return model, nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)


def merged(sizes: Architecture, state: TrainState) -> LanguageModel:
    """The float model with its adapters added to its params."""
    del sizes
    return lora.merge(nnx.clone(state[0]), example_input(), to_float=True)


def save_peft(state: TrainState, names: Mapping[str, str], path: pathlib.Path) -> None:
    adapters, _, layouts = lora.split(state[0], example_input())
    lora.save_peft(path, adapters, layouts, names=names, overwrite=True)


def quantize(
    sizes: Architecture, model: LanguageModel, rules: Rules, quant_stats: Any = None
) -> LanguageModel:
    """Rounds params to nearest."""
    del sizes
    quantized, _ = ptq.quantize(
        model, None, list(rules), example_input(), quant_stats=quant_stats
    )
    return quantized


def quantize_with(
    sizes: Architecture, model: LanguageModel, method: Any, quant_stats: Any = None
) -> LanguageModel:
    """The same by a method that looked at the inputs of weights, such as GPTQ."""
    quantized = qwix_train.quantize_model(
        _abstract(sizes), method.provider, example_input()
    )
    floats = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    nnx.update(quantized, method.quantize_params(floats, quantized, quant_stats))
    return quantized


def save(model: LanguageModel, rules: Rules, path: pathlib.Path) -> None:
    ptq.save(path, model, rules=rules, overwrite=True)


def restore(sizes: Architecture, rules: Rules, path: pathlib.Path) -> LanguageModel:
    provider = qwix_train.PtqProvider(list(rules))
    abstract = qwix_train.quantize_model(_abstract(sizes), provider, example_input())
    return ptq.restore(path, abstract)


def logits(model: LanguageModel, tokens: jax.Array) -> jax.Array:
    return model(tokens)


def params(model: LanguageModel) -> Any:
    return ptq.to_tree(model)


def compiled_train_step(
    state: TrainState, batch
) -> tuple[Callable[..., Any], jax.stages.Compiled]:
    """The train step, compiled ahead of time, and what was compiled."""
    graph, arrays = nnx.split(state)

    def pure(arrays, batch):
        merged = nnx.merge(graph, arrays)
        return train_step(*merged, batch), nnx.state(merged)

    compiled = jax.jit(pure).lower(arrays, batch).compile()

    def step(state: TrainState, batch):
        metrics, arrays = compiled(nnx.state(state), batch)
        nnx.update(state, arrays)
        return state, metrics

    return step, compiled


def _abstract(sizes: Architecture) -> LanguageModel:
    return nnx.eval_shape(lambda: LanguageModel(sizes, rngs=nnx.Rngs(0)))
