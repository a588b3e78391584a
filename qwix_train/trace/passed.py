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

_IDENTITY = frozenset({"copy", "copy_p", "sharding_constraint"})
_CALLS = jax_versions.JIT | jax_versions.REMAT | {"custom_jvp_call", "custom_vjp_call"}


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
        bodies = _bodies(eqn)
        if bodies is None:
            held = operands
        else:
            held = [operands[slots[i]] for inner, slots in bodies for i in read(inner)]
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


def _bodies(eqn: Any) -> list[tuple[jax_versions.Body, Sequence[int]]] | None:
    """The bodies of an equation, each with the operand that each of its inputs is.

    An equation that moves its operand has none; None for one that computes.
    """
    name, params, count = eqn.primitive.name, eqn.params, len(eqn.invars)
    if name in _IDENTITY or name == "transpose":
        return []
    if name in _CALLS:
        return [(jax_versions.call_body(params), range(count))]
    if name in ("scan", "shard_map"):
        return [(jax_versions.body_of(params["jaxpr"]), range(count))]
    if name == "cond":
        slots = range(1, count)
        return [(jax_versions.body_of(b), slots) for b in params["branches"]]
    if name == "while":
        start = params["cond_nconsts"]
        carry = range(start + params["body_nconsts"], count)
        test, body = (params[key] for key in ("cond_jaxpr", "body_jaxpr"))
        return [
            (jax_versions.body_of(test), [*range(start), *carry]),
            (jax_versions.body_of(body), range(start, count)),
        ]
    return None


def _apply(eqn: Any, operands: Sequence[_Moved | None]) -> list[_Moved | None]:
    """What the results of an equation are; fewer where the last ones are new."""
    name, params = eqn.primitive.name, eqn.params
    if name in _IDENTITY:
        return [operands[0]]
    if name == "transpose":
        (operand,) = operands
        return [operand and operand.transposed(params["permutation"])]
    if name in _CALLS:
        return _composed(_results(jax_versions.call_body(params)), operands)
    if name == "scan":
        return _scan(params, operands)
    if name == "while":
        return _while(params, operands)
    if name == "cond":
        return _cond(params, operands)
    if name == "shard_map":
        return _shard_map(params, operands)
    return []


def _composed(inner, operands) -> list[_Moved | None]:
    """Results of a body, as inputs of the function around it."""
    outer = [None if moved is None else operands[moved.place] for moved in inner]
    return [
        None if operand is None else operand.transposed(moved.axes)
        for operand, moved in zip(outer, inner, strict=True)
    ]


def _scan(params: dict[str, Any], operands) -> list[_Moved | None]:
    num_consts, num_carry = jax_versions.scan_parts(params)
    inner = _results(jax_versions.body_of(params["jaxpr"]))
    results: list[_Moved | None] = []
    for index, moved in enumerate(inner):
        if moved is None:
            results.append(None)
        elif index < num_carry:
            kept = moved.place == num_consts + index and _in_order(moved)
            results.append(moved if kept else None)
        elif moved.place < num_consts + num_carry:
            results.append(None)
        else:  # slices along axis 0, put together again
            axes = (0, *(axis + 1 for axis in moved.axes))
            results.append(_Moved(moved.place, axes))
    return _composed(results, operands)


def _while(params: dict[str, Any], operands) -> list[_Moved | None]:
    num_cond, num_body = params["cond_nconsts"], params["body_nconsts"]
    inner = _results(jax_versions.body_of(params["body_jaxpr"]))
    return [
        operands[num_cond + num_body + index]
        if moved is not None and moved.place == num_body + index and _in_order(moved)
        else None
        for index, moved in enumerate(inner)
    ]


def _cond(params: dict[str, Any], operands) -> list[_Moved | None]:
    branches = [_results(jax_versions.body_of(b)) for b in params["branches"]]
    same = [
        moved[0] if all(other == moved[0] for other in moved) else None
        for moved in zip(*branches, strict=True)
    ]
    return _composed(same, operands[1:])


def _shard_map(params: dict[str, Any], operands) -> list[_Moved | None]:
    inner = _results(jax_versions.body_of(params["jaxpr"]))
    ins, outs = params["in_specs"], params["out_specs"]
    same = [
        moved
        if moved is not None and _in_order(moved) and ins[moved.place] == outs[index]
        else None
        for index, moved in enumerate(inner)
    ]
    return _composed(same, operands)
