"""Providers that collect statistics of what enters weights; see `qwix_train.ptq`."""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import traverse_util
from jax import numpy as jnp

from qwix_train.core.how import HowToQuantize
from qwix_train.core.qarray import WithAux
from qwix_train.like_qwix.providers import Lenient
from qwix_train.planning.leaves import Path
from qwix_train.planning.plan import Plan
from qwix_train.planning.planner import make_plan
from qwix_train.planning.quant_stats import states_in
from qwix_train.planning.rules import QuantizationRule
from qwix_train.ptq.input_statistics import InputTagging, WeightInput
from qwix_train.ptq.params import quantize_tree, quantized_leaf
from qwix_train.ptq.weight_matrices import MatrixView
from qwix_train.ptq.weight_method import Weight
from qwix_train.stages.run import run
from qwix_train.trace import function, harvest
from qwix_train.trace.function import TracedCall
from qwix_train.values import stored


class CalibrationProvider(Lenient, abc.ABC):
    """Runs a model in float, and keeps statistics of what enters its weights.

    They stand in the collection `quant_stats` of a Linen model, and in `QuantStat`s of
    an NNX model, beside the weight: `kernel_gptq` for `kernel`. Each holds a `count` of
    batches, and sums over them. Nothing is kept for a weight if its product contracts
    more than one axis, or takes inputs in groups.
    """

    takes_static_ranges = True
    keeps_quant_stats = True

    def __init__(self, rules: Sequence[QuantizationRule], *, disable_jit: bool = False):
        """Checks the rules.

        Args:
          rules: the rules. Those of other types than `get_rule_type` says are skipped,
            and what they match.
          disable_jit: has no effect.
        """
        super().__init__(rules, allow_unmatched=True)
        self.disable_jit = disable_jit
        own = self.get_rule_type()
        self._collecting = tuple(
            rule
            if isinstance(rule, own)
            else QuantizationRule(module_path=rule.module_path, op_names=rule.op_names)
            for rule in self.rules
        )

    @abc.abstractmethod
    def get_rule_type(self) -> type[QuantizationRule]:
        """The type of the rules that ask for statistics."""

    @abc.abstractmethod
    def get_stats_suffix(self) -> str:
        """What stands behind the name of a weight, such as `"_gptq"`."""

    @abc.abstractmethod
    def stats_of(
        self, lhs: jax.Array, weight: jax.Array, rule: QuantizationRule
    ) -> dict[str, jax.Array]:
        """The statistics of a batch.

        Args:
          lhs: what enters the weight, shape (channels, samples).
          weight: the weight, as it is stored.
          rule: its rule.
        """

    def plan(self, traced: TracedCall) -> Plan:
        """See `QuantizationProvider.plan`."""
        self.remember(super().plan(traced))
        return make_plan(traced, self._collecting)

    def collect(
        self, traced: TracedCall, plan: Plan, quant_stats: Any, update: bool
    ) -> tuple[Any, Any]:
        """See `QuantizationProvider`."""
        tagging = InputTagging(self._collecting, second_moment=False)
        stages = tagging.stages(traced, plan)
        readers = {
            found.name: (path, found)
            for path, reads in tagging.reads.items()
            for found in reads.values()
            if isinstance(found, WeightInput) and _is_matrix(found)
        }

        def call(inputs):
            return run(traced.with_inputs(inputs), stages)

        outer = function.trace(call, (list(traced.inputs),), lambda key_path: None)
        rules = {
            path: self._collecting[op.rule_index]
            for op in plan.quantized_ops
            for path in op.weights
            if op.rule_index is not None
        }

        def stats(name, x):
            path, found = readers[name]
            (lhs,) = found.channels.samples(x)
            return self.stats_of(lhs.T, traced.named[path], rules[path])

        empty = {}
        for name in harvest.names_in(outer.body):
            if name in readers:
                _, found = readers[name]
                x = jax.ShapeDtypeStruct(found.shape, found.dtype)
                shapes = jax.eval_shape(functools.partial(stats, name), x)
                empty[name] = {
                    key: jnp.zeros((*found.layers, *value.shape), jnp.float32)
                    for key, value in shapes.items()
                }

        def add(name, x, state):
            return {key: state[key] + value for key, value in stats(name, x).items()}

        outs, sums = harvest.harvest(outer.body, outer.inputs, empty, add)
        if update:
            quant_stats = self._added(quant_stats, readers, sums)
        return outer.rebuild(outs), quant_stats

    def _added(
        self,
        quant_stats: Any,
        readers: Mapping[str, tuple[Path, WeightInput]],
        sums: Mapping[str, Any],
    ) -> dict[str, Any]:
        states = {path: dict(state) for path, state in states_in(quant_stats).items()}
        for name, batch in sums.items():
            (*module, weight), found = readers[name]
            path, layers = (*module, weight + self.get_stats_suffix()), found.layers
            count = jnp.ones(layers, jnp.int32)
            if layers and not found.view.layers:  # one weight for all of them
                axes = tuple(range(len(layers)))
                batch = {key: value.sum(axes) for key, value in batch.items()}
                count = count.sum()
            before = states.setdefault(path, {})
            before["count"] = before.get("count", 0) + count
            for key, value in batch.items():
                key = f"sum_of_{key}"
                before[key] = value + before.get(key, 0)
        return traverse_util.unflatten_dict(states)


class SinglePassCalibrationProvider(CalibrationProvider, abc.ABC):
    """A provider whose statistics follow from the input alone."""

    @abc.abstractmethod
    def compute_stats(self, lhs: jax.Array) -> dict[str, Any]:
        """The statistics of a batch, of shape (channels, samples)."""

    def stats_of(
        self, lhs: jax.Array, weight: jax.Array, rule: QuantizationRule
    ) -> dict[str, jax.Array]:
        """See `CalibrationProvider.stats_of`."""
        del weight, rule
        return self.compute_stats(lhs)


@dataclasses.dataclass(frozen=True)
class CalibratedQuantContext:
    """A weight, and what was collected for it.

    Attributes:
      weight: the weight, with the moments that a method of `qwix_train.ptq` looks at
        still to be filled in.
      calibration_stats: the statistics, averaged over batches, with an axis of matrices
        in front: one for each layer that is scanned over.
      path: the path of the weight.
    """

    weight: Weight
    calibration_stats: Mapping[str, jax.Array]
    path: Path

    def with_moments(self, **moments: jax.Array) -> Weight:
        """The weight with the moments of its input."""
        return dataclasses.replace(self.weight, moments=moments)


def quantize_params_with_calibration(
    params: Any,
    abstract_quantized_params: Any,
    quant_stats: Any,
    stats_suffix: str,
    quantize_fn: Callable[[CalibratedQuantContext], Any],
    *,
    allow_extra_params: bool = False,
    leaves_beside: Callable[[Mapping[Path, Any]], Mapping[Path, Any]] = lambda _: {},
) -> Any:
    """Quantizes weights by what was collected for them, and rounds the others.

    Args:
      params: see `quantize_params`.
      abstract_quantized_params: see `quantize_params`.
      quant_stats: what a `CalibrationProvider` collected.
      stats_suffix: what stands behind the name of a weight there.
      quantize_fn: gives the `QArray` of a weight.
      allow_extra_params: see `quantize_params`.
      leaves_beside: called at the end, with the params of the quantized model by path;
        gives what is put next to the params.
    """
    states = states_in(stored.unbox(quant_stats))

    def leaf(path, param, target, given):
        state = states.get((*path[:-1], path[-1] + stats_suffix))
        if state is None or not stored.is_quantized(target):
            return quantized_leaf(path, param, target, given)
        count = jnp.asarray(state["count"])
        view = _view(tuple(param.shape), target.how, count.shape)
        if view is None:
            return quantized_leaf(path, param, target, given)
        count, means = count.reshape(-1), {}
        for key, value in state.items():
            if key != "count":
                value = value.reshape(len(count), *value.shape[len(view.layers) :])
                each = count.reshape(-1, *(1 for _ in value.shape[1:]))
                means[key.removeprefix("sum_of_")] = value / each
        weight = Weight(param, target.how, view, {})
        return WithAux(
            quantize_fn(CalibratedQuantContext(weight, means, path)), target.how
        )

    return quantize_tree(
        params,
        abstract_quantized_params,
        leaf,
        lambda target: ({}, leaves_beside(target)),
        allow_extra_params=allow_extra_params,
    )


def _is_matrix(found: WeightInput) -> bool:
    """Whether one axis of a weight is contracted, and its inputs come in one group."""
    axes = getattr(found.channels, "contracting", ())
    return len(axes) == 1 and not getattr(found.channels, "groups", ())


def _view(
    shape: tuple[int, ...], how: HowToQuantize, layers: tuple[int, ...]
) -> MatrixView | None:
    """A weight as matrices, one for each layer; None if it is not clear which."""
    kept = [axis for axis in range(len(shape)) if axis in how.channelwise_axes]
    if len(kept) != len(shape) - 1:
        return None
    (channels,) = set(range(len(shape))) - set(kept)
    stacked: list[int] = []
    for size in layers:
        after = stacked[-1] if stacked else -1
        found = (axis for axis in kept if axis > after and shape[axis] == size)
        if (axis := next(found, None)) is None:
            return None
        stacked.append(axis)
    rows = [axis for axis in kept if axis not in stacked]
    return MatrixView(
        stored=shape,
        factors=shape,
        order=(*stacked, *rows, channels),
        layers=layers,
        groups=(),
        rows=math.prod(shape[axis] for axis in rows),
        channels=shape[channels],
    )
