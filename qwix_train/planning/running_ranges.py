"""Static ranges that training itself keeps up to date.

The forward of each step measures the activations, updates the statistics with that,
and quantizes by the range that they give then (with delayed scaling, by the one that
they gave before). What was measured is tagged on the way,
so that the statistics come out of a step that does not return them (see
`trace.harvest`): those of a Linen model, in its collection `quant_stats`, are harvested
from its call, and `wrap_train_step` harvests from the whole step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.struct
import jax
from jax import lax
from jax import numpy as jnp

from qwix_train.core.calibration import compute_scale_zero_point
from qwix_train.core.errors import located
from qwix_train.observers.statistics import RangeObserver, Statistics
from qwix_train.planning import static_range
from qwix_train.planning.plan import OpPlan, Path, Plan
from qwix_train.planning.quant_stats import States
from qwix_train.stages.fake_quantize import Range
from qwix_train.trace import harvest
from qwix_train.trace.evaluate import Once


@dataclasses.dataclass(frozen=True)
class RangeUpdates:
    """When statistics change, and from when on they are used.

    Attributes:
      update: whether this step updates the statistics: a bool, or a bool scalar of
        the step's.
      warmup: the number of batches before statistics are used. Until then, and in any
        case before the first batch, an activation has the range of its own batch.
    """

    update: Any = True
    warmup: int = 0

    @property
    def may_update(self) -> bool:
        """Whether statistics change at all."""
        return self.update is not False

    def updated(self, old: Any, new: Any) -> Any:
        """The statistics after a step."""
        if self.update is True:
            return new
        return jax.tree.map(lambda a, b: jnp.where(self.update, b, a), old, new)


class RunningRanges:
    """The static ranges of one call, from statistics that it may update.

    What a mode does with them: it asks for the `state` of each range before it
    evaluates the call, hands that to the op as what is given for it, and quantizes the
    activation there by its `calibration`; `range_of` is both for a stage. `add` updates
    the statistics then, where the call is harvested.

    Attributes:
      states: the statistics before the call.
      updates: when they change, and are used.
    """

    def __init__(self, states: States, updates: RangeUpdates, of_step: bool = False):
        """Takes the statistics.

        Args:
          states: the statistics before the call.
          updates: when they change, and are used.
          of_step: whether those of a whole step, with its way back, are collected.
        """
        self.states = states
        self.updates = updates
        self.of_step = of_step
        # What is collected, by the name of the range, for those that were reached.
        self._found: dict[str, _Collected] = {}

    def state(self, path: Path) -> Mapping[str, Any]:
        """The statistics of one range before the call.

        Args:
          path: the path of the range.

        Raises:
          ValueError: if there are none.
        """
        if path not in self.states:
            raise ValueError(
                f"The quant_stats have no range for {'/'.join(path)!r}, which a rule "
                "asks for. Make them with the same rules, and a model call like that "
                "of the step: attach(state, rules, *inputs)."
            )
        return self.states[path]

    def range_of(
        self, static: static_range.StaticOperand, plan: Plan, once: Once
    ) -> RunningRange:
        """The range of an activation, for a stage.

        Args:
          static: the activation.
          plan: the plan that it is of.
          once: what is made once for the call.
        """
        op, side = static.op, static.side
        names = op.ranges[side]
        # The statistics of all ops that read the array get what is measured.
        state, *_ = [self.state(name) for name in names]
        return RunningRange(
            names,
            tuple(length > 0 for length in op.op.scans),
            static.how.qtype,
            plan.statistics_of(op, side),
            self,
            once,
            state,
        )

    def range_of_gradient(self, op: OpPlan, plan: Plan) -> RunningRange | None:
        """The range of the gradient of the result of an op.

        Args:
          op: what happens to the op.
          plan: the plan that it is of.

        Returns:
          The range; None if what is collected is not that of a whole step.
        """
        statistics, path = plan.gradient_statistics(op), op.gradient_path
        assert statistics is not None
        if not self.of_step:
            return None
        layers = tuple(length > 0 for length in op.op.scans)
        qtype, state = statistics.how.qtype, self.state(path)
        return RunningRange((path,), layers, qtype, statistics, self, None, state)

    def calibration(
        self,
        paths: Sequence[Path],
        statistics: Statistics,
        x: Any,
        state: Any,
        layers: Sequence[bool] = (),
        *,
        backward: bool = False,
    ) -> Any:
        """The range of one activation; what is measured of it is tagged.

        Args:
          paths: the paths of the ranges whose statistics get what is measured.
          statistics: what is measured, and how batches combine.
          x: the activation.
          state: the statistics that give the range, as `state` has them; those of one
            layer, where a `scan` goes over layers.
          layers: for each `scan` of the model around it, outermost first, whether it
            goes over layers; see `harvest.tag`.
          backward: whether it is on the way back; see `harvest.tag`.
        """
        with located("/".join(paths[0])):
            measured = statistics.measure(x)
        if self.updates.may_update:
            found = _Collected(statistics, measured)
            packed = found.packed(measured)
            for name in map("/".join, paths):
                self._found[name] = found
                packed = harvest.tag(
                    packed,
                    name,
                    layers,
                    backward=backward,
                    joined=statistics.how.axis_names,
                )
            measured = found.unpacked(packed)
            if not statistics.delayed:
                with located("/".join(paths[0])):
                    added = statistics.add(state, measured)
                state = self.updates.updated(state, added)
        return _calibration(statistics, state, measured, self.updates.warmup)

    def after(self) -> RunningRanges:
        """What `add` takes after the call, without the arrays of its trace."""
        ranges = RunningRanges({}, RangeUpdates())
        ranges._found = self._found
        return ranges

    def add(
        self, name: str, measured: Any, state: Any, *, updates: RangeUpdates
    ) -> Any:
        """For `harvest`: the statistics after what was measured under a name.

        Args:
          name: the name of the range.
          measured: what was tagged.
          state: the statistics before.
          updates: when statistics change; as in `calibration`, but where the harvest
            is, which may be outside of the trace that the call is in.
        """
        found = self._found[name]
        harvest.check_not_batched(name, measured, found.ndim)
        with located(name):
            new = found.statistics.add(state, found.unpacked(measured))
        return updates.updated(state, new)


@flax.struct.dataclass
class RunningRange:
    """The range of an activation that statistics give, which may change by it.

    Attributes:
      names: the paths of the ranges of all ops that read it.
      layers: for each `scan` around it, whether it goes over layers.
      qtype: the type of its codes.
      statistics: what is measured, and how batches combine.
      ranges: the ranges of the call.
      once: measures an array once, whatever stages read it; None for a gradient, which
        is read once.
      state: the statistics of the first of its ranges, as `ranges` has them.
    """

    names: tuple[Path, ...] = flax.struct.field(pytree_node=False)
    layers: tuple[bool, ...] = flax.struct.field(pytree_node=False)
    qtype: Any = flax.struct.field(pytree_node=False)
    statistics: Statistics = flax.struct.field(pytree_node=False)
    ranges: RunningRanges = flax.struct.field(pytree_node=False)
    once: Once | None = flax.struct.field(pytree_node=False)
    state: Any

    def of(self, x: Any) -> Range:
        """See `stages.fake_quantize.RangeOf`."""

        def measured() -> Range:
            return Range(*compute_scale_zero_point(self.calibration(x), self.qtype))

        return measured() if self.once is None else self.once(self.names, x, measured)

    def calibration(self, x: Any) -> Mapping[str, Any]:
        """The range of an array as `core.calibration` has it."""
        given = self.names, self.statistics, x, self.state, self.layers
        return self.ranges.calibration(*given, backward=self.once is None)


class _Collected:
    """What is collected of an activation, and how it goes into one array.

    A tag is on one array; the two ends of a range are two.
    """

    def __init__(self, statistics: Statistics, measured: Any):
        self.statistics = statistics
        self._ends = sorted(measured) if isinstance(measured, Mapping) else None
        self.ndim = jnp.ndim(self.packed(measured))

    def packed(self, measured: Any) -> Any:
        if self._ends is None:
            return measured
        return jnp.stack([measured[end] for end in self._ends])

    def unpacked(self, packed: Any) -> Any:
        if self._ends is None:
            return packed
        return dict(zip(self._ends, packed, strict=True))


def _calibration(statistics: Statistics, state: Any, measured: Any, warmup: int) -> Any:
    """The range that statistics give, or where they are too few that of the batch."""
    trusted = state["count"] >= max(1, warmup)
    if isinstance(statistics.observer, RangeObserver):
        collected = statistics.calibration(state)
        return {
            key: jnp.where(trusted, value, measured[key])
            for key, value in collected.items()
        }

    def of_batch():
        empty = statistics.init(measured.shape, measured.dtype)
        return statistics.calibration(statistics.add(empty, measured))

    return lax.cond(trusted, lambda: statistics.calibration(state), of_batch)
