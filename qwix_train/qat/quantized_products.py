"""Ops whose forward and backward products are computed from codes.

The values of QAT, and their straight-through gradients, stay what they are: each
operand comes fake-quantized, and with the codes that its values stand for. The forward
multiplies the codes, the backward multiplies the codes with those of the gradient, and
what comes out is the gradient at the fake-quantized values. These themselves are never
read, so that XLA does not compute them. NaN, which codes cannot say, makes the scale of
its tile NaN whatever the range is.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax

from qwix_train import ops
from qwix_train.core import calibration, numerics
from qwix_train.core import stochastic_rounding as noise
from qwix_train.core.how import HowToQuantize
from qwix_train.core.qarray import MaybeQArray, QArray, with_nan
from qwix_train.planning.plan import OpPlan, Path, Plan
from qwix_train.qat.backward_product import BackwardProduct
from qwix_train.qat.qt_rule import QtRule
from qwix_train.stages.fake_quantize import WithCodes
from qwix_train.stages.stage import ParamStage
from qwix_train.trace import provenance
from qwix_train.trace.analyze import Op
from qwix_train.trace.carried import Carried, Deferred, value_of
from qwix_train.trace.function import TracedCall
from qwix_train.values.stored_weight import StoredWeight, product

STREAM = "stochastic_rounding"
"""The stream of random keys of a model that stochastic rounding draws from."""


class QuantizedProducts:
    """The ops of one call that a `QtRule` with a `bwd_qtype` is for.

    Attributes:
      weights: the paths of the params that they read.
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
        for op in plan.quantized_ops:
            rule = None if op.rule_index is None else plan.rules[op.rule_index]
            if not isinstance(rule, QtRule) or rule.bwd_qtype is None:
                continue
            if not ops.is_product(op.op.primitive):
                continue
            _check_op(op.op, rule)
            self._rules[op.op.key] = rule
            self.weights.update(op.weights)
        self._key = None
        if any(rule.bwd_stochastic_rounding for rule in self._rules.values()):
            drawn = traced.make_rng(STREAM)
            self._key = jax.random.key(0) if drawn is None else drawn

    def product(self, plan: OpPlan) -> QuantizedProduct | None:
        """How an op is computed, if it is one of these."""
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
        self, op: Op, operands: Sequence[Any], run: Callable[..., Any]
    ) -> jax.Array:
        """See `stages.product.Product`."""
        del run
        key = None
        if self.rule.bwd_stochastic_rounding is not None:
            assert self.key is not None
            # Ops whose gradients are the same are still to differ.
            key = jax.random.fold_in(self.key, zlib.crc32(op.where.encode()))
        values = [value_of(x) for x in operands]
        codes = [_codes_of(x) for x in operands]
        return _product(op, self.plan, self.rule, values, codes, key)


@dataclasses.dataclass(frozen=True)
class KeepCodes(ParamStage):
    """Keeps the codes of a fake-quantized weight, for products of codes.

    Attributes:
      how: how the weight is quantized.
      path: its path.
    """

    how: HowToQuantize
    path: Path

    def on_param(self, value: Any) -> Carried:
        """See `ParamStage.on_param`."""
        hows = (self.how, self.how.of_slice())
        return _Weight(value, hows, "/".join(self.path))


def _codes_of(operand: Any) -> Any:
    """The codes of an operand, which have no gradient; None if it has none."""
    if isinstance(operand, _Weight):
        return operand.codes
    if not isinstance(operand, WithCodes):
        return None
    return _with_nan(operand.constant)


def _with_nan(quantized: WithCodes) -> QArray:
    by_method = calibration.shows_nan(quantized.how.calibration_method)
    if quantized.range is None and by_method:
        return quantized.codes
    return with_nan(quantized.codes, quantized.array)


def _check_op(op: Op, rule: QtRule) -> None:
    tile = rule.bwd_weight_grad_tile_size
    kind = ops.kind_of(op)
    if tile is not None and not kind.has_tiles:
        raise ValueError(
            f"{op.where}: bwd_weight_grad_tile_size={tile} is set, but {kind.plural} "
            "have no sub-channel quantization. Put a rule without it, for "
            f"op_names=({op.name!r},), before this one."
        )


def _product(
    op: Op,
    plan: OpPlan,
    rule: QtRule,
    values: list[jax.Array],
    codes: list[Any],
    key: jax.Array | None,
) -> jax.Array:
    """A product of codes, with the derivative of one of values.

    Args:
      op: the op.
      plan: what happens to it.
      rule: how gradients are quantized.
      values: the operands; those behind the factors have no gradient.
      codes: their codes, `QArray`s or stored weights; None for those without.
      key: the random key for stochastic rounding, if there is any.
    """
    sides = ops.kind_of(op).sides
    rest, values, codes = values[sides:], values[:sides], codes[:sides]
    dtypes = [value.dtype for value in values]
    result = op.params["preferred_element_type"]
    result = result or numerics.promote_types(*dtypes)
    params = {**op.params, "preferred_element_type": result}
    gradients = [
        BackwardProduct(
            op.primitive, params, side, _is_weight(op, plan, side), rule, op.where
        )
        for side in range(sides)
    ]
    of_both = all(code is not None for code in codes)

    def operands_of(values, codes, rest):
        # Next to values, a weight has the dtype that the model gave it.
        factors = [
            value if code is None else code if of_both else code.astype(value.dtype)
            for value, code in zip(values, codes, strict=True)
        ]
        return [*factors, *rest]

    @jax.custom_vjp
    def of_codes(values, codes, rest, key):
        del key
        return product(op.primitive, params, operands_of(values, codes, rest))

    def forward(values, codes, rest, key):
        out = of_codes(values, codes, rest, key)
        return out, (operands_of(values, codes, rest), key)

    def backward(kept, g):
        operands, key = kept
        keys = (None, None)
        if key is not None:
            keys = jax.random.split(noise.key_of_data(key, g))
        found = [
            gradient(g, operands, own).astype(dtype)
            for gradient, own, dtype in zip(gradients, keys, dtypes, strict=True)
        ]
        return found, None, None, None

    of_codes.defvjp(forward, backward)
    return of_codes(values, codes, rest, key)


def _is_weight(op: Op, plan: OpPlan, side: int) -> bool:
    origin = op.operands[side].provenance
    return plan.activations[side] is None and isinstance(origin, provenance.Weight)


class _Weight(Carried):
    """A weight that is fake-quantized, or a view of one, together with its codes."""

    follows = True

    def __init__(
        self,
        fake: Any,
        hows: tuple[HowToQuantize | None, HowToQuantize | None],
        path: str,
        stored_weight: StoredWeight | None = None,
    ):
        """Takes the values and, unless they are of the whole weight, the codes.

        Args:
          fake: the fake-quantized weight: deferred, or an array of a view of it.
          hows: how the whole of it is quantized, and a slice of it along axis 0.
          path: the path of the param.
          stored_weight: the codes.
        """
        self._fake = fake
        self._hows = hows
        self._path = path
        self._known = stored_weight

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
            array, how = lax.stop_gradient(self._fake.array), self._hows[0]
            assert how is not None
            if how.rotation is not None:
                array = how.rotation.apply(array)
            codes = _with_nan(WithCodes(array, how.in_basis, None))
            self._known = StoredWeight(codes, array.dtype, self._path)
        return self._known

    @property
    def arrays(self) -> tuple[Any, ...]:
        """The fake-quantized array, its codes, and the scales."""
        return (self.value, *self._stored.arrays)

    def inside(self, arrays: Sequence[Any]) -> _Weight:
        """See `Carried.inside`."""
        return self._view(arrays[0], self._stored.inside(arrays[1:]))

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
            return arrays, lambda *parts: _Weight(layer(*parts), hows, self._path)
        parts, one = self._stored.sliced()
        return (self.value, *parts), lambda value, *rest: self._view(value, one(*rest))

    def apply(self, primitive, params, operands, run):
        """See `Carried.apply`: what is done to the values is done to the codes."""
        if ops.is_product(primitive):
            return None  # In float, as no rule is for it.
        stored_weights = [x._stored if isinstance(x, _Weight) else x for x in operands]
        results = self._stored.apply(primitive, params, stored_weights, run)
        if results is None:
            return None
        views = [x for x in results if isinstance(x, StoredWeight)]
        values = run(*map(value_of, operands))
        return [self._view(*pair) for pair in zip(values, views, strict=True)]

    def constrained(self, sharding: Any) -> _Weight:
        """See `Carried.constrained`."""
        value = lax.with_sharding_constraint(self.value, sharding)
        return self._view(value, self._stored.constrained(sharding))

    def _view(self, value: Any, stored_weight: StoredWeight) -> _Weight:
        return _Weight(value, (None, None), self._path, stored_weight)
