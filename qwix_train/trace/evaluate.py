"""Runs a traced function again, with chosen operations replaced.

`evaluate` interprets a jaxpr. Equations that nothing is to change run exactly as
they were traced; the chosen ones are handed to a handler; and an operation with a
body (`scan`, `cond`, `remat` and so on) that holds a chosen one is rebuilt around
the body's own evaluation, with its options kept. What comes out is an ordinary
traced computation again, so it can be differentiated, batched, sharded and compiled.
"""

from __future__ import annotations

import abc
import contextlib
import functools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp
from jax.extend import core as jex

from qwix_train.trace import bodies, carried, jax_versions, passed, scopes
from qwix_train.trace.analyze import Op
from qwix_train.trace.bodies import Inside, Key, Kind, inside_of
from qwix_train.trace.carried import Carried, value_of

# handler(op, operands, run, given) -> result. `run(*operands)` is the op itself, and
# `given` what `evaluate` was given for it.
Handler = Callable[[Op, Sequence[Any], Callable[..., Any], Any], Any]


class Once:
    """What handlers make once, for all the ops of an evaluation that need it.

    A body that JAX traces on its own, such as that of a loop or a checkpoint, holds
    arrays that nothing outside may read: each trace of it makes them anew.
    """

    def __init__(self):
        self._made: dict[Any, tuple[Any, Any]] = {}

    def __call__(self, key: Hashable, given: Any, make: Callable[[], Any]) -> Any:
        """What was made for a key and a tree of arrays; makes it the first time."""
        whole = (key, *map(id, jax.tree.leaves(given)))
        if whole not in self._made:
            self._made[whole] = make(), given  # held, so that no other gets its id
        return self._made[whole][0]

    @contextlib.contextmanager
    def in_new_trace(self) -> Iterator[None]:
        """Sets aside what was made, and drops what is made meanwhile."""
        outside, self._made = self._made, {}
        try:
            yield
        finally:
            self._made = outside


def evaluate(
    body: jax_versions.Body,
    inputs: Sequence[Any],
    ops: Mapping[Key, Op],
    handler: Handler,
    given: Mapping[Key, Any] | None = None,
    once: Once | None = None,
) -> list[Any]:
    """Evaluates a body with some of its ops replaced.

    Args:
      body: the traced function.
      inputs: a value for each of its inputs: an array, or a `Carried` one.
      ops: the ops to replace, by where they are.
      handler: called with each of them.
      given: a tree of arrays for an op, by where it is, that its handler needs. Inside
        of a scan over layers the arrays have one leading axis for each such scan, and
        the handler gets the slice of its layer.
      once: what the handler makes once.

    Returns:
      The results of the body. For an input that the body returns as it came this is
      what it says is `returned`: a model that hands its params on hands on the user's.
    """
    kept = _kept(inputs, lambda: passed.sources(body))
    replacement = _Replacement(ops, handler, given or {}, once or Once())
    with replacement.once.in_new_trace():
        outs = replacement.run(body, inputs, ())
    outs = [kept.get(index, out) for index, out in enumerate(outs)]
    return [x.returned if isinstance(x, Carried) else x for x in outs]


def _follows(value: Any) -> bool:
    return isinstance(value, Carried) and value.follows


class Evaluation(abc.ABC):
    """Evaluates a body with some of its equations replaced.

    It threads a state: what replaces an equation may read and write its part of it,
    within loops and branches, too.

    Attributes:
      replaced: what is known of each equation to replace, by where it is. Its `scans`
        say which of the `scan`s around it go over layers, and its `name` which part of
        the state it writes, if there is a state.
      inside: where those are that are inside of each equation with bodies.
      given: a tree of arrays for some of them, by where they are.
      states: the parts of the state, by name, where the evaluation is now.
      once: what is made once in each trace.
      depth: how many scans are around that.
    """

    def __init__(
        self,
        replaced: Mapping[Key, Any],
        given: Mapping[Key, Any],
        states: Mapping[str, Any],
    ):
        self.replaced = replaced
        self.inside: dict[Key, list[Key]] = {}
        for key in replaced:
            for length in range(1, len(key), 2):
                self.inside.setdefault(key[:length], []).append(key)
        self.given = given
        self.states: dict[str, Any] = dict(states)
        self.once: Once = Once()
        self.depth = 0

    @abc.abstractmethod
    def replace(self, eqn: Any, operands: Sequence[Any], key: Key) -> Any:
        """The result of an equation to replace."""

    def run(
        self, body: jax_versions.Body, inputs: Sequence[Any], key: Key
    ) -> list[Any]:
        """The results of a body; `key` is where it is."""
        jaxpr = body.jaxpr
        env: dict[Any, Any] = dict(zip(jaxpr.constvars, body.consts, strict=True))
        env.update(zip(jaxpr.invars, inputs, strict=True))

        def read(atom):
            return atom.val if isinstance(atom, jex.Literal) else env[atom]

        last_use = _last_uses(jaxpr)
        pending: list[Any] = []  # equations to run as they are, in one go
        # Forward rules, which are called now, may ask for the path of their module.
        asks = scopes.is_asked()
        for index, eqn in enumerate(jaxpr.eqns):
            here = (*key, index)
            chosen = here in self.replaced or here in self.inside
            chosen = chosen or (asks and _holds_forward_rule(eqn))
            if not chosen and not _reads_carried(eqn, env):
                if asks and bodies.has_forward_rule(eqn):
                    _run_unchanged(pending, env, last_use, index)
                    within = scopes.code_within(str(eqn.source_info.name_stack))
                    _run_unchanged([eqn], env, last_use, index + 1, within)
                    pending = []
                else:
                    pending.append(eqn)
                continue
            if not chosen and not _is_needed(eqn, last_use):
                continue  # so that nothing is made for a result that nobody reads
            _run_unchanged(pending, env, last_use, index)
            pending = []
            operands = [read(atom) for atom in eqn.invars]
            with _scope(str(eqn.source_info.name_stack)):
                results = self.results_of(eqn, operands, here)
            if results is None:
                for operand in operands:
                    carried.read(operand, eqn.primitive.name)
                pending.append(eqn)
                continue
            env.update(zip(eqn.outvars, results, strict=True))
        _run_unchanged(pending, env, last_use, len(jaxpr.eqns))
        results = [read(atom) for atom in jaxpr.outvars]
        return results if key else list(map(_as_array, results))

    def results_of(
        self, eqn: Any, operands: Sequence[Any], key: Key
    ) -> Sequence[Any] | None:
        """The results of one equation; None if it is to run as it was traced."""
        if key in self.replaced:
            return [self.replace(eqn, operands, key)]
        inside = inside_of(eqn)
        if inside is None:
            value = next((x for x in operands if _follows(x)), operands[0])
            run = functools.partial(run_equation, eqn)
            return value.apply(eqn.primitive.name, eqn.params, operands, run)
        if inside.kind in (Kind.CUSTOM, Kind.OPAQUE) and key not in self.inside:
            return None
        return self.rebuild(eqn, inside, operands, key)

    def rebuild(
        self, eqn: Any, inside: Inside, operands: Sequence[Any], key: Key
    ) -> Sequence[Any]:
        """The results of an equation with bodies, with its options kept."""
        rebuild = self._rebuilds.get(inside.kind)
        assert rebuild is not None, f"{inside.name} is opaque"
        return rebuild(self, eqn, inside, operands, key)

    def _call(self, eqn, inside, operands, key):
        # Evaluated in place: the caller compiles the whole, or runs eagerly, where
        # a new function would be compiled again at every call.
        operands = _constrained(operands, eqn.params.get("in_shardings"))
        with _scope(bodies.call_scope(eqn)):
            outs = self.run(inside.bodies[0].body, operands, (*key, 0))
        return _constrained(outs, eqn.params.get("out_shardings"))

    def _once(self, eqn, inside, operands, key):
        """A checkpoint or a branch: one of the bodies runs, one time."""
        kept = _passed_on(eqn, inside, operands)
        places = inside.bodies[0].operands
        arrays, restore = carried.unpacked([operands[place] for place in places])

        def function_of(number):
            def function(arrays, states):
                inputs = restore(arrays)
                outs, states = self._traced(inside, number, inputs, key, states)
                return _computed(outs, kept, inside.name), states

            return function

        functions = list(map(function_of, range(len(inside.bodies))))
        if inside.kind is Kind.COND:
            run = functools.partial(lax.switch, value_of(operands[0]), functions)
        else:
            policy, prevent_cse = eqn.params["policy"], eqn.params["prevent_cse"]
            run = jax.checkpoint(functions[0], policy=policy, prevent_cse=prevent_cse)
        return self._after(run(arrays, self._states_inside(key)), kept)

    def _scan(self, eqn, inside, operands, key):
        first, kept, iterate = self._loop(eqn, inside, operands, key)
        scanned = operands[inside.carry.stop :]
        cuts = [x.sliced() if isinstance(x, Carried) else None for x in scanned]
        arrays = [
            carried.read(x, inside.name) if cut is None else tuple(cut[0])
            for x, cut in zip(scanned, cuts, strict=True)
        ]
        # What has something of its own for each layer.
        each = [
            at for at in self.inside.get(key, ()) if self.replaced[at].scans[self.depth]
        ]
        given = {at: self.given[at] for at in each if at in self.given}
        held, structure = jax.tree.flatten(given)
        unique = {id(array): array for array in held}
        states = self._states_inside(key)
        names = states.keys() & {self.replaced[at].name for at in each}
        layers = {name: states.pop(name) for name in names}

        def function(carry, slices):
            (varying, states), (slices, values, layer) = carry, slices
            slices = [
                slice_ if cut is None else cut[1](*slice_)
                for slice_, cut in zip(slices, cuts, strict=True)
            ]
            outer = self.given, self.depth
            slice_of = dict(zip(unique, values, strict=True))
            layer_of = structure.unflatten(slice_of[id(array)] for array in held)
            self.given = {**self.given, **layer_of}
            self.depth += 1
            try:
                outs, after = iterate(0, varying, {**states, **layer}, slices)
            finally:
                self.given, self.depth = outer
            outs = _computed(outs, kept, inside.name)
            states, layer = ({n: after[n] for n in part} for part in (states, layer))
            return (outs[: len(first)], states), (outs[len(first) :], layer)

        (varying, states), (stacked, layers) = lax.scan(
            function,
            (first, states),
            (arrays, list(unique.values()), layers),
            length=eqn.params["length"],
            reverse=eqn.params["reverse"],
            unroll=eqn.params["unroll"],
            _split_transpose=eqn.params.get("_split_transpose", False),
        )
        return self._after(([*varying, *stacked], states | layers), kept)

    def _while_loop(self, eqn, inside, operands, key):
        first, kept, iterate = self._loop(eqn, inside, operands, key)

        def test(carry):
            outs, _ = iterate(0, carry[0], {})
            return value_of(outs[0])

        def function(carry):
            outs, states = iterate(1, *carry)
            return _computed(outs, kept, inside.name), states

        results = lax.while_loop(test, function, (first, self._states_inside(key)))
        return self._after(results, kept)

    def _shard_map(self, eqn, inside, operands, key):
        params, everywhere = eqn.params, jax.sharding.PartitionSpec()
        within = [at for at in self.inside.get(key, ()) if at in self.given]
        given = {at: self.given[at] for at in within}

        def function(arrays, states, given):
            outer, self.given = self.given, {**self.given, **given}
            try:
                outs, states = self._traced(inside, 0, arrays, key, states)
            finally:
                self.given = outer
            return list(map(value_of, outs)), states

        # Whole arrays are transformed, not shards: a shard has a range of its own.
        arrays = [carried.read(x, inside.name) for x in operands]
        results = jax.shard_map(
            function,
            mesh=params["mesh"],
            in_specs=(list(params["in_specs"]), everywhere, everywhere),
            out_specs=(list(params["out_specs"]), everywhere),
            axis_names=set(jax_versions.shard_map_axes(params)),
            check_vma=params["check_vma"],
        )(arrays, self._states_inside(key), given)
        return self._after(results, {})

    def _loop(self, eqn, inside, operands, key):
        """What is common to loops.

        Returns:
          The carry that they start with; what is passed on; and a function that runs
          one of their bodies, once, from a carry, the states before, and slices.
        """
        start, stop = inside.carry.start, inside.carry.stop
        kept = _passed_on(eqn, inside, operands)
        # What a loop reads as a whole in each iteration is transformed once, before it.
        constants = [x if _follows(x) else value_of(x) for x in operands[:stop]]
        varying = [place for place in inside.carry if place - start not in kept]

        def iterate(number, carry, states, slices=()):
            values = [*_entering(constants), *slices]
            for place, value in zip(varying, carry, strict=True):
                values[place] = value
            inputs = [values[place] for place in inside.bodies[number].operands]
            return self._traced(inside, number, inputs, key, states)

        first = [carried.read(constants[place], inside.name) for place in varying]
        return first, kept, iterate

    def _traced(self, inside, number, inputs, key, states):
        """The results of a body in a trace of its own, and the states after it."""
        outer, self.states = self.states, dict(states)
        try:
            with self.once.in_new_trace():
                outs = self.run(inside.bodies[number].body, inputs, (*key, number))
            return outs, self.states
        finally:
            self.states = outer

    def _states_inside(self, key) -> dict[str, Any]:
        """The parts of the state that are written inside of an equation."""
        if not self.states:
            return {}
        inside = self.inside.get(key, ())
        names = dict.fromkeys(self.replaced[at].name for at in inside)
        return {name: self.states[name] for name in names}

    def _after(self, results, kept):
        """All the results of an equation, from those computed and the states."""
        outs, states = results
        self.states |= states
        rest = iter(outs)
        return [
            kept[index] if index in kept else next(rest)
            for index in range(len(outs) + len(kept))
        ]

    _rebuilds: ClassVar = {
        Kind.CALL: _call,
        Kind.REMAT: _once,
        Kind.SCAN: _scan,
        Kind.WHILE: _while_loop,
        Kind.COND: _once,
        Kind.SHARD_MAP: _shard_map,
    }


class _Replacement(Evaluation):
    def __init__(self, ops, handler, given, once):
        super().__init__(ops, given, {})
        self.handler = handler
        self.once = once

    def replace(self, eqn, operands, key):
        operands = [x if _follows(x) else value_of(x) for x in operands]

        def run(*values):
            return run_equation(
                eqn, *(carried.read(value, eqn.primitive.name) for value in values)
            )[0]

        return self.handler(self.replaced[key], operands, run, self.given.get(key))


@contextlib.contextmanager
def _scope(name: str) -> Iterator[None]:
    if not name:  # such a scope would still leave a slash
        yield
        return
    path = scopes.within(name) if scopes.is_asked() else contextlib.nullcontext()
    with path, jax.named_scope(name):
        yield


def _holds_forward_rule(eqn) -> bool:
    """Whether there is one inside of an equation that can be rebuilt."""
    inside = inside_of(eqn)
    if inside is None or inside.kind in (Kind.CUSTOM, Kind.OPAQUE):
        return False
    return any(
        bodies.has_forward_rule(inner)
        for part in inside.bodies
        for _, inner, _ in bodies.equations(part.body, lambda *_: True)
    )


def _as_array(result: Any) -> Any:
    # JAX holds a result that is a constant as an array of NumPy or as a number.
    constant = isinstance(result, np.ndarray | np.generic | int | float | complex)
    return jnp.asarray(result) if constant else result


def _reads_carried(eqn, env) -> bool:
    """Whether an equation reads what says itself what becomes of it."""
    constrains = eqn.primitive.name == carried.CONSTRAINT
    read = (env.get(x) for x in eqn.invars if not isinstance(x, jex.Literal))
    return any(_follows(x) or (constrains and isinstance(x, Carried)) for x in read)


def _is_needed(eqn, last_use) -> bool:
    return bool(eqn.effects) or any(var in last_use for var in eqn.outvars)


def _entering(values: Sequence[Any]) -> list[Any]:
    """What the body of a loop reads, each time that it is traced.

    The array that a `Carried` stands for is made at most once; made within the body
    it belongs to that trace alone, so each trace gets a `Carried` of its own.
    """
    return [carried.inside(x, carried.arrays_of(x)) for x in values]


def _constrained(values, shardings):
    """The operands or results of a `jit`, sharded as it says."""
    pairs = zip(values, shardings or [None] * len(values), strict=True)
    return [
        carried.constrained(x, sharding)
        if jax_versions.explicit_sharding(sharding)
        else x
        for x, sharding in pairs
    ]


def _kept(operands, find):
    """What is handed on as it came and is `Carried`, by the index of the result.

    Args:
      operands: the operands.
      find: gives for each result the index of the operand that it is, or None.
    """
    if not any(isinstance(operand, Carried) for operand in operands):
        return {}
    return {
        index: operands[place]
        for index, place in enumerate(find())
        if place is not None and isinstance(operands[place], Carried)
    }


def _passed_on(eqn, inside, operands):
    return _kept(operands, lambda: passed.passed_on(eqn, inside))


def _computed(outs, kept, primitive):
    """The results of a body that it does not just pass on, as arrays."""
    return [
        carried.read(out, primitive)
        for index, out in enumerate(outs)
        if index not in kept
    ]


def _last_uses(jaxpr: Any) -> dict[Any, int]:
    """The index of the last equation that reads each variable, or behind the last."""
    reads = [*(eqn.invars for eqn in jaxpr.eqns), jaxpr.outvars]
    return {
        atom: index
        for index, atoms in enumerate(reads)
        for atom in atoms
        if not isinstance(atom, jex.Literal)
    }


def run_equation(eqn: Any, *values: Any) -> list[Any]:
    """The results of an equation, from arrays for its operands."""
    # Literals cannot be replaced in an equation, and a variable may be repeated
    # (`x @ x`), so all operands have names of their own.
    names = [jex.Var(atom.aval) for atom in eqn.invars]
    call = jax_versions.without_scope(eqn.replace(invars=names))
    return jax_versions.evaluate_equations([call], names, eqn.outvars, values)


def _run_unchanged(equations, env, last_use, end, within=None) -> None:
    """Runs consecutive equations as traced.

    Args:
      equations: the equations.
      env: the values of variables, which gets those that are computed.
      last_use: see `_last_uses`.
      end: the index after the last of them.
      within: a context that says where they are, if that is known.
    """
    if not equations:
        return
    made: dict[Any, None] = {}
    inputs: dict[Any, None] = {}
    for eqn in equations:
        for atom in eqn.invars:
            if not isinstance(atom, jex.Literal) and atom not in made:
                inputs[atom] = None
        made.update(dict.fromkeys(eqn.outvars))
    outputs = [var for var in made if last_use.get(var, -1) >= end]
    if within is None:
        asks = scopes.is_asked()
        within = scopes.unknown() if asks else contextlib.nullcontext()
    with within:
        values = jax_versions.evaluate_equations(
            equations, list(inputs), outputs, [value_of(env[var]) for var in inputs]
        )
    env.update(zip(outputs, values, strict=True))
