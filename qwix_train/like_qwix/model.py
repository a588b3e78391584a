"""Doors with the signatures of `qwix`."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from typing import Any, cast

from flax import nnx
from flax.core import FrozenDict

from qwix_train.frontends import model as frontends_model
from qwix_train.frontends import nnx_objects
from qwix_train.frontends.model import Model
from qwix_train.frontends.quant_stat import quant_stats_in
from qwix_train.planning.provider import QuantizationProvider
from qwix_train.ptq import params as ptq_params
from qwix_train.ptq import whole_model
from qwix_train.ptq.provider import PtqProvider


def quantize_model(
    model: Model,
    provider: QuantizationProvider,
    *model_inputs: Any,
    methods: Collection[str] = ("__call__",),
    **model_inputs_kwargs: Any,
) -> Model:
    """A copy of a model whose methods run quantized; see `qwix_train.quantize_model`.

    NNX models get what `qwix` keeps in their modules, too: `qwix_path`, `qwix_rngs`,
    `disable_quant_stats_update`. The last stops the updates of statistics; adapters
    have random keys of their own. What an NNX model has collected in `QuantStat`s
    becomes its ranges with a `PtqProvider`.

    Args:
      model: a Linen or an NNX module.
      provider: the mode and the rules.
      *model_inputs: inputs of an NNX model.
      methods: the methods to quantize.
      **model_inputs_kwargs: keyword inputs. With `skip_nnx_init=True`, an NNX model is
        taken to hold already what it needs.
    """
    skip = model_inputs_kwargs.pop("skip_nnx_init", False)
    if not isinstance(model, nnx.Module):
        return frontends_model.quantize_model(
            model, provider, *model_inputs, methods=methods, **model_inputs_kwargs
        )
    collected = dict(quant_stats_in(model)) if isinstance(provider, PtqProvider) else {}
    if skip:
        quantized = nnx.clone(model)
    elif collected:
        rules, rngs = provider.rules, model_inputs_kwargs.pop("rngs", None)
        quantized, _ = whole_model.quantize(
            model, None, rules, *model_inputs, rngs=rngs, **model_inputs_kwargs
        )
    else:
        quantized = frontends_model.quantize_model(
            model, provider, *model_inputs, methods=methods, **model_inputs_kwargs
        )
    if skip or collected:
        nnx_objects.remove_params(quantized, collected)
        frontends_model.run_quantized(quantized, provider, tuple(methods))
    for path, module in nnx.iter_modules(quantized):
        for name, value in (
            ("qwix_path", path),
            ("qwix_rngs", nnx.data(None)),
            ("disable_quant_stats_update", False),
        ):
            setattr(module, name, value)
    return cast(Model, quantized)


def apply_lora_to_model(
    model: Model,
    provider: QuantizationProvider,
    *model_inputs: Any,
    methods: Collection[str] = ("__call__",),
    **model_inputs_kwargs: Any,
) -> Model:
    """The same, for adapters: an NNX model without `rngs` gets those of a fixed seed.

    Args:
      model: see `quantize_model`.
      provider: see `quantize_model`.
      *model_inputs: see `quantize_model`.
      methods: see `quantize_model`.
      **model_inputs_kwargs: see `quantize_model`.
    """
    if isinstance(model, nnx.Module) and "rngs" not in model_inputs_kwargs:
        warnings.warn(
            "apply_lora_to_model has no rngs, so that adapters start from the seed "
            "10003: pass rngs=nnx.Rngs(seed).",
            stacklevel=2,
        )
        model_inputs_kwargs["rngs"] = nnx.Rngs(10003)
    return quantize_model(
        model, provider, *model_inputs, methods=methods, **model_inputs_kwargs
    )


def quantize_params(
    params: Any,
    abstract_quantized_params: Any,
    quant_stats: Any = FrozenDict(),  # noqa: B008
    *,
    allow_extra_params: bool = False,
) -> Any:
    """Quantizes float params as a quantized model says.

    See `qwix_train.quantize_params`.

    Args:
      params: the float params.
      abstract_quantized_params: the params of the quantized model.
      quant_stats: the ranges of activations.
      allow_extra_params: whether params that the quantized model does not have are left
        out.
    """
    return ptq_params.quantize_params(
        params,
        abstract_quantized_params,
        quant_stats,
        allow_extra_params=allow_extra_params,
    )
