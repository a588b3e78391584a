"""The tensors that Hugging Face's PEFT has for an adapter, and back.

For a layer ``y = W x`` of PyTorch, with ``W`` of shape ``(out, in)``, PEFT keeps
``lora_A`` of shape ``(rank, in)`` and ``lora_B`` of shape ``(out, rank)``. For a
convolution, both have spatial axes behind; those of ``lora_B`` have size 1. For a table
of shape ``(rows, out)`` they are ``lora_embedding_A``, ``(rank, rows)``, and
``lora_embedding_B``, ``(out, rank)``. If several axes of a param are contracted, they
are one axis there, in their order in the param. So are several axes that are kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp

from qwix_train import ops
from qwix_train.lora import peft_config
from qwix_train.lora.layout import AdapterLayout
from qwix_train.planning.leaves import AdapterPart, Path

MAGNITUDE = "lora_magnitude_vector"

# By the kind of operation: a linear layer, a convolution, a table of embeddings.
_NAMES = {
    ops.DOT: ("lora_A.weight", "lora_B.weight"),
    ops.CONV: ("lora_A.weight", "lora_B.weight"),
    ops.GATHER: ("lora_embedding_A", "lora_embedding_B"),
}


def names_of(layout: AdapterLayout) -> tuple[str, ...]:
    """The names of the tensors of an adapter: of A, B and perhaps the magnitude."""
    return (*_NAMES[_kind(layout)], *([MAGNITUDE] if layout.dora else []))


def layout_of(
    path: Path | None,
    module: str,
    tensors: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
) -> AdapterLayout:
    """The layout of the adapter of a plain layer, as its tensors tell it.

    Args:
      path: the path of the param. If None, it follows from the name of the module, as
        Flax names params.
      module: the name of its module.
      tensors: its tensors, by name.
      config: the config beside them.

    Raises:
      ValueError: if one of its tensors is missing.
    """
    of_table = any(name in tensors for name in _NAMES[ops.GATHER])
    names = _NAMES[ops.GATHER if of_table else ops.DOT]
    if missing := [name for name in names if name not in tensors]:
        raise ValueError(f"There is no {module}.{missing[0]}.")
    a, b = (tensors[name] for name in names)
    kind = ops.GATHER if of_table else ops.CONV if a.ndim > 2 else ops.DOT
    rank, inputs, *spatial = a.shape
    last = "embedding" if of_table else "kernel"
    contracted = tuple(range(len(spatial) + 1))
    alpha = peft_config.alpha_of(config, module)
    return AdapterLayout(
        path=(*module.split("."), last) if path is None else path,
        shape=(*spatial, inputs, b.shape[0]),
        rank=rank,
        alpha=alpha,
        scaling=peft_config.scaling_of(config, alpha, rank),
        dora=MAGNITUDE in tensors,
        op=kind.names[0],
        layers=(),
        a_axes=contracted,
        b_axes=(len(contracted),),
        contracted=contracted,
        flat=kind.flattens(kind.names[0]),
    )


def _kind(layout: AdapterLayout) -> ops.OpKind:
    kind = ops.by_name(layout.op)
    assert kind is not None
    return kind


def indices(layout: AdapterLayout) -> list[tuple[int, ...]]:
    """The indices of the stacked layers of a param; one, empty, if it has none."""
    return list(np.ndindex(*(layout.shape[axis] for axis in layout.layers)))


def check(layout: AdapterLayout) -> None:
    """Checks that PEFT can hold an adapter, and computes the same with it.

    Raises:
      ValueError: if it cannot; the message has the path of the param.
    """
    name = "/".join(layout.path)
    if _kind(layout) not in _NAMES:
        raise ValueError(
            f"The adapter of {name!r} is one of {_kind(layout).plural}, and PEFT has "
            "no such layers. Leave it out of the rules, or merge it."
        )
    if set(layout.a_axes) - set(layout.contracted):
        raise ValueError(
            f"The adapter of {name!r} has axes of a batch, such as one for experts, "
            "and PEFT has no such layers. Leave it out of the rules, or merge it."
        )
    if layout.particulars:
        raise ValueError(
            f"PEFT computes something else with an adapter of {name!r} than this model "
            f"does: {'; '.join(layout.particulars)}. PEFT adapts each linear layer, "
            "each lookup, and each convolution without groups and dilation by itself. "
            "Give the param no adapter, by a rule of its own before the LoraRule; or "
            "merge it (lora.merge), and save the whole params."
        )
    if _kind(layout) is ops.CONV:
        _conv_inputs(layout)


def encode(layout: AdapterLayout, arrays: list[Any]) -> list[dict[str, np.ndarray]]:
    """The tensors of an adapter, by name, for each of its stacked layers.

    Args:
      layout: its layout.
      arrays: ``A``, ``B`` and perhaps the magnitude.
    """
    tensors = []
    for array, tensor in zip(arrays, _tensors(layout).values(), strict=True):
        whole = layout.on_param(tensor.part, jnp.asarray(array))
        whole = layout.gathered(whole, [*layout.layers, *tensor.axes])
        tensors.append(whole.reshape(*layout.lead, *tensor.shape))
    host = [np.asarray(x) for x in jax.device_get(tensors)]
    return [
        dict(zip(names_of(layout), (x[index] for x in host), strict=True))
        for index in indices(layout)
    ]


def weights(layout: AdapterLayout, param: Any) -> list[np.ndarray]:
    """A param as the weight of a layer of PyTorch, for each of its stacked layers.

    Args:
      layout: the layout of its adapter.
      param: a float array, shape `layout.shape`.
    """
    of_a, of_b, *_ = _tensors(layout).values()
    inputs, outputs = of_a.axes[1:], of_b.axes[:-1]
    in_sizes, out = of_a.shape[1:], of_b.shape[0]
    # PyTorch has the outputs first, except in tables.
    order, shape = [*outputs, *inputs], (out, *in_sizes)
    if _kind(layout) is ops.GATHER:
        order, shape = [*inputs, *outputs], (*in_sizes, out)
    whole = np.asarray(jax.device_get(param))[..., None]
    whole = layout.gathered(whole, [*layout.layers, *order])
    whole = whole.reshape(*layout.lead, *shape)
    return [whole[index] for index in indices(layout)]


def decode(
    layout: AdapterLayout, tensors: Sequence[Mapping[str, np.ndarray]]
) -> list[jax.Array]:
    """``A``, ``B`` and perhaps the magnitude of an adapter.

    Args:
      layout: its layout.
      tensors: its tensors, by name, for each of its stacked layers.
    """
    arrays = []
    for name, tensor in _tensors(layout).items():
        stacked = jnp.stack([entry[name] for entry in tensors])
        whole = layout.spread(stacked, [*layout.layers, *tensor.axes])
        arrays.append(layout.as_part(tensor.part, whole))
    return arrays


def shapes_of(layout: AdapterLayout) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors of one layer, by name."""
    return {name: tensor.shape for name, tensor in _tensors(layout).items()}


class _Tensor(NamedTuple):
    """A part of the adapter of one layer, as PEFT has it."""

    part: AdapterPart
    axes: list[int]  # Of the param and the rank, in the order of the tensor.
    shape: tuple[int, ...]


def _tensors(layout: AdapterLayout) -> dict[str, _Tensor]:
    is_conv, rank = _kind(layout) is ops.CONV, layout.rank_axis
    inputs = _conv_inputs(layout) if is_conv else sorted(layout.a_axes)
    kept = sorted(layout.b_axes)
    out, in_sizes = layout.size(*kept), [layout.size(*inputs)]
    before, ones = (), ()
    if is_conv:
        in_sizes = [*map(layout.size, inputs)]
        before, ones = (1,), (1,) * (len(inputs) - 1)
    tensors = (
        _Tensor("a", [rank, *inputs], (layout.rank, *in_sizes)),
        _Tensor("b", [*kept, rank], (out, layout.rank, *ones)),
        _Tensor("magnitude", kept, (*before, out, *ones)),
    )
    return dict(zip(names_of(layout), tensors, strict=False))


def _conv_inputs(layout: AdapterLayout) -> list[int]:
    """The input channel of a kernel, and its spatial axes behind."""
    axes = sorted(layout.a_axes)
    for out in layout.b_axes:
        if out > axes[-1]:  # spatial axes, in, out, as in Flax
            return [axes[-1], *axes[:-1]]
        if out < axes[0]:  # out, in, spatial axes, as in PyTorch
            return axes
    raise ValueError(
        f"The kernel {'/'.join(layout.path)!r} of shape {layout.shape} has its output "
        f"channels at axis {layout.b_axes}, so which are its input channels is not "
        "known. PEFT's layout is for kernels (spatial axes, in, out) or (out, in, "
        "spatial axes) of more than one output channel."
    )
