"""The dot product of integer codes, in the form that is fast on the platform.

GPU and TPU have instructions for it. A CPU is faster in float32 where there are few
rows, see `cpu_dots.integer_dot`; the bits are the same.
"""

import functools
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from qwix_train.core import cpu_dots, product_forms
from qwix_train.core import operands as ops
from qwix_train.core.arrival import when_there
from qwix_train.core.symbolic import is_symbolic

_Axes: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]


def integer_dot(
    left: jax.Array,
    right: jax.Array,
    dimension_numbers: tuple[_Axes, _Axes],
    precision: Any = None,
) -> jax.Array:
    """`jax.lax.dot_general` of integers of up to 8 bits, in int32.

    >>> ones = jnp.ones((2, 3), jnp.int4)
    >>> integer_dot(ones, ones, (((1,), (1,)), ((), ()))).tolist()
    [[3, 3], [3, 3]]
    """

    @custom_vmap
    def product(left, right):
        lowered = product_forms.traced(_lowered)
        return lowered(left, right, numbers=dimension_numbers, precision=precision)

    @product.def_vmap
    def _(axis_size, in_batched, left, right):
        # A batch of rows is a matrix, and the form to take is that for a matrix.
        del axis_size
        sides = zip(*dimension_numbers, strict=True)
        (lc, lb), (rc, rb) = (
            tuple(tuple(a + batched for a in axes) for axes in side)
            for side, batched in zip(sides, in_batched, strict=True)
        )
        if all(in_batched):
            numbers = ((lc, rc), ((0, *lb), (0, *rb)))
            return integer_dot(left, right, numbers, precision), True
        out = integer_dot(left, right, ((lc, rc), (lb, rb)), precision)
        # Where the new axis is in the result: first among the kept ones of its side.
        position = (
            len(lb) if in_batched[0] else out.ndim - (right.ndim - len(rc) - len(rb))
        )
        return jnp.moveaxis(out, position, 0), True

    return product(left, right)


@functools.partial(jax.jit, static_argnames=("numbers", "precision"))
def _lowered(
    left: jax.Array, right: jax.Array, *, numbers: tuple[_Axes, _Axes], precision: Any
) -> jax.Array:
    contracting, (batch, _) = numbers

    def general(left, right):
        return jax.lax.dot_general(
            *ops.common_codes(left, right),
            numbers,
            precision=precision,
            preferred_element_type=jnp.dtype(jnp.int32),
        )

    def in_floats(left: jax.Array, right: jax.Array) -> Any:
        return cpu_dots.integer_dot(left, right, contracting)

    def on_cpu(left, right):
        if jax.eval_shape(in_floats, left, right) is not None:
            activations = left if left.size <= right.size else right
            return when_there(activations, in_floats, left, right)
        if contracting == ((0,), (0,)) and left.ndim == right.ndim == 2:
            return _of_columns(*ops.common_codes(left, right))
        return general(left, right)

    types = {left.dtype, right.dtype}
    if (
        batch
        or not types <= {jnp.dtype(jnp.int8), jnp.dtype(jnp.int4)}
        or any(map(ops.is_explicitly_sharded, (left, right)))
        or is_symbolic(left, right)  # The other forms are for a few rows.
    ):
        return general(left, right)
    return jax.lax.platform_dependent(left, right, cpu=on_cpu, default=general)


def _of_columns(left: jax.Array, right: jax.Array) -> jax.Array:
    """Returns the product over the first axis of both: that of a weight's gradient.

    XLA for CPUs multiplies integers in this layout some eight times as slowly as in
    others, and folds a transpose of one into it. Two contracted axes it brings into
    the fast layout by itself.
    """

    def cut(array: jax.Array) -> jax.Array:
        if len(array) % 2:
            array = jnp.pad(array, ((0, 1), (0, 0)))
        # The long axis is the outer one, so that a sharded one stays sharded.
        return array.reshape(len(array) // 2, 2, array.shape[1])

    return jax.lax.dot_general(
        cut(left),
        cut(right),
        (((0, 1), (0, 1)), ((), ())),
        preferred_element_type=jnp.dtype(jnp.int32),
    )
