"""One call from a model in JAX to a `.tflite` file that computes what training saw."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
import numpy as np
from flax import linen as nn
from flax import nnx
from jax import core
from jax import numpy as jnp

from qwix_train.frontends.quant_stat import quant_stats_in
from qwix_train.odml import dynamic_batch as batches
from qwix_train.odml import flatbuffer
from qwix_train.odml.annotation import grids_of, run_annotated
from qwix_train.odml.calls import ModelCall
from qwix_train.odml.converter import to_flatbuffer
from qwix_train.odml.edit import integer_ends, merged, with_metadata
from qwix_train.odml.litert_model import DEFAULT_SIGNATURE, InJax, LiteRTModel
from qwix_train.odml.plan import OdmlPlan, TensorPlan
from qwix_train.odml.provider import OdmlQatProvider
from qwix_train.planning.provider import checked_plan
from qwix_train.planning.quant_stats import nested
from qwix_train.planning.rules import QuantizationRule


def convert(
    model: Any,
    variables: Any,
    rules: Sequence[QuantizationRule] | OdmlQatProvider,
    *inputs: Any,
    quant_stats: Mapping[str, Any] | None = None,
    method: str | Callable[..., Any] = "__call__",
    signatures: Mapping[str, tuple[str | Callable[..., Any], Sequence[Any]]]
    | None = None,
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
      *inputs: inputs of the model, or their shapes: arrays, or trees of them. What is
        no array keeps its value.
      quant_stats: the ranges of activations, as `ranges` gives them, or a
        `calib.Calibrator`. If None, those among the variables, or in the NNX
        model.
      method: the method to convert, by name or as a function.
      signatures: for a file with several functions, for each its name, and a method
        with its inputs: `{"encode": ("encode", (image,))}`. In the place of `inputs`
        and `method`. Equal weights are in the file once.
      integer_inputs: whether the file takes int8 codes, not floats, as its inputs.
      integer_outputs: whether it gives int8 codes, not floats.
      dynamic_batch: whether the length of the batch may be another whenever the model
        runs. It is the first axis of all inputs. The file is tested on a batch of
        another length than those that it is made with.
      metadata: entries for the metadata of the file, by name.
      **kwargs: keyword arguments of the method, such as `train=False`. Arrays among
        them are inputs, too.

    Returns:
      The model, which runs in LiteRT's interpreter, and is written by `save(path)`.

    Raises:
      ImportError: if the packages of the extra `odml` are not installed.
      TypeError: if the model is not a Flax module or a function, or metadata is
        neither text nor bytes.
      ValueError: if LiteRT has no integer form of an operation, or its converter leaves
        floats where training has integers (with a strict provider), a range is missing,
        a collection of a Linen model is missing, no rule matches (unless the provider
        says `allow_unmatched`), the model trains or computes in another type than
        float32, variables are traced, the length of the batch cannot be left open, an
        end of the model has no codes, or options do not go together.

    Example:
      >>> import jax
      >>> from flax import linen as nn
      >>> from jax import numpy as jnp
      >>> from qwix_train import QuantizationRule
      >>> from qwix_train.odml import convert
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
        signatures = {DEFAULT_SIGNATURE: (method, inputs)}
    elif inputs or method != "__call__":
        raise ValueError(
            "convert takes signatures, or inputs and a method, not both: "
            f"signatures={{'encode': ('encode', (x,))}}. It was given {len(inputs)} "
            f"inputs and method={method!r} beside."
        )
    if isinstance(model, nn.Module):
        _check_collections(variables)
    _check_concrete(model, variables)
    calls = {}
    for name, entry in signatures.items():
        if not isinstance(entry, Sequence) or isinstance(entry, str) or len(entry) != 2:
            raise ValueError(
                f"The signature {name!r} is {entry!r}; give a method and its inputs, "
                "such as ('encode', (x,))."
            )
        calls[name] = ModelCall(model, variables, *entry, kwargs)
    if not calls:
        raise ValueError("signatures={} names no function to convert.")
    if quant_stats is None:
        quant_stats = _stats_in(model, variables)
    fixed = provider.with_ranges(quant_stats)
    converted = {
        name: _converted(name, call, fixed, dynamic_batch)
        for name, call in calls.items()
    }
    contents = [content for content, _ in converted.values()]
    content = contents[0] if len(contents) == 1 else merged(contents)
    if integer_inputs or integer_outputs:
        content = integer_ends(content, integer_inputs, integer_outputs)
    if metadata:
        content = with_metadata(content, metadata)
    return LiteRTModel(content, {name: found for name, (_, found) in converted.items()})


def _converted(
    name: str,
    call: ModelCall,
    provider: OdmlQatProvider,
    dynamic_batch: bool,
) -> tuple[bytes, InJax]:
    """The file of one signature, and what it was made from."""
    inputs, outputs = call.input_names(), call.output_names()

    def content_of(arrays: Sequence[Any]) -> bytes:
        plan, function, shapes = _exported(call, provider, arrays)
        content = to_flatbuffer(function, shapes, name, inputs, outputs)
        _check_content(name, content, plan, provider, outputs)
        return content

    def reference(*arrays):
        traced, unwrap = call.trace([jnp.asarray(x) for x in arrays])
        plan = provider.plan(traced)
        run = jax.jit(lambda values: provider.outputs(plan, values))
        outs = run(list(traced.inputs))
        return unwrap(traced.rebuild(outs))

    def tree(arrays):
        traced, unwrap = call.traced
        return unwrap(traced.rebuild(arrays))

    in_jax = InJax(tree, reference)
    if not dynamic_batch:
        return content_of(call.arrays), in_jax
    content, larger = (content_of(call.batch_of(n)) for n in batches.SIZES)
    content = batches.with_dynamic_batch(content, larger)
    tested = call.batch_of(batches.TESTED_SIZE)
    batches.check_dynamic_batch(name, content, content_of(tested), tested)
    return content, in_jax


def _exported(
    call: ModelCall, provider: OdmlQatProvider, arrays: Sequence[Any]
) -> tuple[OdmlPlan, Callable[..., Any], Sequence[Any]]:
    """The plan, the function to export, and the shapes of its arguments."""
    traced, _ = call.traced if arrays is call.arrays else call.trace(arrays)
    plan = cast(OdmlPlan, checked_plan(provider, traced))
    _check_float32(plan)
    inputs = list(zip(traced.inputs, traced.held, strict=True))

    def exported(*arrays):
        rest = iter(arrays)
        values = [x if held else next(rest) for x, held in inputs]
        outs = run_annotated(
            plan,
            values,
            provider.quant_stats or {},
        )
        return tuple(outs)

    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x, held in inputs if not held]
    return plan, exported, shapes


def _check_content(
    name: str,
    content: bytes,
    plan: OdmlPlan,
    provider: OdmlQatProvider,
    outputs: Sequence[str],
) -> None:
    """Checks that a file computes in integers what a plan has in integers.

    Args:
      name: the name of its signature.
      content: the file.
      plan: the plan.
      provider: says whether a difference is an error.
      outputs: the names of the outputs.

    Raises:
      ValueError: if it does not, and the provider is strict.
    """
    ops = flatbuffer.ops_in(content)
    found = []
    for op in flatbuffer.float_ops(ops):
        # Among what is to run in floats, only what quantizes floats again is known to
        # be a fault.
        if op.name == "QUANTIZE" or not plan.float_ops:
            shapes = ", ".join(f"{t.dtype}{t.shape}" for t in op.inputs)
            found.append(f"{op.name} of {shapes} computes with floats")
    grids = grids_of(plan, provider.quant_stats or {})
    scales = flatbuffer.signatures_in(content)[name].output_scales
    for output, value in zip(outputs, plan.graph.outputs, strict=True):
        tensor = plan.range_of(value)
        if isinstance(tensor, TensorPlan):
            scale = float(grids[tensor.name].scale)
            if not np.isclose(scales.get(output, 0), scale, 1e-5, 0):
                found.append(
                    f"the output {output!r} has the scale {scales.get(output)}, and "
                    f"{scale} in training"
                )
    if not found:
        return
    message = (
        f"The LiteRT converter made another model of the signature {name!r} than was "
        f"trained: {'; '.join(found)}. Leave out of the rules what these are part of, "
        "or write it in another way; with strict=False this is a warning."
    )
    if provider.strict:
        raise ValueError(message)
    warnings.warn(message, stacklevel=4)


def _check_collections(variables: Any) -> None:
    """Checks that variables are not the params of a Linen model alone."""
    is_mapping = isinstance(variables, Mapping)
    if not is_mapping or (variables and not {"params", "batch_stats"} & set(variables)):
        raise ValueError(
            "The variables of a Linen model are its collections, the params among "
            'them: odml.convert(model, {"params": params}, rules, *inputs).'
        )


def _check_concrete(model: Any, variables: Any) -> None:
    """Checks that variables have values, which the file is to hold."""
    held = nnx.state(model) if isinstance(model, nnx.Module) else variables
    for path, leaf in jax.tree_util.tree_flatten_with_path(held)[0]:
        if isinstance(leaf, core.Tracer | jax.ShapeDtypeStruct):
            raise ValueError(
                f"The variable {jax.tree_util.keystr(path)} has no value, as the file "
                f"needs it, but is {leaf}: call convert outside of jax.jit, with "
                "variables that hold arrays."
            )


def _stats_in(model: Any, variables: Any) -> Mapping[str, Any]:
    """The ranges among the variables of a Linen model, or in an NNX model."""
    if isinstance(model, nnx.Module):
        stats = quant_stats_in(model)
        return nested({path: stat.get_value() for path, stat in stats})
    if isinstance(model, nn.Module) and isinstance(variables, Mapping):
        return variables.get("quant_stats", {})
    return {}


def _check_float32(plan: OdmlPlan) -> None:
    """Checks that a model computes in the one type that the converter quantizes."""
    inputs = [(v, "an input of the model") for v in plan.graph.inputs if not v.static]
    computed = [(v, node.where) for node in plan.nodes for v in node.node.outputs]
    for value, where in (*inputs, *computed):
        if value.is_float and value.dtype != jnp.float32:
            raise ValueError(
                f"{where} is in {value.dtype}, and the converter quantizes float32 "
                "alone. Give float32 inputs, and make the model with dtype=float32; "
                "its params may stay as they are."
            )
