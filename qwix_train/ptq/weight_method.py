"""Methods that look at the inputs of a weight before they choose its codes."""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import numpy as np
from flax import nnx, traverse_util
from jax import numpy as jnp

from qwix_train.calib.calibrator import Collector, Step
from qwix_train.calib.merging import merge_stats
from qwix_train.calib.observe import Observed
from qwix_train.core.how import HowToQuantize
from qwix_train.core.operands import as_float, is_concrete
from qwix_train.core.qarray import MaybeQArray, QArray, WithAux
from qwix_train.files import processes
from qwix_train.planning import static_range
from qwix_train.planning.leaves import SIDES, OperandName, Path, pre_quant_scale_path
from qwix_train.planning.quant_stats import states_in
from qwix_train.planning.rules import QuantizationRule, check_rules
from qwix_train.ptq.given_scales import GivenScales
from qwix_train.ptq.input_statistics import InputTagging, WeightInput
from qwix_train.ptq.params import quantize_tree, quantized_leaf
from qwix_train.ptq.provider import PtqProvider
from qwix_train.ptq.weight_matrices import MatrixView
from qwix_train.ptq.weight_report import WeightRecord, WeightReport
from qwix_train.values import stored


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("param", "moments"),
    meta_fields=("how", "view"),
    drop_fields=("inputs",),  # Weights that differ in their names are compiled once.
)
@dataclasses.dataclass(frozen=True)
class Weight:
    """A weight, with all that a method may look at.

    Compiled functions take it as an argument. Inside of them it has no `inputs`.

    Attributes:
      param: the stored param, a float array.
      how: how the param is to be quantized.
      view: how it is read as matrices, of shape (matrices, rows, channels).
      moments: the statistics of the inputs of these matrices: ``absmean``, ``min`` and
        ``max``, shape (matrices, channels), and ``second_moment``, shape (matrices,
        channels, channels), if the method collects it.
      inputs: the inputs of the products that read the weight.
    """

    param: jax.Array
    how: HowToQuantize
    view: MatrixView
    moments: Mapping[str, jax.Array]
    inputs: tuple[WeightInput, ...] = ()

    @property
    def name(self) -> str:
        """The names of its inputs, as text."""
        return ", ".join(found.name for found in self.inputs)

    def matrices(
        self, array: MaybeQArray | None = None, scale: jax.Array | None = None
    ) -> jax.Array:
        """The matrices, in float32, that the input is multiplied by.

        Args:
          array: an array to use instead of the param; None for the param.
          scale: what the input is multiplied by first, shape (matrices, channels).
        """
        array = as_float(self.param if array is None else array)
        matrices = self.view.to_matrices(array).astype(jnp.float32)
        return (
            matrices if scale is None else matrices * scale.astype(jnp.float32)[:, None]
        )

    def divided(self, scale: jax.Array) -> jax.Array:
        """The param, divided by a scale of its input, shape (matrices, channels)."""
        each = jnp.broadcast_to(scale.astype(jnp.float32)[:, None], self.view.shape)
        return (self.param / self.view.from_matrices(each)).astype(self.param.dtype)

    def scaled(self, scale: jax.Array) -> Weight:
        """The weight for an input that is multiplied by a scale.

        Args:
          scale: shape (matrices, channels).

        Returns:
          It with the second moment of the scaled input, and no other moments.
        """
        moments = {"second_moment": _scaled(self.moments["second_moment"], scale)}
        return dataclasses.replace(self, param=self.divided(scale), moments=moments)


@jax.jit
def _scaled(second_moment: jax.Array, scale: jax.Array) -> jax.Array:
    scale = scale.astype(jnp.float32)
    return second_moment * scale[:, :, None] * scale[:, None]


@dataclasses.dataclass(frozen=True)
class Scale:
    """What the input of a weight is multiplied by.

    Attributes:
      channels: the scale, shape (matrices, channels).
      stored: the scale as it is kept among the params (see `pre_quant_scale`).
      range: the statistics of the range of the scaled input, if that range is static.
    """

    channels: jax.Array
    stored: jax.Array
    range: dict[str, jax.Array] | None = None


@dataclasses.dataclass(frozen=True)
class Finding:
    """What the report says of a weight.

    Attributes:
      note: a note.
      errors: the squared errors of the outputs, relative to the outputs squared: with
        rounding to nearest, and with this method. If None, `output_error` gives them.
      reason: why the weight was left as it is; empty if it was not.
    """

    note: str = ""
    errors: tuple[jax.Array, jax.Array] | None = None
    reason: str = ""


class QuantizedWeight(NamedTuple):
    """The result of a method for a weight.

    Attributes:
      array: its codes and scales.
      found: what the report says of it.
      scale: what its input is multiplied by; None if it is not.
    """

    array: QArray
    found: Finding
    scale: Scale | None = None


def output_error(
    weight: Weight, array: QArray, scale: jax.Array | None = None
) -> jax.Array:
    """The squared error of the outputs, relative to the outputs squared.

    With the error ``E`` of the weight ``W`` and the second moment ``M`` of the input,
    it is ``trace(E M E^T) / trace(W M W^T)``, where both are summed over matrices.

    Args:
      weight: the weight.
      array: what it was quantized to.
      scale: what its input is multiplied by, shape (matrices, channels), or None.
    """
    matrices, approximate = weight.matrices(), weight.matrices(array, scale)
    moment = weight.moments["second_moment"]
    total = squared_outputs(matrices, moment).sum()
    return squared_outputs(matrices - approximate, moment).sum() / total


@jax.jit
def squared_outputs(matrices: jax.Array, second_moment: jax.Array) -> jax.Array:
    """The mean square of the outputs, ``trace(W M W^T)``, of each matrix.

    Args:
      matrices: ``W``, shape (matrices, rows, channels).
      second_moment: ``M``, shape (matrices, channels, channels).
    """
    product = jnp.matmul(matrices, second_moment, precision=jax.lax.Precision.HIGHEST)
    return jnp.sum(product * matrices, (1, 2))


State = Mapping[str, Any]
"""What was collected for each input, by its path: ``Dense_0/dot_general0_lhs``."""


class WeightMethod(Collector, abc.ABC):
    """Collects the inputs of weights in a user's loop, then quantizes the weights.

    Wrap the eval step of the float model and run the loop. Then call the method
    `quantize_params` instead of the function of that name. You can wrap several steps.
    To quantize one block of the model after the other, see `quantize_in_sequence`.

    Attributes:
      rules: the rules.
      state: the statistics so far, by name: a tree of arrays that you can save, and set
        again.
      report: what was done to each weight; None before `quantize_params`.
    """

    title: str = ""
    second_moment: bool = True
    rows: int = 0
    scales_inputs: bool = False

    def __init__(self, rules: Sequence[QuantizationRule]):
        """Checks the rules.

        Args:
          rules: the rules by which the model is to be quantized.

        Raises:
          ValueError: if a rule has a rotation.
        """
        super().__init__()
        self.rules: tuple[QuantizationRule, ...] = check_rules(rules)
        for index, rule in enumerate(self.rules):
            if rule.rotation is not None:
                raise ValueError(
                    f"Rule {index} (rotation={rule.rotation!r}): {self.title} "
                    "quantizes weights in their own basis. Leave the rotation out, or "
                    "round to nearest in it, with ptq.quantize."
                )
        self.report: WeightReport | None = None
        self.restart()

    def restart(self, takes: Callable[[Path], bool] = lambda path: True) -> None:
        """Drops all statistics. Wrapped steps collect new ones.

        Args:
          takes: says of the path of a param whether its inputs are collected from now
            on; see `InputTagging`.
        """
        self.state: Mapping[str, Any] = {}
        self.tagging: InputTagging = InputTagging(
            self.rules,
            second_moment=self.second_moment,
            rows=self.rows,
            takes=takes,
        )

    @property
    def ranges(self) -> Mapping[str, Any]:
        """The inputs whose statistics were found so far, by name."""
        return self.tagging.ranges

    @property
    def provider(self) -> PtqProvider:
        """The mode of the model that is to run what `quantize_params` gives."""
        return PtqProvider(self.rules, pre_quant_scale=self.scales_inputs)

    def wrap(self, step: Step) -> Step:
        """Makes a step collect statistics at every call.

        Args:
          step: a step that calls a Linen or NNX model, in float. If it is jitted, it
            runs compiled. Do not use the wrapped step inside `jit`, `scan` and the
            like: use `observe` for that.

        Returns:
          A step with the same signature and the same results.

        Raises:
          ValueError: by the step, when it is called within a transformation, or if no
            rule quantizes a weight that it reads.
        """

        # Compiled for the inputs that are collected; `restart` may choose others.
        @functools.lru_cache(maxsize=1)
        def collecting(tagging: InputTagging) -> Step:
            observed = Observed(step, tagging)
            return self.collecting(step, observed, "method.observe(step)")

        @functools.wraps(step)
        def wrapped(*args, **kwargs):
            return collecting(self.tagging)(*args, **kwargs)

        return cast(Step, wrapped)

    def observe(self, step: Callable[..., Any]) -> Observed:
        """The pure form of `wrap`, for loops that jit, scan or shard the step.

        Args:
          step: a step that calls a Linen or NNX model, in float.

        Returns:
          A function `observed(state, *args) -> (state, outputs)`, which starts from
          `observed.init(*args)`. Put the last state into `state` of this object.
        """
        return Observed(step, self.tagging)

    def merge(self, a: State, b: State) -> State:
        """The statistics of the batches of two states, such as those of two hosts.

        Args:
          a: a state.
          b: another one. Statistics of an input that only one of the two has are kept.
        """
        return merge_stats(self, a, b)

    def quantize_params(
        self,
        params: Any,
        abstract_quantized_params: Any,
        quant_stats: Any = None,
        *,
        allow_extra_params: bool = False,
        donate: bool = False,
    ) -> Any:
        """Quantizes float params as a quantized model says.

        If the method cannot be applied to a weight, the weight is rounded to nearest,
        as the function `quantize_params` does. `report` says which weights, and why.

        Args:
          params: see the function `quantize_params`.
          abstract_quantized_params: see there. `provider` must quantize the model.
          quant_stats: see there. For an input that gets a scale for its channels, a
            range that is given is ignored: its range is that of the scaled input over
            all batches that were collected. For other inputs the given range counts.
          allow_extra_params: see there.
          donate: see there.

        Returns:
          The quantized params.

        Raises:
          TypeError, ValueError: see there; and if nothing was collected, or a
            quantized param was not reached in the steps that were run.
        """
        static_range.check_quant_stats(quant_stats)
        self.check_collected()
        job = Job(self, isinstance(abstract_quantized_params, nnx.Module))
        tree = quantize_tree(
            params,
            abstract_quantized_params,
            job.leaf,
            functools.partial(job.finish, quant_stats),
            allow_extra_params=allow_extra_params,
            donate=donate,
        )
        self.report = WeightReport(self.title, tuple(job.records))
        return tree

    @abc.abstractmethod
    def quantize_weight(self, weight: Weight) -> QuantizedWeight:
        """The codes of a weight."""

    def obstacle(self, weight: Weight) -> str:
        """Why the method does not apply to a weight; empty if it does."""
        del weight
        return ""

    def check_collected(self) -> None:
        """Complains of inputs that were not collected.

        Raises:
          ValueError: if there are any, or no input was found.
        """
        tagging = self.tagging
        # If no weight has an input to collect, there are no ranges either, and the
        # report says why.
        if not tagging.reads or (tagging.ranges and not self.state):
            raise ValueError(
                "No inputs were collected: run the wrapped step first. For a state "
                "that was put back, trace the step: method.observe(step).init(*args)."
            )
        for name in tagging.ranges:
            counts = self.state[name]["count"] if name in self.state else 0
            if is_concrete(counts) and not np.all(processes.whole(counts)):
                raise ValueError(
                    f"No input was collected for {name!r}: its op was not reached, or "
                    "every batch was empty or not finite. Run the wrapped step on "
                    "batches that reach it, or leave it out of the rules."
                )


class Job:
    """Quantizes the params of a tree, one after the other.

    Attributes:
      records: what was done to each.
    """

    def __init__(self, method: WeightMethod, in_module: bool):
        """Starts with nothing.

        Args:
          method: the method.
          in_module: whether the quantized model is an NNX module.
        """
        self.method = method
        self.in_module = in_module
        self.records: list[WeightRecord] = []
        self.scales: dict[Path, jax.Array] = {}
        self.ranges: dict[Path, dict[str, jax.Array]] = {}
        # Those of inputs that are left as they are, unless others are given.
        self.own_ranges: dict[Path, dict[str, jax.Array]] = {}
        self.unscaled: list[Path] = []

    def leaf(self, names: Path, param: Any, target: Any, given: GivenScales) -> Any:
        """Quantizes one param; see `params.QuantizeLeaf`."""
        return self.leaf_and_values(names, param, target, given)[0]

    def leaf_and_values(
        self, names: Path, param: Any, target: Any, given: GivenScales
    ) -> tuple[Any, Any]:
        """Quantizes one param, and gives its values for the float model.

        Returns:
          The quantized param; and a function that gives a float array. With it, the
          products of the float model are those of the quantized weight. If the method
          scales the input, that is part of the array.
        """
        rounded = quantized_leaf(names, param, target, given)
        if not stored.is_quantized(target):
            return rounded, lambda: rounded
        where = f"Param {'/'.join(names)!r}"
        if isinstance(param, jax.ShapeDtypeStruct):
            raise TypeError(
                f"{where} is a shape, and {self.method.title} looks at values. To have "
                "shapes of the result, put the call into jax.eval_shape."
            )
        all_reads = self.method.tagging.reads
        path = path_among(all_reads, names)
        prefix = names[: len(names) - len(path)]
        reads = all_reads[path]
        weight = self._weight(path, jnp.asarray(param), target.how)
        reason = weight if isinstance(weight, str) else self.method.obstacle(weight)
        if names in given.weights:
            reason = "its scale stands next to it among the params"
        record = functools.partial(WeightRecord, "/".join(path), tuple(reads))
        if reason or isinstance(weight, str):
            self.records.append(record(False, reason))
            self.unscaled += [(*prefix, *name.split("/")) for name in reads]
            return rounded, lambda: stored.dequantized(rounded)
        array, said, scale = self.method.quantize_weight(weight)
        if scale is not None:
            (found,) = weight.inputs
            place = (*prefix, *pre_quant_scale_path(found.path))
            self.scales[place] = scale.stored
            if scale.range is not None:
                channels = scale.channels
                unscaled = is_concrete(channels) and np.all(
                    processes.whole(channels) == 1
                )
                ranges = self.own_ranges if unscaled else self.ranges
                ranges[found.path] = scale.range
        errors = said.errors
        if errors is None and "second_moment" in weight.moments:
            before = output_error(weight, rounded.array)
            errors = before, output_error(weight, array, scale and scale.channels)
        before, after = map(_known, errors or (None, None))
        note = "; ".join(filter(None, (said.note, _without_input(weight))))
        self.records.append(record(not said.reason, said.reason, before, after, note))

        def values():
            matrices = weight.matrices(array, scale and scale.channels)
            return weight.view.from_matrices(matrices).astype(weight.param.dtype)

        return WithAux(array, rounded.how), values

    def finish(self, quant_stats: Any, target: Mapping[Path, Any]) -> Any:
        """The ranges, with those of scaled inputs, and the scales."""
        if self.in_module and (lost := sorted(self.scales.keys() - target.keys())):
            raise ValueError(
                f"The quantized model has no place for {'/'.join(lost[0])!r}. Quantize "
                "it with the provider of the method: "
                "quantize_model(model, method.provider, *inputs)."
            )
        for path in self.unscaled:
            for side in SIDES:
                operand = OperandName.parse(path)._replace(side=side)
                place = pre_quant_scale_path(operand.path)
                if place in target:
                    shape = stored.shape_of(target[place])
                    self.scales[place] = jnp.ones(shape.shape, shape.dtype)
        given = states_in(stored.unbox(quant_stats or {}))
        ranges = {**self.own_ranges, **given, **self.ranges}
        return traverse_util.unflatten_dict(ranges), self.scales

    def _weight(self, path: Path, param: jax.Array, how: HowToQuantize) -> Weight | str:
        """The weight at a path; or why the method does not apply to it, as text."""
        reads = self.method.tagging.reads[path].values()
        if reasons := [found for found in reads if isinstance(found, str)]:
            return "; ".join(dict.fromkeys(reasons))
        inputs = tuple(found for found in reads if isinstance(found, WeightInput))
        view = inputs[0].view
        if any(found.view != view for found in inputs):
            return "its ops contract different axes of it"
        if view.stored != param.shape:
            raise ValueError(
                f"Param {'/'.join(path)!r} has shape {param.shape}, and {view.stored} "
                "in the model whose inputs were collected. Give the params of that "
                "model."
            )
        all_states = [
            state
            for found in inputs
            for state in _per_matrix(found, self.method.state[found.name])
        ]
        merge = inputs[0].statistics.merge
        return Weight(param, how, view, functools.reduce(merge, all_states), inputs)


def path_among(paths: Collection[Path], names: Path) -> Path:
    """The path of a param in a model, without the collection that it stands in.

    Args:
      paths: the paths of the params that the model read in the steps that were run.
      names: the path of the param in a tree.

    Raises:
      ValueError: if the model did not read it.
    """
    path = names if names in paths else names[1:]
    if path not in paths:
        raise ValueError(
            f"Param {'/'.join(names)!r} was not reached: no op that reads it was in "
            "the steps that were run. Run steps that reach it, or leave it out of the "
            "rules."
        )
    return path


def _per_matrix(found: WeightInput, state: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The state of an input with one axis of matrices in front.

    If all layers of a scan share the weight, there is a state for each layer.
    """
    depth = len(found.layers)
    count = math.prod(found.layers)

    def stacked(value: Any) -> jax.Array:
        if is_concrete(value):
            # Off the mesh of the step, which may be another than that of the params.
            value = processes.whole(value)
        return jnp.asarray(value).reshape(count, *value.shape[depth:])

    moments = {name: stacked(value) for name, value in state.items()}
    if found.view.layers or not found.layers:
        names = [name for name in moments if moments[name].ndim > 1]
        merged = {name: jnp.concatenate(list(moments[name])) for name in names}
        others = {name: moments[name][0] for name in moments.keys() - set(names)}
        return [{**merged, **others}]
    return [{name: value[i] for name, value in moments.items()} for i in range(count)]


def _without_input(weight: Weight) -> str:
    """Says which matrices of a weight, such as those of experts, saw no input."""
    seen = weight.moments["absmean"]
    if not is_concrete(seen):
        return ""
    unseen = np.flatnonzero(~np.any(processes.whole(seen) != 0, axis=-1)).tolist()
    if not unseen:
        return ""
    names = ", ".join(map(str, unseen[:8])) + (", ..." if len(unseen) > 8 else "")
    return (
        f"no input reached {len(unseen)} of its {len(seen)} matrices ({names}): "
        "they are rounded to nearest"
    )


def _known(value: jax.Array | None) -> float | None:
    return float(value) if value is not None and is_concrete(value) else None
