"""Rotations by Hadamard matrices, which spread outliers over a block.

Of ``b`` elements in a block, ``x @ H / sqrt(b)`` with the Hadamard matrix ``H`` of
Sylvester, whose elements are 1 and -1 (arXiv 2404.00456, section 3). Random signs
``D`` before it, ``x @ D @ H / sqrt(b)``, keep what is alike in all elements from ending
up in one of them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from typing import ClassVar, Self

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from qwix_train.core import numerics
from qwix_train.core.operands import is_explicitly_sharded, with_sharding
from qwix_train.core.rotation import Rotation

# A block is rotated in factors of at most this size, one small product each.
_FACTOR = 64


@dataclasses.dataclass(frozen=True)
class Hadamard(Rotation):
    """A rotation by Hadamard matrices along one axis, in blocks.

    Attributes:
      block: the length of a block: a power of two that divides that of the axis.
      seed: of the random signs; None for no signs. They depend on it and on the length
        of the axis alone, so that whatever meets the array has the same.

    Example:
      >>> rotation = Hadamard(axis=0, block=4)
      >>> rotation.apply(jnp.array([8.0, 0.0, 0.0, 0.0])).tolist()
      [4.0, 4.0, 4.0, 4.0]
    """

    block: int
    seed: int | None = None

    name: ClassVar[str] = "hadamard"
    form: ClassVar[str] = (
        "hadamard[,block[,seed of signs]], a block of 0 is the largest"
    )

    @classmethod
    def parse(cls, numbers: tuple[int, ...], axis: int, length: int | None) -> Self:
        """See `Rotation.parse`: the block, by default the largest, and the seed."""
        if len(numbers) > 2 or min(numbers, default=0) < 0:
            raise ValueError("it takes up to two numbers, none of them negative")
        block, *seed = (*numbers, 0)[: max(len(numbers), 1)]
        if block and (block < 2 or block & (block - 1)):
            raise ValueError(f"a block of {block} is not a power of two")
        if length is None:
            return cls(axis, block, *seed)
        block = block or length & -length
        if block < 2 or length % block:
            raise ValueError(
                f"no blocks of {max(block, 2)} divide an axis of length {length}"
            )
        return cls(axis, block, *seed)

    def apply(self, x: jax.Array) -> jax.Array:
        """See `Rotation.apply`."""
        signs = self._signs(x)
        return self._spread(x if signs is None else x * signs)

    def undo(self, x: jax.Array) -> jax.Array:
        """See `Rotation.undo`: the matrix is its own inverse."""
        signs = self._signs(x)
        x = self._spread(x)
        return x if signs is None else x * signs

    def _spread(self, x: jax.Array) -> jax.Array:
        """The blocks of an array, each times the matrix."""
        sizes = _factors(self.block)
        before, after = x.shape[: self.axis], x.shape[self.axis + 1 :]
        wide = x.astype(numerics.compute_dtype(x.dtype))
        count = x.shape[self.axis] // self.block
        held = jax.typeof(x).sharding
        wide = _with_whole_blocks(wide, self.axis, count)
        parts = wide.reshape(*before, count, *sizes, *after)
        for place, size in enumerate(sizes, len(before) + 1):
            matrix = jnp.asarray(_matrix(size), wide.dtype)
            numbers = (((place,), (0,)), ((), ()))
            product = lax.dot_general(
                parts, matrix, numbers, precision=lax.Precision.HIGHEST
            )
            parts = jnp.moveaxis(product, -1, place)
        result = parts.reshape(x.shape).astype(x.dtype)
        # Where a sharding is part of the type, what follows goes by that of before.
        return with_sharding(result, held) if is_explicitly_sharded(x) else result

    def _signs(self, x: jax.Array) -> jax.Array | None:
        if self.seed is None:
            return None
        length = x.shape[self.axis]
        # Not a random number generator, whose numbers may differ in later versions.
        digest = hashlib.shake_256(str(self.seed).encode()).digest(-(-length // 8))
        bits = np.unpackbits(np.frombuffer(digest, np.uint8))[:length]
        shape = [length if axis == self.axis else 1 for axis in range(x.ndim)]
        return jnp.asarray(1 - 2.0 * bits, x.dtype).reshape(shape)


def _with_whole_blocks(x: jax.Array, axis: int, count: int) -> jax.Array:
    """An array with no block in two shards, where a sharding is part of the type."""
    sharding = jax.typeof(x).sharding
    names = sharding.spec[axis] or ()
    names = names if isinstance(names, tuple) else (names,)
    if count % math.prod(sharding.mesh.shape[name] for name in names) == 0:
        return x
    spec = [None if a == axis else names for a, names in enumerate(sharding.spec)]
    return with_sharding(x, sharding.update(spec=spec))


def _factors(block: int) -> list[int]:
    """The sizes of matrices whose Kronecker product is that of a block."""
    sizes = []
    while block > _FACTOR:
        sizes.append(_FACTOR)
        block //= _FACTOR
    return [*sizes, block]


def _matrix(size: int) -> np.ndarray:
    """A Hadamard matrix whose rows have length 1."""
    rows = np.arange(size)
    parity = np.bitwise_count(rows[:, None] & rows) % 2
    return (1 - 2.0 * parity) / math.sqrt(size)
