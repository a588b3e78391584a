"""The stages of params that have adapters, in every mode.

A mode chooses stages for a param and for an op. After these, the param gets its
adapter. The runner computes the product of the base by the stages of the op, and adds
the product of the adapter. So the base may be in float, fake-quantized in training,
quantized, or observed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.struct
import jax
from jax import lax
from jax import numpy as jnp

from qwix_train.lora.layout import AdapterLayout
from qwix_train.planning.plan import Path
from qwix_train.stages.product import as_carried
from qwix_train.stages.run import CallStages, OpStages
from qwix_train.stages.stage import At, ParamStage, Stage
from qwix_train.trace.analyze import Op
from qwix_train.trace.carried import value_of
from qwix_train.values.adapted_weight import AdaptedWeight


@dataclasses.dataclass(frozen=True)
class Adapter:
    """The adapter of one param.

    Attributes:
      layout: its shapes.
      a: shape `layout.a_shape`.
      b: shape `layout.b_shape`.
      magnitude: shape `layout.magnitude_shape`, or None.
    """

    layout: AdapterLayout
    a: jax.Array
    b: jax.Array
    magnitude: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class AddAdapter(ParamStage):
    """Gives a param an adapter, whose product is computed separately."""

    adapter: Adapter

    def on_param(self, value: Any) -> AdaptedWeight:
        """See `ParamStage.on_param`."""
        adapter, layout = self.adapter, self.adapter.layout
        a, b = layout.factors(adapter.a, adapter.b)
        gain = None
        if adapter.magnitude is not None:
            # The norm is a constant to the derivative (arXiv 2402.09353, section 4.3).
            weight = value_of(value).astype(adapter.magnitude.dtype)
            weight += layout.delta(adapter.a, adapter.b)
            norm = lax.stop_gradient(layout.norm(weight))
            gain = layout.gain(adapter.magnitude, norm)
        return AdaptedWeight(value, a, layout.scaling * b, gain)


@dataclasses.dataclass(frozen=True)
class MergeAdapter(ParamStage):
    """Adds an adapter to a param that is in float."""

    adapter: Adapter

    def on_param(self, value: Any) -> jax.Array:
        """See `ParamStage.on_param`."""
        adapter = self.adapter
        return adapter.layout.merged(value, adapter.a, adapter.b, adapter.magnitude)


@flax.struct.dataclass
class DropOut(Stage):
    """Sets elements to zero, and scales the others up.

    Attributes:
      rate: the probability with which an element is set to zero.
      key: a random key.
    """

    rate: float = flax.struct.field(pytree_node=False)
    key: Any

    def apply(self, x: Any, at: At | None = None) -> Any:
        """See `Stage.apply`."""
        if self.rate == 1:
            return jnp.zeros_like(x)
        keep = jax.random.bernoulli(self.key, 1 - self.rate, x.shape)
        return jnp.where(keep, x / (1 - self.rate), jnp.zeros_like(x))


@dataclasses.dataclass(frozen=True)
class Adapted:
    """Adds adapters to the stages of a mode.

    Attributes:
      added: the adapters whose products are computed separately, by the path of their
        param.
      merged: the stages of params whose adapter is merged in, in every mode.
      dropouts: for ops that read a param with an adapter, the dropout of the input of
        the adapter.
    """

    added: Mapping[Path, Adapter]
    merged: Mapping[Path, tuple[ParamStage | Stage, ...]]
    dropouts: Sequence[tuple[Op, DropOut]]

    def __call__(self, stages: CallStages) -> CallStages:
        """The stages that the call has."""
        params = {**stages.params, **self.merged}
        for path, adapter in self.added.items():
            params[path] = (*stages.params.get(path, ()), AddAdapter(adapter))
        ops = dict(stages.ops)
        for op, dropout in self.dropouts:
            found = ops.get(op.key)
            if found is None:
                found = OpStages(op, ((),) * len(op.operands), as_carried)
            ops[op.key] = dataclasses.replace(found, beside=(dropout,))
        return CallStages(params, ops)
