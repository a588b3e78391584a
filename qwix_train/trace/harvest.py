"""Reads values out of the middle of a traced step, whatever stands around them.

A value that a model call tags with `tag` (a public identity operation of JAX) keeps
its tag through `grad`, `remat`, `scan`, `vmap` and `jit`. `harvest` runs a whole traced
step again and hands every tagged value to an update of a state that belongs to its tag.
The state is carried through loops and branches as any array would be; where a `scan`
goes over the layers of a model, each layer has its own slice of it.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core as jex

from qwix_train.trace import jax_versions
from qwix_train.trace.analyze import Key
from qwix_train.trace.evaluate import constrained, last_uses, run_unchanged

_PREFIX = "qwix_train:"

# update(name, value, state) -> state
Update = Callable[[str, Any, Any], Any]


def tag(value: Any, name: str, layers: Sequence[bool] = ()) -> Any:
    """Tags a value, to be found by `harvest`.

    Args:
      value: an array.
      name: the name of its state.
      layers: for each `scan` of the model around the value, outermost first, whether it
        goes over layers, each with a state of its own.
    """
    code = "".join("01"[layer] for layer in layers)
    return checkpoint_name(value, f"{_PREFIX}{code}:{name}")


def name_of(eqn: Any) -> str | None:
    """The name of the tag that an equation is, or None."""
    found = _parse(eqn)
    return None if found is None else found[1]


def check_not_batched(name: str, value: Any, ndim: int) -> None:
    """Complains of a value that `vmap` has given an axis of examples.

    Args:
      name: the name of its state.
      value: the value, as `harvest` has found it.
      ndim: the number of axes that it was tagged with.

    Raises:
      ValueError: if it has another number of axes.
    """
    if value.ndim != ndim:
        raise ValueError(
            f"{name}: the model is called inside of vmap, where values cannot be "
            "collected from it. Call it on the whole batch."
        )


def names_in(body: jax_versions.Body) -> dict[str, tuple[int, ...]]:
    """The tags in a traced step, each with the sizes of its axes of layers.

    Raises:
      ValueError: if a value is nowhere computed but where a derivative needs it again.
    """
    found: dict[str, tuple[int, ...]] = {}
    for (code, name), _, lengths in _find(body, (), ()):
        sizes = [
            n for layer, n in zip(code, _last(lengths, code), strict=True) if layer
        ]
        found.setdefault(name, tuple(sizes))
    for (_, name), _, _ in _find(body, (), (), recomputed=True):
        if name not in found:
            raise ValueError(
                f"{name}: its values cannot be collected, since all that is left of "
                "them is what jax.checkpoint computes again for a derivative. Take "
                "the checkpoint off, or collect in a step without a derivative."
            )
    return found


def harvest(
    body: jax_versions.Body,
    inputs: Sequence[Any],
    states: Mapping[str, Any],
    update: Update,
) -> tuple[list[Any], dict[str, Any]]:
    """Runs a traced step, and updates a state with each tagged value.

    Args:
      body: the traced step.
      inputs: a value for each of its inputs.
      states: a tree of arrays for each tag in it. Within layers that are scanned over,
        the arrays have an axis of layers, in front, for each of these scans.
      update: what a value makes of the state of its tag.

    Returns:
      The results of the step, and the updated states.
    """
    return _Harvester(body, update).run(body, inputs, dict(states), ())


def _last(items: Sequence[Any], code: Sequence[Any]) -> Sequence[Any]:
    return items[len(items) - len(code) :]


def _parse(eqn: Any) -> tuple[tuple[bool, ...], str] | None:
    """The code and the name of a tag; None for any other equation."""
    text = eqn.params.get("name") if eqn.primitive.name == "name" else None
    if not isinstance(text, str) or not text.startswith(_PREFIX):
        return None
    code, _, name = text.removeprefix(_PREFIX).partition(":")
    return tuple(bit == "1" for bit in code), name


def _find(body, key: Key, scans: tuple[tuple[Key, int], ...], recomputed=False):
    """Yields each tag, the keys of the scans around it, and their lengths.

    Those that are computed again for a derivative are left out, unless asked for.
    """
    for index, eqn in enumerate(body.jaxpr.eqns):
        here = (*key, index)
        parsed = _parse(eqn)
        if parsed is not None:
            yield parsed, tuple(k for k, _ in scans), tuple(n for _, n in scans)
            continue
        if not recomputed and _is_recomputed(eqn):
            continue
        around = scans
        if eqn.primitive.name == "scan":
            around = (*scans, (here, eqn.params["length"]))
        for number, inner in enumerate(_bodies(eqn)):
            yield from _find(inner, (*here, number), around, recomputed)


def _is_recomputed(eqn: Any) -> bool:
    """Whether an equation computes a forward again, on the way back through it.

    What JAX calls differentiated may be the forward, too: that of layers with a
    checkpoint each, in a `scan` that is in a checkpoint itself. There, nothing is
    computed for a second time.
    """
    return (
        eqn.primitive.name in jax_versions.REMAT
        and bool(eqn.params.get("differentiated"))
        and jax_versions.recomputes(jax_versions.call_body(eqn.params))
    )


def _bodies(eqn: Any) -> list[jax_versions.Body]:
    name, params = eqn.primitive.name, eqn.params
    if name in _CALLS:
        return [jax_versions.call_body(params)]
    if name == "scan":
        return [jax_versions.body_of(params["jaxpr"])]
    if name == "while":
        return [jax_versions.body_of(params[k]) for k in ("cond_jaxpr", "body_jaxpr")]
    if name == "cond":
        return [jax_versions.body_of(branch) for branch in params["branches"]]
    return jax_versions.bodies(params) if jax_versions.has_body(params) else []


# A function with a derivative of its own is a call like any other: it holds tags only
# in a step that is not differentiated once more, as no model's op in it is rewritten.
_CALLS = jax_versions.JIT | jax_versions.REMAT | {"custom_jvp_call", "custom_vjp_call"}


class _Harvester:
    def __init__(self, body: jax_versions.Body, update: Update):
        self.update = update
        # The tags below each equation; those below a scan over layers that has a slice
        # of the state for each.
        self.below: dict[Key, dict[str, None]] = collections.defaultdict(dict)
        self.sliced: dict[Key, set[str]] = collections.defaultdict(set)
        for (code, name), scans, _ in _find(body, (), ()):
            for key, layer in zip(_last(scans, code), code, strict=True):
                if layer:
                    self.sliced[key].add(name)
        self._index(body, ())

    def _index(self, body, key: Key) -> dict[str, None]:
        names: dict[str, None] = {}
        for index, eqn in enumerate(body.jaxpr.eqns):
            here = (*key, index)
            parsed = _parse(eqn)
            if parsed is not None:
                found = {parsed[1]: None}
            elif _is_recomputed(eqn):
                found = {}
            else:
                found = {}
                for number, inner in enumerate(_bodies(eqn)):
                    found |= self._index(inner, (*here, number))
            if found:
                self.below[here] = found
            names |= found
        return names

    def run(self, body, inputs, states, key: Key):
        jaxpr = body.jaxpr
        env: dict[Any, Any] = dict(zip(jaxpr.constvars, body.consts, strict=True))
        env.update(zip(jaxpr.invars, inputs, strict=True))

        def read(atom):
            return atom.val if isinstance(atom, jex.Literal) else env[atom]

        last_use = last_uses(jaxpr)
        pending: list[Any] = []
        for index, eqn in enumerate(jaxpr.eqns):
            here = (*key, index)
            if here not in self.below:
                pending.append(eqn)
                continue
            run_unchanged(pending, env, last_use, index)
            pending = []
            operands = [read(atom) for atom in eqn.invars]
            parsed = _parse(eqn)
            if parsed is not None:
                name = parsed[1]
                states[name] = self.update(name, operands[0], states[name])
                results = operands
            else:
                results, states = self.enter(eqn, operands, states, here)
            env.update(zip(eqn.outvars, results, strict=True))
        run_unchanged(pending, env, last_use, len(jaxpr.eqns))
        return [read(atom) for atom in jaxpr.outvars], states

    def enter(self, eqn, operands, states, key):
        name, params = eqn.primitive.name, eqn.params
        if name in _CALLS and name not in jax_versions.REMAT:
            body = jax_versions.call_body(params)
            operands = constrained(operands, params.get("in_shardings"))
            results, states = self.run(body, operands, states, (*key, 0))
            return constrained(results, params.get("out_shardings")), states
        inside = {n: states[n] for n in self.below[key]}
        if name in jax_versions.REMAT:
            results, inside = self.remat(params, operands, inside, key)
        elif name == "scan":
            results, inside = self.scan(params, operands, inside, key)
        elif name == "while":
            results, inside = self.loop(params, operands, inside, key)
        elif name == "cond":
            results, inside = self.branch(params, operands, inside, key)
        else:
            raise ValueError(
                f"Values cannot be collected inside of {name}: use a step that calls "
                "the model outside of it."
            )
        return results, {**states, **inside}

    def remat(self, params, operands, states, key):
        body = jax_versions.call_body(params)

        def function(operands, states):
            return self.run(body, operands, dict(states), (*key, 0))

        return jax.checkpoint(
            function, policy=params["policy"], prevent_cse=params["prevent_cse"]
        )(operands, states)

    def scan(self, params, operands, states, key):
        num_consts, num_carry = jax_versions.scan_parts(params)
        body = jax_versions.body_of(params["jaxpr"])
        start = num_consts + num_carry
        consts = operands[:num_consts]
        sliced = {n: s for n, s in states.items() if n in self.sliced[key]}
        carried = {n: s for n, s in states.items() if n not in sliced}

        def function(carry, slices):
            carry, carried = carry
            slices, sliced = slices
            outs, after = self.run(
                body, [*consts, *carry, *slices], {**carried, **sliced}, (*key, 0)
            )
            carry = outs[:num_carry], {n: after[n] for n in carried}
            return carry, (outs[num_carry:], {n: after[n] for n in sliced})

        (carry, carried), (stacked, sliced) = lax.scan(
            function,
            (operands[num_consts:start], carried),
            (operands[start:], sliced),
            length=params["length"],
            reverse=params["reverse"],
            unroll=params["unroll"],
            _split_transpose=params.get("_split_transpose", False),
        )
        return [*carry, *stacked], {**carried, **sliced}

    def loop(self, params, operands, states, key):
        num_cond, num_body = params["cond_nconsts"], params["body_nconsts"]
        condition = jax_versions.body_of(params["cond_jaxpr"])
        body = jax_versions.body_of(params["body_jaxpr"])
        cond_consts = operands[:num_cond]
        consts = operands[num_cond : num_cond + num_body]

        def test(carry):
            inputs = [*cond_consts, *carry[0]]
            outs, _ = self.run(condition, inputs, {}, (*key, 0))
            return outs[0]

        def function(carry):
            carry, states = carry
            outs, states = self.run(body, [*consts, *carry], states, (*key, 1))
            return outs, states

        return lax.while_loop(test, function, (operands[num_cond + num_body :], states))

    def branch(self, params, operands, states, key):
        index, *inputs = operands

        def make(number, body):
            def function(inputs, states):
                return self.run(body, inputs, dict(states), (*key, number))

            return function

        bodies = [jax_versions.body_of(branch) for branch in params["branches"]]
        branches = [make(number, body) for number, body in enumerate(bodies)]
        return lax.switch(index, branches, inputs, states)
