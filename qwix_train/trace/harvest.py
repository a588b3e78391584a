"""Reads values out of the middle of a traced step, whatever stands around them.

A value that a model call tags with `tag` (a public identity operation of JAX) keeps
its tag through `grad`, `remat`, `scan`, `vmap` and `jit`. `harvest` runs a whole traced
step again and hands every tagged value to an update of a state that belongs to its tag.
The state is carried through loops and branches as any array would be; where a `scan`
goes over the layers of a model, each layer has its own slice of it.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core as jex

from qwix_train.trace import bodies, jax_versions
from qwix_train.trace.bodies import Key, Kind, inside_of
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
    for _, tag in _tags(body):
        found.setdefault(tag.name, tuple(tag.layers.values()))
    for _, tag in _tags(body, recomputed=True):
        if tag.name not in found:
            raise ValueError(
                f"{tag.name}: its values cannot be collected, since all that is left "
                "of them is what jax.checkpoint computes again for a derivative. Take "
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


class _Tag(NamedTuple):
    """A tag: the name of its state, and the scans over layers around it.

    Attributes:
      name: the name.
      layers: where each of these scans is, and its length, outermost first.
    """

    name: str
    layers: Mapping[Key, int]


def _parse(eqn: Any) -> tuple[tuple[bool, ...], str] | None:
    """The code and the name of a tag; None for any other equation."""
    text = eqn.params.get("name") if eqn.primitive.name == "name" else None
    if not isinstance(text, str) or not text.startswith(_PREFIX):
        return None
    code, _, name = text.removeprefix(_PREFIX).partition(":")
    return tuple(bit == "1" for bit in code), name


def _tags(
    body: jax_versions.Body, recomputed: bool = False
) -> Iterator[tuple[Key, _Tag]]:
    """Yields where each tag is, and the tag.

    Those that are computed again for a derivative are left out, unless asked for.
    """
    lengths: dict[Key, int] = {}

    def enters(eqn, inside):
        return recomputed or not _is_recomputed(eqn, inside)

    for key, eqn, inside in bodies.equations(body, enters):
        if inside is not None and inside.kind is Kind.SCAN:
            lengths[key] = eqn.params["length"]
        parsed = _parse(eqn)
        if parsed is not None:
            code, name = parsed
            around = [k for n in range(1, len(key), 2) if (k := key[:n]) in lengths]
            layers = [False] * (len(around) - len(code)) + list(code)
            scans = dict(zip(around, layers, strict=True))
            yield key, _Tag(name, {k: lengths[k] for k in around if scans[k]})


def _is_recomputed(eqn: Any, inside: bodies.Inside) -> bool:
    """Whether an equation computes a forward again, on the way back through it.

    What JAX calls differentiated may be the forward, too: that of layers with a
    checkpoint each, in a `scan` that is in a checkpoint itself. There, nothing is
    computed for a second time.
    """
    return (
        inside.kind is Kind.REMAT
        and bool(eqn.params.get("differentiated"))
        and any(
            jax_versions.is_recomputed(inner)
            for _, inner, _ in bodies.equations(
                inside.bodies[0].body, lambda eqn, inside: True
            )
        )
    )


class _Harvester:
    def __init__(self, body: jax_versions.Body, update: Update):
        self.update = update
        # The tags below each equation; those below a scan over layers that has a slice
        # of the state for each.
        self.below: dict[Key, dict[str, None]] = collections.defaultdict(dict)
        self.sliced: dict[Key, set[str]] = collections.defaultdict(set)
        for key, tag in _tags(body):
            for length in range(1, len(key) + 1, 2):
                self.below[key[:length]][tag.name] = None
            for scan in tag.layers:
                self.sliced[scan].add(tag.name)

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
        inside, params = inside_of(eqn), eqn.params
        assert inside is not None
        # A function with a derivative of its own is a call like any other: it holds
        # tags only in a step that is not differentiated once more, as no model's op in
        # it is rewritten.
        if inside.kind in (Kind.CALL, Kind.CUSTOM):
            body = inside.bodies[0].body
            operands = constrained(operands, params.get("in_shardings"))
            results, states = self.run(body, operands, states, (*key, 0))
            return constrained(results, params.get("out_shardings")), states
        below = {n: states[n] for n in self.below[key]}
        enter = {
            Kind.REMAT: self.remat,
            Kind.SCAN: self.scan,
            Kind.WHILE: self.loop,
            Kind.COND: self.branch,
        }.get(inside.kind)
        if enter is None:
            raise ValueError(
                f"Values cannot be collected inside of {inside.name}: use a step "
                " that calls the model outside of it."
            )
        results, below = enter(params, inside, operands, below, key)
        return results, {**states, **below}

    def remat(self, params, inside, operands, states, key):
        body = inside.bodies[0].body

        def function(operands, states):
            return self.run(body, operands, dict(states), (*key, 0))

        return jax.checkpoint(
            function, policy=params["policy"], prevent_cse=params["prevent_cse"]
        )(operands, states)

    def scan(self, params, inside, operands, states, key):
        body = inside.bodies[0].body
        num_consts, start = inside.carry.start, inside.carry.stop
        num_carry = start - num_consts
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

    def loop(self, params, inside, operands, states, key):
        (condition, _), (body, slots) = inside.bodies
        start = inside.carry.start
        cond_consts, consts = operands[: slots[0]], operands[slots[0] : start]

        def test(carry):
            inputs = [*cond_consts, *carry[0]]
            outs, _ = self.run(condition, inputs, {}, (*key, 0))
            return outs[0]

        def function(carry):
            carry, states = carry
            outs, states = self.run(body, [*consts, *carry], states, (*key, 1))
            return outs, states

        return lax.while_loop(test, function, (operands[start:], states))

    def branch(self, params, inside, operands, states, key):
        index, *inputs = operands

        def make(number, body):
            def function(inputs, states):
                return self.run(body, inputs, dict(states), (*key, number))

            return function

        branches = [make(n, body) for n, (body, _) in enumerate(inside.bodies)]
        return lax.switch(index, branches, inputs, states)
