"""Traces a call of a function: which of its inputs are params, and what it does."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from qwix_train.trace import (
    analyze,
    carried,
    evaluate,
    jax_versions,
    passed,
    provenance,
    scopes,
)

# The path of a param from the key path of a leaf within one argument, or None where
# the leaf is not a param.
ParamName = Callable[[tuple[Any, ...]], tuple[str, ...] | None]


@dataclasses.dataclass(frozen=True)
class StoredType:
    """How to trace a function that finds objects of a class where it expects arrays.

    Attributes:
      unbox: the object without metadata, from one as it stands among the params.
      aval: the shape and dtype of the array that an unboxed object stands for.
      box: what the function receives for an object: an array, with the metadata.
    """

    unbox: Callable[[Any], Any]
    aval: Callable[[Any], jax.ShapeDtypeStruct]
    box: Callable[[Any, Any], Any]


_stored_types: dict[type, StoredType] = {}


def register_stored_type(cls: type, stored_type: StoredType) -> None:
    """Lets objects of a class stand for arrays among the params of traced functions."""
    _stored_types[cls] = stored_type


def is_stored(leaf: Any) -> bool:
    """Whether an object stands for an array, as `register_stored_type` says."""
    return type(leaf) in _stored_types


@dataclasses.dataclass(frozen=True)
class Param:
    """A param of a traced call: its path and its value."""

    path: tuple[str, ...]
    value: Any


@dataclasses.dataclass(frozen=True)
class TracedCall:
    """One call of a function, traced.

    Attributes:
      body: the trace.
      inputs: the value of each input of the trace.
      params: for each input, the param that it is, or None.
      ops: the matrix products, convolutions and lookups in it.
      paths: for each input, its path if it is in the first argument, and has one.
      rebuild: gives the result of the call from the results of its body.
      module_path: where in a larger model the function stands.
      added: values next to the params that are no inputs, by path.
      make_rng: gives a random key of a stream of the model, by the name of the stream;
        None if it has no such stream.
      deterministic: whether the call says that the model is evaluated, not trained;
        None if it does not say.
      boxes: what Flax holds params in, where it holds more than the array, by path.
      held: for each input, whether it belongs to the model: a param, or another of its
        variables.
      method: the name of the method that was called.
      layer_axes: for params that a `scan` goes over, by path, the axes of layers.
      declares: whether the model has the param of a path by itself, as it came from its
        author; None where it does not say.
      seen_shapes: the shapes that modules see of params, by path. Transformations
        around them, such as `vmap`, take axes off.
      requests: the paths of modules whose code asked for a rule, and the names of ops
        that it asked for.
      own_stages: what becomes of the stages that a mode chooses for the call, where
        its params have some whatever the mode, such as adapters; see `stages.run`.
      once: what becomes of arrays that several ops read, for handlers of `run`.
      initializing: whether its params were just drawn at random, so that none is
        trained, and no range is known.
    """

    body: jax_versions.Body
    inputs: Sequence[Any]
    params: Sequence[Param | None]
    ops: Sequence[analyze.Op]
    paths: Sequence[tuple[str, ...] | None]
    rebuild: Callable[[Sequence[Any]], Any]
    module_path: str = ""
    added: Mapping[tuple[str, ...], Any] = dataclasses.field(default_factory=dict)
    make_rng: Callable[[str], Any] = lambda name: None
    deterministic: bool | None = None
    boxes: Mapping[tuple[str, ...], Any] = dataclasses.field(default_factory=dict)
    held: Sequence[bool] = ()
    method: str = "__call__"
    layer_axes: Mapping[tuple[str, ...], Collection[int]] = dataclasses.field(
        default_factory=dict
    )
    declares: Callable[[tuple[str, ...]], bool | None] = lambda path: None
    seen_shapes: Mapping[tuple[str, ...], Collection[tuple[int, ...]]] = (
        dataclasses.field(default_factory=dict)
    )
    requests: Sequence[tuple[str, str]] = ()
    own_stages: Callable[[Any], Any] | None = None
    once: evaluate.Once = dataclasses.field(default_factory=evaluate.Once)
    initializing: bool = False

    def run(
        self,
        replace: Sequence[analyze.Op],
        handler: evaluate.Handler,
        substitute: Callable[[Param], Any],
        given: Mapping[analyze.Key, Any] | None = None,
    ) -> Any:
        """The result of the call, with some ops and params replaced.

        Args:
          replace: the ops to hand to `handler`.
          handler: what to do in their place.
          substitute: what to evaluate in the place of a param, a `Carried` or an array;
            or None.
          given: see `evaluate.evaluate`.

        Raises:
          TypeError: if the call has stages of its own, which would be dropped.
        """
        if self.own_stages is not None:
            raise TypeError(
                "The params of this call have adapters, which TracedCall.run does not "
                "apply: override stages(traced, plan) of the mode, not transform."
            )
        inputs, plain = list(self.inputs), set()
        for index, param in enumerate(self.params):
            instead = None if param is None else substitute(param)
            if instead is not None:
                inputs[index] = instead
                if not isinstance(instead, carried.Carried):
                    plain.add(index)
        outs = evaluate.evaluate(
            self.body, inputs, {op.key: op for op in replace}, handler, given, self.once
        )
        if plain:  # what is handed on as it came comes out as it is stored
            for index, source in enumerate(passed.sources(self.body)):
                if source is not None and source in plain:
                    outs[index] = self.inputs[source]
        return self.rebuild(outs)

    @property
    def named(self) -> dict[tuple[str, ...], Any]:
        """The inputs that have a path, integers among them, and what was added."""
        pairs = zip(self.paths, self.inputs, strict=True)
        return {path: x for path, x in pairs if path is not None} | dict(self.added)

    @functools.cached_property
    def read(self) -> set[tuple[str, ...] | None]:
        """The paths of the inputs that it computes with, and does not just hand on."""
        return {self.paths[place] for place in passed.read(self.body)}

    def mapped_axes(self, param: Param) -> tuple[int, ...] | None:
        """The axes of a param that its module does not see, and no `scan` goes over.

        A `vmap` around the module goes over them.

        Returns:
          The axes; None if there are such, and the shapes do not tell which.
        """
        shape, scanned = param.value.shape, self.layer_axes.get(param.path, ())
        seen = self.seen_shapes.get(param.path, ())
        if len(seen) != 1 or len(inner := next(iter(seen))) == len(shape):
            return ()
        found = [
            tuple(axis for axis in range(len(shape)) if axis not in kept)
            for kept in itertools.combinations(range(len(shape)), len(inner))
            if tuple(shape[axis] for axis in kept) == inner
        ]
        mapped = [
            tuple(axis for axis in off if axis not in scanned)
            for off in found
            if set(scanned) <= set(off)
        ]
        return mapped[0] if len(mapped) == 1 else None

    def is_own(self, path: tuple[str, ...]) -> bool | None:
        """Whether the model itself has a param; None if that cannot be known.

        What it computes with is its own, and what another of its methods may read, too.
        """
        return True if path in self.read else self.declares(path)

    def with_inputs(self, inputs: Sequence[Any]) -> TracedCall:
        """The same call on other inputs, of the same shapes."""
        params = [
            Param(p.path, value) if p else None
            for p, value in zip(self.params, inputs, strict=True)
        ]
        return dataclasses.replace(self, params=params, inputs=inputs)

    def with_params(self, values: Mapping[tuple[str, ...], Any]) -> TracedCall:
        """The same call with other values, by path, for params, or next to them."""
        inputs = [
            values.get(p.path, value) if p else value
            for p, value in zip(self.params, self.inputs, strict=True)
        ]
        known = {p.path for p in self.params if p}
        added = {path: value for path, value in values.items() if path not in known}
        return dataclasses.replace(self.with_inputs(inputs), added=added)


def trace(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    param_name: ParamName,
    *,
    module_path: str = "",
    as_arrays: bool = True,
    num_held: int = 1,
) -> TracedCall:
    """Traces `function(*args)`.

    Arrays among the arguments, NumPy's, too, become inputs of the trace, as they do
    under `jit`. Everything else (flags, strings, Python and NumPy numbers, as in
    `model.apply(variables, x, train=True)`) keeps its value, so that the function may
    branch on it.

    Args:
      function: the function.
      args: its arguments; the first holds the params.
      param_name: see `ParamName`; called for the leaves of the first argument.
      module_path: where in a larger model the function stands.
      as_arrays: whether the function finds arrays in the place of stored params. One
        that calls models itself, such as a whole step, finds them as they are.
      num_held: how many arguments hold what belongs to the model: variables other than
        params may come in one of their own.
    """
    is_leaf = is_stored if as_arrays else None
    flat, tree = jax.tree_util.tree_flatten_with_path(args, is_leaf=is_leaf)
    leaves = [leaf for _, leaf in flat]
    inputs, params, paths, held, slots = [], [], [], [], []
    for index, (key_path, leaf) in enumerate(flat):
        first = key_path[0].idx == 0
        stored = is_stored(leaf)
        if not (stored or _is_input(leaf, first)):
            continue
        slots.append(index)
        held.append(key_path[0].idx < num_held)
        if stored:
            leaf = _stored_types[type(leaf)].unbox(leaf)
        elif not first and isinstance(leaf, np.ndarray):
            leaf = jnp.asarray(leaf)  # in a dtype that JAX has
        inputs.append(leaf)
        name = param_name(key_path[1:]) if first else None
        if name is None and stored:
            name = param_path(key_path)
        paths.append(name)
        is_param = stored or jnp.issubdtype(leaf.dtype, jnp.floating)
        params.append(
            Param(name, inputs[-1]) if name is not None and is_param else None
        )
    layout: list[Any] = []

    def flat_function(*values):
        filled = list(leaves)
        for slot, value in zip(slots, values, strict=True):
            leaf = leaves[slot]
            if is_stored(leaf):
                value = _stored_types[type(leaf)].box(leaf, value)
            filled[slot] = value
        # Results that are not arrays are kept as they are, and arrays are not, so that
        # the tracers of the trace are not held.
        outs, *layout[:] = divided(
            function(*jax.tree.unflatten(tree, filled)), is_array
        )
        return outs

    avals = [
        _stored_types[type(value)].aval(value) if is_stored(value) else value
        for value in inputs
    ]
    with scopes.recording() as requests:
        closed = jax.make_jaxpr(flat_function)(*avals)
    statics, joined = layout
    body = jax_versions.body_of(closed)
    origins = [
        provenance.param(p.path, aval.shape) if p else provenance.ACTIVATION
        for p, aval in zip(params, avals, strict=True)
    ]
    found = analyze.find_ops(body, origins, module_path)
    return TracedCall(
        body=body,
        inputs=inputs,
        params=params,
        ops=found.ops,
        requests=tuple(dict.fromkeys([*found.requests, *requests])),
        layer_axes=found.layer_axes,
        paths=paths,
        held=held,
        module_path=module_path,
        rebuild=lambda outs: joined(outs, statics),
    )


def eval_shape(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The shapes of what a function returns, without computing it.

    As `jax.eval_shape`, but an argument that is not an array, such as a flag, keeps
    its value, as in `trace`.

    Args:
      function: the function.
      *args: its arguments, arrays or the shapes of such.
      **kwargs: its keyword arguments.

    Example:
      >>> eval_shape(lambda x, flag: x if flag else None, jnp.ones(2), True)
      ShapeDtypeStruct(shape=(2,), dtype=float32)
    """
    inputs, others, joined = divided((args, kwargs), _is_input)

    def call(inputs):
        args, kwargs = joined(inputs, others)
        return function(*args, **kwargs)

    return jax.eval_shape(call, inputs)


def divided(
    tree: Any,
    which: Callable[[Any], bool],
    is_leaf: Callable[[Any], bool] | None = None,
) -> tuple[list[Any], list[Any], Callable[..., Any]]:
    """Some leaves of a tree, the others, and what puts such leaves together again.

    Args:
      tree: the tree.
      which: whether a leaf is one of those that come first.
      is_leaf: as in `jax.tree.flatten`.

    Example:
      >>> numbers, others, joined = divided([1, "a", 2], lambda x: x != "a")
      >>> joined([3, 4], others)
      [3, 'a', 4]
    """
    leaves, structure = jax.tree.flatten(tree, is_leaf=is_leaf)
    is_first = list(map(which, leaves))
    parts: tuple[list[Any], list[Any]] = [], []
    for leaf, first in zip(leaves, is_first, strict=True):
        parts[not first].append(leaf)

    def joined(some: Iterable[Any], others: Iterable[Any]) -> Any:
        rest = iter(others), iter(some)
        return jax.tree.unflatten(structure, [next(rest[first]) for first in is_first])

    return *parts, joined


def _is_input(leaf: Any, first: bool = False) -> bool:
    """Whether a leaf is an input of a trace.

    A NumPy array without axes is, as numbers are, what a model may branch on; but for
    those among the params. JAX has no arrays of strings or objects.
    """
    if is_array(leaf):
        return True
    if not isinstance(leaf, np.ndarray):
        return False
    is_number = leaf.dtype == bool or jnp.issubdtype(leaf.dtype, jnp.number)
    return is_number and (first or leaf.ndim > 0)


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an input of a trace: a JAX array, or the shape of one."""
    return isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)


def by_path(
    tree: Any, is_leaf: Callable[[Any], bool] | None = None
) -> dict[tuple[str, ...], Any]:
    """The leaves of a tree of params, by path."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    return {param_path(key_path): leaf for key_path, leaf in leaves}


def param_path(key_path: Sequence[Any]) -> tuple[str, ...]:
    """The path of a param: the dictionary keys, attributes and indices to it."""
    key_path = list(key_path)
    # A boxed param, such as `nn.Partitioned` or `nnx.Param`, holds its array in the
    # attribute `value`. A param of that name has a dictionary key.
    boxed = isinstance(key_path[-1], jax.tree_util.GetAttrKey) if key_path else False
    if boxed and key_path[-1].name == "value" and len(key_path) > 1:
        key_path.pop()
    names = []
    for key in key_path:
        for attribute in ("key", "idx", "name"):
            if hasattr(key, attribute):
                names.append(str(getattr(key, attribute)))
                break
    return tuple(names)
