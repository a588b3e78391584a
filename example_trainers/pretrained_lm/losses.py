"""What distillation minimizes."""

import jax
import optax


def divergence(target: jax.Array, logits: jax.Array) -> jax.Array:
    """How far probabilities are from those of a teacher, in nats per token.

    The mean of the Kullback-Leibler divergence of the tokens.

    Args:
        target: The logits of the teacher, shape `(batch, length, vocabulary)`.
        logits: Those of the student.
    """
    student, teacher = jax.nn.log_softmax(logits), jax.nn.log_softmax(target)
    return optax.losses.kl_divergence_with_log_targets(student, teacher).mean()
