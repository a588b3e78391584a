"""Products with a packed weight, of which nothing but the packed arrays is kept.

The weight is dequantized for the product, and again for the derivative, as QLoRA does
(arXiv 2305.14314, section 3): a step of training holds one float weight at a time.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.custom_batching import custom_vmap

from qwix_train.core import operands
from qwix_train.core.arrival import never
from qwix_train.core.packed_array import PackedQArray


def dequantized_product(
    product: Callable[..., jax.Array],
    weight_of: Callable[[PackedQArray], jax.Array],
    x: jax.Array,
    packed: PackedQArray,
    *others: jax.Array,
) -> jax.Array:
    """A function that is linear in an array, and reads a packed weight.

    The packed array is a constant to the derivative. Forward-mode differentiation is
    refused, as of any function with its own rule for the way back.

    Args:
        product: Called as ``product(x, weight, *others)``; linear in ``x``.
        weight_of: Gives the weight, of the packed array.
        x: The array, of a float dtype.
        packed: The packed array.
        *others: Arrays without a derivative, such as the sizes of groups.

    Returns:
        ``product(x, weight_of(packed), *others)``.

    >>> from jax import numpy as jnp
    >>> from qwix_train.core import packed_array
    >>> from qwix_train.core.qarray import dequantize, quantize
    >>> packed = packed_array.pack(quantize(2 * jnp.eye(4), 'nf4'))
    >>> def product(x):
    ...     weight_of = lambda packed: dequantize(packed_array.unpack(packed))
    ...     return dequantized_product(jnp.matmul, weight_of, x, packed)
    >>> jax.jit(jax.grad(lambda x: product(x)[1]))(jnp.ones(4)).tolist()
    [0.0, 2.0, 0.0, 0.0]
    """
    aval = jax.typeof(x)

    @jax.custom_vjp
    def of(x: jax.Array, packed: PackedQArray, *others: jax.Array) -> jax.Array:
        return product(x, weight_of(_after(packed, x)), *others)

    def forward(x, packed, *others):
        return of(x, packed, *others), (packed, others)

    def backward(kept, cotangent):
        packed, others = kept
        weight = weight_of(_after(packed, cotangent))
        transpose = jax.linear_transpose(lambda x: product(x, weight, *others), aval)
        return (*transpose(cotangent), None, *(None for _ in others))

    of.defvjp(forward, backward)
    return of(x, packed, *others)


def _after(packed: PackedQArray, x: jax.Array) -> PackedQArray:
    """The same, so that no part of what is computed from it comes before ``x``.

    Otherwise a compiler makes the weights of all layers before it has activations, and
    takes that of the way back from the way there.
    """
    codes, after = packed.packed, _on_platform
    if operands.is_explicitly_sharded(x) or operands.is_explicitly_sharded(codes):
        after = _by_barrier
    if jax.typeof(x).manual_axis_type != jax.typeof(codes).manual_axis_type:
        # Within `shard_map`, only a value computed from both would vary as x does.
        after = _by_barrier
    return packed.replace(packed=after(codes, x))  # pyright: ignore


@custom_vmap
def _on_platform(codes: jax.Array, x: jax.Array) -> jax.Array:
    return jax.lax.platform_dependent(codes, x, cpu=_by_value, default=_by_barrier)


@_on_platform.def_vmap
def _(axis_size: int, in_batched: Any, codes: jax.Array, x: jax.Array) -> Any:
    # After one of a batch is after all. Codes that have no batch must not get one.
    del axis_size
    first = jax.lax.index_in_dim(x, 0, keepdims=False) if in_batched[1] else x
    return _on_platform(codes, first), in_batched[0]


def _by_barrier(codes: jax.Array, x: jax.Array) -> jax.Array:
    return jax.lax.optimization_barrier((codes, x))[0]


def _by_value(codes: jax.Array, x: jax.Array) -> jax.Array:
    # On a CPU, XLA drops barriers before it orders what it computes.
    return codes ^ never(x).astype(codes.dtype)
