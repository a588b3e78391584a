"""Einstein summation of quantized arrays, any number of them.

The operands are contracted two at a time, in the order that `opt_einsum` finds, by
`dot_general`. The result of a pair is a float array; a quantized array that meets one
is dequantized, as `dot_general` does.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import opt_einsum
from opt_einsum.parser import parse_einsum_input

from qwix_train.core import operands as ops
from qwix_train.core.dot_general import dot_general
from qwix_train.core.qarray import MaybeQArray, QArray


def einsum(
    subscripts: Any,
    *operands: Any,
    optimize: Any = "auto",
    precision: Any = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
    _dot_general: Callable[..., jax.Array] = dot_general,
) -> jax.Array:
    """`jax.numpy.einsum` for arrays and quantized arrays.

    Args:
        subscripts: Such as ``'bij,bjk->bik'``; ellipses, an implicit output, and the
            form with alternating operands and axis lists are understood.
        *operands: The operands.
        optimize: As in `jax.numpy.einsum`: how the order of contraction is found.
        precision: As in `jax.lax.dot_general`.
        preferred_element_type: The dtype of the result; that of the dequantized
            operands, promoted, if None.
        out_sharding: As in `jax.numpy.einsum`; for two operands at most.
        _dot_general: What multiplies two operands.

    Raises:
        ValueError: The subscripts do not fit the operands, or as `dot_general`.

    >>> from jax import numpy as jnp
    >>> from qwix_train import einsum
    >>> from qwix_train.core.qarray import quantize
    >>> q = quantize(jnp.ones((2, 3)), 'int8')
    >>> einsum('ij,jk,kl->il', q, q.T, jnp.ones((2, 5))).shape
    (2, 5)
    """
    inputs, output, arrays = _parse(subscripts, *operands)
    if not any(isinstance(array, QArray) for array in arrays):
        return jnp.einsum(
            subscripts,
            *operands,
            optimize=optimize,
            precision=precision,
            preferred_element_type=preferred_element_type,
            out_sharding=out_sharding,
        )
    result = ops.result_dtype(*arrays, preferred=preferred_element_type)
    kwargs = dict(precision=precision, preferred_element_type=result)
    terms = _without_broadcasting(inputs, arrays)
    path = _path(terms, output, optimize)
    for step, positions in enumerate(path):
        chosen = [terms.pop(index) for index in sorted(positions, reverse=True)][::-1]
        while chosen:
            # A step of more than two operands is taken pair by pair.
            pair, chosen = chosen[:2], chosen[2:]
            rest = {letter for subs, _ in (*terms, *chosen) for letter in subs}
            last = step == len(path) - 1 and not chosen
            kept = output if last else "".join(sorted({*rest, *output}))
            sharding = out_sharding if last else None
            term = _contract(pair, kept, last, _dot_general, kwargs, sharding)
            if not chosen:
                terms.append(term)
                break
            chosen.insert(0, term)
    (_, out) = terms[0]
    return ops.as_float(out).astype(result)


_Term = tuple[str, MaybeQArray]


def _parse(*operands: Any) -> tuple[list[str], str, list[MaybeQArray]]:
    # opt_einsum reads shapes only; what is not an array, such as a list, becomes one.
    places = slice(1, None)
    if not isinstance(operands[0], str):
        places = slice(0, len(operands) // 2 * 2, 2)
    flat: list[Any] = list(operands)
    arrays = [_as_array(operand) for operand in flat[places]]
    flat[places] = [array.shape for array in arrays]
    parsed = parse_einsum_input(tuple(flat), shapes=True)
    inputs = parsed[0].split(",")
    for subs, array in zip(inputs, arrays, strict=True):
        if len(subs) != array.ndim:
            raise ValueError(
                f"The subscripts {subs!r} do not fit an operand of shape {array.shape}."
            )
    return inputs, parsed[1], arrays


def _as_array(operand: Any) -> MaybeQArray:
    return operand if isinstance(operand, QArray) else jnp.asarray(operand)


def _without_broadcasting(
    inputs: Sequence[str], arrays: Sequence[MaybeQArray]
) -> list[_Term]:
    """Drops axes of size 1 whose letter is longer in another operand."""
    sizes: dict[str, int] = {}
    for subs, array in zip(inputs, arrays, strict=True):
        for letter, size in zip(subs, array.shape, strict=True):
            known = sizes.setdefault(letter, size)
            if 1 not in (known, size) and known != size:
                raise ValueError(
                    f"The axes of {letter!r} have different sizes, {known} and {size}."
                )
            sizes[letter] = size if known == 1 else known
    terms: list[_Term] = []
    for subs, array in zip(inputs, arrays, strict=True):
        pairs = list(zip(subs, array.shape, strict=True))
        kept = [size == sizes[letter] for letter, size in pairs]
        if not all(kept):
            shape = [n for n, keep in zip(array.shape, kept, strict=True) if keep]
            array = array.reshape(tuple(shape))
            subs = "".join(c for c, keep in zip(subs, kept, strict=True) if keep)
        terms.append((subs, array))
    return terms


def _path(terms: Sequence[_Term], output: str, optimize: Any) -> list[tuple[int, ...]]:
    """Returns which operands each step contracts."""
    if len(terms) <= 2:
        return [tuple(range(len(terms)))]
    inputs = ",".join(subs for subs, _ in terms)
    shapes = [array.shape for _, array in terms]
    if isinstance(optimize, bool):
        optimize = "optimal" if optimize else [tuple(range(len(terms)))]
    path, _ = opt_einsum.contract_path(
        f"{inputs}->{output}", *shapes, shapes=True, optimize=optimize
    )
    return [tuple(step) for step in path]


def _contract(
    pair: Sequence[_Term],
    kept: str,
    last: bool,
    dot: Callable[..., jax.Array],
    kwargs: dict[str, Any],
    out_sharding: Any,
) -> _Term:
    """Contracts one or two operands to the letters to keep, in their order if last."""
    others = [{*pair[1][0]}, {*pair[0][0]}] if len(pair) == 2 else [set()]
    pair = [_reduced(t, {*kept} | o) for t, o in zip(pair, others, strict=True)]
    if len(pair) == 1:
        ((subs, out),) = pair
        order = [letter for letter in kept if letter in subs] if last else list(subs)
    else:
        (left, lhs), (right, rhs) = pair
        batch = [c for c in left if c in right and c in kept]
        contracted = [c for c in left if c in right and c not in kept]
        numbers = (
            ([left.index(c) for c in contracted], [right.index(c) for c in contracted]),
            ([left.index(c) for c in batch], [right.index(c) for c in batch]),
        )
        shared = {*left} & {*right}
        free = [c for c in (*left, *right) if c not in shared]
        subs = "".join((*batch, *free))
        order = list(kept) if last else list(subs)
        if out_sharding is not None and order == list(subs):
            kwargs, out_sharding = {**kwargs, "out_sharding": out_sharding}, None
        out = dot(lhs, rhs, numbers, **kwargs)
    if order != list(subs):
        out = out.transpose(tuple(subs.index(c) for c in order))
    if out_sharding is not None:
        out = jax.sharding.reshard(ops.as_float(out), out_sharding)
    return "".join(order), out


def _reduced(term: _Term, kept: set[str]) -> _Term:
    """Takes diagonals of repeated letters, and sums over letters of no one else."""
    subs, array = term
    target = "".join(dict.fromkeys(c for c in subs if c in kept))
    if target == subs:
        return term
    array = ops.as_float(array)
    # Sums of narrow floats are carried out in float32, as `jnp.sum` does.
    return target, jnp.einsum(f"{subs}->{target}", array)
