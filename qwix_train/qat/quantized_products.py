"""Ops whose forward and backward products are computed from codes.

The values of QAT and their straight-through gradients do not change. Each operand comes
fake-quantized, together with the codes of its values. The forward multiplies the codes,
and the backward multiplies the codes with those of the gradient. The result is the
gradient at the fake-quantized values. These values are never read, so XLA does not
compute them. Codes cannot say NaN, so a NaN makes the scale of its tile NaN, whatever
the range is.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import flax.struct
import jax
from jax import lax

from qwix_train import ops
from qwix_train.core import calibration, numerics
from qwix_train.core import stochastic_rounding as noise
from qwix_train.core.how import HowToQuantize
from qwix_train.core.qarray import MaybeQArray, QArray, with_nan
from qwix_train.planning.plan import OpPlan, Path, Plan
from qwix_train.planning.running_ranges import RunningRange
from qwix_train.qat.backward_product import BackwardProduct, Groups
from qwix_train.qat.qt_rule import QtRule
from qwix_train.stages.fake_quantize import WithCodes
from qwix_train.stages.observe import LargestMagnitude
from qwix_train.stages.stage import ParamStage
from qwix_train.trace import provenance
from qwix_train.trace.analyze import Op
from qwix_train.trace.carried import Carried, Deferred, value_of
from qwix_train.trace.function import TracedCall
from qwix_train.values.stored_weight import StoredWeight, product

STREAM = "stochastic_rounding"
"""The stream of a model from which stochastic rounding takes its random keys."""


class QuantizedProducts:
    """The ops of one call that a `QtRule` with a `bwd_qtype` matches.

    Attributes:
      weights: the paths of the params that these ops read.
      original: the paths of those params that the backward reads as they were before
        they were quantized.
    """

    def __init__(self, traced: TracedCall, plan: Plan):
        """Finds the ops.

        Args:
          traced: the call.
          plan: what the rules do to it.

        Raises:
          ValueError: if a rule asks for tiles in the backward of a convolution.
        """
        self._rules: dict[Any, QtRule] = {}
        self.weights: set[Path] = set()
        self.original: set[Path] = set()
        for op in plan.quantized_ops:
            rule = None if op.rule_index is None else plan.rules[op.rule_index]
            if not isinstance(rule, QtRule) or rule.bwd_qtype is None:
                continue
            if not ops.is_product(op.op.primitive):
                continue
            _check_op(op.op, rule)
            self._rules[op.op.key] = rule
            self.weights.update(op.weights)
            if rule.bwd_residuals == "original":
                self.original.update(op.weights)
        self._key = None
        if any(rule.bwd_stochastic_rounding for rule in self._rules.values()):
            drawn = traced.make_rng(STREAM)
            self._key = jax.random.key(0) if drawn is None else drawn

    def product(self, plan: OpPlan) -> QuantizedProduct | None:
        """How an op is computed, if it is one of these ops; None otherwise."""
        rule = self._rules.get(plan.op.key)
        return rule and QuantizedProduct(plan, rule, self._key)

    def check_has_no_grid(self, path: Path) -> None:
        """Complains of a param that is to be multiplied in codes of a given scale.

        Raises:
          ValueError: if such an op reads it.
        """
        if path in self.weights:
            raise ValueError(
                f"Param {'/'.join(path)!r} has a scale beside it, and a QtRule with a "
                "bwd_qtype computes one. Leave the scale out of the params, or take a "
                "rule without bwd_qtype."
            )


@dataclasses.dataclass(frozen=True)
class QuantizedProduct:
    """A product of codes whose backward products are of codes, too.

    Attributes:
      plan: what happens to the op.
      rule: how gradients are quantized.
      key: the random key for stochastic rounding, if there is any.
    """

    plan: OpPlan
    rule: QtRule
    key: jax.Array | None

    def __call__(
        self,
        op: Op,
        operands: Sequence[Any],
        run: Callable[..., Any],
        gradient: RunningRange | NoRange | None = None,
    ) -> jax.Array:
        """See `stages.product.Product`, and `OpStages.gradient`."""
        del run
        key = None
        if self.rule.bwd_stochastic_rounding is not None:
            assert self.key is not None
            # Ops with equal gradients must still draw different noise.
            key = jax.random.fold_in(self.key, zlib.crc32(op.where.encode()))
        values = [value_of(x) for x in operands]
        codes = [_codes_of(x) for x in operands]
        floats = None
        if self.rule.bwd_residuals == "original":
            floats = [_floats_of(x) for x in operands[: ops.kind_of(op).sides]]
        return _product(op, self.plan, self.rule, values, codes, floats, key, gradient)


@flax.struct.dataclass
class NoRange:
    """Stands for the range of a gradient that nothing collects.

    Attributes:
      name: its name.
    """

    name: str = flax.struct.field(pytree_node=False)

    def calibration(self, x: Any) -> Mapping[str, Any]:
        """Refuses, since nothing collects the range.

        Raises:
          ValueError: always.
        """
        raise ValueError(
            f"{self.name}: bwd_averaging is set, and ranges of gradients are kept by "
            "wrap_train_step alone, with a state that has their statistics: "
            "attach(state, rules, *inputs). Wrap the step, without quant_stats, or "
            "take a rule without bwd_averaging."
        )


@dataclasses.dataclass(frozen=True)
class KeepCodes(ParamStage):
    """Keeps the codes of a fake-quantized weight, for products of codes.

    Attributes:
      how: how the weight is quantized.
      path: its path.
      keeps_floats: whether the weight before it was quantized is kept, too.
    """

    how: HowToQuantize
    path: Path
    keeps_floats: bool = False

    def on_param(self, value: Any) -> Carried:
        """See `ParamStage.on_param`."""
        hows = (self.how, self.how.of_slice())
        return _Weight(value, hows, "/".join(self.path), self.keeps_floats)


def _codes_of(operand: Any) -> Any:
    """The codes of an operand, without a gradient; None if it has no codes."""
    if isinstance(operand, _Weight):
        return operand.codes
    if not isinstance(operand, WithCodes):
        return None
    return _with_nan(operand.constant)


def _floats_of(operand: Any) -> Any:
    """An operand before it was quantized, without a gradient."""
    if isinstance(operand, _Weight):
        return operand.floats
    if isinstance(operand, WithCodes):
        return operand.constant.array
    return lax.stop_gradient(value_of(operand))


def _with_nan(quantized: WithCodes) -> QArray:
    by_method = calibration.shows_nan(quantized.how.calibration_method)
    if quantized.range is None and by_method:
        return quantized.codes
    return with_nan(quantized.codes, quantized.array)


def _check_op(op: Op, rule: QtRule) -> None:
    kind = ops.kind_of(op)
    for field in ("bwd_tile_size", "bwd_weight_grad_tile_size"):
        tile = getattr(rule, field)
        if tile is not None and not kind.has_tiles:
            raise ValueError(
                f"{op.where}: {field}={tile} gives each {tile} elements a scale, and "
                f"{kind.plural} have no such tiles. Put a rule with "
                f"op_names=({op.name!r},), and without {field}, before it."
            )


def _product(
    op: Op,
    plan: OpPlan,
    rule: QtRule,
    values: list[jax.Array],
    codes: list[Any],
    floats: list[Any] | None,
    key: jax.Array | None,
    gradient: RunningRange | NoRange | None,
) -> jax.Array:
    """A product of codes, with the derivative of a product of values.

    Args:
      op: the op.
      plan: what happens to it.
      rule: how gradients are quantized.
      values: the operands. Those behind the factors have no gradient.
      codes: the codes of the operands, `QArray`s or stored weights; None for an operand
        without codes.
      floats: the factors before they were quantized, if the backward reads these.
      key: the random key for stochastic rounding, if there is any.
      gradient: the range of the gradient, if it is collected.
    """
    sides = ops.kind_of(op).sides
    rest, values, codes = values[sides:], values[:sides], codes[:sides]
    dtypes = [value.dtype for value in values]
    result = op.params["preferred_element_type"]
    result = result or numerics.promote_types(*dtypes)
    params = {**op.params, "preferred_element_type": result}
    of_weight = [_is_weight(op, plan, side) for side in range(sides)]
    again = [
        None if code is None else _again(plan, rule, side, of_weight)
        for side, code in enumerate(codes)
    ]
    products = [
        BackwardProduct(
            op.primitive, params, side, weight, rule, op.where, again[1 - side]
        )
        for side, weight in enumerate(of_weight)
    ]
    of_both = all(code is not None for code in codes)

    def operands_of(values, codes, rest):
        # Multiplied with values, a weight has the dtype that the model gave it.
        factors = [
            value if code is None else code if of_both else code.astype(value.dtype)
            for value, code in zip(values, codes, strict=True)
        ]
        return [*factors, *rest]

    @jax.custom_vjp
    def of_codes(values, codes, floats, rest, key, gradient):
        del floats, key, gradient
        return product(op.primitive, params, operands_of(values, codes, rest))

    def forward(values, codes, floats, rest, key, gradient):
        out = of_codes(values, codes, floats, rest, key, gradient)
        residuals = operands_of(values, codes, rest)
        for side, how in enumerate(again):
            if floats is not None and how is not None:
                residuals[side] = floats[side]
        # Residuals have no gradients, so a second derivative would lack their part.
        return out, (_of_one_gradient(op.where, residuals, values), key, gradient)

    def backward(kept, g):
        residuals, key, gradient = kept
        g = cast(jax.Array, _of_one_gradient(op.where, g, g))
        calibration = None
        if gradient is not None:
            calibration = gradient.calibration(LargestMagnitude().apply(g))
        keys = (None, None)
        if key is not None:
            keys = jax.random.split(noise.key_of_data(key, g))
        found = [
            product(g, residuals, own, calibration).astype(dtype)
            for product, own, dtype in zip(products, keys, dtypes, strict=True)
        ]
        return found, None, None, None, None, None

    of_codes.defvjp(forward, backward)
    return of_codes(values, codes, floats, rest, key, gradient)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _of_one_gradient(where: str, kept: Any, read: Any) -> Any:
    """Returns what a gradient is computed from, and refuses to differentiate it.

    Args:
      where: the module and the op, for the error.
      kept: what the gradient is computed from.
      read: what `kept` depends on.

    Raises:
      NotImplementedError: if the gradient is differentiated.
    """
    del where, read
    return kept


def _refused(where: str, kept: Any, cotangent: Any) -> Any:
    del kept, cotangent
    raise NotImplementedError(
        f"{where}: a gradient that is quantized (bwd_qtype) has no gradient of its "
        "own. Take second derivatives of the model with rules without bwd_qtype."
    )


_of_one_gradient.defvjp(
    lambda where, kept, read: (_of_one_gradient(where, kept, read), None), _refused
)


def _again(
    plan: OpPlan, rule: QtRule, side: int, of_weight: Sequence[bool]
) -> Groups | None:
    """How an operand is quantized for the product that gives the other's gradient.

    Returns:
      None if that product takes the codes of the forward: because the rule says so, or
      because the same elements would share a scale.
    """
    if rule.bwd_residuals == "quantized" or (plan.static and not of_weight[side]):
        return None
    groups = Groups(
        rule.act_qtype, rule.act_tiles, rule.act_method, rule.act_axis_names
    )
    if of_weight[side]:
        method = rule.weight_calibration_method
        groups = Groups(rule.weight_qtype, rule.weight_tiles, method)
    is_rotated = of_weight[1 - side] and rule.bwd_weight_grad_rotation is not None
    whole = groups.tile_size is None and rule.disable_channelwise_axes
    same = whole or isinstance(groups.tile_size, Mapping)
    return None if same and not is_rotated else groups


def _is_weight(op: Op, plan: OpPlan, side: int) -> bool:
    origin = op.operands[side].provenance
    return plan.activations[side] is None and isinstance(origin, provenance.Weight)


class _Weight(Carried):
    """A fake-quantized weight, or a view of one, together with its codes."""

    follows = True

    def __init__(
        self,
        fake: Any,
        hows: tuple[HowToQuantize | None, HowToQuantize | None],
        path: str,
        keeps_floats: bool = False,
        stored_weight: StoredWeight | None = None,
        floats: Any = None,
    ):
        """Takes the values and, for a view, the codes.

        Args:
          fake: the fake-quantized weight: deferred, or an array of a view of it.
          hows: how the whole weight is quantized, and how a slice of it along axis 0.
          path: the path of the param.
          keeps_floats: whether the array before it was quantized is kept.
          stored_weight: the codes, for a view.
          floats: the array before it was quantized, for a view, if it is kept.
        """
        self._fake = fake
        self._hows = hows
        self._path = path
        self._keeps_floats = keeps_floats
        self._known = stored_weight
        self._floats = floats

    @property
    def value(self) -> Any:
        """The fake-quantized array."""
        fake = self._fake
        return fake.value if isinstance(fake, Deferred) else fake

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of that array."""
        return self._fake.shape

    @property
    def codes(self) -> MaybeQArray:
        """The codes and scales."""
        return self._stored.array

    @property
    def _stored(self) -> StoredWeight:
        if self._known is None:
            array, how = self._whole, self._hows[0]
            assert how is not None
            codes = _with_nan(WithCodes(array, how.in_basis, None))
            self._known = StoredWeight(codes, array.dtype, self._path)
        return self._known

    @property
    def _whole(self) -> jax.Array:
        """The weight before it is quantized, in the basis in which that happens."""
        array, how = lax.stop_gradient(self._fake.array), self._hows[0]
        assert how is not None
        return array if how.rotation is None else how.rotation.apply(array)

    @property
    def floats(self) -> Any:
        """The array before it was quantized; None if it is not kept."""
        if self._floats is None and self._keeps_floats:
            self._floats = self._whole
        return self._floats

    @property
    def arrays(self) -> tuple[Any, ...]:
        """The fake-quantized array, perhaps the array before, codes and scales."""
        floats = (self.floats,) if self._keeps_floats else ()
        return (self.value, *floats, *self._stored.arrays)

    def inside(self, arrays: Sequence[Any]) -> _Weight:
        """See `Carried.inside`."""
        value, *rest = arrays
        floats = rest.pop(0) if self._keeps_floats else None
        return self._view(value, self._stored.inside(rest), floats)

    @property
    def returned(self) -> Any:
        """The weight in float if this is the whole of it, else the values."""
        fake = self._fake
        return fake.returned if isinstance(fake, Deferred) else fake

    def sliced(self):
        """See `Carried.sliced`: layers are quantized one by one, where they can be."""
        cut = self._fake.sliced() if isinstance(self._fake, Deferred) else None
        if cut is not None:
            arrays, layer = cut
            hows = (self._hows[1], None)
            return arrays, lambda *parts: _Weight(
                layer(*parts), hows, self._path, self._keeps_floats
            )
        parts, one = self._stored.sliced()
        if not self._keeps_floats:
            whole = (self.value, *parts)
            return whole, lambda value, *rest: self._view(value, one(*rest))

        def with_floats(value, floats, *rest):
            return self._view(value, one(*rest), floats)

        return (self.value, self.floats, *parts), with_floats

    def apply(self, primitive, params, operands, run):
        """See `Carried.apply`: what is done to the values is done to the codes."""
        if ops.is_product(primitive):
            return None  # Computed in float: no rule matches it.
        stored_weights = [x._stored if isinstance(x, _Weight) else x for x in operands]
        results = self._stored.apply(primitive, params, stored_weights, run)
        if results is None:
            return None
        views = [x for x in results if isinstance(x, StoredWeight)]
        values = run(*map(value_of, operands))
        floats = [None] * len(values)
        if self._keeps_floats:
            floats = run(*map(_floats_or_value, operands))
        parts = zip(values, views, floats, strict=True)
        return [self._view(*part) for part in parts]

    def constrained(self, sharding: Any) -> _Weight:
        """See `Carried.constrained`."""
        value, floats = self.value, self.floats
        value = lax.with_sharding_constraint(value, sharding)
        if floats is not None:
            floats = lax.with_sharding_constraint(floats, sharding)
        return self._view(value, self._stored.constrained(sharding), floats)

    def _view(
        self, value: Any, stored_weight: StoredWeight, floats: Any = None
    ) -> _Weight:
        keeps = self._keeps_floats
        return _Weight(value, (None, None), self._path, keeps, stored_weight, floats)


def _floats_or_value(operand: Any) -> Any:
    floats = operand.floats if isinstance(operand, _Weight) else None
    return value_of(operand) if floats is None else floats
