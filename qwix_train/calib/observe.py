"""Collects the ranges of activations inside an unmodified step."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jax import numpy as jnp

from qwix_train.calib.range_warnings import warn_of_ranges
from qwix_train.core.errors import located
from qwix_train.files import processes
from qwix_train.frontends.nnx import tracing_step
from qwix_train.frontends.wrapping import wrap
from qwix_train.observers.statistics import Statistics, per_layer
from qwix_train.planning.plan import OpPlan, Path, Plan
from qwix_train.planning.provider import QuantizationProvider
from qwix_train.planning.rules import QuantizationRule
from qwix_train.stages.observe import LargestMagnitude, Observe
from qwix_train.stages.run import CallStages, OpStages
from qwix_train.trace import harvest
from qwix_train.trace.function import TracedCall
from qwix_train.trace.jax_versions import Body

# The state of each range, by its path: "Dense_0/dot_general0_lhs".
Stats = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Tagged:
    """An array that is tagged, so that statistics of it are collected.

    Attributes:
      path: the path of its range: the module, the op, and the side of the operand.
      statistics: what is measured, and how batches combine.
      shape: the shape of the array, in one layer; None if it is not known.
      dtype: its dtype.
      learned: whether its range is only the first value of a scale that is trained.
      owner: the path of the range that all operations share which quantize this array
        alike: that of the first of them.
    """

    path: Path
    statistics: Statistics
    shape: Any
    dtype: Any
    learned: bool = dataclasses.field(default=False, kw_only=True)
    owner: Path = dataclasses.field(default=(), kw_only=True)

    @property
    def name(self) -> str:
        """The path as text."""
        return "/".join(self.path)


class Observed:
    """A step that collects ranges, as a pure function of them. See `observe`."""

    def __init__(self, step: Callable[..., Any], provider: Tagging) -> None:
        self._provider = provider
        self._step = wrap(step, provider)

    @property
    def ranges(self) -> dict[str, Any]:
        """The ranges that were found so far, by name; see `Tagging`."""
        return dict(self._provider.ranges)

    def __call__(self, stats: Stats, *args: Any, **kwargs: Any) -> tuple[Stats, Any]:
        """Runs the step, and updates the statistics.

        Args:
          stats: the statistics so far. Ranges that are not among them start here.
          *args: the arguments of the step.
          **kwargs: the keyword arguments of the step.

        Returns:
          The statistics after this call, and what the step returns.
        """
        with tracing_step(self._step, args, kwargs) as (traced, finish):
            ranges = self._provider.ranges
            states = {**empty_states(traced.body, ranges), **stats}
            found = {name: states[name] for name in harvest.names_in(traced.body)}
            outs, after = updated_states(traced.body, traced.inputs, ranges, found)
            return {**states, **after}, finish(traced.rebuild(outs))

    def quant_stats(self, stats: Stats) -> dict[str, Any]:
        """The ranges that statistics give, as `quantize_params` takes them.

        Args:
          stats: the statistics.

        Raises:
          ValueError: if a range was never updated with a batch that counts.
        """
        return quant_stats_of(self.ranges, stats)

    def init(self, *args: Any, **kwargs: Any) -> Stats:
        """The statistics before any batch; the step is traced, not run.

        Args:
          *args: the arguments of the step, or their shapes.
          **kwargs: the keyword arguments of the step.
        """
        with tracing_step(self._step, args, kwargs) as (traced, _):
            return empty_states(traced.body, self._provider.ranges)


def observe(
    step: Callable[..., Any], rules: Sequence[QuantizationRule] | QuantizationProvider
) -> Observed:
    """Makes a step collect the ranges of activations, without changing what it does.

    This is for loops that jit, scan or shard the step themselves. For all others,
    `Calibrator` keeps the statistics.

    Args:
      step: an eval step, or any step that calls a Flax model.
      rules: the rules, or a provider that collects ranges, such as `QtProvider(rules)`.
        Ranges are collected for the activations that a rule with
        `act_static_scale=True` quantizes, or for those that the provider asks for.

    Returns:
      A function `observed(stats, *args) -> (stats, outputs)`. Its first `stats` are
      `observed.init(*args)`, or an empty dictionary. `observed.quant_stats(stats)` are
      the ranges, for `ptq.quantize` and all others that take `quant_stats`.

    Raises:
      TypeError: if a provider collects no ranges, such as a `PtqProvider`.
      ValueError: if no rule sets `act_static_scale=True`; by the function, if nothing
        in the step has a static range.

    Example:
      >>> import jax
      >>> from flax import linen as nn
      >>> from jax import numpy as jnp
      >>> from qwix_train import QuantizationRule
      >>> from qwix_train.calib import observe
      >>> rules = [
      ...     QuantizationRule(
      ...         weight_qtype="int8", act_qtype="int8", act_static_scale=True
      ...     )
      ... ]
      >>> model = nn.Dense(2)
      >>> params = model.init(jax.random.key(0), jnp.ones((1, 4)))
      >>> observed = observe(model.apply, rules)
      >>> stats, step = {}, jax.jit(observed)
      >>> for scale in (1.0, 3.0):
      ...     stats, out = step(stats, params, scale * jnp.ones((8, 4)))
      >>> observed.quant_stats(stats)["dot_general0_lhs"]["sum_of_absmax"]
      Array([[4.]], dtype=float32)
    """
    return Observed(step, tagging(rules))


def tagging(rules: Sequence[QuantizationRule] | QuantizationProvider) -> Tagging:
    """The provider that collects the ranges that rules, or another provider, ask for.

    Args:
      rules: the rules, or the provider.

    Raises:
      TypeError: if the provider collects no ranges.
      ValueError: if there is no range to collect.
    """
    if isinstance(rules, QuantizationProvider):
        return rules.tagging()
    return RangeTagging(rules)


def empty_states(body: Body, ranges: Mapping[str, Any]) -> dict[str, Any]:
    """The statistics of what is tagged in a body, before any batch.

    Args:
      body: the body.
      ranges: what was tagged, by name.
    """
    states = {}
    for name, layers in harvest.names_in(body).items():
        found = ranges[name]
        state = found.statistics.init(found.shape, found.dtype)
        states[name] = jax.tree.map(
            lambda x, layers=layers: jnp.broadcast_to(x, (*layers, *x.shape)), state
        )
    return states


def updated_states(
    body: Body, inputs: Sequence[Any], ranges: Mapping[str, Any], states: Stats
) -> tuple[list[Any], dict[str, Any]]:
    """Runs a body, and updates the statistics of what is tagged in it.

    Args:
      body: the body.
      inputs: its inputs.
      ranges: what was tagged, by name.
      states: the statistics before, of each name that is tagged in the body.

    Returns:
      The results of the body, and the statistics after.
    """

    def update(name, value, state):
        harvest.check_not_batched(name, value, len(ranges[name].shape))
        with located(name):
            return ranges[name].statistics.update(state, value)

    return harvest.harvest(body, inputs, states, update)


def quant_stats_of(ranges: Mapping[str, Any], stats: Stats) -> dict[str, Any]:
    """The ranges that statistics give, as `quantize_params` takes them.

    Args:
      ranges: what is collected, by name.
      stats: the statistics.

    Raises:
      ValueError: if a range was never updated with a batch that counts.

    Warns:
      UserWarning: if ranges clip much of what was seen, or batches differ much.
    """
    flat = {}
    warn_of_ranges(
        (name, found.statistics, stats[name], found.shape)
        for name, found in ranges.items()
        if name in stats and not found.learned and has_batches(stats[name])
    )
    for name, found in ranges.items():
        state = stats.get(name, {"count": 0})
        if not has_batches(state):
            raise ValueError(
                f"No range was collected for {name!r}: its op was not reached, or "
                "every batch was empty or not finite. If only some elements are not "
                "finite, such as padding, act_finite_only=True leaves them out."
            )
        flat[found.path] = per_layer(found.statistics.quant_stats, state)(state)
    return traverse_util.unflatten_dict(flat)


def has_batches(state: Mapping[str, Any]) -> bool:
    """Whether a state was updated with a batch that counts, in every layer."""
    return bool(np.all(processes.whole(state["count"]) > 0))


class Tagging(QuantizationProvider):
    """Tags arrays of a model that stays in float, so that statistics are collected.

    Attributes:
      ranges: what was tagged so far, by the name of its range.
    """

    takes_static_ranges = True

    def __init__(self, rules: Sequence[QuantizationRule]):
        """Checks the rules."""
        super().__init__(rules)
        self.ranges: dict[str, Any] = {}

    def tag(
        self, path: Path, statistics: Statistics, array: Any, layers: Sequence[bool]
    ) -> Any:
        """Tags one array, so that statistics of it are collected.

        Args:
          path: the path of its range.
          statistics: what is measured, and how batches combine.
          array: the array.
          layers: for each `scan` of the model around it, outermost first, whether it
            goes over layers; see `harvest.tag`.
        """
        self.note(path, statistics, array)
        return harvest.tag(array, "/".join(path), layers)

    def note(
        self, path: Path, statistics: Statistics, array: Any, **fields: Any
    ) -> None:
        """Takes note of an array that is tagged.

        Args:
          path: the path of its range.
          statistics: what is measured, and how batches combine.
          array: the array.
          **fields: other fields of `Tagged`.
        """
        found = Tagged(path, statistics, array.shape, array.dtype, **fields)
        self.ranges[found.name] = found


class RangeTagging(Tagging):
    """Tags the activations that need ranges."""

    def __init__(
        self, rules: Sequence[QuantizationRule], *, with_gradients: bool = False
    ):
        """Checks the rules.

        Args:
          rules: the rules.
          with_gradients: whether to make room for statistics of gradients, too, which a
            train step collects. The arrays that are tagged for them are not gradients.

        Raises:
          ValueError: if no rule asks for ranges.
        """
        super().__init__(rules)
        self.with_gradients = with_gradients
        if with_gradients and any(rule.gradient_statistics for rule in self.rules):
            return
        if not any(rule.static_act_ranges for rule in self.rules):
            raise ValueError(
                "No rule sets act_static_scale=True, so there is no range to collect."
            )

    def tags(self, op: OpPlan) -> bool:
        """Whether the activations of an op need ranges."""
        return op.static

    def stages(self, traced: TracedCall, plan: Plan) -> CallStages:
        """See `QuantizationProvider.stages`: activations are tagged."""
        del traced

        def observed(op: OpPlan, side: int) -> tuple[Observe, ...]:
            if op.activations[side] is None:
                return ()
            path, statistics = op.range_path(side), plan.statistics_of(op, side)
            fields = {"learned": bool(op.learned), "owner": op.range_owner(side)}
            note = functools.partial(self.note, path, statistics, **fields)
            joined = statistics.how.axis_names
            return (Observe(op.before(side), "/".join(path), note, joined),)

        def room(op: OpPlan) -> tuple[Observe, ...]:
            statistics = plan.gradient_statistics(op)
            if statistics is None or not self.with_gradients:
                return ()
            path = op.gradient_path
            note = functools.partial(self.note, path, statistics)
            return (Observe((LargestMagnitude(),), "/".join(path), note),)

        ops = {}
        for op in plan.quantized_ops:
            operands: list[tuple[Observe, ...]] = [()] * len(op.activations)
            if self.tags(op):
                operands = [observed(op, side) for side in range(len(op.activations))]
            operands[0] = (*operands[0], *room(op))
            if any(operands):
                ops[op.op.key] = OpStages(op.op, tuple(operands))
        return CallStages({}, ops)
