"""This repository's own text, byte by byte, and how a language model learns it."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

LENGTH = 64
BATCH = 16


def texts() -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """What to train on, and what to test on: bytes `x`, and the next ones `y`."""
    root = pathlib.Path(__file__).parents[1]
    files = sorted([*root.glob("qwix_train/**/*.py"), *root.glob("docs/*.md")])
    splits = []
    for held_out in (False, True):
        chosen = [f for i, f in enumerate(files) if (i % 10 == 0) == held_out]
        text = np.frombuffer(b"".join(f.read_bytes() for f in chosen), np.uint8)
        count = (len(text) - 1) // LENGTH
        x = text[: count * LENGTH].reshape(count, LENGTH)
        y = text[1 : count * LENGTH + 1].reshape(count, LENGTH)
        order = np.random.default_rng(0).permutation(count)
        x, y = (jnp.asarray(part[order].astype(np.int32)) for part in (x, y))
        splits.append({"x": x, "y": y})
    train, test = splits
    return train, {name: part[:256] for name, part in test.items()}


def train_step(state, batch):
    """One step of a loop that knows nothing of quantization."""

    def loss_fn(params):
        logits = state.apply_fn({"params": params}, batch["x"])
        return optax.softmax_cross_entropy_with_integer_labels(
            logits, batch["y"]
        ).mean()

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads), loss


def trained(
    state: Any, step: Callable[..., Any], data: dict[str, jax.Array], steps: int
) -> Any:
    """The state after some compiled steps."""
    for number in range(steps):
        start = number * BATCH % (len(data["x"]) - BATCH)
        batch = {k: v[start : start + BATCH] for k, v in data.items()}
        state, _ = step(state, batch)
    return state


def loss(model: Any, params: Any, test: dict[str, jax.Array]) -> float:
    """The loss of a model, in bits a byte."""
    logits = jax.jit(model.apply)({"params": params}, test["x"])
    found = optax.softmax_cross_entropy_with_integer_labels(logits, test["y"])
    return float(found.mean() / np.log(2))
