"""What a sensitivity is measured with: three ways to run a call of a model.

One program evaluates every op with every type: which op is quantized is an input of the
program (`SwitchedProvider`). The float model, run once, gives the error of each op's
output with each type (`OutputErrorProvider`). With an offset added to each param,
derivatives by the offsets are those by the params, wherever a loss function takes them
from (`OffsetProvider`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.struct
import jax
from jax import lax
from jax import numpy as jnp

from qwix_train.planning import static_range, weights
from qwix_train.planning.plan import OpPlan, Path, Plan
from qwix_train.planning.provider import QuantizationProvider
from qwix_train.qat.shared_params import OpGroup, OpName, TypedPlans, op_name
from qwix_train.stages.fake_quantize import FakeQuantize
from qwix_train.stages.run import CallStages, OpStages
from qwix_train.stages.stage import At, Constant, ParamStage, Stage
from qwix_train.stages.switch import Switch
from qwix_train.trace import harvest, session
from qwix_train.trace.analyze import Op
from qwix_train.trace.carried import Carried, value_of
from qwix_train.trace.function import TracedCall
from qwix_train.trace.provenance import Weight


class DiscoveryProvider(QuantizationProvider):
    """Takes note of the ops and params to quantize, and leaves the model as it is."""

    takes_static_ranges = True

    def __init__(self, typed: TypedPlans):
        """Takes the object that collects the plans."""
        super().__init__(typed.rules)
        self._typed = typed

    def transform(self, traced: TracedCall, plan: Plan) -> Any:
        """The call is to run as it is."""
        del plan
        self._typed.add(traced)
        return session.UNCHANGED


class SwitchedProvider(QuantizationProvider):
    """Fake-quantizes each group of ops with the type that an input chooses."""

    takes_static_ranges = True

    def __init__(
        self,
        typed: TypedPlans,
        groups: Sequence[OpGroup],
        quant_stats: Mapping[str, Any] | None,
        choices: jax.Array,
    ):
        """Takes the choices.

        Args:
          typed: the plans of each type.
          groups: the groups of ops.
          quant_stats: the ranges of activations, as for `QtProvider`.
          choices: an int32 for each group: 0 for float, 1 for the first type, and so
            on. shape=(len(groups),)
        """
        super().__init__(typed.rules)
        self._typed = typed
        self._quant_stats = quant_stats or {}
        of_group = list(map(Constant, choices))
        is_quantized = [Constant(jnp.minimum(choice, 1)) for choice in choices]
        self._of_op = {
            op: is_quantized[i] for i, g in enumerate(groups) for op in g.ops
        }
        self._of_param = {
            p: of_group[i] for i, g in enumerate(groups) for p in g.params
        }

    def stages(self, traced: TracedCall, plan: Plan) -> CallStages:
        """See `QuantizationProvider.stages`."""
        plans = self._typed.of(traced)

        def activation(op: OpPlan, quantize: FakeQuantize | None) -> tuple[Stage, ...]:
            if quantize is None:
                return ()
            return (Switch(((), (quantize,)), self._of_op[op_name(op)]),)

        params = {
            path: (Switch(((), *zip(_each_type(plans, path))), choice),)
            for path, choice in self._of_param.items()
            if _is_quantized(plan, path)
        }
        ops = {
            op.op.key: OpStages(op.op, tuple(activation(op, x) for x in activations))
            for op, activations in _ops_in(plan, self._of_op, self._quant_stats)
        }
        return CallStages(params, ops)


class OutputErrorProvider(QuantizationProvider):
    """Runs the float model, and tags what quantization would do to each op's output.

    For group `i`, the tag `output i 0` has the sum of squares of an op's output `y`.
    The tag `output i t` has the sum of squares of the error of `y` if the op is
    quantized with type `t`, counted from 1, on inputs of the float model. The tags
    `weight i j 0` and `weight i j t` have the sum of squares of the group's param `j`,
    and that of its errors. All are scalars, so it does not matter which axis a `vmap`
    around the model adds to them.
    """

    takes_static_ranges = True

    def __init__(
        self,
        typed: TypedPlans,
        groups: Sequence[OpGroup],
        quant_stats: Mapping[str, Any] | None,
    ):
        """Takes the groups; see `SwitchedProvider`."""
        super().__init__(typed.rules)
        self._typed = typed
        self._quant_stats = quant_stats or {}
        self._of_op = {op: i for i, g in enumerate(groups) for op in g.ops}
        self._names = weight_tags(groups)

    def stages(self, traced: TracedCall, plan: Plan) -> CallStages:
        """See `QuantizationProvider.stages`: those of the float model, and tags."""
        plans = self._typed.of(traced)
        params = {
            path: (_Compare(tuple(_each_type(plans, path)), name),)
            for path, name in self._names.items()
            if _is_quantized(plan, path)
        }
        ops = {}
        for op, activations in _ops_in(plan, self._of_op, self._quant_stats):
            operands = tuple(
                () if quantize is None else (_InVersions(quantize, len(plans)),)
                for quantize in activations
            )
            has_versions = [
                bool(own) or _is_weight(op.op, side)
                for side, own in enumerate(operands)
            ]
            name = f"output {self._of_op[op_name(op)]}"
            product = functools.partial(_compared, name, has_versions, len(plans))
            ops[op.op.key] = OpStages(op.op, operands, product)
        return CallStages(params, ops)


class OffsetProvider(QuantizationProvider):
    """Runs the float model with an offset added to each param."""

    takes_static_ranges = True

    def __init__(self, typed: TypedPlans, offsets: Mapping[Path, jax.Array]):
        """Takes the offsets: for each param an array of its shape, in float32."""
        super().__init__(typed.rules)
        self._offsets = offsets

    def stages(self, traced: TracedCall, plan: Plan) -> CallStages:
        """See `QuantizationProvider.stages`."""
        offsets = {path: (_Plus(x),) for path, x in self._offsets.items()}
        return CallStages(offsets, {})


@flax.struct.dataclass
class _Plus(Stage):
    offset: jax.Array

    def apply(self, x: Any, at: At | None = None) -> Any:
        return (x.astype(jnp.float32) + self.offset).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class _Compare(ParamStage):
    """Tags the errors of each type, and gives the param in all versions."""

    stages: tuple[FakeQuantize, ...]
    name: str

    def on_param(self, value: Any) -> _Versions:
        versions = functools.partial(_all_versions, self.stages)
        slices = [stage.of_slice() for stage in self.stages]
        value = _tagged(*versions(value), name=self.name)
        # The axes are the same for each type.
        of_slice = functools.partial(_all_versions, slices) if all(slices) else None
        return _Versions((value,), versions, of_slice)


@flax.struct.dataclass
class _InVersions(Stage):
    """An activation in float, and quantized as often as there are types."""

    quantize: FakeQuantize
    types: int = flax.struct.field(pytree_node=False)

    def apply(self, x: Any, at: At | None = None) -> _Versions:
        quantized = self.quantize.apply(x, at)
        return _Versions((x, *[quantized] * self.types), _as_they_are)


def _compared(
    name: str,
    has_versions: Sequence[bool],
    types: int,
    op: Op,
    operands: Sequence[Any],
    run: Callable[..., Any],
) -> Any:
    """The result of an op in float; what is lost with each type is tagged."""
    del op
    columns = [
        x.versions
        if of_each and isinstance(x, _Versions)
        else (value_of(x),) * (1 + types)
        for x, of_each in zip(operands, has_versions, strict=True)
    ]
    return _tagged(*(run(*row) for row in zip(*columns, strict=True)), name=name)


def weight_tags(groups: Sequence[OpGroup]) -> dict[Path, str]:
    """The name that the errors of each param are tagged with."""
    return {
        path: f"weight {i} {j}"
        for i, group in enumerate(groups)
        for j, path in enumerate(group.params)
    }


class _Versions(Carried):
    """A param in float and quantized to each type, or what the model computes from it.

    Attributes:
      held: the arrays that it holds: the param, or all versions of what was computed.
      expand: makes all versions, the float one first, from what is held.
      expand_slice: makes the versions of one slice of the param along axis 0; None if
        they are not slices of the versions of the param.
    """

    follows = True

    def __init__(
        self,
        held: Sequence[Any],
        expand: Callable[..., Sequence[Any]],
        expand_slice: Callable[..., Sequence[Any]] | None = None,
    ):
        self.held = tuple(held)
        self.expand = expand
        self.expand_slice = expand_slice

    @functools.cached_property
    def versions(self) -> tuple[Any, ...]:
        """All versions, the float one first."""
        return tuple(self.expand(*self.held))

    @property
    def value(self) -> Any:
        """The float array."""
        return self.held[0]

    @property
    def arrays(self) -> tuple[Any, ...]:
        """What is held."""
        return self.held

    def inside(self, arrays: Sequence[Any]) -> _Versions:
        """The same, within a body."""
        return _Versions(arrays, self.expand, self.expand_slice)

    @property
    def returned(self) -> Any:
        """The float array."""
        return self.value

    def sliced(self):
        """Slices of the param, or of all versions."""
        expand = self.expand_slice
        if expand is not None:
            return self.held, lambda slice_: _Versions((slice_,), expand)
        return self.versions, lambda *slices: _Versions(slices, _as_they_are)

    def apply(self, primitive, params, operands, run):
        """Runs an equation once for each version."""
        del primitive, params
        columns = [
            x.versions if isinstance(x, _Versions) else (x,) * len(self.versions)
            for x in operands
        ]
        results = [run(*map(value_of, row)) for row in zip(*columns, strict=True)]
        return [
            _Versions(versions, _as_they_are) for versions in zip(*results, strict=True)
        ]

    def constrained(self, sharding: Any) -> _Versions:
        """The same under a sharding constraint."""
        versions = [lax.with_sharding_constraint(x, sharding) for x in self.versions]
        return _Versions(versions, _as_they_are)


def _ops_in(
    plan: Plan, known: Mapping[OpName, Any], quant_stats: Mapping[str, Any]
) -> Iterator[tuple[OpPlan, list[FakeQuantize | None]]]:
    """The ops of a call that read quantized weights, and the stages of activations.

    Args:
      plan: the plan of the call.
      known: a mapping whose keys are the ops that were found in the first batch.
      quant_stats: the ranges of activations.
    """
    ranges = static_range.collected(plan, quant_stats)
    for op in plan.quantized_ops:
        if not op.weights:
            continue
        if op_name(op) not in known:
            raise ValueError(
                f"{op.op.where} runs in this batch, and did not in the first. Give "
                "batches for which the loss function calls the model in one way."
            )
        found = zip(op.activations, static_range.ranges_of(op, ranges), strict=True)
        yield op, [how and FakeQuantize(how, range_) for how, range_ in found]


def _is_quantized(plan: Plan, path: Path) -> bool:
    """Whether a param is quantized: another call of the model may leave it in float."""
    return path in plan.params and plan.params[path].how is not None


def _each_type(plans: Sequence[Plan], path: Path) -> list[FakeQuantize]:
    """The stages that fake-quantize a param, one for each type."""
    hows = [plan.params[path].how for plan in plans]
    return [FakeQuantize(how) for how in hows if how is not None]


def _as_they_are(*arrays: Any) -> tuple[Any, ...]:
    return arrays


def _all_versions(stages: Sequence[Any], w: Any) -> list[Any]:
    return [w, *(stage.apply(w) for stage in stages)]


def _is_weight(op: Any, side: int) -> bool:
    """Whether an operand is a weight, and not an input that was looked up in one."""
    roles = weights.roles(op)
    return side < len(roles) and isinstance(roles[side], Weight)


def _tagged(exact: Any, *others: Any, name: str) -> Any:
    """An array, with tags for the sum of its squares and those of errors.

    Args:
      exact: the array.
      *others: the array with errors.
      name: the first part of the tags.

    Returns:
      The array, which depends on the tagged sums, so that they are not dropped as
      unused.
    """
    wide = exact.astype(jnp.float32)
    sums = [_energy(wide), *(_energy(wide - other) for other in others)]
    tagged = [harvest.tag(x, f"{name} {at}") for at, x in enumerate(sums)]
    return lax.optimization_barrier((exact, tagged))[0]


def _energy(x: Any) -> jax.Array:
    return jnp.sum(jnp.square(x))
