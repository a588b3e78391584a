"""Ranges of activations, collected while a user's own loop runs."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import jax
from jax import core

from qwix_train.calib.observe import Observed, Stats, quant_stats_of, tagging
from qwix_train.frontends.compiled import Compiled
from qwix_train.planning.provider import QuantizationProvider
from qwix_train.planning.rules import QuantizationRule, check_rules

Step = TypeVar("Step", bound=Callable[..., Any])


class Collector:
    """Keeps the statistics that steps collect.

    Attributes:
      state: the statistics so far, by name: a tree of arrays that you can save with a
        checkpoint, and set again.
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
          pure_form: how a user makes `observed`, for messages.

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
                # A step within a step: the outer one collects for both.
                return step(*args, **kwargs)
            check_not_traced((args, kwargs))
            with self._lock:
                self._running.step = True
                try:
                    # With statistics from the start, the step is compiled only once.
                    state = self.state or observed.init(*args, **kwargs)
                    state, out = run(state, *args, **kwargs)
                finally:
                    self._running.step = False
                # The arguments are not traced, but what the step closes over may be.
                check_not_traced(state)
                self.state = state
            return out

        return cast(Step, wrapped)


class Calibrator(Collector):
    """Collects the ranges that static quantization of activations needs.

    Wrap the eval step, run the eval loop, and give `quant_stats` to `quantize_params`.
    The loop, the step and what the step returns do not change. You can wrap several
    steps; they share the statistics.

    Attributes:
      rules: the rules.
      state: the statistics so far, by name: a tree of arrays that you can save with a
        checkpoint, and set again.

    Example:
      >>> import jax
      >>> from flax import linen as nn
      >>> from jax import numpy as jnp
      >>> from qwix_train import QuantizationRule
      >>> from qwix_train.calib import Calibrator
      >>> rule = QuantizationRule(
      ...     weight_qtype="int8", act_qtype="int8", act_static_scale=True
      ... )
      >>> model = nn.Dense(2)
      >>> params = model.init(jax.random.key(0), jnp.ones((1, 4)))
      >>> calibrator = Calibrator([rule])
      >>> eval_step = calibrator.wrap(jax.jit(lambda params, x: model.apply(params, x)))
      >>> for scale in (1.0, 3.0):
      ...     out = eval_step(params, scale * jnp.ones((8, 4)))
      >>> stats = calibrator.quant_stats["dot_general0_lhs"]
      >>> stats["sum_of_absmax"] / stats["count"]
      Array([[2.]], dtype=float32)
    """

    def __init__(self, rules: Sequence[QuantizationRule] | QuantizationProvider):
        """Checks the rules.

        Args:
          rules: the rules by which the model is to be quantized; or a provider that
            collects ranges, such as `QtProvider(rules)`.

        Raises:
          TypeError: if a provider collects no ranges, such as a `PtqProvider`; or if
            `rules` is neither a provider nor a list of rules.
          ValueError: if no rule sets `act_static_scale=True`.
        """
        super().__init__()
        provided = isinstance(rules, QuantizationProvider)
        self._given = rules if provided else check_rules(rules)
        self.rules: Sequence[QuantizationRule] = tagging(
            self._given
        ).rules  # complains if there are no ranges
        self._observed: list[Observed] = []

    def wrap(self, step: Step) -> Step:
        """Makes a step collect ranges at every call.

        A jitted step runs compiled, together with the statistics. Any other step is
        traced, and runs one operation at a time.

        Args:
          step: a step that calls a Linen or NNX model, or a function that `as_model`
            marks. Do not use the wrapped step inside `jit`, `scan` and the like: use
            `observe` for that.

        Returns:
          A step with the same signature and the same results. They are the same bit for
          bit if the step is jitted. Otherwise they are the same to float rounding,
          because JAX compiles some functions, such as `jnp.mean`, as a whole.

        Raises:
          ValueError: by the step, when it is called within a transformation.
        """
        observed = Observed(step, tagging(self._given))
        self._observed.append(observed)
        return self.collecting(step, observed, "calib.observe(step, rules)")

    @property
    def ranges(self) -> dict[str, Any]:
        """The ranges that were found so far, by name; see `calib.observe.Tagged`."""
        return {k: v for each in self._observed for k, v in each.ranges.items()}

    @property
    def quant_stats(self) -> dict[str, Any]:
        """The ranges as a nested dictionary, as `quantize_params` takes them.

        At the path of each module there is an entry for each operand, such as
        `dot_general0_lhs`. It has a `count`, and `sum_of_absmax`, or `sum_of_min` and
        `sum_of_max`.

        Raises:
          ValueError: if nothing was collected, or if all batches of some operand were
            empty or not finite.

        Warns:
          UserWarning: if ranges are far below what was seen, or batches differ much;
            see docs/static_ranges.md.
        """
        if not self.state:
            raise ValueError("No range was collected: run the wrapped step first.")
        return quant_stats_of(self.ranges, self.state)
