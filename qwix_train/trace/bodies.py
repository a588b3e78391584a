"""Which equations have bodies, and what goes into each body and comes out of it.

`inside_of` describes an equation: a call, a loop, a branch. It is the one place that
knows how these hand their operands to their bodies, whatever walks over them.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from qwix_train.trace import jax_versions
from qwix_train.trace.jax_versions import Body

# Where an equation is: its index, then (for one inside a body) the number of the
# body and the index there, and so on inward.
Key = tuple[int, ...]


class Kind(enum.Enum):
    """What an equation does with its bodies."""

    CALL = enum.auto()
    """Runs its body once, compiled."""
    REMAT = enum.auto()
    """Runs its body once, and again for a derivative."""
    CUSTOM = enum.auto()
    """Runs its body once, and has a derivative rule of its own."""
    SCAN = enum.auto()
    """Runs its body for each slice of some operands, with a carry."""
    WHILE = enum.auto()
    """Runs its second body, with a carry, for as long as its first one says so."""
    COND = enum.auto()
    """Runs the body that its first operand chooses."""
    SHARD_MAP = enum.auto()
    """Runs its body on each device, on shards of its operands."""
    OPAQUE = enum.auto()
    """Anything else, such as a kernel or a solver: only JAX knows."""


_KINDS = {
    **dict.fromkeys(jax_versions.JIT, Kind.CALL),
    **dict.fromkeys(jax_versions.REMAT, Kind.REMAT),
    "custom_jvp_call": Kind.CUSTOM,
    "custom_vjp_call": Kind.CUSTOM,
    "scan": Kind.SCAN,
    "while": Kind.WHILE,
    "cond": Kind.COND,
    "shard_map": Kind.SHARD_MAP,
}


class Inner(NamedTuple):
    """One body of an equation.

    Attributes:
      body: the body.
      operands: for each input of the body, the index of the operand that it is. In a
        `scan` it is a slice of those that are scanned, and in a `shard_map` a shard.
    """

    body: Body
    operands: Sequence[int]


class Inside(NamedTuple):
    """What an equation with bodies holds.

    Attributes:
      kind: what it does with its bodies.
      name: what users know the equation as.
      bodies: its bodies, in the order in which keys number them.
      carry: of a loop, the indices of the operands that it starts its carry with.
        Operands before them are the same in each iteration, and those after them are
        scanned. The first results are the last carry, and the others are stacked.
    """

    kind: Kind
    name: str
    bodies: tuple[Inner, ...]
    carry: range = range(0)


def kind_of(primitive: str) -> Kind | None:
    """The kind of the equations of a primitive; None where the name does not say it."""
    return _KINDS.get(primitive)


def inside_of(eqn: Any) -> Inside | None:
    """What an equation holds; None if it has no bodies.

    Args:
      eqn: an equation of a jaxpr.
    """
    name, params, count = eqn.primitive.name, eqn.params, len(eqn.invars)
    kind = _KINDS.get(name)
    if kind is None:
        if not jax_versions.has_body(params):
            return None
        found = jax_versions.bodies(params)
        return Inside(Kind.OPAQUE, name, tuple(Inner(body, ()) for body in found))
    if kind is Kind.COND:
        branches = map(jax_versions.body_of, params["branches"])
        inner = tuple(Inner(body, range(1, count)) for body in branches)
        return Inside(kind, name, inner)
    if kind is Kind.WHILE:
        start = params["cond_nconsts"]
        carry = range(start + params["body_nconsts"], count)
        test = jax_versions.body_of(params["cond_jaxpr"])
        step = jax_versions.body_of(params["body_jaxpr"])
        inner = (Inner(test, [*range(start), *carry]), Inner(step, range(start, count)))
        return Inside(kind, name, inner, carry)
    if kind is Kind.REMAT:
        name = "checkpoint"  # whatever the version of JAX calls it
    carry = range(0)
    if kind is Kind.SCAN:
        num_consts, num_carry = jax_versions.scan_parts(params)
        carry = range(num_consts, num_consts + num_carry)
    inner = (Inner(jax_versions.call_body(params), range(count)),)
    return Inside(kind, name, inner, carry)


def call_scope(eqn: Any) -> str:
    """The scope that a compiled call gives to what is in it."""
    return f"jit({eqn.params.get('name', '')})"


def equations(
    body: Body, enters: Callable[[Any, Inside], bool], key: Key = ()
) -> Iterator[tuple[Key, Any, Inside | None]]:
    """Yields the equations of a body, each before those inside it.

    Args:
      body: the body.
      enters: whether to go into the bodies of an equation.
      key: where the body is.

    Yields:
      Where an equation is, the equation, and what it holds.
    """
    for index, eqn in enumerate(body.jaxpr.eqns):
        here, inside = (*key, index), inside_of(eqn)
        yield here, eqn, inside
        if inside is not None and enters(eqn, inside):
            for number, inner in enumerate(inside.bodies):
                yield from equations(inner.body, enters, (*here, number))
