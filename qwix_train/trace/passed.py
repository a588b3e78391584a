"""Which inputs a traced function hands on as they came.

NNX writes every variable back that entered a loop or a `remat`, so what a model only
reads comes out of its trace, too: through the body of one operation within that of
another, and with its axes moved and moved back.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jax.extend import core as jex

from qwix_train.trace import jax_versions
from qwix_train.trace.bodies import Inside, Kind, inside_of

_IDENTITY = frozenset({"copy", "copy_p", "sharding_constraint"})


class _Moved(NamedTuple):
    """An input, by its place, with its axes in another order."""

    place: int
    axes: tuple[int, ...]

    def transposed(self, permutation: Sequence[int]) -> _Moved:
        return _Moved(self.place, tuple(self.axes[axis] for axis in permutation))


def sources(body: jax_versions.Body) -> list[int | None]:
    """For each result of a body the index of the input that it is, or None.

    Example:
      >>> import jax
      >>> closed = jax.make_jaxpr(lambda a, b: (b, a + b, a.T.T))(jax.numpy.eye(2), 1.0)
      >>> sources(jax_versions.body_of(closed))
      [1, None, 0]
    """
    return [
        moved.place if moved is not None and _in_order(moved) else None
        for moved in _results(body)
    ]


def read(body: jax_versions.Body) -> set[int]:
    """The inputs, by index, that a body computes with, and not just hands on.

    Example:
      >>> import jax
      >>> closed = jax.make_jaxpr(jax.jit(lambda a, b: (a, 2 * b)))(1.0, 2.0)
      >>> read(jax_versions.body_of(closed))
      {1}
    """
    found: set[int] = set()
    for eqn, operands in _handed_on(body, {}):
        inside = inside_of(eqn)
        if inside is not None and inside.kind is not Kind.OPAQUE:
            held = [operands[slots[i]] for b, slots in inside.bodies for i in read(b)]
        elif eqn.primitive.name in _IDENTITY or eqn.primitive.name == "transpose":
            continue
        else:
            held = operands
        found |= {moved.place for moved in held if moved is not None}
    return found


def _in_order(moved: _Moved) -> bool:
    return moved.axes == tuple(range(len(moved.axes)))


def _results(body: jax_versions.Body) -> list[_Moved | None]:
    env: dict[Any, _Moved] = {}
    collections.deque(_handed_on(body, env), maxlen=0)  # which fills it
    return [_moved(atom, env) for atom in body.jaxpr.outvars]


def _handed_on(
    body: jax_versions.Body, env: dict[Any, _Moved]
) -> Iterator[tuple[Any, list[_Moved | None]]]:
    """Yields each equation that has inputs as operands, and which those are.

    Args:
      body: the body.
      env: is filled with the variables that are inputs.
    """
    for place, var in enumerate(body.jaxpr.invars):
        env[var] = _Moved(place, tuple(range(len(getattr(var.aval, "shape", ())))))
    for eqn in body.jaxpr.eqns:
        operands = [_moved(atom, env) for atom in eqn.invars]
        if any(operand is not None for operand in operands):
            for var, moved in zip(eqn.outvars, _apply(eqn, operands), strict=False):
                if moved is not None:
                    env[var] = moved
            yield eqn, operands


def _moved(atom: Any, env: Mapping[Any, _Moved]) -> _Moved | None:
    return None if isinstance(atom, jex.Literal) else env.get(atom)


def _apply(eqn: Any, operands: Sequence[_Moved | None]) -> list[_Moved | None]:
    """What the results of an equation are; fewer where the last ones are new."""
    name, params = eqn.primitive.name, eqn.params
    if name in _IDENTITY:
        return [operands[0]]
    if name == "transpose":
        (operand,) = operands
        return [operand and operand.transposed(params["permutation"])]
    inside = inside_of(eqn)
    if inside is None or inside.kind is Kind.OPAQUE:
        return []
    return _through(eqn, inside, operands)


def _through(eqn, inside, operands) -> list[_Moved | None]:
    inner = [_results(body) for body, _ in inside.bodies]
    if inside.kind is Kind.SCAN:
        return _composed(_scan(inside, inner[0]), operands)
    if inside.kind is Kind.WHILE:
        return _while(inside, inner[1], operands)
    if inside.kind is Kind.SHARD_MAP:
        return _composed(_shard_map(eqn.params, inner[0]), operands)
    same = [
        moved[0] if all(other == moved[0] for other in moved) else None
        for moved in zip(*inner, strict=True)
    ]
    return _composed(same, [operands[i] for i in inside.bodies[0].operands])


def _composed(inner, operands) -> list[_Moved | None]:
    """Results of a body, as inputs of the function around it."""
    outer = [None if moved is None else operands[moved.place] for moved in inner]
    return [
        None if operand is None else operand.transposed(moved.axes)
        for operand, moved in zip(outer, inner, strict=True)
    ]


def _scan(inside: Inside, inner) -> list[_Moved | None]:
    carry = inside.carry
    results: list[_Moved | None] = []
    for index, moved in enumerate(inner):
        if moved is None:
            results.append(None)
        elif index < len(carry):
            kept = moved.place == carry[index] and _in_order(moved)
            results.append(moved if kept else None)
        elif moved.place < carry.stop:
            results.append(None)
        else:  # slices along axis 0, put together again
            axes = (0, *(axis + 1 for axis in moved.axes))
            results.append(_Moved(moved.place, axes))
    return results


def _while(inside: Inside, inner, operands) -> list[_Moved | None]:
    slots = inside.bodies[1].operands
    return [
        operands[place]
        if moved is not None and slots[moved.place] == place and _in_order(moved)
        else None
        for place, moved in zip(inside.carry, inner, strict=True)
    ]


def _shard_map(params: dict[str, Any], inner) -> list[_Moved | None]:
    ins, outs = params["in_specs"], params["out_specs"]
    return [
        moved
        if moved is not None and _in_order(moved) and ins[moved.place] == outs[index]
        else None
        for index, moved in enumerate(inner)
    ]
