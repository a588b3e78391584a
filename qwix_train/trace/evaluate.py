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

from qwix_train.trace import jax_versions
from qwix_train.trace.analyze import Key, Op

# handler(op, operands, run) -> result. `run(*operands)` is the op itself.
Handler = Callable[[Op, Sequence[Any], Callable[..., Any]], Any]


class Deferred:
    """An input that a transform applies to, as late as possible.

    A quantized weight is made where it is first used: inside the body of a `remat`,
    so that it is not kept for the backward pass, and once per iteration of a `scan`
    over stacked layers, so that only one layer's is alive; but outside a loop whose
    every iteration reads the whole of it.

    Attributes:
      array: the untransformed input.
      transform: what to apply.
      per_iteration: what to apply to one slice of it along axis 0, where that gives
        a slice of the transformed whole; None where it does not.
    """

    def __init__(
        self,
        array: Any,
        transform: Callable[[Any], Any],
        per_iteration: Callable[[Any], Any] | None = None,
    ):
        self.array = array
        self.transform = transform
        self.per_iteration = per_iteration

    @functools.cached_property
    def value(self) -> Any:
        """The transformed input."""
        return self.transform(self.array)

    def inside(self, array: Any) -> Deferred:
        """The same input, within a body that receives it as `array`."""
        return Deferred(array, self.transform, self.per_iteration)


def evaluate(
    body: jax_versions.Body,
    inputs: Sequence[Any],
    ops: Mapping[Key, Op],
    handler: Handler,
) -> list[Any]:
    """Evaluates a body with some of its ops replaced.

    Args:
      body: the traced function.
      inputs: a value for each of its inputs: an array, or a `Deferred` one.
      ops: the ops to replace, by where they are.
      handler: called with each of them.

    Returns:
      The results of the body. An input that the body returns as it came is returned
      untransformed: a model that hands its params on hands on the user's.
    """
    touched = {key[:length] for key in ops for length in range(1, len(key))}
    outs = _Evaluator(ops, touched, handler).run(body, inputs, ())
    return _raw(outs)


def _value(value: Any) -> Any:
    return value.value if isinstance(value, Deferred) else value


class _Evaluator:
    def __init__(self, ops, touched, handler):
        self.ops = ops
        self.touched = touched
        self.handler = handler

    def run(self, body: jax_versions.Body, inputs: Sequence[Any], key: Key):
        jaxpr = body.jaxpr
        env: dict[Any, Any] = dict(zip(jaxpr.constvars, body.consts, strict=True))
        env.update(zip(jaxpr.invars, inputs, strict=True))

        def read(atom):
            return atom.val if isinstance(atom, jex.Literal) else env[atom]

        last_use = _last_uses(jaxpr)
        pending: list[Any] = []  # equations to run as they are, in one go
        for index, eqn in enumerate(jaxpr.eqns):
            here = (*key, index)
            if here not in self.ops and here not in self.touched:
                pending.append(eqn)
                continue
            _run_unchanged(pending, env, last_use, index)
            pending = []
            operands = [read(atom) for atom in eqn.invars]
            with _scope(str(eqn.source_info.name_stack)):
                if here in self.ops:
                    results = [self.replace(eqn, operands, here)]
                else:
                    results = self.rebuild(eqn, operands, here)
            env.update(zip(eqn.outvars, results, strict=True))
        _run_unchanged(pending, env, last_use, len(jaxpr.eqns))
        return [read(atom) for atom in jaxpr.outvars]

    def replace(self, eqn, operands, key):
        arrays = [_value(operand) for operand in operands]

        def run(*values):
            # Literals cannot be replaced in an equation, so all operands are named.
            names = [
                jex.Var(atom.aval) if isinstance(atom, jex.Literal) else atom
                for atom in _distinct(eqn.invars)
            ]
            call = jax_versions.without_scope(eqn.replace(invars=names))
            return jax_versions.evaluate_equations([call], names, eqn.outvars, values)[
                0
            ]

        return self.handler(self.ops[key], arrays, run)

    def rebuild(self, eqn, operands, key) -> list[Any]:
        """Runs an equation whose body holds ops to replace."""
        name, params = eqn.primitive.name, eqn.params
        if name in jax_versions.JIT:
            return self.rebuild_jit(params, operands, key)
        if name in jax_versions.REMAT:
            return self.rebuild_remat(params, operands, key)
        if name == "scan":
            return self.rebuild_scan(params, operands, key)
        if name == "while":
            return self.rebuild_while(params, operands, key)
        if name == "cond":
            return self.rebuild_cond(params, operands, key)
        if name == "shard_map":
            return self.rebuild_shard_map(params, operands, key)
        raise AssertionError(f"{name} is opaque: no op inside it can be replaced")

    def rebuild_jit(self, params, operands, key):
        # Evaluated in place: the caller compiles the whole, or runs eagerly, where
        # a new function would be compiled again at every call.
        def constrain(values, shardings):
            return [
                lax.with_sharding_constraint(_value(value), sharding)
                if jax_versions.explicit_sharding(sharding)
                else value
                for value, sharding in zip(values, shardings, strict=True)
            ]

        body = jax_versions.call_body(params)
        operands = constrain(
            operands, params.get("in_shardings", [None] * len(operands))
        )
        # The scope that a compiled call would have given to what is in it.
        with _scope(f"jit({params.get('name', '')})"):
            outs = self.run(body, operands, (*key, 0))
        return constrain(outs, params.get("out_shardings", [None] * len(outs)))

    def rebuild_remat(self, params, operands, key):
        body = jax_versions.call_body(params)

        def function(*arrays):
            outs = self.run(body, _inside(operands, arrays), (*key, 0))
            return [_value(out) for out in outs]

        results = jax.checkpoint(
            function, policy=params["policy"], prevent_cse=params["prevent_cse"]
        )(*_raw(operands))
        return _pass_on(body, operands, results)

    def rebuild_scan(self, params, operands, key):
        num_consts, num_carry = jax_versions.scan_parts(params)
        body = jax_versions.body_of(params["jaxpr"])
        start = num_consts + num_carry
        consts = [_value(x) for x in operands[:num_consts]]
        carry = [_value(x) for x in operands[num_consts:start]]
        scanned = [
            x if isinstance(x, Deferred) and x.per_iteration else _value(x)
            for x in operands[start:]
        ]

        def function(carry, slices):
            slices = [
                Deferred(slice_, x.per_iteration)
                if isinstance(x, Deferred) and x.per_iteration
                else slice_
                for x, slice_ in zip(scanned, slices, strict=True)
            ]
            outs = self.run(body, [*consts, *carry, *slices], (*key, 0))
            outs = [_value(out) for out in outs]
            return outs[:num_carry], outs[num_carry:]

        carry, stacked = lax.scan(
            function,
            carry,
            _raw(scanned),
            length=params["length"],
            reverse=params["reverse"],
            unroll=params["unroll"],
            _split_transpose=params.get("_split_transpose", False),
        )

        def unchanged(place, result):
            carried = result < num_carry and place == num_consts + result
            return carried or (result >= num_carry and place >= start)

        return _pass_on(body, operands, [*carry, *stacked], unchanged)

    def rebuild_while(self, params, operands, key):
        num_cond, num_body = params["cond_nconsts"], params["body_nconsts"]
        condition = jax_versions.body_of(params["cond_jaxpr"])
        body = jax_versions.body_of(params["body_jaxpr"])
        arrays = [_value(x) for x in operands]
        cond_consts, consts = arrays[:num_cond], arrays[num_cond : num_cond + num_body]

        def test(carry):
            return self.run(condition, [*cond_consts, *carry], (*key, 0))[0]

        def function(carry):
            return self.run(body, [*consts, *carry], (*key, 1))

        results = lax.while_loop(test, function, arrays[num_cond + num_body :])
        return _pass_on(
            body,
            operands[num_cond:],
            results,
            lambda place, result: place == num_body + result,
        )

    def rebuild_cond(self, params, operands, key):
        index, *inputs = operands

        def branch(number, body):
            def function(*arrays):
                outs = self.run(body, _inside(inputs, arrays), (*key, number))
                return [_value(out) for out in outs]

            return function

        bodies = [jax_versions.body_of(closed) for closed in params["branches"]]
        branches = [branch(i, body) for i, body in enumerate(bodies)]
        results = lax.switch(_value(index), branches, *_raw(inputs))
        passed = [_pass_on(body, inputs, results) for body in bodies]
        return [
            same[0] if all(x is same[0] for x in same) else result
            for result, *same in zip(results, *passed, strict=True)
        ]

    def rebuild_shard_map(self, params, operands, key):
        body = jax_versions.body_of(params["jaxpr"])

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
        )(*[_value(x) for x in operands])


def _scope(name: str):
    # A scope without a name would still leave a slash.
    return jax.named_scope(name) if name else contextlib.nullcontext()


def _pass_on(body, operands, results, unchanged=lambda place, result: True):
    """Results of a body, with the deferred inputs that it returns as they came.

    Args:
      body: the body.
      operands: what its inputs stand for outside of it.
      results: its results.
      unchanged: whether an input, by its index, is what a result holds outside.
    """
    places = {var: place for place, var in enumerate(body.jaxpr.invars)}

    def outside(index, var, result):
        place = None if isinstance(var, jex.Literal) else places.get(var)
        if place is None or not isinstance(operands[place], Deferred):
            return result
        return operands[place] if unchanged(place, index) else result

    return [
        outside(index, var, result)
        for index, (var, result) in enumerate(
            zip(body.jaxpr.outvars, results, strict=True)
        )
    ]


def _raw(values):
    return [x.array if isinstance(x, Deferred) else x for x in values]


def _inside(values, arrays):
    return [
        x.inside(array) if isinstance(x, Deferred) else array
        for x, array in zip(values, arrays, strict=True)
    ]


def _distinct(atoms):
    """The operands of an equation, with repeated variables (`x @ x`) told apart."""
    seen: set[int] = set()
    for atom in atoms:
        repeated = id(atom) in seen
        seen.add(id(atom))
        yield jex.Var(atom.aval) if repeated else atom


def _last_uses(jaxpr) -> dict[Any, int]:
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


def _run_unchanged(equations, env, last_use, end) -> None:
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
