"""When periodic actions are due."""

from __future__ import annotations

import abc
import time
from collections.abc import Iterable
from typing import Any

import numpy as np

from qwix_train.files import processes


class PeriodicAction(abc.ABC):
    """An action that is done every so many steps or seconds. Call it after each step.

    It is due when the actions of `clu.periodic_actions` are. Subclasses do it in
    `_apply`, which gets the step, the time, and the other arguments of the call.

    Example:
      >>> from qwix_train.hooks import PeriodicAction
      >>> class Print(PeriodicAction):
      ...     def _apply(self, step, t, loss):
      ...         print(f"step {step}: loss {loss}")
      >>> report = Print(every_steps=2)
      >>> [report(step, loss=1 / step) for step in range(1, 5)]
      step 2: loss 0.5
      step 4: loss 0.25
      [False, True, False, True]
    """

    def __init__(
        self,
        *,
        every_steps: int | None = None,
        every_secs: float | None = None,
        on_steps: Iterable[int] | None = None,
    ):
        """Says when the action is due: whenever one of the arguments says so.

        Args:
          every_steps: at the steps that are multiples of this. The hook must then be
            called after every step.
          every_secs: when more than so many seconds have passed since the last time,
            or since the first call. With several processes, the clock of the first one
            counts. It tells the others in every call.
          on_steps: at these steps.

        Raises:
          TypeError: if `every_steps` or one of `on_steps` is not an int, or
            `every_secs` is not a number.
          ValueError: if `every_steps` is below 1, or `every_secs` negative or NaN.
        """
        given = (every_steps, every_secs, on_steps)
        self._has_schedule = any(when is not None for when in given)
        on_steps = () if on_steps is None else tuple(on_steps)
        steps = [("on_steps", step) for step in on_steps]
        if every_steps is not None:
            steps.append(("every_steps", every_steps))
        for name, step in steps:
            if isinstance(step, bool) or not isinstance(step, int | np.integer):
                raise TypeError(f"{name}={step!r}: a number of steps is an int.")
        if every_steps is not None and every_steps < 1:
            raise ValueError(f"every_steps={every_steps}: it must be 1 or more.")
        if every_secs is not None:
            if isinstance(every_secs, bool) or not isinstance(every_secs, int | float):
                raise TypeError(f"every_secs={every_secs!r}: it is a number.")
            if not every_secs >= 0:
                raise ValueError(f"every_secs={every_secs}: it must not be negative.")
        self._every_steps = every_steps
        self._every_secs = every_secs
        self._on_steps = frozenset(on_steps)
        self._last_step: int | None = None
        self._previous_time = 0.0  # of the action, or of the first call

    def __call__(
        self, step: int, t: float | None = None, *args: Any, **kwargs: Any
    ) -> bool:
        """Does the action if it is due.

        Args:
          step: the step that was just done.
          t: the time in seconds; `time.monotonic()` if None.
          *args: further arguments of the action, such as the train state.
          **kwargs: the same by keyword.

        Returns:
          Whether it was due.

        Raises:
          ValueError: if `every_steps` is set, and a step was left out or repeated; or
            if nothing says when the action is due.
        """
        if not self._has_schedule:
            raise ValueError(
                f"{type(self).__name__} is called, and never due: give every_steps, "
                "every_secs or on_steps, such as every_steps=1000."
            )
        t = time.monotonic() if t is None else t
        if self._last_step is None:
            self._previous_time = t
        elif self._every_steps is not None and step != self._last_step + 1:
            raise ValueError(
                f"{type(self).__name__} with every_steps={self._every_steps} was "
                f"called with step {step} after step {self._last_step}: call it once "
                "after every step, or use every_secs or on_steps."
            )
        self._last_step = step
        if not self._is_due(step, t):
            return False
        self._apply(step, t, *args, **kwargs)
        self._previous_time = t
        return True

    def _is_due(self, step: int, t: float) -> bool:
        if self._every_steps is not None and step % self._every_steps == 0:
            return True
        if step in self._on_steps:
            return True
        if self._every_secs is None:
            return False
        # Clocks differ, and an action may need all processes.
        return processes.agreed(t - self._previous_time > self._every_secs)

    @abc.abstractmethod
    def _apply(self, step: int, t: float, *args: Any, **kwargs: Any) -> None:
        """Does the action."""
