"""The tensors that Hugging Face's PEFT has for an adapter, and back.

For a layer ``y = W x`` of PyTorch, with ``W`` of shape ``(out, in)``, PEFT keeps
``lora_A`` of shape ``(rank, in)`` and ``lora_B`` of shape ``(out, rank)``; for a
convolution both have spatial axes behind, those of ``lora_B`` of size 1; for a table of
shape ``(rows, out)`` they are ``lora_embedding_A``, ``(rank, rows)``, and
``lora_embedding_B``, ``(out, rank)``. Several axes of a param that are contracted, or
kept, are one there, in their order in the param.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from qwix_train import ops
from qwix_train.lora.layout import AdapterLayout

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
    a, b, *magnitude = arrays
    inputs, kept, lead = _inputs(layout), _kept(layout), len(layout.layers)
    a, b = layout.factors(jnp.asarray(a), jnp.asarray(b))
    end = len(layout.shape)
    a = a.transpose(*layout.layers, end, *inputs, *kept)
    b = b.transpose(*layout.layers, *kept, end, *inputs)
    sizes = _sizes(layout, layout.layers)
    conv = _kind(layout) is ops.CONV
    in_sizes = _sizes(layout, inputs) if conv else (-1,)
    a = a.reshape(*sizes, layout.rank, *in_sizes)
    b = b.reshape(*sizes, -1, layout.rank, *_spatial_ones(layout))
    tensors = [a, b]
    if magnitude:
        whole = layout.on_param(jnp.asarray(magnitude[0]))
        whole = whole.transpose(*layout.layers, *kept, *layout.contracted)
        before = (1,) if conv else ()
        tensors.append(whole.reshape(*sizes, *before, -1, *_spatial_ones(layout)))
    host = [np.asarray(x) for x in jax.device_get(tensors)]
    assert all(x.ndim >= lead for x in host)
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
    inputs, kept = _inputs(layout), _kept(layout)
    sizes = [[-1], [int(np.prod(_sizes(layout, kept)))]]
    if _kind(layout) is ops.CONV:
        sizes[0] = list(_sizes(layout, inputs))
    order, parts = [*inputs, *kept], [*sizes[0], *sizes[1]]
    if (
        _kind(layout) is not ops.GATHER
    ):  # But for tables, PyTorch has the outputs first.
        order, parts = [*kept, *inputs], [*sizes[1], *sizes[0]]
    whole = np.asarray(jax.device_get(param)).transpose(*layout.layers, *order)
    whole = whole.reshape(*_sizes(layout, layout.layers), *parts)
    return [whole[index] for index in indices(layout)]


def decode(
    layout: AdapterLayout, tensors: Sequence[Mapping[str, np.ndarray]]
) -> list[jax.Array]:
    """``A``, ``B`` and perhaps the magnitude of an adapter.

    Args:
      layout: its layout.
      tensors: its tensors, by name, for each of its stacked layers.
    """
    lead = _sizes(layout, layout.layers)
    a, b, *magnitude = (
        jnp.stack([x[name] for x in tensors]).reshape(*lead, *tensors[0][name].shape)
        for name in names_of(layout)
    )
    inputs, kept, count = _inputs(layout), _kept(layout), len(lead)
    a = a.reshape(*lead, layout.rank, *_sizes(layout, inputs))
    order = [count + 1 + inputs.index(axis) for axis in layout.a_axes]
    a = a.transpose(*range(count), *order, count)
    a = layout.layers_in_place(a.reshape(*lead, *layout.one_a_shape))
    b = b.reshape(*lead, *_sizes(layout, kept), layout.rank)
    order = [count + kept.index(axis) for axis in layout.b_axes]
    b = b.transpose(*range(count), b.ndim - 1, *order)
    b = layout.layers_in_place(b.reshape(*lead, *layout.one_b_shape))
    arrays = [a, b]
    if magnitude:
        free = [a for a in range(len(layout.shape)) if a not in layout.contracted]
        held = [*layout.layers, *kept]
        whole = magnitude[0].reshape(_sizes(layout, held))
        whole = whole.transpose([held.index(axis) for axis in free])
        arrays.append(layout.as_magnitude(whole))
    return arrays


def shapes_of(layout: AdapterLayout) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors of one layer, by name."""
    ones = _spatial_ones(layout)
    in_sizes, out = _sizes(layout, _inputs(layout)), _sizes(layout, _kept(layout))
    if _kind(layout) is not ops.CONV:
        in_sizes = (int(np.prod(in_sizes)),)
    out = int(np.prod(out))
    a, b = (layout.rank, *in_sizes), (out, layout.rank, *ones)
    magnitude = (1, out, *ones) if ones else (out,)
    return dict(zip(names_of(layout), (a, b, magnitude), strict=False))


def _inputs(layout: AdapterLayout) -> list[int]:
    """The contracted axes of a param, in PyTorch's order."""
    if _kind(layout) is ops.CONV:
        return _conv_inputs(layout)
    return sorted(layout.a_axes)


def _kept(layout: AdapterLayout) -> list[int]:
    return sorted(layout.b_axes)


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


def _spatial_ones(layout: AdapterLayout) -> tuple[int, ...]:
    if _kind(layout) is not ops.CONV:
        return ()
    return (1,) * (len(layout.a_axes) - 1)


def _sizes(layout: AdapterLayout, axes: Any) -> tuple[int, ...]:
    return tuple(layout.shape[axis] for axis in axes)
