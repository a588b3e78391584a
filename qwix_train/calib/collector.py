"""Statistics that are kept between the calls of a user's step."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
from jax import core

from qwix_train.calib.observe import Observed, Stats
from qwix_train.frontends.compiled import Compiled

Step = TypeVar("Step", bound=Callable[..., Any])


class Collector:
    """Keeps the statistics that steps collect.

    Attributes:
      state: the statistics as they are, by name: a tree of arrays, to be saved with a
        checkpoint and put back.
    """

    def __init__(self) -> None:
        """Starts without statistics."""
        self.state: Stats = {}
        self._lock = threading.Lock()
        self._running = threading.local()

    def collecting(self, step: Step, observed: Observed, pure_form: str) -> Step:
        """A step that updates the statistics at every call.

        Args:
          step: the step. If it is jitted, it runs compiled, with the statistics.
          observed: the step as a function of statistics.
          pure_form: how a user writes that.

        Raises:
          ValueError: by the step, when it is called within a transformation.
        """
        run = Compiled(observed, step, 1) if hasattr(step, "lower") else observed
        name = type(self).__name__

        def check_not_traced(tree):
            leaves = jax.tree.leaves(tree)
            if any(isinstance(leaf, core.Tracer) for leaf in leaves):
                raise ValueError(
                    f"A step that a {name} wraps keeps statistics between calls and "
                    "cannot run inside of jit, grad, vmap or scan. Jit the step "
                    f"first, wrap(jax.jit(step)), or use the pure form, {pure_form}."
                )

        @functools.wraps(step)
        def wrapped(*args, **kwargs):
            if getattr(self._running, "step", False):
                # A step within a step, which collects for both.
                return step(*args, **kwargs)
            check_not_traced((args, kwargs))
            with self._lock:
                self._running.step = True
                try:
                    # Compiled once: with statistics from the start.
                    state = self.state or observed.init(*args, **kwargs)
                    state, out = run(state, *args, **kwargs)
                finally:
                    self._running.step = False
                # Where all that is traced is what the step closes over, or nothing.
                check_not_traced(state)
                self.state = state
            return out

        return cast(Step, wrapped)
