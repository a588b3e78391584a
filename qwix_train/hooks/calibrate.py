"""Collects the ranges of activations again and again while a model trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from qwix_train.calib import Calibrator
from qwix_train.hooks.periodic import PeriodicAction


class Calibrate(PeriodicAction):
    """Runs an eval loop that a `Calibrator` watches, and keeps the ranges.

    The loop is a function of yours. It gets the arguments of the hook's call that
    follow the step and the time, as with `clu.periodic_actions.PeriodicCallback`:
    `calibrate(step, state=state)` calls `evaluate(state=state)`.

    Attributes:
      calibrator: the calibrator.
      quant_stats: the ranges of the latest run, as `quantize_params` takes them; None
        before the first.
      step: the step of that run; None before the first.

    Example:
      >>> import jax
      >>> from flax import linen as nn
      >>> from jax import numpy as jnp
      >>> from qwix_train import QuantizationRule
      >>> from qwix_train.calib import Calibrator
      >>> from qwix_train.hooks import Calibrate
      >>> rule = QuantizationRule(
      ...     weight_qtype="int8", act_qtype="int8", act_static_scale=True
      ... )
      >>> model, eval_batches = nn.Dense(2), [jnp.ones((8, 4))]
      >>> calibrator = Calibrator([rule])
      >>> eval_step = calibrator.wrap(jax.jit(model.apply))
      >>> def evaluate(variables):
      ...     for batch in eval_batches:
      ...         eval_step(variables, batch)
      >>> calibrate = Calibrate(calibrator, evaluate, every_steps=2)
      >>> variables = model.init(jax.random.key(0), eval_batches[0])
      >>> for step in range(1, 4):
      ...     _ = calibrate(step, variables=variables)
      >>> calibrate.step, calibrate.quant_stats["dot_general0_lhs"]["sum_of_absmax"]
      (2, Array([[1.]], dtype=float32))
    """

    def __init__(
        self,
        calibrator: Calibrator,
        evaluate: Callable[..., Any],
        *,
        fresh: bool = True,
        every_steps: int | None = None,
        every_secs: float | None = None,
        on_steps: Iterable[int] | None = None,
    ):
        """Sets up the runs.

        Args:
          calibrator: the calibrator that wraps the eval step.
          evaluate: runs the wrapped eval step over some batches. What it returns is
            not used.
          fresh: whether each run forgets all statistics that were collected before,
            even those collected outside of this hook. Otherwise it adds to them.
          every_steps: see `PeriodicAction`.
          every_secs: see `PeriodicAction`.
          on_steps: see `PeriodicAction`.

        Raises:
          TypeError: if `evaluate` is not a function.
        """
        super().__init__(
            every_steps=every_steps, every_secs=every_secs, on_steps=on_steps
        )
        if not callable(evaluate):
            raise TypeError(
                f"Expected a function that runs the eval loop, got {evaluate!r}."
            )
        self.calibrator = calibrator
        self.quant_stats: dict[str, Any] | None = None
        self.step: int | None = None
        self._evaluate = evaluate
        self._fresh = fresh

    def _apply(self, step: int, t: float, *args: Any, **kwargs: Any) -> None:
        """Runs the loop.

        Raises:
          ValueError: if the loop did not call the wrapped step, or had no batch that
            counts for some activation. Then the ranges of the last run stay.
        """
        if self._fresh:
            self.calibrator.state = {}
        self._evaluate(*args, **kwargs)
        self.quant_stats = self.calibrator.quant_stats
        self.step = step
