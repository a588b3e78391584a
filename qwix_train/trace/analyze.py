"""Finds the operations of a traced function: where they are and what they read.

`find_ops` walks a jaxpr, and every body inside it, without computing anything. It
returns an `Op` for each matrix product and convolution, with the module it belongs
to and the provenance of its operands. Which of them to rewrite, and how, is for the
caller to say; `evaluate` then does it.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from jax import core
from jax.extend import core as jex

from qwix_train.trace import bodies, jax_versions, provenance
from qwix_train.trace.bodies import Key, inside_of
from qwix_train.trace.constants import Constants, moves_elements
from qwix_train.trace.provenance import Provenance
from qwix_train.trace.scopes import is_in_float, module_path_of


class Kind(Protocol):
    """What has to be known of a kind of operation to find it."""

    @property
    def primitive(self) -> str:
        """The name of its primitive."""
        ...

    @property
    def is_product(self) -> bool:
        """Whether it multiplies its operands."""
        ...

    def name_in(self, scope: str) -> str:
        """The name of one that runs in a scope."""
        ...

    def is_found(
        self, operands: Sequence[Provenance], shapes: Sequence[tuple[int, ...]]
    ) -> bool:
        """Whether an equation of the primitive is one."""
        ...

    def axes(self, params: Mapping[str, Any], side: int, ndim: int) -> Any:
        """What it does with the axes of an operand, among them `contracted`."""
        ...


_kinds: dict[str, Kind] = {}


def register_kind(kind: Kind) -> None:
    """Has operations of a kind found in traced functions."""
    _kinds[kind.primitive] = kind


@dataclasses.dataclass(frozen=True)
class Operand:
    """An operand of an op: its shape, dtype, and where it came from."""

    shape: tuple[int, ...]
    dtype: Any
    provenance: Provenance


@dataclasses.dataclass(frozen=True)
class Op:
    """A matrix product, convolution or lookup of the traced function.

    Attributes:
      key: where its equation is.
      primitive: the name of its primitive.
      name: the name by which rules know it.
      id: the name and the count within the module, such as `dot_general0`.
      module_path: the path of the module that ran it, such as `encoder/Dense_0`.
      params: the parameters of its equation.
      operands: what it reads.
      out_shape: the shape of its result.
      opaque: the enclosing operation that cannot be rewritten, such as
        `custom_vjp_call`, or None.
      moves: whether it only moves elements of an activation, as a product with a
        constant does whose ones select them.
      in_float: whether the call that it is part of stays in float.
      scans: the length of each `scan` around it, outermost first, if it goes over
        params, as one over the layers of a model does; 0 for any other.
      name_stack: the scopes around it.
    """

    key: Key
    primitive: str
    name: str
    id: str
    module_path: str
    params: Mapping[str, Any]
    operands: tuple[Operand, ...]
    out_shape: tuple[int, ...]
    opaque: str | None = None
    moves: bool = False
    in_float: bool = False
    scans: tuple[int, ...] = ()
    name_stack: str = ""

    @property
    def where(self) -> str:
        """The module and the op, such as `encoder/Dense_0/dot_general0`."""
        return f"{self.module_path}/{self.id}" if self.module_path else self.id

    @property
    def layers(self) -> tuple[int, ...]:
        """The sizes of the axes of layers that the op is run for."""
        return tuple(length for length in self.scans if length)


class Found(NamedTuple):
    """What a function does.

    Attributes:
      ops: its ops, in the order in which they run.
      layer_axes: for params that a `scan` goes over, the axes that it does so along.
    """

    ops: list[Op]
    layer_axes: Mapping[tuple[str, ...], Collection[int]]


def find_ops(
    body: jax_versions.Body, inputs: Sequence[Provenance], prefix: str = ""
) -> Found:
    """All the ops of a function.

    Args:
      body: the traced function.
      inputs: the provenance of each of its inputs.
      prefix: the path of the module whose method was traced, when it is part of a
        larger model.
    """
    walker = _Walker(prefix)
    walker.walk(body, inputs, key=(), scope="", opaque=None)
    return Found(walker.ops, walker.layer_axes)


def find_tagged(
    body: jax_versions.Body,
    inputs: Sequence[Provenance],
    name_of: Callable[[Any], str | None],
) -> dict[str, set[Provenance]]:
    """Where the values come from that equations give a name.

    Args:
      body: the traced function.
      inputs: the provenance of each of its inputs.
      name_of: the name that an equation gives its operand, or None.

    Returns:
      For each name, one for each place where the function gives it.
    """
    walker = _TagWalker(name_of)
    walker.walk(body, inputs, key=(), scope="", opaque=None)
    return walker.found


class _Walker:
    def __init__(self, prefix: str):
        self.prefix = prefix
        self.ops: list[Op] = []
        self.counts: collections.Counter[tuple[str, str]] = collections.Counter()
        # What each compiled body read when it was first met; the modules that take
        # the place of those that the body being walked names; and the length of the
        # scope around that body.
        self.first_operands: dict[int, Sequence[Provenance]] = {}
        self.renamed: dict[str, str] = {}
        self.outside = 0
        self.scans: tuple[int, ...] = ()
        # Those of the body that is walked.
        self.constants: Constants | None = None
        self.layer_axes: dict[tuple[str, ...], set[int]] = {}

    def walk(
        self,
        body: jax_versions.Body,
        inputs: Sequence[Provenance],
        key: Key,
        scope: str,
        opaque: str | None,
        atoms: Sequence[Any] = (),
    ) -> list[Provenance]:
        """Walks one body; returns the provenance of its results.

        Its first inputs are `atoms` of the body around it.
        """
        jaxpr = body.jaxpr
        outside = self.constants
        self.constants = Constants(body, outside, atoms)
        env: dict[Any, Provenance] = dict(zip(jaxpr.invars, inputs, strict=True))
        env.update(
            (var, _closed_over(value))
            for var, value in zip(jaxpr.constvars, body.consts, strict=True)
        )

        def read(atom):
            return provenance.CONSTANT if isinstance(atom, jex.Literal) else env[atom]

        for index, eqn in enumerate(jaxpr.eqns):
            operands = [read(atom) for atom in eqn.invars]
            name = eqn.primitive.name
            inside = inside_of(eqn)
            if inside or self.is_found(eqn, operands):
                here = (*key, index)
                inner_scope = _join(scope, str(eqn.source_info.name_stack))
                if inside:
                    results = self.enter(
                        eqn, inside, operands, here, inner_scope, opaque
                    )
                else:
                    self.add(eqn, operands, here, inner_scope, opaque)
            if not inside:
                results = provenance.propagate(
                    name,
                    eqn.params,
                    operands,
                    [_shape(atom) for atom in eqn.invars],
                    [_shape(var) for var in eqn.outvars],
                )
            env.update(zip(eqn.outvars, results, strict=True))
        self.constants = outside
        return [read(atom) for atom in jaxpr.outvars]

    def is_found(self, eqn, operands) -> bool:
        """Whether `add` is to be called with an equation without bodies."""
        return _is_op(eqn, operands)

    def add(self, eqn, operands, key, scope, opaque):
        path = module_path_of(scope)
        if module_path_of(scope[self.outside :]):
            for old, new in self.renamed.items():
                if path == old or path.startswith(f"{old}/"):
                    path = new + path.removeprefix(old)
                    break
        path = _join(self.prefix, path)
        name = _kinds[eqn.primitive.name].name_in(scope)
        count = self.counts[path, name]
        self.counts[path, name] += 1
        self.ops.append(
            Op(
                key=key,
                primitive=eqn.primitive.name,
                name=name,
                id=f"{name}{count}",
                module_path=path,
                params=eqn.params,
                operands=tuple(
                    Operand(tuple(atom.aval.shape), atom.aval.dtype, operand)
                    for atom, operand in zip(eqn.invars, operands, strict=True)
                ),
                out_shape=tuple(eqn.outvars[0].aval.shape),
                opaque=opaque,
                moves=self.moves(eqn, operands),
                in_float=is_in_float(scope),
                scans=self.scans,
                name_stack=scope,
            )
        )

    def moves(self, eqn, operands) -> bool:
        """Whether an equation multiplies an activation by a constant that selects."""
        kind = _kinds[eqn.primitive.name]
        if not kind.is_product:
            return False
        sides = [isinstance(x, provenance.Constant) for x in operands[:2]]
        others = [isinstance(x, provenance.Activation) for x in operands[:2]]
        if sorted(sides) != [False, True] or not any(others):
            return False
        side = sides.index(True)
        assert self.constants is not None
        value = self.constants.value(eqn.invars[side])
        if value is None:
            return False
        axes = kind.axes(eqn.params, side, value.ndim)
        return moves_elements(value, axes.contracted)

    def enter(self, eqn, inside, operands, key, scope, opaque) -> list[Provenance]:
        """Walks the bodies of one equation."""
        name = eqn.primitive.name
        if inside.kind is bodies.Kind.CALL:
            # JAX traces a function once for all modules that compile it with the
            # same shapes (`nn.jit`), and its ops are marked with the first of them.
            (body, _) = inside.bodies[0]
            first = self.first_operands.setdefault(id(body.jaxpr), operands)
            before = self.renamed, self.outside
            if not self.renamed:
                self.renamed = _renamed(first, operands)
                self.outside = len(scope)
            results = self.walk(body, operands, (*key, 0), scope, opaque, eqn.invars)
            self.renamed, self.outside = before
            return results
        if inside.kind is bodies.Kind.REMAT:
            (body, _) = inside.bodies[0]
            return self.walk(body, operands, (*key, 0), scope, opaque, eqn.invars)
        if inside.kind is bodies.Kind.CUSTOM:
            # Its forward says where values come from, but must not be replaced: the
            # derivative rule would be that of another function.
            (body, _) = inside.bodies[0]
            return self.walk(body, operands, (*key, 0), scope, opaque or name)
        if inside.kind is bodies.Kind.SHARD_MAP:
            (body, _) = inside.bodies[0]
            operands = [
                _shard(operand, _shape(outside), _shape(inside))
                for operand, outside, inside in zip(
                    operands, eqn.invars, body.jaxpr.invars, strict=True
                )
            ]
            results = self.walk(body, operands, (*key, 0), scope, opaque)
            return [
                _shard(result, _shape(inside), _shape(outside))
                for result, inside, outside in zip(
                    results, body.jaxpr.outvars, eqn.outvars, strict=True
                )
            ]
        if inside.kind is bodies.Kind.OPAQUE:
            # A kernel, a solver: what runs inside cannot be replaced, since more than
            # one body must stay consistent, or no JAX runs there at all.
            for number, (body, _) in enumerate(inside.bodies):
                inputs = [provenance.ACTIVATION] * len(body.jaxpr.invars)
                self.walk(body, inputs, (*key, number), scope, opaque or name)
            return provenance.propagate(name, {}, operands, (), [()] * len(eqn.outvars))
        if inside.kind is bodies.Kind.COND:
            branches = [
                self.walk(body, [operands[i] for i in slots], (*key, n), scope, opaque)
                for n, (body, slots) in enumerate(inside.bodies)
            ]
            return [
                functools.reduce(provenance.join, each)
                for each in zip(*branches, strict=True)
            ]
        return self.enter_loop(eqn, inside, operands, key, scope, opaque)

    def enter_loop(self, eqn, inside, operands, key, scope, opaque):
        is_scan = inside.kind is bodies.Kind.SCAN
        start, stop = inside.carry.start, inside.carry.stop
        for operand in operands[stop:]:
            for view in operand.views if isinstance(operand, provenance.Weight) else ():
                axes = {atom.axis for atom in view.dims[0]}
                self.layer_axes.setdefault(view.path, set()).update(axes)
        scanned = [provenance.per_iteration(x) for x in operands[stop:]]
        outside = self.scans
        if is_scan:
            layers = any(isinstance(x, provenance.Weight) for x in scanned)
            self.scans = (*outside, eqn.params["length"] if layers else 0)
        last = len(inside.bodies) - 1
        body, slots = inside.bodies[last]

        def run(carry):
            values = [*operands[:start], *carry, *scanned]
            return self.walk(
                body,
                [values[i] for i in slots],
                (*key, last),
                scope,
                opaque,
                eqn.invars[:start] if is_scan else (),
            )

        carry, outs = self.to_fixpoint(operands[start:stop], run)
        values = [*operands[:start], *carry]
        for number, (condition, slots) in enumerate(inside.bodies[:last]):
            inputs = [values[i] for i in slots]
            self.walk(condition, inputs, (*key, number), scope, opaque)
        self.scans = outside
        rest = outs[len(carry) :]
        stacked = provenance.propagate(eqn.primitive.name, {}, rest, (), ((),))
        return [*carry, *(stacked * len(rest))]

    def to_fixpoint(self, carry, run):
        """Walks a loop's body until its carry holds what it held before."""
        ops, counts = len(self.ops), self.counts.copy()
        while True:
            outs = run(carry)
            after = [
                provenance.join(a, b)
                for a, b in zip(carry, outs[: len(carry)], strict=True)
            ]
            if after == list(carry):
                return list(carry), outs
            carry = after
            del self.ops[ops:]
            self.counts = counts.copy()


class _TagWalker(_Walker):
    def __init__(self, name_of: Callable[[Any], str | None]):
        super().__init__("")
        self.name_of = name_of
        self.found: dict[str, set[Provenance]] = collections.defaultdict(set)

    def is_found(self, eqn, operands) -> bool:
        return self.name_of(eqn) is not None

    def add(self, eqn, operands, key, scope, opaque):
        name = self.name_of(eqn)
        assert name is not None
        self.found[name].add(operands[0])


def _is_op(eqn, operands: Sequence[Provenance]) -> bool:
    kind = _kinds.get(eqn.primitive.name)
    return kind is not None and kind.is_found(
        operands, [_shape(atom) for atom in eqn.invars]
    )


def _renamed(first: Sequence[Provenance], now: Sequence[Provenance]) -> dict[str, str]:
    """The modules that differ between two calls of a function, by their params."""
    renamed = {}
    for a, b in zip(first, now, strict=True):
        paths = zip(provenance.paths_of(a), provenance.paths_of(b), strict=False)
        for old, new in paths:
            while old and new and old[-1] == new[-1]:
                old, new = old[:-1], new[:-1]
            if old and new:
                renamed["/".join(old)] = "/".join(new)
    return renamed


def _closed_over(value: Any) -> Provenance:
    # A tracer belongs to a computation around this one, which may have any inputs.
    traced = isinstance(value, core.Tracer)
    return provenance.ACTIVATION if traced else provenance.CONSTANT


def _shape(atom: Any) -> tuple[int, ...]:
    return getattr(atom.aval, "shape", ())


def _shard(operand: Provenance, shape, local) -> Provenance:
    if isinstance(operand, provenance.Weight):
        return provenance.shard(operand, shape, local)
    return operand


def _join(*parts: str) -> str:
    return "/".join(part for part in parts if part)
