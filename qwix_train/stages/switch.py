"""Applies one of several lists of stages, by a number."""

from __future__ import annotations

import functools
from typing import Any

import flax.struct
from jax import lax

from qwix_train.stages.stage import At, Constant, Stage, applied, of_slice


@flax.struct.dataclass
class Switch(Stage):
    """Applies one of several lists of stages.

    Attributes:
      choices: the lists.
      choice: which of them: the index, an int32 scalar.
    """

    choices: tuple[tuple[Stage, ...], ...]
    choice: Constant = flax.struct.field(pytree_node=False)

    def apply(self, x: Any, at: At | None = None) -> Any:
        """See `Stage.apply`."""
        branches = [
            functools.partial(applied, stages, at=at) for stages in self.choices
        ]
        return lax.switch(self.choice.value, branches, x)

    def of_slice(self) -> Switch | None:
        """See `Stage.of_slice`."""
        slices = [of_slice(stages) for stages in self.choices]
        if None in slices:
            return None
        return Switch(tuple(slices), self.choice)  # type: ignore[arg-type]
