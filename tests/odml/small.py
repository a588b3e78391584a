"""Small models with their ranges, for the tests of conversion."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax import nnx
from jax import numpy as jnp

from qwix_train import QuantizationRule, calib, odml

INT8 = (
    QuantizationRule(weight_qtype="int8", act_qtype="int8", act_averaging="minmax"),
)


class Mlp(nn.Module):
    """Two layers, each a method of its own."""

    def setup(self):
        self.first = nn.Dense(16, bias_init=nn.initializers.normal(0.2))
        self.second = nn.Dense(4)

    def encode(self, x):
        return nn.relu(self.first(x))

    def decode(self, h):
        return self.second(h)

    def __call__(self, x):
        return self.decode(self.encode(x))


def module(call: Any) -> nn.Module:
    """A Linen module from a compact method."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, *args, **kwargs):
            return call(self, *args, **kwargs)

    return Model()


def init(model: nn.Module, *inputs: Any, **kwargs: Any) -> Any:
    """The variables of a Linen model."""
    return jax.jit(model.init)(jax.random.key(0), *inputs, **kwargs)


def normal(*shape: int, seed: int = 0) -> jnp.ndarray:
    rng = np.random.default_rng(seed)
    return jax.device_put(rng.normal(size=shape).astype(np.float32))


def stats_of(provider: odml.OdmlQatProvider, run: Any, *args: Any) -> Any:
    """The ranges of a call of a function that runs a model."""
    calibrator = calib.Calibrator(provider)
    calibrator.wrap(nnx.jit(run))(*args)
    return calibrator.quant_stats


def converted(
    model: nn.Module,
    variables: Any,
    *inputs: Any,
    provider: odml.OdmlQatProvider | None = None,
    **options: Any,
) -> odml.LiteRTModel:
    """A Linen model, calibrated on its inputs, and converted."""
    provider = provider or odml.OdmlQatProvider(INT8)

    stats = stats_of(provider, model.apply, variables, *inputs)
    return odml.convert(
        model, variables, provider, *inputs, quant_stats=stats, **options
    )
