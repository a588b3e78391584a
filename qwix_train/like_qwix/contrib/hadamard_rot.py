"""Hadamard rotations as `qwix.contrib.hadamard_rot` has them.

Rules have them for whole models: `QuantizationRule(rotation="hadamard")`.
"""

from __future__ import annotations

import jax
from jax import numpy as jnp


def hadamard_rotate_inputs(
    act: jax.Array,
    weight: jax.Array,
    key: jax.Array | None,
    *,
    row_sign_flip: bool,
    col_sign_flip: bool,
    lhs_reduction_dim: int,
    rhs_reduction_dim: int,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Rotates both operands of a product along what it contracts.

    With the Hadamard matrix ``H`` of ``n`` rows, the activation becomes ``act @ H`` and
    the weight ``H^T @ weight / n``, so that their product stays.

    Args:
      act: the activation.
      weight: the weight.
      key: the random key of the signs; None if there are none.
      row_sign_flip: whether rows of ``H`` have random signs.
      col_sign_flip: whether columns do.
      lhs_reduction_dim: the contracted axis of the activation, a power of two.
      rhs_reduction_dim: that of the weight.

    Returns:
      Both, rotated; and another key, or the one that was given if none was used.

    Raises:
      ValueError: if the axes differ in length, that is no power of two, or a key is
        missing.
    """
    for name, axis in (("lhs", lhs_reduction_dim), ("rhs", rhs_reduction_dim)):
        if not isinstance(axis, int):
            raise ValueError(f"{name}_reduction_dim={axis!r} must be an int.")
    size, other = act.shape[lhs_reduction_dim], weight.shape[rhs_reduction_dim]
    if size != other:
        raise ValueError(f"The contracted axes have lengths {size} and {other}.")
    if size < 1 or size & (size - 1):
        raise ValueError(f"The contracted axis has length {size}, not a power of two.")
    matrix = jnp.ones((1, 1), jnp.bfloat16)
    while len(matrix) < size:
        matrix = jnp.block([[matrix, matrix], [matrix, -matrix]])
    flips = [axis for axis, flip in enumerate((row_sign_flip, col_sign_flip)) if flip]
    if flips:
        if key is None:
            raise ValueError("Random signs need a key.")
        *own, key = jax.random.split(key, len(flips) + 1)
        for axis, signs_key in zip(flips, own, strict=True):
            signs = jax.random.choice(signs_key, jnp.array([-1, 1]), (size,))
            matrix = matrix * jnp.expand_dims(signs.astype(matrix.dtype), 1 - axis)
    act = _rotated(act, matrix, lhs_reduction_dim)
    weight = _rotated(weight, matrix, rhs_reduction_dim) / size
    return act, weight, key


def _rotated(x: jax.Array, matrix: jax.Array, axis: int) -> jax.Array:
    moved = jnp.moveaxis(jnp.tensordot(x, matrix, ((axis,), (0,))), -1, axis)
    return moved.astype(jnp.result_type(x, matrix))
