"""Static ranges that training itself keeps up to date.

The forward of each step measures the activations, updates the statistics with that,
and quantizes by the range that they give then (with delayed scaling, by the one that
they gave before). What was measured is tagged on the way,
so that the statistics come out of a step that does not return them (see
`trace.harvest`): `QtProvider` with a collection `quant_stats` harvests them from the
call of the model, `wrap_train_step` from the whole step.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.struct
import jax
from flax import traverse_util
from jax import lax
from jax import numpy as jnp

from qwix_train.calib.observe import statistics_of
from qwix_train.calib.ranges import states_in
from qwix_train.core.calibration import compute_scale_zero_point
from qwix_train.observers.statistics import RangeObserver, Statistics, in_layout_of_qwix
from qwix_train.planning import static_range
from qwix_train.planning.plan import Path, Plan
from qwix_train.planning.provider import QuantizationProvider
from qwix_train.planning.rules import QuantizationRule
from qwix_train.stages.fake_quantize import Range
from qwix_train.trace import function, harvest
from qwix_train.trace.evaluate import Once
from qwix_train.trace.function import TracedCall

# The statistics of each range, by its path.
States = Mapping[Path, Mapping[str, Any]]


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

    def __init__(self, states: States, updates: RangeUpdates):
        """Takes the statistics.

        Args:
          states: the statistics before the call.
          updates: when they change, and are used.
        """
        self.states = states
        self.updates = updates
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
        self,
        static: static_range.StaticOperand,
        rules: Sequence[QuantizationRule],
        once: Once,
    ) -> RunningRange:
        """The range of an activation, for a stage.

        Args:
          static: the activation.
          rules: the rules that its plan was made from.
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
            statistics_of(op, side, rules),
            self,
            once,
            state,
        )

    def calibration(
        self,
        paths: Sequence[Path],
        statistics: Statistics,
        x: Any,
        state: Any,
        layers: Sequence[bool] = (),
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
        """
        measured = statistics.measure(x)
        if self.updates.may_update:
            found = _Collected(statistics, measured)
            packed = found.packed(measured)
            for name in map("/".join, paths):
                self._found[name] = found
                packed = harvest.tag(packed, name, layers)
            measured = found.unpacked(packed)
            if not statistics.delayed:
                state = self.updates.updated(state, statistics.add(state, measured))
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
      once: measures an array once, whatever stages read it.
      state: the statistics of the first of its ranges, as `ranges` has them.
    """

    names: tuple[Path, ...] = flax.struct.field(pytree_node=False)
    layers: tuple[bool, ...] = flax.struct.field(pytree_node=False)
    qtype: Any = flax.struct.field(pytree_node=False)
    statistics: Statistics = flax.struct.field(pytree_node=False)
    ranges: RunningRanges = flax.struct.field(pytree_node=False)
    once: Once = flax.struct.field(pytree_node=False)
    state: Any

    def of(self, x: Any) -> Range:
        """See `stages.fake_quantize.RangeOf`."""

        def measured() -> Range:
            calibration = self.ranges.calibration(
                self.names, self.statistics, x, self.state, self.layers
            )
            return Range(*compute_scale_zero_point(calibration, self.qtype))

        return self.once(self.names, x, measured)


def run_with_quant_stats(
    provider: QuantizationProvider,
    traced: TracedCall,
    plan: Plan,
    quant_stats: Any,
    update: bool,
) -> tuple[Any, Any]:
    """The result of a traced call, and the statistics after it.

    Args:
      provider: the provider, which says how to run with ranges that it may update.
      traced: the call.
      plan: what the provider does to it.
      quant_stats: the statistics, as a Linen model holds them.
      update: whether they change.
    """
    states = {
        path: {"skipped": jnp.zeros_like(state["count"]), **state}
        for path, state in states_in(quant_stats).items()
    }
    ranges = RunningRanges(states, RangeUpdates(update))
    running = provider.running(ranges)
    if not update:
        return running.transform(traced, plan), quant_stats
    out, states = _harvest_call(running, ranges, traced, plan)
    return out, as_quant_stats(states)


def as_quant_stats(states: Mapping[Path, Any]) -> dict[str, Any]:
    """Statistics as a Linen model holds them, in the layout of `qwix`."""
    return nested({path: in_layout_of_qwix(state) for path, state in states.items()})


def _harvest_call(
    provider: QuantizationProvider,
    ranges: RunningRanges,
    traced: TracedCall,
    plan: Plan,
) -> tuple[Any, dict[Path, Any]]:
    """The result of a traced call, and the statistics after it.

    It may be differentiated, as part of a user's own loss function.

    Args:
      provider: the provider that quantizes with these ranges.
      ranges: the ranges of the call.
      traced: the call.
      plan: what the provider does to it.
    """

    def call(inputs):
        return provider.transform(traced.with_inputs(inputs), plan)

    add = functools.partial(ranges.add, updates=ranges.updates)
    outer = function.trace(call, (list(traced.inputs),), lambda key_path: None)
    named = {"/".join(path): state for path, state in ranges.states.items()}
    found = {name: named[name] for name in harvest.names_in(outer.body)}
    outs, after = harvest.harvest(outer.body, outer.inputs, found, add)
    updated = {tuple(name.split("/")): state for name, state in after.items()}
    return outer.rebuild(outs), {**ranges.states, **updated}


def initial_states(
    plan: Plan, rules: Sequence[QuantizationRule]
) -> dict[Path, dict[str, Any]]:
    """The statistics before any batch, for each range that a plan asks for."""
    states = {}
    for static in static_range.static_operands(plan):
        if static.op.collected:
            statistics = statistics_of(static.op, static.side, rules)
            layers = static.op.op.layers
            states[static.path] = jax.tree.map(
                lambda x, layers=layers: jnp.broadcast_to(x, (*layers, *x.shape)),
                statistics.init(static.operand.shape, static.operand.dtype),
            )
    return states


def nested(states: States) -> dict[str, Any]:
    """The nested dictionary of statistics, from those by path."""
    return traverse_util.unflatten_dict(dict(states))


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
