"""What `optim.freeze_oscillations` knows of oscillating weights, from any state."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax import numpy as jnp

from qwix_train.optim import FreezeOscillationsState
from qwix_train.planning.plan import Path
from qwix_train.trace.function import by_path
from qwix_train.values import stored


class Oscillations(NamedTuple):
    """The oscillations of one param.

    Attributes:
      frequency: for each weight, the share of updates in which its level turns back;
        in the shape of the param, float32.
      frozen: for each weight, whether it is frozen; bool.
    """

    frequency: jax.Array
    frozen: jax.Array

    def counts(self, threshold: float) -> tuple[jax.Array, jax.Array]:
        """How many weights oscillate, and how many are frozen.

        Args:
          threshold: the frequency above which a weight counts as oscillating.
        """
        oscillating = (self.frequency > threshold) & ~self.frozen
        return jnp.sum(oscillating), jnp.sum(self.frozen)


def oscillations_in(state: Any, paths: Collection[Path]) -> dict[Path, Oscillations]:
    """The oscillations of params, by path, for those that a state knows of.

    Args:
      state: a train state, the state of an optimizer, or an `nnx.Optimizer`. It may
        hold a `FreezeOscillationsState` anywhere, such as in a chain or a partition.
      paths: the paths of the params.
    """
    found = {}
    for held in _states(state):
        held = stored.unbox(held)
        frequency, frozen = by_path(held.frequency), by_path(held.frozen)
        for path, value in frequency.items():
            # What is trained may be the variables of a model, with their collections.
            name = next((p for p in (path, path[1:]) if p in paths), None)
            if name is not None:
                found[name] = Oscillations(value, frozen[path])
    return found


def _states(tree: Any) -> Iterator[FreezeOscillationsState]:
    def is_whole(node):
        return isinstance(node, FreezeOscillationsState | nnx.Pytree)

    for leaf in jax.tree.leaves(tree, is_leaf=is_whole):
        if isinstance(leaf, FreezeOscillationsState):
            yield leaf
        elif isinstance(leaf, nnx.Pytree):
            yield from _states(getattr(leaf, "opt_state", None))
