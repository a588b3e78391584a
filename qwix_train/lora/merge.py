"""Adapters merged into their base, and taken out again."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.core import Tracer

from qwix_train.core import numerics
from qwix_train.frontends import marks, nnx_keys, nnx_objects
from qwix_train.frontends.model import quantize_model
from qwix_train.lora import merge_report, parts
from qwix_train.lora.layout import AdapterLayout
from qwix_train.lora.merge_report import MergeReport
from qwix_train.lora.train_state import LoraTrainState, by_path
from qwix_train.planning.plan import Path
from qwix_train.ptq.provider import PtqProvider
from qwix_train.trace import subclasses
from qwix_train.trace.function import param_path
from qwix_train.values import stored


class Merged(NamedTuple):
    """The result of `merge_with_report`.

    Attributes:
      params: the result of `merge`.
      report: what requantizing did to each weight.
    """

    params: Any
    report: MergeReport


def merge(base: Any, *args: Any, to_float: bool = False, **kwargs: Any) -> Any:
    """Merges adapters into their base: ``W`` becomes ``W + scaling * A @ B``.

    With DoRA it becomes ``m * (W + scaling * A @ B) / norm``. The sum is computed in
    float32, at the highest precision, and rounded to the dtype of ``W``. A quantized
    base is dequantized first. Then it is quantized again as it was (by its
    `WithAux.how`, unpacked if it was packed), which rounds what adapters add: see
    `merge_with_report`.

    There are three ways to call it:

    - ``merge(state)``, for a `LoraTrainState`;
    - ``merge(frozen, adapters, layouts)``, with what `lora.init` gives, or what `split`
      takes out of the params of a Linen model;
    - ``merge(model, *inputs)``, for an NNX model with adapters. Shapes will do for
      inputs.

    Args:
      base: a state, the params of a base, or an NNX model.
      *args: the arguments after it, as above.
      to_float: whether quantized params become float arrays, even those that have no
        adapter.
      **kwargs: keyword inputs of an NNX model.

    Returns:
      The params, in the tree of the base. Float params are for the float model, and
      quantized ones for a `PtqProvider` with the same rules, and for `ptq.save`. Params
      of rules with `qat=True` are in float. For an NNX model it is a copy without
      adapters: the float model or, if any of its params are quantized, a model that
      runs with a `PtqProvider`. In that model, params of rules with `qat=True` are
      quantized, too.

    Raises:
      TypeError: if the arguments do not fit any of the three.
      ValueError: if adapters do not fit the layouts, or the layouts the base; the
        message names the params.

    Example:
      >>> import jax
      >>> from jax import numpy as jnp
      >>> from qwix_train.lora import merge
      >>> base = {"kernel": jnp.ones((4, 2))}
      >>> from qwix_train.lora import LoraRule, init
      >>> adapters, frozen, layouts = init(
      ...     base, lambda p, x: x @ p["kernel"], [LoraRule(rank=1, alpha=2.0)],
      ...     jax.random.key(0), jnp.ones((1, 4)),
      ... )
      >>> adapters = jax.tree.map(jnp.ones_like, adapters)
      >>> merge(frozen, adapters, layouts)["kernel"][0].tolist()
      [3.0, 3.0]
    """
    return _merged(base, args, to_float, None, kwargs)


def merge_with_report(
    base: Any, *args: Any, to_float: bool = False, **kwargs: Any
) -> Merged:
    """Merges, and says what requantizing did to each weight.

    Args:
      base: see `merge`.
      *args: see `merge`.
      to_float: see `merge`. Then only the rounding of floats is lost, which the report
        shows.
      **kwargs: see `merge`.

    Returns:
      The result of `merge`, and a report that prints as a table.

    Example:
      >>> import jax
      >>> from jax import numpy as jnp
      >>> from qwix_train.lora import LoraRule, init, merge_with_report
      >>> rule = LoraRule(rank=1, alpha=1.0, weight_qtype="int4")
      >>> adapters, frozen, layouts = init(
      ...     {"kernel": jnp.ones((4, 2))}, lambda p, x: x @ p["kernel"], [rule],
      ...     jax.random.key(0), jnp.ones((1, 4)),
      ... )
      >>> print(merge_with_report(frozen, adapters, layouts).report)
      param   type  adapter / base  adapter / step  error  error / adapter
      --------------------------------------------------------------------
      kernel  int4           0.00%           0.000  6.67%                -
    """
    records: list[merge_report.MergeRecord] = []
    params = _merged(base, args, to_float, records, kwargs)
    return Merged(params, MergeReport(tuple(records)))


def unmerge(params: Any, adapters: Any, layouts: parts.Layouts) -> Any:
    """Takes adapters out of float params that they were merged into.

    ``W = merged - scaling * A @ B``, computed as in `merge`. The base is right to the
    rounding of its dtype, which in bfloat16 is one part in 256. If you have kept the
    base (`LoraTrainState.frozen`), use that instead.

    Args:
      params: what `merge` gave.
      adapters: the adapters.
      layouts: their layouts.

    Returns:
      The params of the base.

    Raises:
      ValueError: if a param is quantized, or has a magnitude (DoRA), because its base
        cannot be found again; or if adapters do not fit. The message names the param.

    Example:
      >>> import jax
      >>> from jax import numpy as jnp
      >>> from qwix_train.lora import LoraRule, init, merge, unmerge
      >>> adapters, frozen, layouts = init(
      ...     {"kernel": jnp.ones((4, 2))}, lambda p, x: x @ p["kernel"],
      ...     [LoraRule(rank=1, alpha=2.0)], jax.random.key(0), jnp.ones((1, 4)),
      ... )
      >>> adapters = jax.tree.map(jnp.ones_like, adapters)
      >>> merged = merge(frozen, adapters, layouts)
      >>> unmerge(merged, adapters, layouts)["kernel"][0].tolist()
      [1.0, 1.0]
    """
    arrays = parts.checked(adapters, layouts)
    _check_base(by_path(params), layouts)

    def taken_out(path: Path, param: Any) -> Any:
        layout, name = layouts[path], "/".join(path)
        if stored.is_quantized(param):
            raise ValueError(
                f"Param {name!r} is quantized: merging rounded the sum of its base and "
                "its adapter, and no adapter can be taken out of that again. Keep the "
                "base (state.frozen, or ptq.save(path, state.frozen)) and merge into "
                "it, or merge with to_float=True."
            )
        if layout.dora:
            raise ValueError(
                f"Param {name!r} has a magnitude (DoRA): merging divided each channel "
                "by its norm, which is known no more. Keep the base (state.frozen)."
            )
        a, b = parts.arrays_of(layout, arrays)
        return _placed(_plus(layout, param, -a, b), param)

    return _mapped(params, layouts, taken_out)


def _merged(
    base: Any,
    args: Sequence[Any],
    to_float: bool,
    records: list[merge_report.MergeRecord] | None,
    kwargs: dict[str, Any],
) -> Any:
    if isinstance(base, nnx.Module):
        return _merged_model(base, args, to_float, records, kwargs)
    if isinstance(base, LoraTrainState) and not args and not kwargs:
        base, args = base.frozen, (base.params, base.layouts)
    if len(args) != 2 or kwargs or isinstance(base, LoraTrainState):
        raise TypeError(
            "Call lora.merge(state), lora.merge(frozen, adapters, layouts) or, for an "
            "NNX model, lora.merge(model, *inputs)."
        )
    adapters, layouts = args[0], parts.layouts_of(args[1])
    arrays = parts.checked(adapters, layouts)
    _check_base(by_path(base), layouts)

    def merged(path: Path, param: Any) -> Any:
        layout = layouts[path]
        is_quantized = stored.is_quantized(param)
        weight = stored.dequantized(param) if is_quantized else param
        adapter = parts.arrays_of(layout, arrays)
        result = _placed(_plus(layout, weight, *adapter), weight)
        new = result
        if is_quantized and not to_float:
            new = stored.quantize_param(result, param.how)
        if records is not None:
            wide = weight.astype(numerics.compute_dtype(weight.dtype))
            exact = _plus(layout, wide, *adapter)
            records.extend(merge_report.measure(layout, wide, exact, new))
        return new

    return _mapped(base, layouts, merged, to_float)


def _merged_model(
    model: nnx.Module,
    inputs: Sequence[Any],
    to_float: bool,
    records: list[merge_report.MergeRecord] | None,
    kwargs: dict[str, Any],
) -> nnx.Module:
    """A copy of an NNX model without adapters."""
    if not inputs and not kwargs:
        raise TypeError(
            "Which params have adapters is seen in the call of the model: "
            "lora.merge(model, *inputs). Shapes will do."
        )
    provider = parts.provider_of(model)
    adapters, base, layouts = parts.split(model, *inputs, **kwargs)
    values = by_path(_merged(base, (adapters, layouts), to_float, records, {}))
    merged = nnx.clone(model)
    marks.set_class(merged, subclasses.original(type(model)))
    nnx_objects.replace_params(merged, values, _like, lambda path, value: value)
    for layout in layouts.values():
        nnx_objects.remove_params(merged, layout.shapes)
    nnx_keys.remove(merged)
    if to_float or not any(map(stored.is_quantized, values.values())):
        return merged
    _, methods = subclasses.mode(model) or (None, ())
    ptq = PtqProvider(provider.rules)
    return quantize_model(merged, ptq, *inputs, methods=methods, **kwargs)


def _mapped(
    tree: Any,
    layouts: parts.Layouts,
    change: Callable[[Path, Any], Any],
    to_float: bool = False,
) -> Any:
    """A tree of params with those that have an adapter changed, in their boxes.

    Args:
      tree: the params.
      layouts: the layouts of the adapters.
      change: gives the new value of a param from its path and its value, unboxed.
      to_float: whether other params are dequantized.
    """

    def new(key_path, leaf):
        path, value = param_path(key_path), stored.unbox(leaf)
        if path in layouts:
            return _like(change(path, value), leaf)
        if to_float and merge_report.is_weight(value):
            return _like(stored.dequantized(value), leaf)
        return leaf

    return jax.tree_util.tree_map_with_path(new, tree, is_leaf=stored.is_whole)


def _like(value: Any, leaf: Any) -> Any:
    """A param in the box of another one, or in the box of its codes."""
    was_quantized = stored.is_quantized(leaf)
    if stored.is_quantized(value):
        return stored.box(value, stored.box_of(leaf) if was_quantized else leaf)
    if was_quantized:
        return stored.box_array(leaf, value)
    if isinstance(leaf, nnx.Variable):
        return leaf.replace(value)
    return leaf.replace_boxed(value) if stored.is_box(leaf) else value


@functools.partial(jax.jit, static_argnums=0)
def _plus(layout: AdapterLayout, weight: Any, *adapter: Any) -> jax.Array:
    return layout.merged(weight, *adapter)


def _placed(value: jax.Array, like: Any) -> jax.Array:
    """An array, on the devices of another one."""
    if isinstance(like, jax.Array) and not isinstance(like, Tracer):
        return jax.device_put(value, like.sharding)
    return value


def _check_base(params: dict[Path, Any], layouts: parts.Layouts) -> None:
    """Complains of a base that does not fit the layouts."""
    for path, layout in layouts.items():
        name, param = "/".join(path), params.get(path)
        if param is None:
            raise ValueError(
                f"The base has no param {name!r}, which the layouts have an adapter "
                "for. Give the params that the adapters were made for (state.frozen)."
            )
        if tuple(param.shape) != layout.shape:
            raise ValueError(
                f"Param {name!r} of the base has shape {tuple(param.shape)}, and the "
                f"adapter is for one of shape {layout.shape}: it is another model's."
            )
