"""Writes what quantization does to a model, as scalars for a dashboard."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import jax
import numpy as np
from flax import nnx

from qwix_train.calib.quantization_error import decibels
from qwix_train.core import numerics
from qwix_train.core.shortened import shortened
from qwix_train.files import processes
from qwix_train.hooks import state as states
from qwix_train.hooks.oscillations import oscillations_in
from qwix_train.hooks.periodic import PeriodicAction
from qwix_train.hooks.weight_measures import (
    WeightMeasures,
    drift,
    layer_axes,
    measure,
)
from qwix_train.planning import static_range
from qwix_train.planning.leaves import Leaf, Path
from qwix_train.planning.plan import Plan
from qwix_train.planning.quant_stats import states_in
from qwix_train.values import stored

_DRIFTS = ("scale_drift", "scale_drift_total")


class Writer(Protocol):
    """Takes the scalars, as a `clu.metric_writers.MetricWriter` does."""

    def write_scalars(self, step: int, scalars: Mapping[str, Any], /) -> Any:
        """Writes the scalars of a step."""


class QuantReport(PeriodicAction):
    """Writes how well a model's weights and activations fit their types.

    For each weight that the plan quantizes, such as `Dense_0/kernel`:

    * `quant/Dense_0/kernel/sqnr_db`: the signal-to-quantization-noise ratio of its
      float values `x` and their fake-quantized ones `q`,
      `10 log10(sum(x**2) / sum((x - q)**2))`; infinite where they are equal,
    * `quant/Dense_0/kernel/saturated`: the fraction of its elements that lie outside
      of the range, and are clipped; 0 if the method of calibration covers all elements,
    * `quant/Dense_0/kernel/at_end_codes`: the fraction that has the lowest or the
      highest code of the type, clipped or not,
    * `quant/Dense_0/kernel/bits`: how many bits a code has,
    * `quant/Dense_0/kernel/scale_drift` and `.../scale_drift_total`: how far its scales
      `s` have moved since the last report, and since the first one, relative to what
      they were then: `norm(s - s_then) / norm(s_then)`. They begin with the second
      report,
    * `quant/Dense_0/kernel/oscillating` and `.../frozen`, if the optimizer has
      `optim.freeze_oscillations` (with a threshold of `jnp.inf` to count alone): the
      fraction of its elements that oscillate between two levels more often than
      `oscillation_threshold`, and the fraction that is frozen at a level. For the whole
      model, `quant/oscillating` and `quant/frozen` are the numbers of such weights.

    If the params hold a `kernel_scale` beside the weight (and perhaps a
    `kernel_zero_point`), it is measured with this scale, which an export has, too.

    For each range of an activation, such as that of `Dense_0/dot_general0_lhs`, its
    ends: `quant/Dense_0/dot_general0_lhs/absmax`, or `min` and `max`. Of several
    channels or layers, these are the widest ends.

    Give the state to each call, `hook(step, state=state)`: a train state, variables,
    params, or an NNX module. Or give it once, as `state` below. With several processes,
    all call the hook, and the first one writes.

    Example:
      >>> from flax import linen as nn
      >>> from jax import numpy as jnp
      >>> from qwix_train import QuantizationRule, plan
      >>> from qwix_train.hooks import QuantReport
      >>> class Writer:  # or a clu.metric_writers.MetricWriter
      ...     def write_scalars(self, step, scalars):
      ...         for name, value in scalars.items():
      ...             print(step, name, round(value, 1))
      >>> model, x = nn.Dense(2), jnp.ones((1, 4))
      >>> params = {"kernel": jnp.arange(8.0).reshape(4, 2), "bias": jnp.zeros(2)}
      >>> rules = [QuantizationRule(weight_qtype="int4")]
      >>> report = QuantReport(Writer(), plan(model, rules, x), every_steps=10)
      >>> report(10, state=params)
      10 quant/kernel/sqnr_db 23.1
      10 quant/kernel/saturated 0.0
      10 quant/kernel/at_end_codes 0.2
      10 quant/kernel/bits 4.0
      True
    """

    def __init__(
        self,
        writer: Writer,
        plan: Plan,
        *,
        state: states.Source = None,
        quant_stats: states.QuantStats = None,
        opt_state: states.Source = None,
        oscillation_threshold: float = 0.005,
        per_layer: bool = False,
        prefix: str = "quant",
        every_steps: int | None = None,
        every_secs: float | None = None,
        on_steps: Iterable[int] | None = None,
    ):
        """Sets up the report.

        Args:
          writer: where the scalars go; see `Writer`.
          plan: what rules do to the model: `qwix_train.plan(model, rules, *inputs)`.
          state: an NNX module, or a function without arguments that returns the state
            of the loop, for calls of the hook that are not given one.
          quant_stats: the ranges of activations as `quantize_params` takes them, or a
            function that returns them, such as `lambda: calibrate.quant_stats` of a
            `Calibrate` hook. If None, the ranges that the state holds, as a state of
            QAT does (`attach`). Without any ranges, only weights are reported.
          opt_state: an `nnx.Optimizer`, or a function that returns the state of the
            optimizer. If None, the one that the state holds, as a train state and an
            `nnx.ModelAndOptimizer` do.
          oscillation_threshold: the frequency above which a weight counts as
            oscillating, as `FreezeOscillationsState` has it. With 0.005 and a momentum
            of 0.01, one oscillation counts for 69 updates.
          per_layer: whether the layers of weights and ranges that are stacked for
            `scan` have scalars of their own, too: `quant/.../layer_0/sqnr_db`.
          prefix: the first part of all names.
          every_steps: see `PeriodicAction`.
          every_secs: see `PeriodicAction`.
          on_steps: see `PeriodicAction`.

        Raises:
          TypeError: if the writer is not a writer, the plan is not a `Plan`, or
            `opt_state` is neither an NNX object nor a function.
          ValueError: if the plan quantizes no weight.
        """
        super().__init__(
            every_steps=every_steps, every_secs=every_secs, on_steps=on_steps
        )
        if not callable(getattr(writer, "write_scalars", None)):
            raise TypeError(
                f"The writer {writer!r} has no method write_scalars(step, scalars)."
            )
        if not isinstance(plan, Plan):
            raise TypeError(
                "Expected the plan of a model, qwix_train.plan(model, rules, "
                f"*inputs), got {shortened(plan)}."
            )
        if not isinstance(opt_state, nnx.Pytree | Callable | None):
            raise TypeError(
                "opt_state changes with every step: give a function that returns it, "
                f"opt_state=lambda: opt_state, not a {type(opt_state).__name__}."
            )
        weights = {path: p for path, p in plan.params.items() if p.how is not None}
        if not weights:
            raise ValueError(plan.no_match_message())
        self._writer = writer
        self._plan = plan
        self._weights = weights
        self._state = state
        self._quant_stats = quant_stats
        self._opt_state = opt_state
        self._oscillation_threshold = oscillation_threshold
        # The scales of the last report, and of the first.
        self._scales: tuple[dict[Path, Any], ...] = ()
        self._per_layer = per_layer
        self._prefix = prefix
        self._measure = jax.jit(self._measure_all)

    def scalars(self, state: Any = None) -> dict[str, float]:
        """The scalars, by name, without the prefix.

        Args:
          state: the state; see the class.

        Raises:
          ValueError: if the params lack a weight of the plan, the weight or its scale
            has another shape, or the weight is quantized already.
        """
        return self._scalars(state)[0]

    def _apply(self, step: int, t: float, state: Any = None) -> None:
        scalars, scales = self._scalars(state)
        self._scales = (scales, *(self._scales[1:] or (scales,)))
        named = _named(self._prefix, scalars)
        processes.once(lambda: self._writer.write_scalars(step, named))

    def _scalars(self, state: Any) -> tuple[dict[str, float], dict[Path, Any]]:
        """The scalars, and the scales of the weights."""
        state = states.current(state, self._state, type(self).__name__)
        params = self._params(states.params_of(state))
        measured = processes.whole(self._measure(params))
        scalars: dict[str, float] = {}
        for path, found in measured.items():
            scalars |= self._weight_scalars(path, params[path][0].size, found)
        scalars |= self._oscillation_scalars(state)
        scales = {path: found.scale for path, found in measured.items()}
        return scalars | self._range_scalars(state), scales

    def _weight_scalars(
        self, path: Path, size: int, found: WeightMeasures
    ) -> dict[str, float]:
        """The scalars of one weight, and of its layers."""
        name, planned = "/".join(path), self._weights[path]
        assert planned.how is not None
        count = found.signal.size  # of layers
        moved = {
            key: drift(found.scale, scales[path], layer_axes(planned))
            # Before the first report there are none.
            for key, scales in zip(_DRIFTS, self._scales, strict=False)
        }

        def scalars(pick, size):
            noise = pick(found.noise)
            return {
                # A weight of zeros is exact, too.
                "sqnr_db": decibels(pick(found.signal), noise) if noise else math.inf,
                "saturated": float(pick(found.outside) / max(size, 1)),
                "at_end_codes": float(pick(found.at_ends) / max(size, 1)),
                **{
                    key: float(np.sqrt(pick(distance) / pick(length)))
                    for key, (distance, length) in moved.items()
                },
            }

        bits = {"bits": float(numerics.qtype_bits(planned.how.qtype))}
        named = _named(name, {**scalars(np.sum, size), **bits})
        for where, index in self._layers(found.signal.shape):
            layer = scalars(
                lambda x, index=index: np.broadcast_to(x, found.signal.shape)[index],
                size / count,
            )
            named |= _named(f"{name}/{where}", layer)
        return named

    def _oscillation_scalars(self, state: Any) -> dict[str, float]:
        """The scalars of oscillations, if the optimizer counts them."""
        if self._opt_state is not None:
            state = states.current(None, self._opt_state, type(self).__name__)
        found = {
            path: held.counts(self._oscillation_threshold)
            for path, held in oscillations_in(state, self._weights).items()
        }
        scalars: dict[str, float] = {}
        for path, counts in processes.whole(found).items():
            size = max(math.prod(self._weights[path].shape), 1)
            for key, count in zip(("oscillating", "frozen"), counts, strict=True):
                scalars[f"{'/'.join(path)}/{key}"] = float(count / size)
                scalars[key] = scalars.get(key, 0.0) + float(count)
        return scalars

    def _params(self, tree: Any) -> dict[Path, tuple[Any, Any, Any]]:
        """The weights of the plan, by path, each with its scale and zero point.

        Scale and zero point are None if they are not among the params.
        """
        given = stored.by_path(tree)
        params = {}
        for path, planned in self._weights.items():
            param = given.get(path)
            name = "/".join(path)
            if stored.is_quantized(param):
                raise ValueError(
                    f"Param {name!r} is quantized already; the report compares the "
                    "float params with what they become."
                )
            if param is None or tuple(param.shape) != planned.shape:
                found = "no such param" if param is None else f"shape {param.shape}"
                raise ValueError(
                    f"The plan quantizes a param {name!r} of shape {planned.shape}; "
                    f"the state has {found} there. Make the plan for this model."
                )
            leaf = Leaf(path, "scale")
            scale = leaf.among(given)
            zero_point = Leaf(path, "zero_point").among(given)
            if scale is not None:
                assert planned.how is not None
                leaf.check_shape(scale, planned.how.scale_shape(planned.shape))
            params[path] = param, scale, zero_point
        return params

    def _measure_all(self, params: dict[Path, Any]) -> dict[Path, Any]:
        return {
            path: measure(param, planned.how, layer_axes(planned), *grid)
            for path, (param, *grid) in params.items()
            if (planned := self._weights[path]).how is not None
        }

    def _range_scalars(self, state: Any) -> dict[str, float]:
        quant_stats = states.quant_stats_of(self._quant_stats, state, self._plan)
        found = processes.whole(states_in(stored.unbox(quant_stats or {})))
        scalars: dict[str, float] = {}
        for path, state in found.items():
            statistics = {k: np.asarray(v, np.float32) for k, v in state.items()}
            name, count = "/".join(path), statistics["count"]
            for (kind, end), value in static_range.ends_in(statistics).items():
                if kind == "sum":
                    axes = count.shape + (1,) * (value.ndim - count.ndim)
                    value = value / count.reshape(axes)
                widest = np.min if end == "min" else np.max
                scalars[f"{name}/{end}"] = float(widest(value))
                for where, index in self._layers(count.shape):
                    scalars[f"{name}/{where}/{end}"] = float(widest(value[index]))
        return scalars

    def _layers(self, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
        """The names and indices of layers that are stacked in this shape."""
        if not self._per_layer or not shape:
            return []
        return [
            ("layer_" + "_".join(map(str, index)), index) for index in np.ndindex(shape)
        ]


def _named(prefix: str, scalars: Mapping[str, float]) -> dict[str, float]:
    return {f"{prefix}/{name}" if prefix else name: x for name, x in scalars.items()}
