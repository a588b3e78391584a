"""Runs a traced function again, with chosen operations replaced.

`evaluate` interprets a jaxpr. Equations that nothing is to change run exactly as
they were traced; the chosen ones are handed to a handler; and an operation with a
body (`scan`, `cond`, `remat` and so on) that holds a chosen one is rebuilt around
the body's own evaluation, with its options kept. What comes out is an ordinary
traced computation again, so it can be differentiated, batched, sharded and compiled.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax import lax
from jax.extend import core as jex

from qwix_train.core.operands import with_sharding
from qwix_train.trace import bodies, carried, jax_versions, passed
from qwix_train.trace.analyze import Op
from qwix_train.trace.bodies import Key, Kind, inside_of
from qwix_train.trace.carried import Carried

# handler(op, operands, run, given) -> result. `run(*operands)` is the op itself, and
# `given` what `evaluate` was given for it.
Handler = Callable[[Op, Sequence[Any], Callable[..., Any], Any], Any]


def evaluate(
    body: jax_versions.Body,
    inputs: Sequence[Any],
    ops: Mapping[Key, Op],
    handler: Handler,
    given: Mapping[Key, Any] | None = None,
) -> list[Any]:
    """Evaluates a body with some of its ops replaced.

    Args:
      body: the traced function.
      inputs: a value for each of its inputs: an array, or a `Carried` one.
      ops: the ops to replace, by where they are.
      handler: called with each of them.
      given: a tree of arrays for an op, by where it is, that its handler needs. Of an
        op within scans over layers, an axis of layers for each of these stands in
        front, and the handler gets the slice of the layer.

    Returns:
      The results of the body. For an input that the body returns as it came this is
      what it says is `returned`: a model that hands its params on hands on the user's.
    """
    touched = {key[:length] for key in ops for length in range(1, len(key))}
    kept = _held(inputs, passed.sources(body))
    outs = _Evaluator(ops, touched, handler, given or {}).run(body, inputs, ())
    outs = [kept.get(index, out) for index, out in enumerate(outs)]
    return [x.returned if isinstance(x, Carried) else x for x in outs]


def _value(value: Any) -> Any:
    return value.value if isinstance(value, Carried) else value


def _read(value: Any, primitive: str) -> Any:
    """The array that a value stands for, read for an equation of a primitive."""
    if isinstance(value, Carried):
        value.read_by(primitive)
    return _value(value)


def _follows(value: Any) -> bool:
    return isinstance(value, Carried) and value.follows


class _Evaluator:
    def __init__(self, ops, touched, handler, given):
        self.ops = ops
        self.touched = touched
        self.handler = handler
        self.given = given
        self.depth = 0  # of scans

    def run(self, body: jax_versions.Body, inputs: Sequence[Any], key: Key):
        jaxpr = body.jaxpr
        env: dict[Any, Any] = dict(zip(jaxpr.constvars, body.consts, strict=True))
        env.update(zip(jaxpr.invars, inputs, strict=True))

        def read(atom):
            return atom.val if isinstance(atom, jex.Literal) else env[atom]

        last_use = last_uses(jaxpr)
        pending: list[Any] = []  # equations to run as they are, in one go
        for index, eqn in enumerate(jaxpr.eqns):
            here = (*key, index)
            chosen = here in self.ops or here in self.touched
            if not chosen and not _reads_carried(eqn, env):
                pending.append(eqn)
                continue
            if not chosen and not _is_needed(eqn, last_use):
                continue  # so that nothing is made for a result that nobody reads
            run_unchanged(pending, env, last_use, index)
            pending = []
            operands = [read(atom) for atom in eqn.invars]
            with _scope(str(eqn.source_info.name_stack)):
                results = self.results_of(eqn, operands, here)
            if results is None:
                for operand in operands:
                    _read(operand, eqn.primitive.name)
                pending.append(eqn)
                continue
            env.update(zip(eqn.outvars, results, strict=True))
        run_unchanged(pending, env, last_use, len(jaxpr.eqns))
        return [read(atom) for atom in jaxpr.outvars]

    def results_of(self, eqn, operands, key) -> list[Any] | None:
        """The results of one equation; None if it is to run as it was traced."""
        if key in self.ops:
            return [self.replace(eqn, operands, key)]
        name, inside = eqn.primitive.name, inside_of(eqn)
        rebuild = None if inside is None else _REBUILDS.get(inside.kind)
        if rebuild is not None:
            return rebuild(self, eqn, inside, operands, key)
        assert key not in self.touched, f"{name} is opaque"
        if inside is not None:
            return None
        carried = next(x for x in operands if _follows(x))
        run = functools.partial(run_equation, eqn)
        return carried.apply(name, eqn.params, operands, run)

    def replace(self, eqn, operands, key):
        operands = [x if _follows(x) else _value(x) for x in operands]

        def run(*values):
            return run_equation(
                eqn, *(_read(value, eqn.primitive.name) for value in values)
            )[0]

        return self.handler(self.ops[key], operands, run, self.given.get(key))

    def rebuild_call(self, eqn, inside, operands, key):
        # Evaluated in place: the caller compiles the whole, or runs eagerly, where
        # a new function would be compiled again at every call.
        operands = constrained(operands, eqn.params.get("in_shardings"))
        # The scope that a compiled call would have given to what is in it.
        with _scope(bodies.call_scope(eqn)):
            outs = self.run(inside.bodies[0].body, operands, (*key, 0))
        return constrained(outs, eqn.params.get("out_shardings"))

    def rebuild_remat(self, eqn, inside, operands, key):
        body, params = inside.bodies[0].body, eqn.params
        kept = _passed_on(eqn, inside, operands)
        arrays, restore = carried.unpacked(operands)

        def function(*arrays):
            outs = self.run(body, restore(arrays), (*key, 0))
            return _computed(outs, kept, inside.name)

        results = jax.checkpoint(
            function, policy=params["policy"], prevent_cse=params["prevent_cse"]
        )(*arrays)
        return _with_kept(results, kept)

    def rebuild_scan(self, eqn, inside, operands, key):
        params, name = eqn.params, inside.name
        body = inside.bodies[0].body
        num_consts, start = inside.carry.start, inside.carry.stop
        num_carry = start - num_consts
        consts = list(map(_loop_constant, operands[:num_consts]))
        carry = list(map(_loop_constant, operands[num_consts:start]))
        scanned = operands[start:]
        cuts = [x.sliced() if isinstance(x, Carried) else None for x in scanned]
        kept = _passed_on(eqn, inside, operands)
        in_carry = [i for i in range(num_carry) if i not in kept]
        per_layer = {
            at: value
            for at, value in self.given.items()
            if at[: len(key)] == key and self.ops[at].scans[self.depth]
        }

        def function(varying, slices):
            slices, values = slices
            given = dict(zip(per_layer, values, strict=True))
            inner = _entering(carry)
            for place, value in zip(in_carry, varying, strict=True):
                inner[place] = value
            inputs = [
                slice_ if cut is None else cut[1](*slice_)
                for slice_, cut in zip(slices, cuts, strict=True)
            ]
            with self.within_scan(given):
                outs = self.run(body, [*_entering(consts), *inner, *inputs], (*key, 0))
            computed = _computed(outs, kept, name)
            return computed[: len(in_carry)], computed[len(in_carry) :]

        varying, stacked = lax.scan(
            function,
            [_read(carry[i], name) for i in in_carry],
            (
                [
                    _read(x, name) if cut is None else tuple(cut[0])
                    for x, cut in zip(scanned, cuts, strict=True)
                ],
                list(per_layer.values()),
            ),
            length=params["length"],
            reverse=params["reverse"],
            unroll=params["unroll"],
            _split_transpose=params.get("_split_transpose", False),
        )
        return _with_kept([*varying, *stacked], kept)

    @contextlib.contextmanager
    def within_scan(self, given):
        """While the body of a scan is evaluated, with what its ops are given there."""
        before = self.given
        self.given, self.depth = {**before, **given}, self.depth + 1
        try:
            yield
        finally:
            self.given, self.depth = before, self.depth - 1

    def rebuild_while(self, eqn, inside, operands, key):
        name = inside.name
        (condition, _), (body, slots) = inside.bodies
        num_cond, start = slots[0], inside.carry.start
        constants = list(map(_loop_constant, operands))
        cond_consts = constants[:num_cond]
        consts, carry = constants[num_cond:start], constants[start:]
        kept = _passed_on(eqn, inside, operands)
        in_carry = [i for i in range(len(carry)) if i not in kept]

        def whole(varying):
            inner = _entering(carry)
            for place, value in zip(in_carry, varying, strict=True):
                inner[place] = value
            return inner

        def test(varying):
            inputs = [*_entering(cond_consts), *whole(varying)]
            return _value(self.run(condition, inputs, (*key, 0))[0])

        def function(varying):
            inputs = [*_entering(consts), *whole(varying)]
            outs = self.run(body, inputs, (*key, 1))
            return _computed(outs, kept, name)

        start = [_read(carry[i], name) for i in in_carry]
        results = lax.while_loop(test, function, start)
        return _with_kept(results, kept)

    def rebuild_cond(self, eqn, inside, operands, key):
        index, *inputs = operands
        kept = _passed_on(eqn, inside, operands)
        arrays, restore = carried.unpacked(inputs)

        def branch(number, body):
            def function(*arrays):
                outs = self.run(body, restore(arrays), (*key, number))
                return _computed(outs, kept, inside.name)

            return function

        branches = [branch(i, body) for i, (body, _) in enumerate(inside.bodies)]
        results = lax.switch(_value(index), branches, *arrays)
        return _with_kept(results, kept)

    def rebuild_shard_map(self, eqn, inside, operands, key):
        body, params = inside.bodies[0].body, eqn.params

        def function(*arrays):
            return [_value(out) for out in self.run(body, arrays, (*key, 0))]

        # Whole arrays are transformed, not shards: a shard has a range of its own.
        return jax.shard_map(
            function,
            mesh=params["mesh"],
            in_specs=tuple(params["in_specs"]),
            out_specs=list(params["out_specs"]),
            axis_names=set(params["newly_manual_axes"]),
            check_vma=params["check_vma"],
        )(*[_read(x, inside.name) for x in operands])


_REBUILDS = {
    Kind.CALL: _Evaluator.rebuild_call,
    Kind.REMAT: _Evaluator.rebuild_remat,
    Kind.SCAN: _Evaluator.rebuild_scan,
    Kind.WHILE: _Evaluator.rebuild_while,
    Kind.COND: _Evaluator.rebuild_cond,
    Kind.SHARD_MAP: _Evaluator.rebuild_shard_map,
}


def _scope(name: str):
    # A scope without a name would still leave a slash.
    return jax.named_scope(name) if name else contextlib.nullcontext()


def _reads_carried(eqn, env) -> bool:
    return any(
        not isinstance(atom, jex.Literal) and _follows(env.get(atom))
        for atom in eqn.invars
    )


def _is_needed(eqn, last_use) -> bool:
    return bool(eqn.effects) or any(var in last_use for var in eqn.outvars)


def _loop_constant(value: Any) -> Any:
    """What a loop reads as a whole in each iteration: transformed once, before it."""
    return value if _follows(value) else _value(value)


def _entering(values: Sequence[Any]) -> list[Any]:
    """What the body of a loop reads, each time that it is traced.

    The array that a `Carried` stands for is made at most once; made within the body
    it belongs to that trace alone, so each trace gets a `Carried` of its own.
    """
    return [x.inside(x.arrays) if isinstance(x, Carried) else x for x in values]


def constrained(values, shardings):
    """The operands or results of a `jit`, sharded as it says."""
    return [
        value
        if not jax_versions.explicit_sharding(sharding)
        else value.constrained(sharding)
        if isinstance(value, Carried)
        else with_sharding(value, sharding)
        for value, sharding in zip(
            values, shardings or [None] * len(values), strict=True
        )
    ]


def _held(operands, places):
    """Of the results that are operands as they came, those that are `Carried`.

    Args:
      operands: the operands.
      places: for each result the index of the operand that it is, or None.
    """
    return {
        index: operands[place]
        for index, place in enumerate(places)
        if place is not None and isinstance(operands[place], Carried)
    }


def _passed_on(eqn, inside, operands):
    """The `Carried` operands that an equation returns, by the index of the result."""
    if not any(isinstance(operand, Carried) for operand in operands):
        return {}
    return _held(operands, passed.passed_on(eqn, inside))


def _computed(outs, kept, primitive):
    """The results of a body that it does not just pass on, as arrays."""
    return [
        _read(out, primitive) for index, out in enumerate(outs) if index not in kept
    ]


def _with_kept(results, kept):
    """All results of a body: those that were computed, and those passed on."""
    rest = iter(results)
    return [
        kept[index] if index in kept else next(rest)
        for index in range(len(results) + len(kept))
    ]


def _distinct(atoms):
    """The operands of an equation, with repeated variables (`x @ x`) told apart."""
    seen: set[int] = set()
    for atom in atoms:
        repeated = id(atom) in seen
        seen.add(id(atom))
        yield jex.Var(atom.aval) if repeated else atom


def last_uses(jaxpr: Any) -> dict[Any, int]:
    """The index of the last equation that reads each variable."""
    last: dict[Any, int] = {}
    for index, eqn in enumerate(jaxpr.eqns):
        for atom in eqn.invars:
            if not isinstance(atom, jex.Literal):
                last[atom] = index
    for atom in jaxpr.outvars:
        if not isinstance(atom, jex.Literal):
            last[atom] = len(jaxpr.eqns)
    return last


def run_equation(eqn: Any, *values: Any) -> list[Any]:
    """The results of an equation, from arrays for its operands."""
    # Literals cannot be replaced in an equation, so all operands are named.
    names = [
        jex.Var(atom.aval) if isinstance(atom, jex.Literal) else atom
        for atom in _distinct(eqn.invars)
    ]
    call = jax_versions.without_scope(eqn.replace(invars=names))
    return jax_versions.evaluate_equations([call], names, eqn.outvars, values)


def run_unchanged(equations, env, last_use, end) -> None:
    """Runs consecutive equations as traced; `end` is the index after the last."""
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
    values = jax_versions.evaluate_equations(
        equations, list(inputs), outputs, [_value(env[var]) for var in inputs]
    )
    env.update(zip(outputs, values, strict=True))
