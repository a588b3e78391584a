"""Quantization rules: which ops of a model to quantize, and how."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from qwix_train import ops
from qwix_train.core import how, numerics, rotations, tiling
from qwix_train.core.formats import Scales
from qwix_train.core.numerics import is_int16
from qwix_train.core.shortened import shortened
from qwix_train.observers.averaging import parse_averaging
from qwix_train.observers.named import parse_observer
from qwix_train.observers.statistics import Statistics, make_statistics
from qwix_train.planning import field_types
from qwix_train.planning.leaves import OperandName, Path
from qwix_train.planning.schedule import OF_WHOLE_STEPS, Schedule

# What only `OdmlQatProvider` quantizes; `odml.table()` says what each becomes.
LITERT_OP_NAMES = tuple(
    """abs add argmax argmin avg_pool ceil clip concatenate cos cumsum eq erf erfc exp
    floor ge gelu gt hard_swish le leaky_relu log log1p log_softmax lt max max_pool
    maximum mean min minimum multiply ne pow relu relu6 relu_n1_to_1 rem round rsqrt
    sigmoid sign silu sin softmax sort sqrt subtract sum take tanh top_k truediv
    where""".split()
)


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class QuantizationRule:
    """Selects ops by module path and name, and says how to quantize them.

    Rules are tried in order, and the first that matches an op decides. A rule that
    sets no `weight_qtype` leaves the ops it matches in float.

    Attributes:
      module_path: a regular expression that the whole path of the module must match,
        such as `"encoder/.*"`.
      op_names: the ops that the rule is for. They are `"dot_general"`, `"einsum"`,
        `"conv_general_dilated"`, `"ragged_dot"` (the matrices of experts), `"gather"`
        (a lookup in a table of embeddings, per row), or one op by its id in the plan,
        such as `"einsum1"`. If empty, the rule is for all products and convolutions,
        and not for lookups. For LiteRT these are the ops of `odml.table()`. Any other
        name is for kernels that ask for it: see `current_rule`. One name may be given
        as a str.
      weight_qtype: the type for weights: `"int1"` to `"int8"`, `"ternary"`, `"nf4"`,
        `"float8_e4m3fn"`, `"mxfp8"`, `"mxfp4"`, `"nvfp4"` and others: see
        `docs/formats.md`; or the `jax.numpy` type of that name.
      act_qtype: the type for activations; they stay in float if None. For LiteRT also
        `"int16"`.
      tile_size: how many elements share a scale along the last contracted axis. If
        None, all elements along the contracted axes do; types with blocks, such as
        `"mxfp8"`, have their own tiles. The last axis is that of the operand itself, in
        whatever order an equation or `dimension_numbers` names the axes. A tile that is
        longer takes this axis whole, and goes on along the contracted axis before it:
        64 is 2 heads of 32 of a weight of shape (12, 32, 512). A float is one over the
        number of tiles along the last axis. A mapping gives the tiles of the weight by
        axis, as the op reads it: blocks of 128 x 128 are `{0: 128, 1: 128}`. Contracted
        axes that a tile does not reach, or that a mapping does not name, share its
        scale.
      act_tile_size: the same for activations; that of `tile_size` if None, unless that
        is a mapping.
      act_static_scale: whether activations are quantized with ranges that were
        collected beforehand.
      weight_calibration_method: how the range of a weight is found: `"absmax"`,
        `"absmax,0.9"`, `"minmax"`, `"rms,4"`, `"absmean"` or `"fixed,-1,1"`. `"lsq"`
        and `"lsq+"` train its scale: see `attach`. With `"ternary"` the default is
        `"absmean"`.
      act_calibration_method: the same for activations; `"absmax"` if None. `"lsq"`,
        `"lsq+"` and `"pact"` train one scale for each activation. `"lsq+"` also trains
        an offset, and `"pact"` is for the outputs of a ReLU.
      act_observer: for static ranges, what is measured in a batch:
        `"percentile,99.99"`, `"mse"`, `"entropy"`, or an object of yours (see
        `calib.RangeObserver` and `calib.StreamObserver`). If None, the range of
        `act_calibration_method`. For scales that are trained, it measures the range
        that they begin with.
      act_averaging: for static ranges, how batches combine: `"mean"`, `"ema,0.99"`,
        `"minmax"`, `"last"`, `"amax_history,16"` (delayed scaling: a batch of training
        is quantized by the widest range of the 16 batches before it), or an
        object of yours: see `calib.Averaging`.
      act_batch_axes: for static ranges, axes of an activation, such as that of the
        batch. Each index along them has a range, and the range of the batch is their
        mean. If None, the batch has one range as a whole.
      act_channelwise_axes: for static ranges, axes of an activation, not contracted,
        along which each index keeps a range of its own, such as that of the heads.
      act_finite_only: whether NaN and infinite elements, such as those of padding, are
        left out of static ranges. GPTQ, AWQ and SmoothQuant then leave out inputs with
        such elements. If False, a batch that has any does not count.
      act_axis_names: axes of the mesh of a `jax.shard_map` in the model or around the
        step, over which ranges of activations are joined: the widest of the shards, or
        their mean if the method takes one. Name the mesh axes that split the elements
        of one scale, and the range is that of the whole activation. Without it, a range
        inside of `shard_map` is that of the shard. Every op that the rule matches must
        be inside of that `shard_map`.
      act_act: whether products of two activations, such as attention's, are
        quantized (when `act_qtype` is set).
      pad_tiles: whether an axis that `tile_size` does not divide gets a shorter last
        tile. An error otherwise.
      rotation: an orthogonal change of basis along the axis that a product contracts.
        Its weight and its input are quantized in that basis. None for their own basis.
        Only products that read a weight have one. `"hadamard"` spreads outliers over
        the largest block that is a power of two, and `"hadamard,64"` over blocks of 64.
        `"hadamard,64,7"` adds random signs of the seed 7; with `"hadamard,0,7"` the
        block is the largest one.
      disable_channelwise_axes: whether weights and activations have one scale for the
        whole array, or for each tile along it; of stacked layers, for each layer. If
        False, they have one for each index along the axes that an op keeps.
      schedule: when in training the ops of this rule are quantized, and with how many
        bits. It replaces the schedule of `wrap_train_step`. See `Schedule`.

    Raises:
      ValueError: if a field is wrong, or `act_qtype` is set without `weight_qtype`.

    Example:
      >>> from qwix_train import QuantizationRule
      >>> QuantizationRule(module_path="Dense_.*", weight_qtype="int4").matches(
      ...     "Dense_0", "dot_general", "dot_general0")
      True
    """

    module_path: str = ".*"
    op_names: Collection[str] = ()
    weight_qtype: Any = None
    act_qtype: Any = None
    tile_size: int | float | Mapping[int, Any] | None = None
    act_tile_size: int | float | Mapping[int, Any] | None = None
    act_static_scale: bool | None = None
    weight_calibration_method: str = "absmax"
    act_calibration_method: str | None = None
    act_observer: Any = None
    act_averaging: Any = "mean"
    act_batch_axes: Collection[int] | None = None
    act_channelwise_axes: Collection[int] = ()
    act_finite_only: bool = False
    act_axis_names: Collection[str] = ()
    act_act: bool = True
    pad_tiles: bool = False
    rotation: str | None = None
    disable_channelwise_axes: bool = False
    schedule: Schedule | None = None

    def __repr__(self) -> str:
        # Of many fields most are left as they are, and say nothing.
        values = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        }
        fields = [
            f"{name}={value.name if isinstance(value, np.dtype) else value!r}"
            for name, value in values.items()
        ]
        return f"{type(self).__name__}({', '.join(fields)})"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            change = functools.partial(field_types.converted, field)
            value = self._check(field.name, change, getattr(self, field.name))
            object.__setattr__(self, field.name, value)
        try:
            re.compile(self.module_path)
        except re.error as error:
            reason = f"not a regular expression: {error}"
            raise self._error("module_path", reason) from None
        named = [("act_observer", "an Observer"), ("act_averaging", "an Averaging")]
        for field, kind in named:
            value = getattr(self, field)
            known = value is None and field == "act_observer" or isinstance(value, str)
            if not known and not hasattr(value, "observe") | hasattr(value, "update"):
                raise self._error(field, f"it must be a name, or {kind}")
        for name in self.op_names:
            known = [*ops.names(), *LITERT_OP_NAMES]
            near = difflib.get_close_matches(name, known, cutoff=0.85)
            if not {name, _op_name(name)} & {*known} and (near or not name):
                meant = f"write {near[0]!r}" if near else "it has no letters"
                raise self._error("op_names", f"{name!r} is not an op: {meant}")
        for field in ("weight_qtype", "act_qtype"):
            qtype = getattr(self, field)
            if qtype is not None and not (field == "act_qtype" and is_int16(qtype)):
                self._check(field, numerics.canonical_qtype, qtype)
        if self.act_qtype is not None and self.weight_qtype is None:
            self.refuse(
                "act_qtype",
                "it needs a weight_qtype: an op's activations are quantized only "
                "together with its weight",
            )
        if self.act_static_scale and self.act_qtype is None:
            raise self._error("act_static_scale", "it needs an act_qtype")
        for field in ("act_batch_axes", "act_channelwise_axes"):
            if getattr(self, field) and not self.act_static_scale:
                self.refuse(field, "it needs act_static_scale=True")
        self._check_learned()
        self._check_axis_names()
        for name in ("weight", "act"):
            field = f"{name}_calibration_method"
            method, qtype = getattr(self, field), getattr(self, f"{name}_qtype")
            if name == "act" and self.learned_act_method:
                method = None
            if method is not None:
                # Not every type has the zero point that a method may need.
                known = "int8" if qtype is None or is_int16(qtype) else qtype
                self._check(field, functools.partial(_how, known), method)
        self._check_observer()
        for name, field in (("weight", "tile_size"), ("act", "act_tile_size")):
            self._check_tile_size(field)
            self._check_blocks(field, getattr(self, f"{name}_qtype"))
        if self.act_static_scale and _block(self.act_qtype) is not None:
            raise self._error(
                "act_static_scale",
                f"the scales of {self.act_qtype} are those of blocks of one array, "
                "which no range of other batches can be: leave it out",
            )
        if self.disable_channelwise_axes and self.act_channelwise_axes:
            axes = self.act_channelwise_axes
            reason = f"act_channelwise_axes={axes} asks for the opposite: set only one"
            raise self._error("disable_channelwise_axes", reason)
        if self.rotation is not None:
            self._check("rotation", rotations.parse, self.rotation)
            if self.weight_qtype is None:
                raise self._error("rotation", "it needs a weight_qtype")
            if self.learns_scales:
                reason = "no scale of a rotated array is trained; choose 'absmax'"
                raise self._error("rotation", reason)
        self._check_schedule()

    def matches(self, module_path: str, op_name: str, op_id: str) -> bool:
        """Whether the rule is for an op.

        Args:
          module_path: the path of the op's module.
          op_name: the name of the op.
          op_id: its id within the module.
        """
        if self.op_names:
            named = op_name in self.op_names or op_id in self.op_names
        else:
            kind = ops.by_name(op_name)
            named = kind is None or not kind.by_name_only
        return named and self.matches_module(module_path)

    def matches_module(self, module_path: str) -> bool:
        """Whether the rule's `module_path` matches the path of a module."""
        return re.fullmatch(self.module_path, module_path) is not None

    @property
    def act_method(self) -> str:
        """The calibration method for activations, with the default filled in.

        For a scale that is trained, that of the range that it stands for.
        """
        method = self.act_calibration_method or "absmax"
        return _RANGES_OF_LEARNED.get(self.learned_act_method, method)

    @property
    def weight_tiles(self) -> int | float | Mapping[int, Any] | None:
        """The tiles of weights: `tile_size`, or the block of the type."""
        block = _block(self.weight_qtype)
        return block if self.tile_size is None else self.tile_size

    @property
    def act_tiles(self) -> int | float | Mapping[int, Any] | None:
        """The tiles of activations: `act_tile_size`, or what it stands for."""
        if self.act_tile_size is not None:
            return self.act_tile_size
        block = _block(self.act_qtype)
        if block is not None:
            return block
        return None if isinstance(self.tile_size, Mapping) else self.tile_size

    @property
    def learned_act_method(self) -> str:
        """The method that trains scales of activations; empty if they are not."""
        name = _method_name(self.act_calibration_method)
        return name if name in _RANGES_OF_LEARNED else ""

    @property
    def adds_adapters(self) -> bool:
        """Whether weights that the rule matches get adapters."""
        return False

    @property
    def learns_scales(self) -> bool:
        """Whether scales of weights or of activations are trained."""
        if self.act_qtype is not None and self.learned_act_method:
            return True
        weight = _method_name(self.weight_calibration_method)
        return self.weight_qtype is not None and weight in _RANGES_OF_LEARNED

    @property
    def static_act_ranges(self) -> bool:
        """Whether activations have ranges that are not those of the batch."""
        return bool(self.act_static_scale or self.learned_act_method)

    @property
    def gradient_statistics(self) -> Statistics | None:
        """What is collected of the gradients of results; None if nothing is."""
        return None

    @property
    def range_observer(self) -> Any:
        """What is measured of a batch, where it is not the range of `act_method`."""
        if self.act_observer is None and self.learned_act_method == "lsq+":
            return "mse,asymmetric"  # as the paper begins (section 3.2)
        return self.act_observer

    def _check_learned(self) -> None:
        """Complains of scales that cannot be trained."""
        for name in ("weight", "act"):
            field, qtype = f"{name}_calibration_method", getattr(self, f"{name}_qtype")
            method = _method_name(getattr(self, field))
            if method not in _RANGES_OF_LEARNED:
                continue
            if getattr(self, field).strip().lower() != method:
                raise self._error(field, f"{method} takes no arguments")
            if method == "pact" and name == "weight":
                reason = "PACT learns to clip activations, not weights: choose 'lsq'"
                raise self._error(field, reason)
            if qtype is not None and (
                is_int16(qtype) or not numerics.is_integer_qtype(qtype)
            ):
                raise self._error(
                    field, f"a scale is trained for int1 to int8, not for {qtype}"
                )
        if not self.learned_act_method:
            if _method_name(self.act_observer) in _RANGES_OF_LEARNED:
                raise self._error(
                    "act_observer",
                    "that is the range in which a scale begins that is trained, and "
                    "act_calibration_method trains none: set that, or choose 'mse'",
                )
            return
        for field in ("tile_size", "act_tile_size"):
            if getattr(self, field) is None:
                continue
            raise self._error(
                field,
                f"act_calibration_method={self.act_calibration_method!r} trains one "
                "scale for a whole activation",
            )
        if self.act_static_scale:
            raise self._error(
                "act_static_scale",
                f"act_calibration_method={self.act_calibration_method!r} trains the "
                "scale, so that no range is collected for it while training",
            )

    def _check_axis_names(self) -> None:
        """Complains of ranges that do not follow from those of shards."""
        field = "act_axis_names"
        if not self.act_axis_names:
            return
        if self.act_qtype is None:
            self.refuse(field, "it needs an act_qtype")
        if self.learned_act_method:
            reason = f"act_calibration_method={self.act_calibration_method!r} trains it"
            raise self._error(field, reason)
        self._check_tiles_in_shards(field, self.act_qtype, self.act_tiles)
        others = ("act_observer", "act_batch_axes", "act_finite_only")
        for other in others:
            if value := getattr(self, other):
                raise self._error(
                    field,
                    f"with {other}={value!r}, the range of an array does not follow "
                    "from the ranges of its shards: leave one of both out",
                )

    def _check_tiles_in_shards(self, field: str, qtype: Any, tiles: Any) -> None:
        """Complains of tiles, unless what is joined is a scale of the whole tensor."""
        entry = None if is_int16(qtype) else numerics.format_of(qtype)
        two_levels = entry is not None and entry.scales is Scales.TWO_LEVELS
        if tiles is not None and not two_levels:
            reason = f"a tile of {tiles} has its range in the shard it lies in"
            raise self._error(field, reason)

    def _check_observer(self) -> None:
        """Complains of statistics that would not give a range."""
        if self.act_static_scale is False:
            self.check_collects()
        if isinstance(self.act_averaging, str):
            self._check("act_averaging", parse_averaging, self.act_averaging)
        if isinstance(self.act_observer, str):
            self._check("act_observer", parse_observer, self.act_observer)
        if not self.act_static_scale or is_int16(self.act_qtype):
            return
        method = how.parse_calibration_method(self.act_method)[0]
        if self.act_observer is None or method == "fixed":
            return

        def check(observer):
            statistics = make_statistics(
                observer,
                self.act_averaging,
                how=_how(self.act_qtype, self.act_method),
                batch_axes=self.act_batch_axes,
            )
            if not isinstance(observer, str):
                return
            state = jax.eval_shape(lambda: statistics.init((1,), np.float32))
            ends = jax.eval_shape(statistics.calibration, state)
            if ("min" in ends) != how.needs_zero_point(self.act_method):
                two = "min" in ends
                raise ValueError(
                    f"it finds ranges {'with two ends' if two else 'around zero'}, and "
                    f"act_calibration_method={self.act_method!r} has "
                    f"{'no' if two else 'a'} zero point: set act_calibration_method="
                    f"{'minmax' if two else 'absmax'!r}"
                )

        self._check("act_observer", check, self.act_observer)

    def check_collects(self) -> None:
        """Checks that a rule which says how ranges are collected collects some.

        Where static ranges are not the default: with `odml` they are.

        Raises:
          ValueError: if it says how, and asks for no static ranges.
        """
        for field, default in (("act_observer", None), ("act_averaging", "mean")):
            if getattr(self, field) != default and not self.static_act_ranges:
                raise self._error(field, NEEDS_STATIC)

    @property
    def note(self) -> str:
        """What else the rule does to an op, for the plan."""
        return ""

    def _check_tile_size(self, field):
        size = getattr(self, field)
        if size is None:
            return
        if isinstance(size, Mapping):
            size = tiling.TiledAxes(size)
            object.__setattr__(self, field, size)
            if not size or not all(isinstance(axis, int) for axis in size):
                raise self._error(field, "it must map axes, such as 0 or -1, to sizes")
        # Not a number is not positive, either.
        sizes = size.values() if isinstance(size, Mapping) else [size]
        if not all(
            isinstance(x, int | float)
            and (0 < x <= 1 if isinstance(x, float) else x > 0)
            for x in sizes
        ):
            raise self._error(
                field,
                "it must be a positive int, or a float of one over the tile count",
            )

    def _check_blocks(self, field: str, qtype: Any) -> None:
        """Complains of tiles that are not the blocks that a type has."""
        block, size = _block(qtype), getattr(self, field)
        if block is None or size in (None, block) or isinstance(size, Mapping):
            return
        raise self._error(
            field,
            f"{numerics.qtype_name(qtype)} has one scale for {block} elements: leave "
            "it out",
        )

    def _check_schedule(self) -> None:
        schedule = self.schedule
        if schedule is None:
            return
        if not isinstance(schedule, Schedule):
            raise self._error("schedule", "it must be a Schedule")
        if self.weight_qtype is None:
            raise self._error("schedule", "it needs a weight_qtype")
        if schedule != schedule.of_rules:
            reason = (
                f"{', '.join(OF_WHOLE_STEPS)} are for a whole step, so set them in the "
                "schedule of wrap_train_step"
            )
            raise self._error("schedule", reason)
        for name in ("weight", "act"):
            end, qtypes = getattr(self, f"{name}_qtype"), f"{name}_qtypes"
            check = functools.partial(Schedule.check_last, field=qtypes, qtype=end)
            self._check("schedule", check, schedule)
            for qtype in (getattr(schedule, qtypes) or {}).values():
                # Not every type goes with every calibration method.
                fields: dict[str, Any] = {"schedule": None, f"{name}_qtype": qtype}
                change = functools.partial(dataclasses.replace, **fields)
                self._check("schedule", change, self)
            self._check_one_type(name, getattr(schedule, qtypes) or {})

    def _check_one_type(self, name: str, qtypes: Mapping[int, Any]) -> None:
        field = f"{name}_calibration_method"
        method = getattr(self, field)
        names = {numerics.qtype_name(qtype) for qtype in qtypes.values()}
        if len(names) > 1 and _method_name(method) in _RANGES_OF_LEARNED:
            raise self._error(
                "schedule",
                f"{field}={method!r} trains one scale, which is of the last of the "
                f"{name}_qtypes and no step for the others: leave these out, or begin "
                "with start_step and ramp_steps",
            )

    def refuse(self, field: str, reason: str) -> None:
        """Refuses what would have no effect, or not the one that is meant.

        Args:
          field: the field.
          reason: what is wrong with it.

        Raises:
          ValueError: always. Rules with the names and defaults of `qwix` (`as_qwix`)
            take it, as it does, and warn.
        """
        raise self._error(field, reason)

    def _check(self, field, function, value):
        try:
            return function(value)
        except ValueError as error:
            raise self._error(field, str(error).rstrip(".")) from None

    def _error(self, field, reason) -> ValueError:
        value = getattr(self, field)
        return ValueError(f"{type(self).__name__}({field}={value!r}): {reason}.")


NEEDS_STATIC = (
    "it says how static ranges are collected: set act_static_scale=True, or leave it "
    "out"
)

# The ranges that trained scales of activations stand for, by their method.
_RANGES_OF_LEARNED = {"lsq": "lsq", "lsq+": "minmax", "pact": "minmax"}


def _method_name(method: Any) -> str:
    return method.partition(",")[0].strip().lower() if isinstance(method, str) else ""


def _block(qtype: Any) -> int | None:
    """The elements that share a scale, if a type says how many."""
    if qtype is None or is_int16(qtype):
        return None
    return numerics.format_of(qtype).block


def _how(qtype: Any, method: str) -> how.HowToQuantize:
    return how.HowToQuantize(qtype=qtype, calibration_method=method)


def _op_name(op_id: str) -> str:
    """The name of an op, from its id, which has a count behind the name.

    A name may end in a number itself: of those that fit it is the longest.
    """
    known = (*ops.names(), *LITERT_OP_NAMES)
    names = (n for n in known if re.fullmatch(re.escape(n) + r"\d+", op_id))
    return max(names, key=len, default=op_id)


def rule_of_range(
    rules: Sequence[QuantizationRule], path: Path
) -> QuantizationRule | None:
    """The rule that decides for the op that a range belongs to; None if none does.

    Args:
      rules: the rules.
      path: the path of the range, which says the module and the op.
    """
    name = OperandName.parse(path)
    op = name.module_path, _op_name(name.op_id), name.op_id
    return next((rule for rule in rules if rule.matches(*op)), None)


def check_rules(rules: Sequence[QuantizationRule]) -> tuple[QuantizationRule, ...]:
    """The rules as a tuple.

    Raises:
      TypeError: if they are not a sequence of rules.
    """
    if isinstance(rules, QuantizationRule):
        raise TypeError(f"Expected a list of rules, got one rule: pass [{rules}].")
    if not isinstance(rules, Iterable) or isinstance(rules, str | Mapping):
        order = " The rules come after the model or the step." * callable(rules)
        raise TypeError(f"Expected a list of rules, got {shortened(rules)}.{order}")
    rules = tuple(rules)
    for rule in rules:
        if not isinstance(rule, QuantizationRule):
            raise TypeError(f"Expected a QuantizationRule, got {shortened(rule)}.")
    return rules
