"""Work on a weight that is to begin when the activations are there, and not before.

What is computed from a weight alone is the same in each round of a loop over tokens, so
XLA takes it out of the loop: the float weights of all layers are then held at once, and
each round reads four bytes a weight in the place of one. Without a loop, its scheduler
may convert the weights of all layers before it needs the first. A branch that depends
on the activations it leaves where it is.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from qwix_train.core.symbolic import surely


def when_there(
    x: jax.Array, compute: Callable[..., jax.Array], *arrays: Any
) -> jax.Array:
    """Computes something from arrays, in a branch that is taken for any ``x``.

    Args:
        x: The activations.
        compute: Gives an array of `arrays`, the activations among them.
        *arrays: Arrays, or None.

    Returns:
        ``compute(*arrays)``.

    >>> int(when_there(jnp.ones(2), jnp.add, jnp.array(1), jnp.array(2)))
    3
    """
    out = jax.eval_shape(compute, *arrays)

    def nothing(*arrays):
        # Within `shard_map` it varies over the axes that the arrays vary over.
        empty = [
            jax.lax.slice(array, (0,) * array.ndim, (0,) * array.ndim)
            for array in jax.tree.leaves(arrays)
        ]
        zero = sum(jnp.sum(array.astype(out.dtype), dtype=out.dtype) for array in empty)
        return jnp.broadcast_to(jnp.asarray(zero), out.shape)

    return jax.lax.cond(never(x), nothing, compute, *arrays)


@custom_vmap
def never(x: jax.Array) -> jax.Array:
    """False, computed from an array in such a way that XLA does not know.

    A batch has one value, so that a branch on it stays a branch. XLA knows the value
    for an array that may be empty.

    Args:
        x: Any shape, a float or an integer dtype.
    """
    if not all(surely(1, size) for size in x.shape):
        return jnp.zeros((), bool)
    one = jax.lax.slice(x, (0,) * x.ndim, (1,) * x.ndim).reshape(())
    if jnp.issubdtype(x.dtype, jnp.floating):
        return jnp.isnan(one) & (one == jnp.inf)
    return (one & 1) > 1


@never.def_vmap
def _(axis_size: int, in_batched: Any, x: jax.Array) -> tuple[jax.Array, bool]:
    # The axis of the batch is one of the array's.
    del axis_size, in_batched
    return never(x), False
