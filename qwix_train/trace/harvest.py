"""Reads values out of the middle of a traced step, whatever stands around them.

A value that a model call tags with `tag` (a public identity operation of JAX) keeps
its tag through `grad`, `remat`, `scan`, `vmap` and `jit`. `harvest` runs a whole traced
step again and hands every tagged value to an update of a state that belongs to its tag.
The state is carried through loops and branches as any array would be; where a `scan`
goes over the layers of a model, each layer has its own slice of it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jax.ad_checkpoint import checkpoint_name

from qwix_train.trace import bodies, jax_versions
from qwix_train.trace.bodies import Key, Kind
from qwix_train.trace.evaluate import Evaluation

_PREFIX = "qwix_train:"
_BACKWARD = "b"

# update(name, value, state) -> state
Update = Callable[[str, Any, Any], Any]


def tag(
    value: Any,
    name: str,
    layers: Sequence[bool] = (),
    *,
    backward: bool = False,
    joined: Collection[str] = (),
) -> Any:
    """Tags a value, to be found by `harvest`.

    Args:
      value: an array.
      name: the name of its state.
      layers: for each `scan` of the model around the value, outermost first, whether it
        goes over layers, each with a state of its own.
      backward: whether it is computed on the way back alone. What a checkpoint computes
        again for a derivative is left out, and this is not.
      joined: the axes of a mesh along which what is made of the value for its state is
        the same: inside of a `shard_map` over other axes it cannot be collected.
    """
    code = "".join("01"[layer] for layer in layers) + _BACKWARD * backward
    code = ",".join((code, *joined))
    return checkpoint_name(value, f"{_PREFIX}{code}:{name}")


def name_of(eqn: Any) -> str | None:
    """The name of the tag that an equation is, or None."""
    found = _parse(eqn)
    return None if found is None else found.name


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
        found.setdefault(tag.name, tuple(filter(None, tag.scans)))
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
    run = _Harvest(dict(_tags(body)), states, update)
    return run.run(body, inputs, ()), run.states


class _Tag(NamedTuple):
    """A tag.

    Attributes:
      name: the name of its state.
      scans: the length of each `scan` around it, outermost first, if it goes over the
        layers of a model; 0 for any other.
      joined: the axes of a mesh along which what is made of it is the same.
    """

    name: str
    scans: tuple[int, ...]
    joined: tuple[str, ...]


class _Text(NamedTuple):
    """What the text of a tag says; see `tag`."""

    layers: tuple[bool, ...]
    backward: bool
    joined: tuple[str, ...]
    name: str


def _parse(eqn: Any) -> _Text | None:
    """What a tag says; None for any other equation."""
    text = eqn.params.get("name") if eqn.primitive.name == "name" else None
    if not isinstance(text, str) or not text.startswith(_PREFIX):
        return None
    code, _, name = text.removeprefix(_PREFIX).partition(":")
    code, *joined = code.split(",")
    layers = tuple(bit == "1" for bit in code.removesuffix(_BACKWARD))
    return _Text(layers, code.endswith(_BACKWARD), tuple(joined), name)


def _tags(
    body: jax_versions.Body, recomputed: bool = False
) -> Iterator[tuple[Key, _Tag]]:
    """Yields where each tag is, and the tag.

    Those that are computed again for a derivative are left out, unless asked for.
    """
    lengths: dict[Key, int] = {}
    again: set[Key] = set()
    for key, eqn, inside in bodies.equations(body, lambda eqn, inside: True):
        if inside is not None and inside.kind is Kind.SCAN:
            lengths[key] = eqn.params["length"]
        if inside is not None and _is_recomputed(eqn, inside):
            again.add(key)
        parsed = _parse(eqn)
        if parsed is None:
            continue
        places = [key[:n] for n in range(1, len(key), 2)]
        if not (recomputed or parsed.backward) and not again.isdisjoint(places):
            continue
        around = map(lengths.get, places)
        scans = [length for length in around if length is not None]
        others = len(scans) - len(parsed.layers)
        layers = zip(parsed.layers, scans[others:], strict=True)
        scans = (0,) * others + tuple(b * n for b, n in layers)
        yield key, _Tag(parsed.name, scans, parsed.joined)


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


class _Harvest(Evaluation):
    def __init__(self, tags, states, update):
        super().__init__(tags, {}, states)
        self.update = update

    def replace(self, eqn, operands, key):
        name, (value,) = self.replaced[key].name, operands
        if name not in self.states:
            raise ValueError(
                f"{name}: values cannot be collected in the condition of a loop."
            )
        self.states[name] = self.update(name, value, self.states[name])
        return value

    def rebuild(self, eqn, inside, operands, key):
        if inside.kind is Kind.CUSTOM:
            # A call like any other: it holds tags only in a step that is not
            # differentiated once more, as no model's op in it is rewritten.
            return self.run(inside.bodies[0].body, operands, (*key, 0))
        if inside.kind is Kind.OPAQUE:
            raise ValueError(
                f"Values cannot be collected inside of {inside.name}: use a step that "
                "calls the model outside of it."
            )
        if inside.kind is Kind.SHARD_MAP:
            self._check_joined(eqn, key)
        return super().rebuild(eqn, inside, operands, key)

    def _check_joined(self, eqn, key):
        """Complains of states that would differ between the devices of a mesh."""
        axes = jax_versions.shard_map_axes(eqn.params)
        for tag in map(self.replaced.__getitem__, self.inside[key]):
            if other := sorted(axes - set(tag.joined)):
                raise ValueError(
                    f"{tag.name}: inside of shard_map, each device has a range of its "
                    f"own. Join them over {', '.join(map(repr, other))}, by "
                    f"act_axis_names={tuple(sorted(axes))} in the rule (bwd_axis_names "
                    "for gradients), or use a step that calls the model outside of it."
                )
