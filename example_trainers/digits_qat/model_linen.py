"""The model and its train step in Flax Linen."""

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from flax.training import train_state

import qwix_train
from example_trainers import metrics

IMAGE = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)


class CNN(nn.Module):
    """Three convolutions with BatchNorm, and a classifier."""

    features: tuple[int, ...]

    @nn.compact
    def __call__(self, x, *, train: bool):
        for i, features in enumerate(self.features):
            strides = (1, 1) if i == 0 else (2, 2)
            x = nn.Conv(features, (3, 3), strides, use_bias=False)(x)
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
            x = nn.relu(x)
        x = x.reshape(x.shape[0], -1)
        return nn.Dense(10)(x)


class TrainState(train_state.TrainState):
    batch_stats: Any


# jit compares a state's `apply_fn` by identity: with one module for all seeds, each
# step compiles once.
@functools.cache
def create_model(features: tuple[int, ...]) -> CNN:
    return CNN(features)


def create_train_state(
    config: ml_collections.ConfigDict, tx: optax.GradientTransformation, seed: int
) -> TrainState:
    model = create_model(tuple(config.features))
    image = jnp.zeros(IMAGE.shape, IMAGE.dtype)
    variables = model.init(jax.random.key(seed), image, train=False)
    return TrainState.create(
        apply_fn=model.apply,
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        tx=tx,
    )


def create_finetune_state(
    state: TrainState, tx: optax.GradientTransformation
) -> TrainState:
    """Returns the same weights and statistics, with a fresh optimizer."""
    # Copies, because the train step takes over the buffers of the state it is given.
    params, batch_stats = jax.tree.map(jnp.copy, (state.params, state.batch_stats))
    return TrainState.create(
        apply_fn=state.apply_fn, params=params, batch_stats=batch_stats, tx=tx
    )


def train_step(state: TrainState, batch):
    """One step of SGD: nothing in here knows that it may be quantized."""

    def loss_fn(params):
        logits, updates = state.apply_fn(
            {"params": params, "batch_stats": state.batch_stats},
            batch["image"],
            train=True,
            mutable=["batch_stats"],
        )
        loss = metrics.cross_entropy(logits, batch["label"])
        return loss, (logits, updates)

    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, (logits, updates)), grads = grad_fn(state.params)
    state = state.apply_gradients(grads=grads, batch_stats=updates["batch_stats"])
    return state, metrics.compute(loss=loss, logits=logits, labels=batch["label"])


def eval_step(state: TrainState, batch):
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    logits = state.apply_fn(variables, batch["image"], train=False)
    loss = metrics.cross_entropy(logits, batch["label"])
    return metrics.compute(loss=loss, logits=logits, labels=batch["label"])


def compile_steps(rules: list[qwix_train.QuantizationRule]):
    """Returns the compiled train and eval steps; float if there are no rules."""
    if rules:
        train = jax.jit(qwix_train.wrap_train_step(train_step, rules), donate_argnums=0)
        evaluate = jax.jit(qwix_train.wrap_eval_step(eval_step, rules))
    else:
        train = jax.jit(train_step, donate_argnums=0)
        evaluate = jax.jit(eval_step)
    return train, evaluate


def make_plan(
    config: ml_collections.ConfigDict, rules: list[qwix_train.QuantizationRule]
) -> qwix_train.Plan:
    """Returns what the rules do to every op of the model."""
    model = create_model(tuple(config.features))
    image = jax.ShapeDtypeStruct((config.batch_size, *IMAGE.shape[1:]), IMAGE.dtype)
    return qwix_train.plan(model, rules, image, train=False)


def predict(
    config: ml_collections.ConfigDict,
    state: TrainState,
    rules: list[qwix_train.QuantizationRule],
    images: np.ndarray,
) -> jax.Array:
    """Returns the logits that the model has in training."""
    model = create_model(tuple(config.features))
    if rules:
        model = qwix_train.quantize_model(model, qwix_train.QtProvider(rules))
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    return jax.jit(functools.partial(model.apply, train=False))(variables, images)


def export(
    config: ml_collections.ConfigDict,
    state: TrainState,
    rules: list[qwix_train.QuantizationRule],
    path: pathlib.Path,
) -> None:
    """Writes the model to serve: quantized params, and the statistics of BatchNorm."""
    params, batch_stats = state.params, state.batch_stats
    if rules:
        _, params = qwix_train.ptq.quantize(
            create_model(tuple(config.features)),
            params,
            rules,
            IMAGE,
            variables={"batch_stats": batch_stats},
            train=False,
        )
    variables = {"params": params, "batch_stats": batch_stats}
    qwix_train.ptq.save(path, variables, rules=rules)


def restore(
    config: ml_collections.ConfigDict,
    rules: list[qwix_train.QuantizationRule],
    path: pathlib.Path,
) -> tuple[Callable[[Any], jax.Array], int]:
    """Reads an exported model; returns it, and the size of its params in bytes."""
    model = create_model(tuple(config.features))
    if rules:
        model = qwix_train.quantize_model(model, qwix_train.PtqProvider(rules))
    init = functools.partial(model.init, train=False)
    abstract = jax.eval_shape(init, jax.random.key(0), IMAGE)
    variables = qwix_train.ptq.restore(path, abstract)
    apply = jax.jit(functools.partial(model.apply, train=False))
    size = metrics.nbytes(variables["params"])
    return functools.partial(apply, variables), size


def to_tree(state: TrainState) -> Any:
    """What a checkpoint holds."""
    return state


def from_tree(state: TrainState, tree: Any) -> TrainState:
    del state
    return tree
