"""What is measured of a language model, on training and on test batches."""

import jax

from example_trainers import metrics


def measure(logits: jax.Array, batch) -> metrics.Metrics:
    """Loss and accuracy of the next byte."""
    # `clu` counts one label for each row of logits.
    return metrics.compute(
        loss=metrics.cross_entropy(logits, batch["target"]),
        logits=logits.reshape(-1, logits.shape[-1]),
        labels=batch["target"].reshape(-1),
    )
