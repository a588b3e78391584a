"""Which equations have bodies, and the one forward walk over all of them.

`inside_of` describes an equation: a call, a loop, a branch. It is the one place that
knows how these hand their operands to their bodies. `Walk` goes over the equations of a
body with a value for each array, and `Domain` goes through the bodies inside it, too:
what a value is, such as the param that an array came from, is for a subclass to say.
"""

from __future__ import annotations

import abc
import enum
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

from jax.extend import core as jex

from qwix_train.trace import jax_versions
from qwix_train.trace.jax_versions import Body

# Where an equation is: its index, then (for one inside a body) the number of the
# body and the index there, and so on inward.
Key = tuple[int, ...]

Value = TypeVar("Value")


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

    @property
    def is_loop(self) -> bool:
        """Whether its last body runs any number of times, with a carry."""
        return self.kind in (Kind.SCAN, Kind.WHILE)


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
        inner = tuple(Inner(body, ()) for body in jax_versions.bodies(params))
        return Inside(Kind.OPAQUE, name, inner) if inner else None
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
    """The scope that a call gives, where it is compiled, to what is in it."""
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


class Walk(abc.ABC, Generic[Value]):
    """Goes over the equations of a body, forward, with a value for each array."""

    @abc.abstractmethod
    def constant(self, value: Any, aval: Any) -> Value:
        """The value of a constant of a body, or of a literal."""

    @abc.abstractmethod
    def equation(self, eqn: Any, operands: list[Value], key: Key) -> Sequence[Value]:
        """The values of the results of an equation that is not entered."""

    @abc.abstractmethod
    def enter(
        self, eqn: Any, inside: Inside, operands: list[Value], key: Key
    ) -> Sequence[Value]:
        """The values of the results of an equation with bodies."""

    def walk(self, body: Body, inputs: Sequence[Value], key: Key = ()) -> list[Value]:
        """The values of the results of a body.

        Args:
          body: the body.
          inputs: the values of its inputs.
          key: where the body is.
        """
        jaxpr = body.jaxpr
        env: dict[Any, Value] = dict(zip(jaxpr.invars, inputs, strict=True))
        for var, value in zip(jaxpr.constvars, body.consts, strict=True):
            env[var] = self.constant(value, var.aval)

        def read(atom):
            if isinstance(atom, jex.Literal):
                return self.constant(atom.val, atom.aval)
            return env[atom]

        for index, eqn in enumerate(jaxpr.eqns):
            operands, here = [read(atom) for atom in eqn.invars], (*key, index)
            inside = inside_of(eqn)
            if inside is None:
                results = self.equation(eqn, operands, here)
            else:
                results = self.enter(eqn, inside, operands, here)
            env.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]


class Domain(Walk[Value]):
    """A walk through the bodies inside a body, each as often as a loop needs it.

    Values have a partial order of finite height, so that loops come to an end.

    Attributes:
      unknown: the value of what a kernel or a solver computes with inside of it.
    """

    unknown: Value

    @abc.abstractmethod
    def join(self, a: Value, b: Value) -> Value:
        """The value of an array that is `a` on one path and `b` on another."""

    @abc.abstractmethod
    def slice(self, eqn: Any, value: Value) -> Value:
        """What one iteration of a `scan` sees of an array that it goes over."""

    @abc.abstractmethod
    def stack(self, eqn: Any, values: list[Value]) -> Sequence[Value]:
        """The arrays that a `scan` makes of the results of its iterations."""

    @abc.abstractmethod
    def shard(self, eqn: Any, body: Body, values: list[Value]) -> Sequence[Value]:
        """What one device sees of the operands of a `shard_map`."""

    @abc.abstractmethod
    def unshard(self, eqn: Any, body: Body, values: list[Value]) -> Sequence[Value]:
        """The arrays that a `shard_map` makes of the results of each device."""

    def undo(self) -> Callable[[], None]:
        """What takes back all that the walk finds from now on.

        It is called before the body of a loop is walked again, with a wider carry.
        """
        return lambda: None

    def body(
        self, eqn: Any, inside: Inside, number: int, inputs: list[Value], key: Key
    ) -> list[Value]:
        """Walks one body of an equation; gives its results."""
        return self.walk(inside.bodies[number].body, inputs, (*key, number))

    def enter(
        self, eqn: Any, inside: Inside, operands: list[Value], key: Key
    ) -> Sequence[Value]:
        """See `Walk.enter`."""
        if inside.kind is Kind.OPAQUE:
            for number, (body, _) in enumerate(inside.bodies):
                inputs = [self.unknown] * len(body.jaxpr.invars)
                self.body(eqn, inside, number, inputs, key)
            return self.equation(eqn, operands, key)
        if inside.is_loop:
            return self._loop(eqn, inside, operands, key)
        is_sharded = inside.kind is Kind.SHARD_MAP
        if is_sharded:
            operands = list(self.shard(eqn, inside.bodies[0].body, operands))
        each = [
            self.body(eqn, inside, number, [operands[i] for i in inner.operands], key)
            for number, inner in enumerate(inside.bodies)
        ]
        results = [functools.reduce(self.join, x) for x in zip(*each, strict=True)]
        if is_sharded:
            return self.unshard(eqn, inside.bodies[0].body, results)
        return results

    def _loop(self, eqn, inside, operands, key):
        start, stop = inside.carry.start, inside.carry.stop
        values = [*operands[:stop], *(self.slice(eqn, x) for x in operands[stop:])]

        def run(number):
            inputs = [values[i] for i in inside.bodies[number].operands]
            return self.body(eqn, inside, number, inputs, key)

        last, undo = len(inside.bodies) - 1, self.undo()
        while True:
            outs = run(last)
            before = values[start:stop]
            after = list(map(self.join, before, outs))
            if after == before:
                break
            values[start:stop] = after
            undo()
        for number in range(last):  # the condition of a `while`
            run(number)
        return [*after, *self.stack(eqn, outs[len(after) :])]
