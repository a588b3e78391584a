"""Observes an operand, and leaves it as it is."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import flax.struct
import jax
from jax import lax
from jax import numpy as jnp

from qwix_train import ops
from qwix_train.core import numerics
from qwix_train.stages.stage import At, Stage, applied
from qwix_train.trace import harvest


@flax.struct.dataclass
class Observe(Stage):
    """Tags an operand, so that statistics of it can be harvested.

    Attributes:
      before: what the operand goes through for that, and not for the operation.
      name: the name of the tag.
      note: called with what is tagged.
      joined: see `harvest.tag`.
    """

    before: tuple[Stage, ...]
    name: str = flax.struct.field(pytree_node=False)
    note: Callable[[Any], None] = flax.struct.field(pytree_node=False)
    joined: Collection[str] = flax.struct.field(pytree_node=False, default=())

    def apply(self, x: Any, at: At | None = None) -> Any:
        """See `Stage.apply`."""
        seen = applied(self.before, x, at)
        self.note(seen)
        return _tagged(x, seen, self.name, at, self.joined)


@flax.struct.dataclass
class ObserveSeen(Stage):
    """Tags what a kind of operation shows of an operand; see `ops.OpKind.seen`.

    Attributes:
      name: the name of the tag.
    """

    name: str = flax.struct.field(pytree_node=False)

    def apply(self, x: Any, at: At | None = None) -> Any:
        """See `Stage.apply`."""
        assert at is not None
        operands = [*at.operands[: at.side], x, *at.operands[at.side + 1 :]]
        seen = ops.kind_of(at.op).seen(at.op.params, at.side, operands)
        return _tagged(x, seen, self.name, at)


@flax.struct.dataclass
class LargestMagnitude(Stage):
    """Gives the largest magnitude of an array, shape (1,), in float32 or wider."""

    def apply(self, x: Any, at: At | None = None) -> jax.Array:
        """See `Stage.apply`."""
        magnitudes = jnp.abs(x.astype(numerics.compute_dtype(x.dtype)))
        return jnp.max(magnitudes, initial=0).reshape(1)


def _tagged(
    x: Any, seen: Any, name: str, at: At | None, joined: Collection[str] = ()
) -> Any:
    """An operand, where what is seen of it is tagged."""
    tagged = harvest.tag(seen, name, _layers(at), joined=joined)
    if seen is x:
        return tagged
    return lax.optimization_barrier((x, tagged))[0]  # keeps what is tagged


def _layers(at: At | None) -> list[bool]:
    """For each `scan` around an operation, whether it goes over layers."""
    return [] if at is None else [length > 0 for length in at.op.scans]
