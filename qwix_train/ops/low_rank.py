"""Terms of low rank: the factors of an adapter on the axes of its weight.

    x @ (W + A @ B) * gain = (x @ W + (x @ A) @ B) * gain

Both factors have the axes of the weight, each of its size or of 1, and the rank behind
them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
from jax import numpy as jnp


class Factors(Protocol):
    """A weight with an adapter, or a view of one."""

    @property
    def a(self) -> jax.Array:
        """The factor ``A``."""
        ...

    @property
    def b(self) -> jax.Array:
        """The factor ``B``, with the scaling in it."""
        ...

    @property
    def gain(self) -> jax.Array | None:
        """What base and adapter together are multiplied by, without the rank."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        ...


class LowRankTerm(NamedTuple):
    """What an adapter adds to a product.

    Attributes:
      apply: the term, of the input.
      gain: what the whole product is multiplied by; None for nothing.
    """

    apply: Callable[[Any], jax.Array]
    gain: jax.Array | None


def in_order(weight: Factors, contracted: Sequence[int]) -> tuple[Any, Any]:
    """The factor that has the contracted axes, and the one that has none of them.

    Two times None if both have some.
    """
    for inner, outer in ((weight.a, weight.b), (weight.b, weight.a)):
        if not varies(outer, contracted):
            return inner, outer
    return None, None


def varies(factor: jax.Array | None, axes: Sequence[int]) -> bool:
    """Whether a factor has more than one entry along any of some axes."""
    return factor is not None and any(factor.shape[axis] != 1 for axis in axes)


def contract(
    a: jax.Array, b: jax.Array, shape: Sequence[int], precision: Any = None
) -> jax.Array:
    """The sum over the last axis of the product of two factors.

    Args:
      a: along each other axis the size in `shape`, or 1.
      b: the same.
      shape: the shape of the result.
      precision: as in `jax.lax.dot_general`.
    """
    summed = len(shape)
    terms: list[Any] = []
    for factor in (a, b):
        ones = [axis for axis in range(summed) if factor.shape[axis] == 1]
        held = [axis for axis in range(summed + 1) if axis not in ones]
        terms += [factor.squeeze(ones), held]
    out = sorted({*terms[1], *terms[3]} - {summed})
    product = jnp.einsum(*terms, out, precision=precision)
    missing = [axis for axis in range(summed) if axis not in out]
    return jnp.broadcast_to(jnp.expand_dims(product, missing), shape)
