"""Sizes that are symbols: those that `jax.export` knows only when it is called."""

from typing import Any

import jax
from jax import export


def is_symbolic(*arrays: Any) -> bool:
    """Whether the size of an axis of an array is a symbol."""
    return any(export.is_symbolic_dim(n) for array in arrays for n in array.shape)


def surely(at_most: Any, bound: Any) -> bool:
    """Whether a size is at most another, whatever its symbols stand for.

    >>> (batch,) = export.symbolic_shape("batch", constraints=["batch <= 8"])
    >>> surely(batch, 8), surely(batch, 7), surely(7, batch)
    (True, False, False)
    """
    try:
        return bool(at_most <= bound)
    except jax.errors.InconclusiveDimensionOperation:
        return False


def is_smaller(size: Any, other: Any) -> bool:
    """Whether a size is the smaller one; of symbols, whether it divides the other.

    >>> batch, length = export.symbolic_shape("batch, length")
    >>> is_smaller(batch, batch * length), is_smaller(batch * length, batch)
    (True, False)
    """
    try:
        return bool(size < other)
    except jax.errors.InconclusiveDimensionOperation:
        return other % size == 0
