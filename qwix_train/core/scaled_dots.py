"""`jax.lax.scaled_dot`: products of two operands in blocks, as accelerators have them.

    with qwix_train.scaled_dots():
        logits = jax.jit(model.apply)(variables, x)

JAX lowers it for every platform to one operation, ``xla.scaled_dot``. A GPU with
instructions for blocks may take these, and others its decomposition: the values in
bfloat16, which holds those of a block exactly, multiplied and added in float32. **It
has been measured on no GPU or TPU**, so nothing chooses it but this context.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qwix_train.core import formats, numerics
from qwix_train.core.formats import SmallFloat
from qwix_train.core.qarray import MaybeQArray, QArray

# Part of the key of jit's caches.
_chosen = jax.make_user_context(False)


@contextlib.contextmanager
def scaled_dots() -> Iterator[None]:
    """Computes products of two operands in blocks by `jax.lax.scaled_dot`.

    That is for operands whose types have blocks and whose elements JAX has as a dtype:
    ``mxfp8``, ``mxfp8_e5m2``, ``mxfp4`` and ``nvfp4``, in products without batch axes
    and without `out_sharding`. Others are computed as without this context, and the
    plan of a `PtqProvider` that is made in it shows which is which. What it is worth
    has not been measured on any GPU or TPU; measure it before you use it.

    >>> import jax.numpy as jnp
    >>> import qwix_train
    >>> ones = qwix_train.quantize(
    ...     jnp.ones((2, 32)), 'mxfp4', channelwise_axes=[0], tiled_axes={1: 32})
    >>> with qwix_train.scaled_dots():
    ...     qwix_train.dot_general(ones, ones, (((1,), (1,)), ((), ()))).tolist()
    [[32.0, 32.0], [32.0, 32.0]]
    """
    with _chosen(True):
        yield


class _Matrix(NamedTuple):
    codes: jax.Array  # shape=(rows, K)
    scale: jax.Array  # shape=(rows, K // block): codes
    tensor: jax.Array | None  # shape=(rows or 1, 1)


def product(
    lhs: MaybeQArray, rhs: MaybeQArray, contracting: Sequence[tuple[int, ...]]
) -> jax.Array | None:
    """Returns the product of two operands in blocks, in float32.

    Args:
        lhs: The left operand.
        rhs: The right operand.
        contracting: The contracted axes of each.

    Returns:
        The kept axes of ``lhs``, then those of ``rhs``; None without the context, and
        for operands that `jax.lax.scaled_dot` does not take.
    """
    if not _chosen.value:
        return None
    pairs = list(zip((lhs, rhs), contracting, strict=True))
    matrices = [_matrix(operand, axes) for operand, axes in pairs]
    left, right = matrices
    if left is None or right is None or left.scale.dtype != right.scale.dtype:
        return None
    out = jax.lax.scaled_dot(
        left.codes,
        right.codes,
        lhs_scale=left.scale,
        rhs_scale=right.scale,
        dimension_numbers=(((1,), (1,)), ((), ())),
        preferred_element_type=jnp.float32,
    )
    if left.tensor is not None:
        out = out * left.tensor
    if right.tensor is not None:
        out = out * right.tensor.T
    kept = [n for x, axes in pairs for i, n in enumerate(x.shape) if i not in axes]
    return out.reshape(kept)


def _matrix(operand: MaybeQArray, axes: tuple[int, ...]) -> _Matrix | None:
    """The operand with the contracted axes merged and last; None if it does not fit."""
    if not isinstance(operand, QArray) or not formats.is_coded(operand.scale):
        return None
    entry = numerics.format_of(operand.qtype)
    dtype = _dtype(entry)
    shape, entries = operand.shape, operand.scale.shape
    free = [axis for axis in range(operand.ndim) if axis not in axes]
    # Blocks lie side by side where axes before the one that is cut have all scales of
    # their own, and those behind it none.
    whole = [entries[axis] == shape[axis] for axis in axes]
    cut = whole.index(False) if False in whole else len(axes)
    terms = math.prod(shape[axis] for axis in axes)
    blocks = math.prod(entries[axis] for axis in axes)
    if (
        dtype is None
        or operand.zero_point is not None
        or any(entries[axis] != 1 for axis in axes[cut + 1 :])
        or any(entries[axis] not in (1, shape[axis]) for axis in free)
        or 0 in shape
        or terms != blocks * (entry.block or 0)
    ):
        return None

    def merged(part: jax.Array, last: int) -> jax.Array:
        return part.transpose(*free, *axes).reshape(-1, last)

    each = [1 if axis in axes else shape[axis] for axis in range(operand.ndim)]
    full = [n if axis in axes else shape[axis] for axis, n in enumerate(entries)]
    codes, tensor = merged(operand.qvalue, terms), operand.tensor_scale
    if codes.dtype != dtype:
        codes = jax.lax.bitcast_convert_type(codes, dtype)
    if tensor is not None:
        tensor = merged(jnp.broadcast_to(tensor, each), 1)
    return _Matrix(codes, merged(jnp.broadcast_to(operand.scale, full), blocks), tensor)


def _dtype(entry: formats.Format) -> Any:
    """The dtype of JAX whose bits the codes of a type are; None if it has none."""
    if not isinstance(entry.elements, SmallFloat):
        return None
    if not entry.has_bits:
        return entry.storage
    return jnp.dtype(jnp.float4_e2m1fn) if entry.bits == 4 else None
