"""The same model and train step in Flax NNX."""

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from flax import nnx

import qwix_train
from example_trainers import metrics

TrainState = tuple["CNN", nnx.Optimizer]

IMAGE = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)


class CNN(nnx.Module):
    """Three convolutions with BatchNorm, and a classifier."""

    def __init__(self, features: tuple[int, ...], *, rngs: nnx.Rngs):
        self.convs = nnx.List([])
        self.norms = nnx.List([])
        in_features = 1
        for i, out_features in enumerate(features):
            strides = (1, 1) if i == 0 else (2, 2)
            self.convs.append(
                nnx.Conv(
                    in_features,
                    out_features,
                    (3, 3),
                    strides,
                    use_bias=False,
                    rngs=rngs,
                )
            )
            self.norms.append(nnx.BatchNorm(out_features, momentum=0.9, rngs=rngs))
            in_features = out_features
        # Each convolution after the first halves the 8x8 image.
        side = 8 // 2 ** (len(features) - 1)
        self.classifier = nnx.Linear(side * side * in_features, 10, rngs=rngs)

    def __call__(self, x, *, train: bool):
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = nnx.relu(norm(conv(x), use_running_average=not train))
        x = x.reshape(x.shape[0], -1)
        return self.classifier(x)


def create_train_state(
    config: ml_collections.ConfigDict, tx: optax.GradientTransformation, seed: int
) -> TrainState:
    model = CNN(tuple(config.features), rngs=nnx.Rngs(seed))
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param)


def create_finetune_state(
    state: TrainState, tx: optax.GradientTransformation
) -> TrainState:
    """Returns the same weights and statistics, with a fresh optimizer."""
    # A copy, because an NNX step updates the model that it is given.
    model = nnx.clone(state[0])
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param)


def train_step(model: CNN, optimizer: nnx.Optimizer, batch):
    """One step of SGD: nothing in here knows that it may be quantized."""

    def loss_fn(model):
        logits = model(batch["image"], train=True)
        return metrics.cross_entropy(logits, batch["label"]), logits

    grad_fn = nnx.value_and_grad(loss_fn, has_aux=True)
    (loss, logits), grads = grad_fn(model)
    optimizer.update(model, grads)
    return metrics.compute(loss=loss, logits=logits, labels=batch["label"])


def eval_step(model: CNN, batch):
    logits = model(batch["image"], train=False)
    loss = metrics.cross_entropy(logits, batch["label"])
    return metrics.compute(loss=loss, logits=logits, labels=batch["label"])


def compile_steps(rules: list[qwix_train.QuantizationRule]):
    """Returns the compiled train and eval steps; float if there are no rules."""
    if rules:
        train = nnx.jit(qwix_train.wrap_train_step(train_step, rules))
        evaluate = nnx.jit(qwix_train.wrap_eval_step(eval_step, rules))
    else:
        train, evaluate = nnx.jit(train_step), nnx.jit(eval_step)

    # The loop's convention: a state goes in, and comes out.
    def train_state_step(state: TrainState, batch):
        return state, train(*state, batch)

    def eval_state_step(state: TrainState, batch):
        return evaluate(state[0], batch)

    return train_state_step, eval_state_step


def make_plan(
    config: ml_collections.ConfigDict, rules: list[qwix_train.QuantizationRule]
) -> qwix_train.Plan:
    """Returns what the rules do to every op of the model."""
    model = CNN(tuple(config.features), rngs=nnx.Rngs(0))
    image = jax.ShapeDtypeStruct((config.batch_size, *IMAGE.shape[1:]), IMAGE.dtype)
    return qwix_train.plan(model, rules, image, train=False)


def predict(
    config: ml_collections.ConfigDict,
    state: TrainState,
    rules: list[qwix_train.QuantizationRule],
    images: np.ndarray,
) -> jax.Array:
    """Returns the logits that the model has in training."""
    del config
    model = state[0]
    if rules:
        model = qwix_train.quantize_model(model, qwix_train.QtProvider(rules))
    return _forward(model, images)


def export(
    config: ml_collections.ConfigDict,
    state: TrainState,
    rules: list[qwix_train.QuantizationRule],
    path: pathlib.Path,
) -> None:
    """Writes the model to serve: quantized params, and the statistics of BatchNorm."""
    del config
    qwix_train.ptq.save(path, _quantized(state[0], rules), rules=rules)


def restore(
    config: ml_collections.ConfigDict,
    rules: list[qwix_train.QuantizationRule],
    path: pathlib.Path,
) -> tuple[Callable[[Any], jax.Array], int]:
    """Reads an exported model; returns it, and the size of its params in bytes."""

    def create():
        return _quantized(CNN(tuple(config.features), rngs=nnx.Rngs(0)), rules)

    model = qwix_train.ptq.restore(path, nnx.eval_shape(create))
    size = metrics.nbytes(qwix_train.ptq.to_tree(model, nnx.Param))
    return functools.partial(_forward, model), size


@nnx.jit
def _forward(model: CNN, images: Any) -> jax.Array:
    return model(images, train=False)


def _quantized(model: CNN, rules: list[qwix_train.QuantizationRule]) -> CNN:
    if not rules:
        return model
    provider = qwix_train.PtqProvider(rules)
    return qwix_train.quantize_model(model, provider, IMAGE, train=False)


def to_tree(state: TrainState) -> Any:
    """What a checkpoint holds."""
    return nnx.to_pure_dict(nnx.state(state))


def from_tree(state: TrainState, tree: Any) -> TrainState:
    saved = nnx.state(state)
    nnx.replace_by_pure_dict(saved, tree)
    nnx.update(state, saved)
    return state
