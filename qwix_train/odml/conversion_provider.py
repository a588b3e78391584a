"""Annotates a model for the LiteRT converter, as a mode of quantization."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jax import core

from qwix_train.odml.annotation import run_annotated
from qwix_train.odml.plan import OdmlPlan
from qwix_train.odml.provider import OdmlQatProvider
from qwix_train.planning.rules import QuantizationRule
from qwix_train.trace import function


class OdmlConversionProvider(OdmlQatProvider):
    """Annotates a model for the LiteRT converter.

    `odml.convert` does this, and all that comes after it. The provider is for tools
    that convert a function themselves: `quantize_model(model, provider)` gives a model
    whose `apply`, exported by `jax.export` with its params closed over, holds the
    composites `quant.fake_quant` that the converter reads.

    Example:
      >>> import jax
      >>> from flax import linen as nn
      >>> from jax import numpy as jnp
      >>> from qwix_train import (
      ...     OdmlConversionProvider,
      ...     QuantizationRule,
      ...     quantize_model,
      ... )
      >>> model, x = nn.Dense(2), jnp.ones((1, 4))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> rules = [QuantizationRule(weight_qtype="int8")]
      >>> provider = OdmlConversionProvider(rules, params, {})
      >>> model = quantize_model(model, provider)
      >>> apply = lambda x: model.apply({"params": params}, x)
      >>> "quant.fake_quant" in str(jax.make_jaxpr(apply)(x))
      True
    """

    def __init__(
        self,
        rules: Sequence[QuantizationRule],
        params: Any,
        quant_stats: Mapping[str, Any] | None,
        **kwargs: Any,
    ):
        """Takes the params and ranges, concrete.

        Args:
          rules: the rules that the model was trained with.
          params: the params: nested dictionaries, or an `nnx.State`. They are used
            where the model is called with traced ones.
          quant_stats: the ranges of activations.
          **kwargs: see `OdmlQatProvider`.

        Raises:
          ValueError: if LiteRT has no such type or range.
        """
        super().__init__(rules, quant_stats=dict(quant_stats or {}), **kwargs)
        self._params = function.by_path(params)

    def transform(self, traced: function.TracedCall, plan: OdmlPlan) -> Any:  # type: ignore[override]
        """The result of a traced call, with its tensors annotated.

        Raises:
          ValueError: if a variable is traced, and none of the params; a range is
            missing; or the model drops elements at random.
        """
        values = []
        for value, held, param in zip(
            traced.inputs, traced.held, traced.params, strict=True
        ):
            if held and isinstance(value, core.Tracer):
                path = None if param is None else param.path
                if path not in self._params:
                    raise ValueError(
                        "A variable of the model is traced, and no param that the "
                        f"provider knows ({path or 'it is no param'}): close over the "
                        "variables in the function that is exported."
                    )
                value = self._params[path]
            values.append(value)
        outs = run_annotated(
            plan,
            values,
            self.quant_stats or {},
        )
        return traced.rebuild(outs)
