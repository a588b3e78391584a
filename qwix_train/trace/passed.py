"""Which inputs a traced function hands on as they came.

NNX writes every variable back that entered a loop or a `remat`, so what a model only
reads comes out of its trace, too: through the body of one operation within that of
another, and with its axes moved and moved back.
"""

from __future__ import annotations

from collections.abc import Sequence
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


def _in_order(moved: _Moved) -> bool:
    return moved.axes == tuple(range(len(moved.axes)))


def _results(body: jax_versions.Body) -> list[_Moved | None]:
    env: dict[Any, _Moved] = {
        var: _Moved(place, tuple(range(len(getattr(var.aval, "shape", ())))))
        for place, var in enumerate(body.jaxpr.invars)
    }

    def read(atom):
        return None if isinstance(atom, jex.Literal) else env.get(atom)

    for eqn in body.jaxpr.eqns:
        operands = [read(atom) for atom in eqn.invars]
        if any(operand is not None for operand in operands):
            for var, moved in zip(eqn.outvars, _apply(eqn, operands), strict=False):
                if moved is not None:
                    env[var] = moved
    return [read(atom) for atom in body.jaxpr.outvars]


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
