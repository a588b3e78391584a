"""How adapters start, and which base they leave of the weight."""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import numpy as jnp

from qwix_train.core import numerics
from qwix_train.core.how import HowToQuantize
from qwix_train.core.qarray import dequantize, quantize_array
from qwix_train.lora.layout import AdapterLayout
from qwix_train.lora.rules import LoraRule


class Start(NamedTuple):
    """An adapter at the start of training.

    Attributes:
      a: shape `AdapterLayout.a_shape`.
      b: shape `AdapterLayout.b_shape`.
      magnitude: shape `AdapterLayout.magnitude_shape`, or None without DoRA.
      base: the weight without what the adapter adds, in the shape of the weight. It is
        the weight itself if the adapter adds nothing at first.
    """

    a: jax.Array
    b: jax.Array
    magnitude: jax.Array | None
    base: jax.Array


def initial(
    weight: jax.Array,
    layout: AdapterLayout,
    rule: LoraRule,
    how: HowToQuantize | None,
    key: jax.Array,
) -> Start:
    """The adapter of a weight as its rule says.

    Args:
      weight: the float weight, shape `layout.shape`.
      layout: the shapes of its adapter.
      rule: the rule.
      how: how the base is quantized, or None.
      key: a random key.
    """
    dtype = rule.param_dtype
    if dtype is None:
        dtype = numerics.compute_dtype(weight.dtype)
    if rule.init is not None:
        _check_groups(layout)
    # What is compiled for one param serves all that are like it.
    layout = dataclasses.replace(layout, path=(), op="", particulars=())
    if rule.init == "pissa":
        return pissa(weight, layout, dtype)
    if rule.loftq_steps:
        assert how is not None
        return loftq(weight, layout, how, rule.loftq_steps, dtype)
    a_key, b_key = jax.random.split(key)

    def drawn(initializer, key, shape):
        for size in reversed(layout.lead):  # Each layer is drawn as if it were alone.
            initializer = _stacked(initializer, size)
        return layout.layers_in_place(initializer(key, shape, dtype))

    a = drawn(rule.lora_a_initializer, a_key, layout.one_shape("a"))
    b = drawn(rule.lora_b_initializer, b_key, layout.one_shape("b"))
    magnitude = None
    if layout.dora:
        magnitude = _magnitude(weight.astype(dtype), a, b, layout)
    return Start(a, b, magnitude, weight)


@functools.partial(jax.jit, static_argnums=3)
def _magnitude(
    weight: jax.Array, a: jax.Array, b: jax.Array, layout: AdapterLayout
) -> jax.Array:
    """The norm of each output channel of the weight with its adapter."""
    return layout.norm(weight + layout.delta(a, b))


def pissa(weight: jax.Array, layout: AdapterLayout, dtype: Any) -> Start:
    r"""The principal singular values and vectors as the adapter, the rest as the base.

    With ``W = U diag(s) V^T`` and the ``rank`` largest singular values ``s_r``,
    ``A = U_r diag(sqrt(s_r / scaling))`` and ``B = diag(sqrt(s_r / scaling)) V_r^T``,
    for each layer and each group alone (PiSSA, arXiv 2404.02948, equations 2 to 4).

    Args:
      weight: shape `layout.shape`, a float dtype.
      layout: the shapes of the adapter.
      dtype: the dtype of the adapter.

    Returns:
      The adapter and the base. The base plus ``scaling * A @ B`` is ``weight``.
    """
    wide = weight.astype(numerics.compute_dtype(weight.dtype))
    a, b, base = _principal(wide, wide, layout)
    return Start(a.astype(dtype), b.astype(dtype), None, base.astype(weight.dtype))


def loftq(
    weight: jax.Array,
    layout: AdapterLayout,
    how: HowToQuantize,
    steps: int,
    dtype: Any,
) -> Start:
    """Base and adapter, fitted in turns so that their sum is close to the weight.

    ``Q_t = quantize(W - A_{t-1} B_{t-1})``, then ``A_t, B_t`` from the `rank` largest
    singular values of ``W - Q_t`` (LoftQ, arXiv 2310.08659, algorithm 1).

    Args:
      weight: shape `layout.shape`, a float dtype.
      layout: the shapes of the adapter.
      how: how the base is quantized.
      steps: the number of turns.
      dtype: the dtype of the adapter.
    """
    wide = weight.astype(numerics.compute_dtype(weight.dtype))
    base, start = wide, None
    for _ in range(steps):
        quantized = dequantize(quantize_array(base.astype(weight.dtype), how))
        # The base of this turn, before it is quantized.
        kept = base.astype(weight.dtype)
        a, b, base = _principal(wide - quantized.astype(wide.dtype), wide, layout)
        start = Start(a.astype(dtype), b.astype(dtype), None, kept)
    assert start is not None
    return start


def _check_groups(layout: AdapterLayout) -> None:
    """Complains of groups that share one B: no adapter holds their principal part."""
    batch = [a for a in layout.a_axes if a not in layout.contracted]
    if batch and not layout.flat:
        name = "/".join(layout.path)
        raise ValueError(
            f"Param {name!r} of shape {layout.shape} is multiplied in groups along the "
            f"axes {tuple(batch)}, and its groups share one B: it has no adapter that "
            "holds its principal part. Give it a rule without init."
        )


@functools.partial(jax.jit, static_argnums=2)
def _principal(
    fitted: jax.Array, weight: jax.Array, layout: AdapterLayout
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The best approximation of a rank, and what a weight is without it.

    A matrix with fewer rows or columns than the rank is given exactly, with zeros
    behind.

    Args:
      fitted: what is approximated, in the compute dtype.
      weight: the weight, in the same dtype.
      layout: the shapes of the adapter.

    Returns:
      The factors, with the scaling divided out, and the weight without their product.
    """
    rank = layout.rank
    columns = [a for a in layout.b_axes if a not in layout.a_axes]
    batch = [a for a in layout.a_axes if a not in layout.contracted]
    rows = [a for a in layout.a_axes if a in layout.contracted]
    lead = [*layout.layers, *batch]
    matrices = layout.gathered(fitted[..., None], [*lead, *rows, *columns])
    sizes = [*map(layout.size, lead), layout.size(*rows), layout.size(*columns)]
    matrices = matrices.reshape(sizes)
    left, values, right = jnp.linalg.svd(matrices, full_matrices=False)
    roots = jnp.sqrt(values[..., :rank] / layout.scaling)
    a = left[..., :rank] * roots[..., None, :]
    b = roots[..., :, None] * right[..., :rank, :]
    rest = [(0, rank - roots.shape[-1])]
    a = jnp.pad(a, [(0, 0)] * (a.ndim - 1) + rest)
    b = jnp.pad(b, [(0, 0)] * (b.ndim - 2) + rest + [(0, 0)])
    a = layout.as_part("a", layout.spread(a, [*lead, *rows, layout.rank_axis]))
    b = layout.as_part("b", layout.spread(b, [*lead, layout.rank_axis, *columns]))
    return a, b, weight - layout.delta(a, b, jax.lax.Precision.HIGHEST)


def _stacked(initializer: Callable[..., jax.Array], size: int) -> Any:
    def of_each(key, shape, dtype):
        keys = jax.random.split(key, size)
        return jnp.stack([initializer(key, shape, dtype) for key in keys])

    return of_each


def key_of(key: jax.Array, path: tuple[str, ...]) -> jax.Array:
    """The key of a param, which does not depend on the other params."""
    return jax.random.fold_in(key, zlib.crc32("/".join(path).encode()))
