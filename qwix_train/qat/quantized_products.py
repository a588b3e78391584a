"""Ops whose forward and backward products are computed from codes.

The values of QAT, and their straight-through gradients, stay what they are: each
operand comes fake-quantized, and with the codes that its values stand for. The forward
multiplies the codes, the backward multiplies the codes with those of the gradient, and
what comes out is the gradient at the fake-quantized values. These themselves are never
read, so that XLA does not compute them. NaN, which codes cannot say, makes the scale of
its tile NaN whatever the range is.
"""

from __future__ import annotations

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
from qwix_train.planning import static_range
from qwix_train.planning.plan import OpPlan, ParamPlan, Path, Plan
from qwix_train.planning.rules import QuantizationRule
from qwix_train.qat.backward_product import BackwardProduct
from qwix_train.qat.qt_rule import QtRule
from qwix_train.trace import provenance
from qwix_train.trace.analyze import Op
from qwix_train.trace.carried import Carried, Deferred, value_of
from qwix_train.trace.function import TracedCall
from qwix_train.values.stored_weight import StoredWeight, product

STREAM = "stochastic_rounding"
"""The stream of random keys of a model that stochastic rounding draws from."""

# The range of an activation, if it is collected; of an op, its plan, the side of the
# operand, the array, and what is given for that side.
RangeOf = Callable[[Op, OpPlan, int, Any, Any], static_range.Range | None]


class QuantizedProducts:
    """The ops of one call that a `QtRule` with a `bwd_qtype` is for."""

    def __init__(
        self,
        traced: TracedCall,
        plan: Plan,
        rules: Sequence[QuantizationRule],
        range_of: RangeOf,
    ):
        """Finds the ops.

        Args:
          traced: the call.
          plan: what the rules do to it.
          rules: the rules.
          range_of: gives the range of an activation.

        Raises:
          ValueError: if a rule asks for tiles in the backward of a convolution.
        """
        self._range_of = range_of
        self._rules: dict[Any, QtRule] = {}
        self._weights: set[Path] = set()
        for op in plan.quantized_ops:
            rule = None if op.rule_index is None else rules[op.rule_index]
            if not isinstance(rule, QtRule) or rule.bwd_qtype is None:
                continue
            if not ops.is_product(op.op.primitive):
                continue
            _check_op(op.op, rule)
            self._rules[op.op.key] = rule
            self._weights.update(op.weights)
        self._key = None
        if any(rule.bwd_stochastic_rounding for rule in self._rules.values()):
            drawn = traced.make_rng(STREAM)
            self._key = jax.random.key(0) if drawn is None else drawn

    def includes(self, op: Op) -> bool:
        """Whether an op is computed from codes."""
        return op.key in self._rules

    def check_has_no_grid(self, path: Path) -> None:
        """Complains of a param that is to be multiplied in codes of a given scale.

        Raises:
          ValueError: if such an op reads it.
        """
        if path in self._weights:
            raise ValueError(
                f"Param {'/'.join(path)!r} has a scale beside it, and a QtRule with a "
                "bwd_qtype computes one. Leave the scale out of the params, or take a "
                "rule without bwd_qtype."
            )

    def weight(self, plan: ParamPlan, fake: Deferred | None) -> Carried | None:
        """What is carried for a param: with its codes, if such an op reads it.

        Args:
          plan: how the param is quantized.
          fake: what is carried for it otherwise.
        """
        if fake is None or plan.path not in self._weights:
            return fake
        return _Weight(fake, (plan.how, plan.per_iteration), "/".join(plan.path))

    def run(
        self, op: Op, plan: OpPlan, operands: Sequence[Any], given: Sequence[Any]
    ) -> jax.Array:
        """The result of an op.

        Args:
          op: the op.
          plan: what happens to it.
          operands: its operands, arrays or what `weight` gave.
          given: what is given for each.
        """
        values, codes = [], []
        for side, (x, how) in enumerate(zip(operands, plan.activations, strict=True)):
            if how is None:
                values.append(value_of(x))
                codes.append(x.codes if isinstance(x, _Weight) else None)
                continue
            x = value_of(x)
            found = self._range_of(op, plan, side, x, given[side])
            values.append(static_range.fake_quantize_activation(x, how, found))
            codes.append(_codes(*lax.stop_gradient((x, found)), how))
        rule = self._rules[op.key]
        key = None
        if rule.bwd_stochastic_rounding is not None:
            assert self._key is not None
            # Ops whose gradients are the same are still to differ.
            key = jax.random.fold_in(self._key, zlib.crc32(op.where.encode()))
        return _product(op, plan, rule, values, codes, key)


def _codes(
    x: jax.Array, found: static_range.Range | None, how: HowToQuantize
) -> QArray:
    codes = static_range.quantize_activation(x, how, found)
    if found is None and calibration.shows_nan(how.calibration_method):
        return codes
    return with_nan(codes, x)


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
            codes = _codes(array, None, how)
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
