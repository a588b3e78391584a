"""What is measured, on training and on test batches."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import optax
from clu import metrics as clu_metrics
from flax import struct

from qwix_train import WithAux


@struct.dataclass
class Metrics(clu_metrics.Collection):
    accuracy: clu_metrics.Accuracy
    loss: clu_metrics.Average.from_output("loss")  # pyright: ignore[reportInvalidTypeForm]


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def compute(*, loss: jax.Array, logits: jax.Array, labels: jax.Array) -> Metrics:
    return Metrics.single_from_model_output(loss=loss, logits=logits, labels=labels)


def nbytes(params: Any) -> int:
    """Returns the size of params, those that are quantized with packed codes."""
    leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, WithAux))
    return sum(
        leaf.array.nbytes if isinstance(leaf, WithAux) else leaf.nbytes
        for leaf in leaves
    )


def merge(collected: Sequence[Metrics]) -> dict[str, float]:
    """Returns the metrics over all the batches, as numbers."""
    merged = functools.reduce(Metrics.merge, jax.device_get(collected))
    return {name: float(value) for name, value in merged.compute().items()}
