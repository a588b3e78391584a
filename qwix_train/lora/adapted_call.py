"""A traced call whose params have adapters, for any mode to run.

A mode says what stands for a param and what becomes of an op, and runs the call with
these. Here the param is wrapped together with its adapter first, and the op is asked
for the product of the base alone, to which that of the adapter is added. So the base
may be in float, fake-quantized in training, quantized, or observed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
from jax import lax
from jax import numpy as jnp

from qwix_train import ops
from qwix_train.lora.adapted_weight import (
    AdaptedWeight,
    base_results,
    product,
    value_of,
)
from qwix_train.lora.layout import AdapterLayout
from qwix_train.planning.plan import ParamPlan, Path
from qwix_train.qat.fake_quantized import fake_quantized_param
from qwix_train.trace.analyze import Key, Op
from qwix_train.trace.carried import Carried
from qwix_train.trace.function import Param, TracedCall
from qwix_train.values import stored
from qwix_train.values.stored_weight import stored_weight


@dataclasses.dataclass(frozen=True)
class Adapter:
    """The adapter of one param.

    Attributes:
      layout: its shapes.
      a: shape `layout.a_shape`.
      b: shape `layout.b_shape`.
      magnitude: shape `layout.magnitude_shape`, or None.
      merged: how the param with the adapter in it is fake-quantized, or None.
    """

    layout: AdapterLayout
    a: jax.Array
    b: jax.Array
    magnitude: jax.Array | None = None
    merged: ParamPlan | None = None


@dataclasses.dataclass(frozen=True)
class Dropout:
    """What is dropped of the input of an adapter.

    Attributes:
      rate: the probability of an element to be set to zero.
      key: a random key, or one for each layer of the scans around the op.
    """

    rate: float
    key: Any


@dataclasses.dataclass(frozen=True)
class AdaptedCall(TracedCall):
    """A traced call with adapters.

    Attributes:
      adapters: the adapters, by the path of their param.
      dropouts: for ops that read a param with an adapter, by their key.
    """

    adapters: Mapping[Path, Adapter] = dataclasses.field(default_factory=dict)
    dropouts: Mapping[Key, Dropout] = dataclasses.field(default_factory=dict)

    # The base is frozen, and may be quantized in modes that train it otherwise.
    runs_stored: ClassVar[bool] = True

    def run(self, replace, handler, substitute, given=None):
        """See `TracedCall.run`."""
        handled = {op.key for op in replace}
        dropping = {op.key: op for op in self.ops if op.key in self.dropouts}
        replaced = {**{op.key: op for op in replace}, **dropping}
        given = given or {}
        keys = {key: dropout.key for key, dropout in self.dropouts.items()}

        def adapted(param: Param) -> Carried | None:
            adapter = self.adapters.get(param.path)
            if stored.is_quantized(param.value):
                base = substitute(param) or stored_weight(param)
            elif adapter is not None and adapter.merged is not None:
                return _merged(param, adapter)
            else:
                base = substitute(param)
            if adapter is None:
                return base
            return _adapted_weight(param.value if base is None else base, adapter)

        def handle(op: Op, operands, run, given):
            given, key = given

            def base(*operands):
                if op.key in handled:
                    return handler(op, operands, run, given)
                return base_results(
                    op.primitive, op.params, operands, lambda *x: [run(*x)]
                )[0]

            if not any(isinstance(x, AdaptedWeight) for x in operands):
                return base(*operands)
            if not ops.is_product(op.primitive):
                return _looked_up(op, operands, base)
            dropout = self.dropouts.get(op.key)

            def dropped_out(x):
                return x if dropout is None else _drop(x, dropout.rate, key)

            return product(op.primitive, op.params, operands, base, dropped_out)

        everything = {key: (given.get(key), keys.get(key)) for key in replaced}
        return super().run(list(replaced.values()), handle, adapted, everything)


def _adapted_weight(base: Any, adapter: Adapter) -> AdaptedWeight:
    layout = adapter.layout
    a, b = layout.factors(adapter.a, adapter.b)
    gain = None
    if adapter.magnitude is not None:
        # The norm is a constant to the derivative (arXiv 2402.09353, section 4.3).
        weight = value_of(base).astype(adapter.magnitude.dtype)
        weight += layout.delta(adapter.a, adapter.b)
        norm = lax.stop_gradient(layout.norm(weight))
        gain = layout.gain(adapter.magnitude, norm)
    return AdaptedWeight(base, a, layout.scaling * b, gain)


def _merged(param: Param, adapter: Adapter) -> Carried | None:
    assert adapter.merged is not None
    weight = adapter.layout.merged(param.value, adapter.a, adapter.b, adapter.magnitude)
    return fake_quantized_param(weight, adapter.merged)


def _looked_up(op: Op, operands, base) -> Any:
    """Rows of a table: those of the base, and those of the adapter."""
    table, indices = operands
    rows = table.apply(op.primitive, op.params, operands, lambda *x: [base(*x)])
    return base(value_of(table), indices) if rows is None else value_of(rows[0])


def _drop(x: jax.Array, rate: float, key: Any) -> jax.Array:
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), jnp.zeros_like(x))
