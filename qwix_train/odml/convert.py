"""One call from a model in JAX to a `.tflite` file that computes what training saw."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax import nnx
from jax import core
from jax import numpy as jnp

from qwix_train.model import trace_function
from qwix_train.odml.conversion import constants_of, grids_of, run_annotated
from qwix_train.odml.converter import to_flatbuffer
from qwix_train.odml.edit import integer_ends, with_dynamic_batch, with_metadata
from qwix_train.odml.litert_model import DEFAULT_SIGNATURE, LiteRTModel, Signature
from qwix_train.odml.plan import OdmlPlan
from qwix_train.odml.provider import OdmlQatProvider
from qwix_train.rules import QuantizationRule
from qwix_train.state import QuantStat
from qwix_train.trace import function, subclasses
from qwix_train.trace import nnx as nnx_calls


class OdmlConversionProvider(OdmlQatProvider):
    """Annotates a model for the LiteRT converter.

    `odml.convert` does this, and all that comes after it. The provider is for tools
    that convert a function themselves: `quantize_model(model, provider)` gives a model
    whose `apply`, exported by `jax.export` with its params closed over, holds the
    composites `quant.fake_quant` that the converter reads.

    Example:
      >>> from jax import numpy as jnp
      >>> from qwix_train import QuantizationRule, quantize_model
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
        """
        super().__init__(rules, quant_stats=dict(quant_stats or {}), **kwargs)
        flat, _ = jax.tree_util.tree_flatten_with_path(params)
        self._params = {function.param_path(path): leaf for path, leaf in flat}

    def transform(self, traced: function.TracedCall, plan: OdmlPlan) -> Any:  # type: ignore[override]
        """The result of a traced call, with its tensors annotated."""
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
        return traced.rebuild(self.annotated(plan, values))

    def annotated(self, plan: OdmlPlan, values: Sequence[Any]) -> list[Any]:
        """The results of a planned graph, with its tensors annotated."""
        return run_annotated(
            plan,
            values,
            constants_of(plan, values),
            grids_of(plan, self.quant_stats or {}),
            per_tensor_weights=self.disable_per_channel_weights,
        )


@dataclasses.dataclass(frozen=True)
class _Call:
    """A method of a model, to become a signature."""

    method: str
    inputs: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def convert(
    model: Any,
    variables: Any,
    rules: Sequence[QuantizationRule] | OdmlQatProvider,
    *inputs: Any,
    quant_stats: Mapping[str, Any] | None = None,
    method: str = "__call__",
    signatures: Mapping[str, tuple[str, Sequence[Any]]] | None = None,
    integer_inputs: bool = False,
    integer_outputs: bool = False,
    dynamic_batch: bool = False,
    metadata: Mapping[str, str | bytes] | None = None,
    **kwargs: Any,
) -> LiteRTModel:
    """Converts a model to LiteRT.

    Args:
      model: a Linen module, an NNX module, or a function whose first argument is a tree
        of params. An NNX model is converted as it is: call `model.eval()` before.
      variables: the variables of a Linen model, or the params of a function. None for
        an NNX model. Of quantization-aware training, or of training in float.
      rules: the rules that the model was trained with, or the provider. For a file in
        float, `OdmlQatProvider([], allow_unmatched=True)`.
      *inputs: inputs of the model, or their shapes.
      quant_stats: the ranges of activations, as `with_quant_stats` or a
        `calib.Calibrator` keeps them. If None, those among the variables, or in the NNX
        model.
      method: the method to convert.
      signatures: for a file with several functions, for each its name, and a method
        with its inputs: `{"encode": ("encode", (image,))}`. In the place of `inputs`
        and `method`.
      integer_inputs: whether the file takes int8 codes, not floats, as its inputs.
      integer_outputs: whether it gives int8 codes, not floats.
      dynamic_batch: whether the length of the first axis of the inputs, 1 there, may be
        another when the model runs.
      metadata: entries for the metadata of the file, by name.
      **kwargs: keyword arguments of the method, such as `train=False`.

    Returns:
      The model, which runs in LiteRT's interpreter, and is written by `save(path)`.

    Raises:
      ImportError: if the packages of the extra `odml` are not installed.
      ValueError: if LiteRT has no integer form of an operation (with a strict
        provider), a range is missing, no rule matches (unless the provider says
        `allow_unmatched`), or the options do not go together.

    Example:
      >>> from qwix_train import QuantizationRule
      >>> model, x = nn.Dense(2), jnp.ones((1, 4))
      >>> variables = model.init(jax.random.key(0), x)
      >>> rules = [QuantizationRule(weight_qtype="int8", act_qtype="int8")]
      >>> unit = {"count": 1, "sum_of_min": jnp.zeros(1), "sum_of_max": jnp.ones(1)}
      >>> stats = {"dot_general0_lhs": unit, "final_output0": unit}
      >>> litert = convert(model, variables, rules, x, quant_stats=stats)
      >>> litert.is_full_integer, litert(x).shape
      (True, (1, 2))
    """
    provider = rules if isinstance(rules, OdmlQatProvider) else OdmlQatProvider(rules)
    if signatures is None:
        calls = {DEFAULT_SIGNATURE: _Call(method, inputs, kwargs)}
    else:
        if inputs:
            raise ValueError("Give inputs in signatures, or beside, not both.")
        calls = {
            name: _Call(called, tuple(given), kwargs)
            for name, (called, given) in signatures.items()
        }
    if not any(jax.tree.leaves(call.inputs) for call in calls.values()):
        raise ValueError(
            "convert needs inputs of the model, or their shapes: "
            "odml.convert(model, variables, rules, *inputs)."
        )
    if quant_stats is None:
        quant_stats = _stats_in(model, variables)
    converting = OdmlConversionProvider(
        provider.rules,
        {},
        quant_stats,
        disable_per_channel_weights=provider.disable_per_channel_weights,
        fixed_range_for_inputs=provider.fixed_range_for_inputs,
        fixed_range_for_outputs=provider.fixed_range_for_outputs,
        strict=provider.strict,
        allow_unmatched=provider.allow_unmatched,
    )
    fixed = provider.with_ranges(quant_stats)
    functions, names, found = {}, {}, {}
    for name, call in calls.items():
        functions[name], names[name], found[name] = _signature(
            model, variables, call, converting, fixed
        )
    content = to_flatbuffer(functions, names)
    if dynamic_batch:
        larger = {
            name: _Call(call.method, _batch_of(call.inputs, 2), call.kwargs)
            for name, call in calls.items()
        }
        other = {
            name: _signature(model, variables, call, converting, fixed)[0]
            for name, call in larger.items()
        }
        content = with_dynamic_batch(content, to_flatbuffer(other, names))
    if integer_inputs or integer_outputs:
        content = integer_ends(content, integer_inputs, integer_outputs)
    if metadata:
        content = with_metadata(content, metadata)
    return LiteRTModel(content, found)


def _signature(model, variables, call, converting, fixed):
    """The function to export, the names of its arguments, and what runs it."""
    trace = functools.partial(_trace, model, variables, call)
    traced, unwrap = trace(call.inputs)
    plan = converting.plan(traced)
    converting.check(plan)
    if not converting.matches(plan) and not converting.allow_unmatched:
        raise ValueError(converting.no_match_message(plan))
    _check_float32(plan)
    places = [i for i, held in enumerate(traced.held) if not held]

    def exported(*arrays):
        values = list(traced.inputs)
        for place, array in zip(places, arrays, strict=True):
            values[place] = array
        return tuple(converting.annotated(plan, values))

    shapes = [
        jax.ShapeDtypeStruct(traced.inputs[i].shape, traced.inputs[i].dtype)
        for i in places
    ]
    inputs = _input_names(model, call)
    outputs = tuple(f"output_{i}" for i in range(len(plan.graph.outputs)))

    def reference(*inputs):
        traced, unwrap = trace(jax.tree.map(jnp.asarray, inputs))
        plan = fixed.plan(traced)
        outs = jax.jit(lambda values: fixed.outputs(plan, values))(list(traced.inputs))
        return unwrap(traced.rebuild(outs))

    def tree(arrays):
        return unwrap(traced.rebuild(arrays))

    return (
        (exported, shapes),
        (inputs, outputs),
        Signature(inputs, outputs, tree, reference),
    )


def _trace(
    model: Any, variables: Any, call: _Call, inputs: tuple[Any, ...]
) -> tuple[function.TracedCall, Callable[[Any], Any]]:
    """The traced call, and what makes the method's result of that of the trace."""
    kwargs = dict(call.kwargs)
    # NumPy arrays would count as constants.
    inputs = jax.tree.map(
        lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x, inputs
    )
    if isinstance(model, nnx.Module):
        cls = subclasses.original(type(model))
        method = getattr(cls, call.method)
        with nnx_calls.tracing_call(method, (model, *inputs), kwargs) as found:
            traced, finish = found

        def unwrap(out):
            (_, updates), _ = out
            if jax.tree.leaves(updates):
                raise ValueError(
                    f"{cls.__name__} updates its variables, as in training, which a "
                    "converted model cannot: call model.eval() before."
                )
            return finish(out)

        return traced, unwrap
    if isinstance(model, nn.Module):
        held = {k: v for k, v in dict(variables).items() if k != "quant_stats"}
        apply = functools.partial(model.apply, method=call.method, **kwargs)
        traced = trace_function(apply, (held, *inputs), {})
        traced = dataclasses.replace(traced, method=call.method)
    elif callable(model):
        traced = trace_function(model, (variables, *inputs), kwargs)
    else:
        raise TypeError(f"Expected a Flax module or a function, got {model!r}.")
    return traced, lambda out: out


def _stats_in(model: Any, variables: Any) -> Mapping[str, Any]:
    """The ranges among the variables of a Linen model, or in an NNX model."""
    if isinstance(model, nnx.Module):
        found: dict[str, Any] = {}
        for path, node in nnx.iter_graph(model):
            if isinstance(node, QuantStat):
                *outer, last = map(str, path)
                inner = functools.reduce(lambda d, k: d.setdefault(k, {}), outer, found)
                inner[last] = node.get_value()
        return found
    if isinstance(variables, Mapping):
        return variables.get("quant_stats", {})
    return {}


def _input_names(model: Any, call: _Call) -> tuple[str, ...]:
    """The names of the inputs of a signature: those of the arguments of the method."""
    cls = subclasses.original(type(model))
    is_module = isinstance(model, nn.Module | nnx.Module)
    called = getattr(cls, call.method) if is_module else model
    try:
        parameters = list(inspect.signature(called).parameters.values())[1:]
    except (TypeError, ValueError):
        parameters = []
    names = []
    for index, given in enumerate(call.inputs):
        name = f"args_{index}"
        if index < len(parameters) and parameters[index].kind not in (
            inspect.Parameter.VAR_POSITIONAL,
            inspect.Parameter.VAR_KEYWORD,
        ):
            name = parameters[index].name
        for path, leaf in jax.tree_util.tree_flatten_with_path(given)[0]:
            if function.is_array(leaf) or isinstance(leaf, np.ndarray):
                names.append("_".join([name, *function.param_path(path)]))
    return tuple(names)


def _batch_of(inputs: Any, size: int) -> Any:
    """Inputs, or their shapes, with another length of the first axis."""

    def change(leaf):
        if np.shape(leaf)[:1] != (1,):
            raise ValueError(
                "dynamic_batch=True needs inputs whose first axis is that of the "
                f"batch, of length 1; one has the shape {np.shape(leaf)}."
            )
        return jax.ShapeDtypeStruct((size, *leaf.shape[1:]), leaf.dtype)

    return jax.tree.map(change, inputs)


def _check_float32(plan: OdmlPlan) -> None:
    for node in plan.nodes:
        for value in node.node.outputs:
            if value.is_float and value.dtype not in (jnp.float32, jnp.float64):
                raise ValueError(
                    f"{node.where} computes in {value.dtype}, which the converter "
                    "keeps in floats. Make the model with dtype=float32; its params "
                    "may stay as they are."
                )
