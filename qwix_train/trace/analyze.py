"""Finds the operations of a traced function: where they are and what they read.

`find_ops` walks a jaxpr, and every body inside it, without computing anything. It
returns an `Op` for each matrix product and convolution, with the module it belongs
to and the provenance of its operands. Which of them to rewrite, and how, is for the
caller to say; `evaluate` then does it.
"""

from __future__ import annotations

import abc
import collections
import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from jax import core
from jax.extend import core as jex

from qwix_train.trace import bodies, jax_versions, provenance
from qwix_train.trace.bodies import Key
from qwix_train.trace.constants import Constants, moves_elements
from qwix_train.trace.provenance import Provenance
from qwix_train.trace.scopes import is_in_float, module_path_of, name_asked_for


@dataclasses.dataclass(frozen=True)
class OperandAxes:
    """What an operation does with the axes of one of its operands.

    Attributes:
      contracted: the axes that it sums over, in the order in which they meet those of
        the other operand.
      batch: the axes along which each index meets the same index of the other operand.
      kept: the others, which are axes of the result.
    """

    contracted: tuple[int, ...]
    batch: tuple[int, ...]
    kept: tuple[int, ...]

    @classmethod
    def of(
        cls, ndim: int, contracted: Sequence[int], batch: Sequence[int] = ()
    ) -> OperandAxes:
        """The axes of an operand with `ndim` axes; those that are left are kept."""
        used = {*contracted, *batch}
        kept = tuple(axis for axis in range(ndim) if axis not in used)
        return cls(tuple(contracted), tuple(batch), kept)


class Findable(abc.ABC):
    """What has to be known of a kind of operation to find it.

    Attributes:
      primitive: the name of its primitive.
      names: the names by which rules know it; the first is the usual one.
      is_product: whether it multiplies its operands. A lookup does not: the rows that
        it takes are elements of the table.
    """

    primitive: str
    names: tuple[str, ...]
    is_product: bool = True

    def name_in(self, scope: str) -> str:
        """The name of an operation of this kind that runs in a scope.

        Args:
          scope: the name stack around it.
        """
        del scope
        return self.names[0]

    def is_found(
        self, operands: Sequence[Provenance], shapes: Sequence[tuple[int, ...]]
    ) -> bool:
        """Whether an equation of the primitive is an operation of this kind.

        Args:
          operands: where its operands come from.
          shapes: their shapes.
        """
        del operands, shapes
        return True

    @abc.abstractmethod
    def axes(self, params: Mapping[str, Any], side: int, ndim: int) -> OperandAxes:
        """What it does with the axes of an operand.

        Args:
          params: the parameters of its equation.
          side: 0 for the left operand, 1 for the right one.
          ndim: how many axes the operand has.
        """


kinds: dict[str, Any] = {}
"""The kinds of operations that are found in traced functions, by their primitives."""


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
      region: the innermost body around it that is traced by itself: any but one that
        `jit` compiles.
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
    region: Key = ()
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
      requests: the paths of modules and the names of ops that code in them asked for;
        see `scopes.asks_for`.
    """

    ops: list[Op]
    layer_axes: Mapping[tuple[str, ...], Collection[int]]
    requests: tuple[tuple[str, str], ...]


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
    walker = _Walker(body, prefix)
    walker.walk(body, list(map(provenance.own, inputs)))
    return Found(walker.ops, walker.layer_axes, tuple(walker.requests))


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
    walker = _TagWalker(body, name_of)
    walker.walk(body, inputs)
    return walker.found


class _Walker(bodies.Domain[Provenance]):
    unknown = provenance.ACTIVATION

    def __init__(self, body: jax_versions.Body, prefix: str):
        self.prefix = prefix
        self.ops: list[Op] = []
        self.requests: dict[tuple[str, str], None] = {}
        self.counts: collections.Counter[tuple[str, str]] = collections.Counter()
        # What each compiled body read when it was first met; the modules that take
        # the place of those that the body being walked names; and the length of the
        # scope around that body.
        self.first_operands: dict[int, Sequence[Provenance]] = {}
        self.renamed: dict[str, str] = {}
        self.outside = 0
        self.scans: tuple[int, ...] = ()
        self.region: Key = ()
        # The results of equations that make the same array of the same one.
        self.restated: dict[Any, tuple[Provenance, Provenance]] = {}
        # Of the body that is walked: the scopes around it, what it is inside of that
        # cannot be rewritten, and its constants.
        self.scope = ""
        self.opaque_name: str | None = None
        self.constants = Constants(body)
        self.layer_axes: dict[tuple[str, ...], set[int]] = {}

    def constant(self, value, aval):
        del aval
        # A tracer belongs to a computation around this one, which may have any inputs.
        traced = isinstance(value, core.Tracer)
        return provenance.Activation() if traced else provenance.CONSTANT

    def equation(self, eqn, operands, key):
        if self.is_found(eqn, operands):
            scope = _join(self.scope, str(eqn.source_info.name_stack))
            self.add(eqn, operands, key, scope, self.opaque_name)
        if all(isinstance(atom, jex.Literal) for atom in eqn.invars):
            scope = _join(self.scope, str(eqn.source_info.name_stack))
            if (name := name_asked_for(scope)) is not None:
                self.requests[self.path_in(scope), name] = None
        source = provenance.restated(eqn.primitive.name, operands)
        if source is not None:
            return [self.restatement(eqn, source)]
        shapes = (list(map(_shape, atoms)) for atoms in (eqn.invars, eqn.outvars))
        name, params = eqn.primitive.name, eqn.params
        results = provenance.propagate(name, params, operands, *shapes)
        return list(map(provenance.own, results))

    def restatement(self, eqn, source) -> Provenance:
        """The array that an equation makes by a cast, or by moving elements.

        Args:
          eqn: the equation.
          source: the array that it reads.
        """
        before, after = eqn.invars[0].aval, eqn.outvars[0].aval
        if eqn.primitive.name == "convert_element_type" and before.dtype == after.dtype:
            return source
        key = (id(source), eqn.primitive.name, *eqn.params.values())
        # The source is held, as another object might get its id.
        return self.restated.setdefault(key, (provenance.own(source), source))[0]

    def is_found(self, eqn, operands) -> bool:
        """Whether `add` is to be called with an equation without bodies."""
        kind = kinds.get(eqn.primitive.name)
        shapes = list(map(_shape, eqn.invars))
        return kind is not None and kind.is_found(operands, shapes)

    def add(self, eqn, operands, key, scope, opaque):
        path = self.path_in(scope)
        name = kinds[eqn.primitive.name].name_in(scope)
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
                region=self.region,
                name_stack=scope,
            )
        )

    def path_in(self, scope: str) -> str:
        """The path of the module that runs what is in a scope."""
        path = module_path_of(scope)
        if module_path_of(scope[self.outside :]):
            for old, new in self.renamed.items():
                if path == old or path.startswith(f"{old}/"):
                    path = new + path.removeprefix(old)
                    break
        return _join(self.prefix, path)

    def moves(self, eqn, operands) -> bool:
        """Whether an equation multiplies an activation by a constant that selects."""
        kind = kinds[eqn.primitive.name]
        if not kind.is_product:
            return False
        sides = [isinstance(x, provenance.Constant) for x in operands[:2]]
        others = [isinstance(x, provenance.Activation) for x in operands[:2]]
        if sorted(sides) != [False, True] or not any(others):
            return False
        side = sides.index(True)
        value = self.constants.value(eqn.invars[side])
        if value is None:
            return False
        axes = kind.axes(eqn.params, side, value.ndim)
        return moves_elements(value, axes.contracted)

    def enter(self, eqn, inside, operands, key):
        before = self.scope, self.opaque_name, self.renamed, self.outside, self.scans
        self.scope = _join(self.scope, str(eqn.source_info.name_stack))
        if inside.kind is bodies.Kind.CALL:
            # JAX traces a function once for all modules that compile it with the
            # same shapes (`nn.jit`), and its ops are marked with the first of them.
            traced = id(inside.bodies[0].body.jaxpr)
            first = self.first_operands.setdefault(traced, operands)
            if not self.renamed:
                self.renamed, self.outside = _renamed(first, operands), len(self.scope)
        elif inside.kind in (bodies.Kind.CUSTOM, bodies.Kind.OPAQUE):
            # The forward of a function with a derivative rule says where values come
            # from, but must not be replaced: the rule would be that of another one. In
            # a kernel or a solver more than one body must stay consistent, or no JAX
            # runs there at all.
            self.opaque_name = self.opaque_name or inside.name
        elif inside.kind is bodies.Kind.SCAN:
            scanned = operands[inside.carry.stop :]
            weights = [x for x in scanned if isinstance(x, provenance.Weight)]
            for view in (view for weight in weights for view in weight.views):
                axes = {atom.axis for atom in view.dims[0]}
                self.layer_axes.setdefault(view.path, set()).update(axes)
            self.scans = (*self.scans, eqn.params["length"] if weights else 0)
        results = super().enter(eqn, inside, operands, key)
        if inside.kind not in (bodies.Kind.CALL, bodies.Kind.REMAT):
            results = list(map(provenance.own, results))
        self.scope, self.opaque_name, self.renamed, self.outside, self.scans = before
        return results

    def body(self, eqn, inside, number, inputs, key):
        outside, (body, places) = self.constants, inside.bodies[number]
        is_sharded = inside.kind is bodies.Kind.SHARD_MAP
        whole = eqn.invars[: inside.carry.start if inside.is_loop else None]
        atoms = {
            var: whole[place]
            for var, place in zip(body.jaxpr.invars, places, strict=False)
            if place < len(whole) and not is_sharded
        }
        around, self.constants = self.region, Constants(body, outside, atoms)
        if inside.kind is not bodies.Kind.CALL:
            self.region = (*key, number)
        if inside.is_loop or is_sharded:  # one iteration's, or one device's
            first = inside.carry.start
            inputs = [
                provenance.own(value) if place >= first else value
                for value, place in zip(inputs, places, strict=True)
            ]
        results = super().body(eqn, inside, number, inputs, key)
        self.constants, self.region = outside, around
        return results

    def join(self, a, b):
        return provenance.join(a, b)

    def slice(self, eqn, value):
        return provenance.per_iteration(value)

    def stack(self, eqn, values):
        name = eqn.primitive.name
        return [provenance.propagate(name, {}, [x], (), ((),))[0] for x in values]

    def shard(self, eqn, body, values):
        return list(map(_shard, values, eqn.invars, body.jaxpr.invars))

    def unshard(self, eqn, body, values):
        return list(map(_shard, values, body.jaxpr.outvars, eqn.outvars))

    def undo(self):
        ops, counts = len(self.ops), self.counts.copy()

        def undo():
            del self.ops[ops:]
            self.counts = counts.copy()

        return undo


class _TagWalker(_Walker):
    def __init__(self, body: jax_versions.Body, name_of: Callable[[Any], str | None]):
        super().__init__(body, "")
        self.name_of = name_of
        self.found: dict[str, set[Provenance]] = collections.defaultdict(set)

    def is_found(self, eqn, operands) -> bool:
        return self.name_of(eqn) is not None

    def add(self, eqn, operands, key, scope, opaque):
        name = self.name_of(eqn)
        assert name is not None
        self.found[name].add(operands[0])


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


def _shape(atom: Any) -> tuple[int, ...]:
    return getattr(atom.aval, "shape", ())


def _shard(value: Provenance, before: Any, after: Any) -> Provenance:
    if isinstance(value, provenance.Weight):
        return provenance.shard(value, _shape(before), _shape(after))
    return value


def _join(*parts: str) -> str:
    return "/".join(part for part in parts if part)
