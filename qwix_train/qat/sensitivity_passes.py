"""What a sensitivity is measured with: three ways to run a call of a model.

One program evaluates every op with every type: which of them is quantized is an input
of it (`SwitchedProvider`). The float model, run once, gives the error of each op's
output with each type (`OutputErrorProvider`); and with an offset added to each param,
derivatives by the offsets are those by the params, wherever a loss function takes them
from (`OffsetProvider`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp

from qwix_train.core.fake_quant import fake_quant
from qwix_train.planning import static_range, weights
from qwix_train.planning.plan import OpPlan, Path, Plan
from qwix_train.planning.provider import QuantizationProvider
from qwix_train.qat.op_groups import OpGroup, OpName, TypedPlans, op_name
from qwix_train.trace import harvest, session
from qwix_train.trace.analyze import Key
from qwix_train.trace.carried import Carried, Deferred, value_of
from qwix_train.trace.function import TracedCall
from qwix_train.trace.provenance import Weight

Transform = Callable[[Any], Any]


class DiscoveryProvider(QuantizationProvider):
    """Takes note of what there is to quantize, and leaves the model as it is."""

    takes_static_ranges = True

    def __init__(self, typed: TypedPlans):
        """Takes what collects the plans."""
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
        self._of_op = {op: choices[i] for i, g in enumerate(groups) for op in g.ops}
        self._of_param = {p: choices[i] for i, g in enumerate(groups) for p in g.params}

    def transform(self, traced: TracedCall, plan: Plan) -> Any:
        """The result of a traced call."""
        plans = self._typed.of(traced)
        ops = _ops_in(plan, self._of_op)
        ranges = static_range.collected(plan, self._quant_stats)
        given = {key: static_range.ranges_of(op, ranges) for key, op in ops.items()}

        def handler(op, operands, run, given):
            planned = ops[op.key]
            is_quantized = self._of_op[op_name(planned)] > 0

            def activation(x, how, given):
                if how is None:
                    return x
                quantize = functools.partial(
                    static_range.fake_quantize_activation, how=how, given=given
                )
                return lax.cond(is_quantized, quantize, lambda x: x, x)

            parts = zip(operands, planned.activations, given, strict=True)
            return run(*(activation(*part) for part in parts))

        def substitute(param):
            choice = self._of_param.get(param.path)
            # Another call, of the same params, may leave this one in float.
            if choice is None or plan.params[param.path].how is None:
                return None
            whole = _transforms(plans, param.path)
            inner = _slice_transforms(plans, param.path)
            return Deferred(
                param.value,
                functools.partial(_switch, choice, whole),
                functools.partial(_switch, choice, inner) if inner else None,
            )

        return traced.run([op.op for op in ops.values()], handler, substitute, given)


class OutputErrorProvider(QuantizationProvider):
    """Runs the float model, and tags what quantization would do to each op's output.

    For group `i`, the tag `output i 0` has the sum of squares of an op's output `y`,
    and `output i t` that of `y` less what it would be if the op were quantized with
    type `t`, the first of which is 1, its inputs those of the float model. The tags
    `weight i j 0` and `weight i j t` have the sum of squares of the group's param `j`,
    and that of its errors. All are scalars, so that it does not matter which axis a
    `vmap` around the model adds to them.
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

    def transform(self, traced: TracedCall, plan: Plan) -> Any:
        """The result of a traced call, which is that of the float model."""
        plans = self._typed.of(traced)
        ops = _ops_in(plan, self._of_op)
        ranges = static_range.collected(plan, self._quant_stats)
        given = {key: static_range.ranges_of(op, ranges) for key, op in ops.items()}

        def handler(op, operands, run, given):
            planned = ops[op.key]
            columns = []
            for side, operand in enumerate(operands):
                how = planned.activations[side]
                if how is not None:
                    x = value_of(operand)
                    quantized = static_range.fake_quantize_activation(
                        x, how, given[side]
                    )
                    columns.append((x, *[quantized] * len(plans)))
                elif _is_weight(op, side) and isinstance(operand, _Versions):
                    columns.append(operand.versions)
                else:
                    columns.append((value_of(operand),) * (1 + len(plans)))
            exact, *others = (run(*row) for row in zip(*columns, strict=True))
            return _tagged(exact, others, f"output {self._of_op[op_name(planned)]}")

        def substitute(param):
            name = self._names.get(param.path)
            if name is None or plan.params[param.path].how is None:
                return None
            transforms = _transforms(plans, param.path)
            w = param.value
            w = _tagged(w, [transform(w) for transform in transforms], name)
            inner = _slice_transforms(plans, param.path)
            return _Versions(
                (w,),
                functools.partial(_all_versions, transforms),
                functools.partial(_all_versions, inner) if inner else None,
            )

        return traced.run([op.op for op in ops.values()], handler, substitute, given)


class OffsetProvider(QuantizationProvider):
    """Runs the float model with an offset added to each param."""

    takes_static_ranges = True

    def __init__(self, typed: TypedPlans, offsets: Mapping[Path, jax.Array]):
        """Takes the offsets: for each param an array of its shape, in float32."""
        super().__init__(typed.rules)
        self._offsets = offsets

    def transform(self, traced: TracedCall, plan: Plan) -> Any:
        """The result of a traced call."""
        del plan

        def run_as_traced(op, operands, run, given):
            del op, given
            return run(*operands)

        def substitute(param):
            offset = self._offsets.get(param.path)
            if offset is None:
                return None
            return Deferred(param.value, functools.partial(_plus, offset))

        return traced.run([], run_as_traced, substitute)


def weight_tags(groups: Sequence[OpGroup]) -> dict[Path, str]:
    """The name that the errors of each param are tagged with."""
    return {
        path: f"weight {i} {j}"
        for i, group in enumerate(groups)
        for j, path in enumerate(group.params)
    }


class _Versions(Carried):
    """A param in float and quantized to each type, or what the model makes of it.

    Attributes:
      held: the arrays that it holds: the param, or all versions of what was made of it.
      expand: makes all versions, the float one first, of what is held.
      expand_slice: makes those of one slice of the param along axis 0, where these are
        slices of its versions; None where they are not.
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


def _ops_in(plan: Plan, known: Mapping[OpName, Any]) -> dict[Key, OpPlan]:
    """The ops of a call that read quantized weights.

    Args:
      plan: the plan of the call.
      known: what holds the ops that were found in the first batch.
    """
    ops = {op.op.key: op for op in plan.quantized_ops if op.weights}
    for op in ops.values():
        if op_name(op) not in known:
            raise ValueError(
                f"{op.op.where} runs in this batch, and did not in the first. Give "
                "batches for which the loss function calls the model in one way."
            )
    return ops


def _as_they_are(*arrays: Any) -> tuple[Any, ...]:
    return arrays


def _all_versions(transforms: Sequence[Transform], w: Any) -> list[Any]:
    return [w, *(transform(w) for transform in transforms)]


def _switch(choice: Any, transforms: Sequence[Transform], w: Any) -> Any:
    return lax.switch(choice, [lambda w: w, *transforms], w)


def _plus(offset: jax.Array, w: Any) -> Any:
    return (w.astype(jnp.float32) + offset).astype(w.dtype)


def _transforms(plans: Sequence[Plan], path: Path) -> list[Transform]:
    """What fake-quantizes a param to each type."""
    hows = [plan.params[path].how for plan in plans]
    return [functools.partial(fake_quant, how=how) for how in hows if how is not None]


def _slice_transforms(plans: Sequence[Plan], path: Path) -> list[Transform] | None:
    """What fake-quantizes a slice along axis 0; None if that gives no slice."""
    hows = [plan.params[path].per_iteration for plan in plans]
    # The axes are the same for each type.
    if hows[0] is None:
        return None
    return [functools.partial(fake_quant, how=how) for how in hows if how is not None]


def _is_weight(op: Any, side: int) -> bool:
    """Whether an operand is a weight, and not an input that was looked up in one."""
    roles = weights.roles(op)
    return side < len(roles) and isinstance(roles[side], Weight)


def _tagged(exact: Any, others: Sequence[Any], name: str) -> Any:
    """An array, for which the energy of it, and that of errors, is tagged.

    Args:
      exact: the array.
      others: arrays in its place.
      name: the first part of the tags.

    Returns:
      The array, made to need what is tagged, so that it is not dropped as unused.
    """
    wide = exact.astype(jnp.float32)
    sums = [_energy(wide), *(_energy(wide - other) for other in others)]
    tagged = [harvest.tag(x, f"{name} {at}") for at, x in enumerate(sums)]
    return lax.optimization_barrier((exact, tagged))[0]


def _energy(x: Any) -> jax.Array:
    return jnp.sum(jnp.square(x))
