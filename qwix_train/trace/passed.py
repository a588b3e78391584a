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
from qwix_train.trace.bodies import Domain, Inside

_IDENTITY = frozenset({"copy", "copy_p", "sharding_constraint"})


class _Moved(NamedTuple):
    """An input, by its place, with its axes in another order.

    Attributes:
      place: the place.
      axes: for each axis of the array, the axis of the input that it is.
      parts: for each `scan` and `shard_map` around that goes over the input, outermost
        first: its equation, by id, and what it takes off: an axis, or the sharding.
    """

    place: int
    axes: tuple[int, ...]
    parts: tuple[tuple[int, Any], ...] = ()

    def part(self, eqn: Any, taken: Any, axes: tuple[int, ...]) -> _Moved:
        """What the body of an equation sees of it."""
        return _Moved(self.place, axes, (*self.parts, (id(eqn), taken)))


def sources(body: jax_versions.Body) -> list[int | None]:
    """For each result of a body the index of the input that it is, or None.

    Example:
      >>> import jax
      >>> closed = jax.make_jaxpr(lambda a, b: (b, a + b, a.T.T))(jax.numpy.eye(2), 1.0)
      >>> sources(jax_versions.body_of(closed))
      [1, None, 0]
    """
    return _in_order(_Followed().walk(body, _inputs(body.jaxpr.invars)))


def passed_on(eqn: Any, inside: Inside) -> list[int | None]:
    """For each result of an equation with bodies the operand that it is, or None."""
    return _in_order(_Followed().enter(eqn, inside, _inputs(eqn.invars), ()))


def read(body: jax_versions.Body) -> set[int]:
    """The inputs, by index, that a body computes with, and not just hands on.

    Example:
      >>> import jax
      >>> closed = jax.make_jaxpr(jax.jit(lambda a, b: (a, 2 * b)))(1.0, 2.0)
      >>> read(jax_versions.body_of(closed))
      {1}
    """
    followed = _Followed()
    followed.walk(body, _inputs(body.jaxpr.invars))
    return followed.read


def _inputs(atoms: Sequence[Any]) -> list[_Moved | None]:
    places: dict[Any, int] = {}
    return [
        None
        if isinstance(atom, jex.Literal)
        else _Moved(
            places.setdefault(atom, place),
            tuple(range(len(getattr(atom.aval, "shape", ())))),
        )
        for place, atom in enumerate(atoms)
    ]


def _in_order(values: Sequence[_Moved | None]) -> list[int | None]:
    return [
        x.place if x is not None and x.axes == tuple(range(len(x.axes))) else None
        for x in values
    ]


class _Followed(Domain[_Moved | None]):
    """Follows inputs that are handed on; any other array is None.

    Attributes:
      read: the places of the inputs that something is computed from.
    """

    unknown = None

    def __init__(self):
        self.read: set[int] = set()

    def constant(self, value, aval):
        del value, aval

    def equation(self, eqn, operands, key):
        if eqn.primitive.name in _IDENTITY:
            return operands[:1]
        if eqn.primitive.name == "transpose":
            (x,) = operands
            order = eqn.params["permutation"]
            return [x and x._replace(axes=tuple(x.axes[axis] for axis in order))]
        self.read.update(x.place for x in operands if x is not None)
        return [None] * len(eqn.outvars)

    def enter(self, eqn, inside, operands, key):
        if not any(operands):
            return [None] * len(eqn.outvars)
        return super().enter(eqn, inside, operands, key)

    def join(self, a, b):
        return a if a == b else None

    def slice(self, eqn, value):
        return value and value.part(eqn, value.axes[0], value.axes[1:])

    def stack(self, eqn, values):
        def stacked(x):
            if x is None or not x.parts or x.parts[-1][0] != id(eqn):
                return None
            *parts, (_, axis) = x.parts
            return _Moved(x.place, (axis, *x.axes), tuple(parts))

        return list(map(stacked, values))

    def shard(self, eqn, body, values):
        specs = zip(values, eqn.params["in_specs"], strict=True)
        return [x and x.part(eqn, (spec, x.axes), x.axes) for x, spec in specs]

    def unshard(self, eqn, body, values):
        return [
            x._replace(parts=x.parts[:-1])
            if x and x.parts[-1] == (id(eqn), (spec, x.axes))
            else None
            for x, spec in zip(values, eqn.params["out_specs"], strict=True)
        ]
