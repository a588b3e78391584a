"""Steps that quantize two trees of params of one model, such as a teacher's."""

from __future__ import annotations

import collections
import functools
import hashlib
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from qwix_train.frontends import nnx_objects
from qwix_train.frontends.nnx import tracing_step
from qwix_train.planning.plan import Path
from qwix_train.stages.run import CallStages, run
from qwix_train.trace import analyze, function, harvest, provenance, session
from qwix_train.trace.function import TracedCall

# What calls of one model have in common: its place, and the paths and shapes of params.
Model = tuple[str, tuple[tuple[Path, tuple[int, ...]], ...]]


def model_of(traced: TracedCall) -> Model:
    """Which model a call is of, whatever params it is called with.

    Two layers of one model that are called on their own stand in different places.
    """
    params = (param for param in traced.params if param is not None)
    shapes = sorted((param.path, tuple(param.value.shape)) for param in params)
    return traced.module_path, tuple(shapes)


class CalledTrees:
    """The params that one call of a step has called its models with.

    Attributes:
      while_compiled: whether the step was called while a function is compiled.
    """

    def __init__(self, given: Any) -> None:
        """Starts with none.

        Args:
          given: the arguments of the step.
        """
        leaves = list(_arrays_in(given))
        self._given = set(map(id, leaves))
        self.while_compiled: bool = any(
            isinstance(leaf, _tracer_of_compiled()) for leaf in leaves
        )
        self._trees: dict[Model, set[tuple[int, ...]]] = collections.defaultdict(set)
        self._seen: dict[int, tuple[weakref.ref[Any], int]] = {}
        self._count = 0
        self._compiled = False

    def add(self, traced: TracedCall) -> None:
        """Takes note of a quantized call."""
        params = [param for param in traced.params if param is not None]
        held = [param.value for param in params]
        values = [x for x in held if isinstance(x, jax.Array | np.ndarray)]
        self._trees[model_of(traced)].add(tuple(map(self._number, values)))
        self._compiled |= any(
            isinstance(value, _tracer_of_compiled()) and id(value) not in self._given
            for value in values
        )

    def _number(self, value: Any) -> int:
        """A number that no other object has, alive or dead.

        Values are not kept alive: they may be tracers of what has ended.
        """
        seen, number = self._seen.get(id(value), (None, 0))
        if seen is None or seen() is not value:
            self._count += 1
            seen, number = weakref.ref(value), self._count
            self._seen[id(value)] = seen, number
        return number

    @property
    def may_be_several(self) -> bool:
        """Whether a model may have been called with several trees of params.

        Only `given_trees` tells: within a derivative or a loop, the same params are
        other objects, and a compiled function is traced once for all its calls.
        """
        return self._compiled or any(len(trees) > 1 for trees in self._trees.values())


def _arrays_in(tree: Any) -> Iterator[Any]:
    for leaf in jax.tree.leaves(tree, is_leaf=nnx_objects.is_node):
        if nnx_objects.is_node(leaf):
            yield from nnx_objects.arrays_in(leaf)
        else:
            yield leaf


@functools.cache
def _tracer_of_compiled() -> type:
    """The class of the tracers that `jax.jit` puts in the place of arrays."""
    found = []
    jax.eval_shape(lambda x: found.append(type(x)), 0.0)
    return found[0]


def given_trees(
    step: Callable[[session.Rewrite], Callable[..., Any]],
    quantizes: Callable[[TracedCall], bool],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> list[tuple[int, str]]:
    """The models that a step calls with several trees of params that it is given.

    Such are among its arguments, or what it closes over. Those that it computes, as
    an optimizer does that looks ahead, are left out.

    Args:
      step: gives the step with the model calls in it rewritten.
      quantizes: whether a call is quantized.
      args: the arguments of the step. It is traced once more, and not run.
      kwargs: the keyword arguments.

    Returns:
      For each, the number of trees, and a param that each of these has.
    """

    def tag(traced: TracedCall) -> Any:
        if not quantizes(traced):
            return session.UNCHANGED
        model = hashlib.sha256(repr(model_of(traced)).encode()).hexdigest()
        inputs = list(traced.inputs)
        for place, param in enumerate(traced.params):
            if param is not None and function.is_array(param.value):
                # The same for all calls of the model, in traces from caches, too.
                name = f"{'/'.join(param.path)!r} of shape {param.value.shape}"
                inputs[place] = harvest.tag(inputs[place], f"{model} {name}")
        return run(traced.with_inputs(inputs), CallStages({}, {}))

    with tracing_step(step(tag), args, kwargs) as (traced, _):
        origins = [
            provenance.param((str(place),), var.aval.shape)
            for place, var in enumerate(traced.body.jaxpr.invars)
        ]
        found = analyze.find_tagged(traced.body, origins, harvest.name_of)
    trees: dict[str, tuple[int, str]] = {}
    for name, from_ in found.items():
        given = {
            provenance.paths_of(x)
            for x in from_
            if isinstance(x, provenance.Weight | provenance.Constant)
        }
        model, _, param = name.partition(" ")
        trees[model] = max(trees.get(model, (0, "")), (len(given), param))
    return [several for several in trees.values() if several[0] > 1]


def warn(step: str, count: int, param: str) -> None:
    """Says that a step quantizes several trees of params of one model.

    Args:
      step: the name of the step.
      count: how many.
      param: a param that each of them has.
    """
    warnings.warn(
        f"{step} quantizes {count} different trees of params of one model: each has "
        f"{param}. If one is that of a teacher, of a "
        "reference, or an average of params, it is probably to stay in float; say so "
        "where it is called: qwix_train.in_float(model).apply(teacher_params, x) with "
        "Linen, in_float(teacher)(x) with NNX. Static ranges are collected of all "
        "calls that are quantized, under the same names.",
        stacklevel=2,
    )
