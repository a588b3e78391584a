"""The whole graph of a traced call, with one node for each operation.

LiteRT gives every tensor of a model its own quantization, so every operation counts,
not only the matrix products. `build_graph` takes a traced call apart: compiled
functions and checkpoints are inlined, loops over layers or time steps unrolled, and
what no result depends on is left out. Each value knows whether it depends on the inputs
of the model, or is `static`: made of params and constants, as a converted model has it
as a constant.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import core, lax
from jax import numpy as jnp

from qwix_train import ops
from qwix_train.trace import bodies, jax_versions, provenance, scopes
from qwix_train.trace.bodies import Kind
from qwix_train.trace.evaluate import run_equation
from qwix_train.trace.function import TracedCall
from qwix_train.trace.provenance import Provenance

# A longer loop would be unrolled into more operations than a phone should run.
MAX_UNROLLED = 256

_RANDOM = frozenset(
    """random_bits random_fold_in random_gamma random_seed random_split random_unwrap
    random_wrap threefry2x32""".split()
)
_REDUCTIONS = frozenset(
    """reduce_sum reduce_max reduce_min reduce_prod argmax argmin psum psum_invariant
    pmean all_gather dot_general""".split()
)
# Functions of JAX with a derivative rule, which says what differentiation finds anyway.
_JAX_FOLDER = os.path.dirname(jax.__file__)
_TAKEN_APART = (Kind.CALL, Kind.REMAT, Kind.CUSTOM, Kind.SCAN)


@dataclasses.dataclass(eq=False)
class Value:
    """An array in the graph.

    Attributes:
      shape: its shape.
      dtype: its dtype.
      static: whether it depends on no input of the model, but on params, constants
        and the statistics of a batch alone.
      random: whether it is static but for random numbers.
      producer: the node that computes it; None for inputs and constants.
      consumers: the nodes that read it.
      index: its place among the inputs of the traced call, if it is one.
      constant: its value, if it is a constant.
      is_output: whether it is a result of the call.
      origin: where it came from, such as which param.
    """

    shape: tuple[int, ...]
    dtype: Any
    static: bool = False
    random: bool = False
    producer: Node | None = None
    consumers: list[Node] = dataclasses.field(default_factory=list)
    index: int | None = None
    constant: Any = None
    is_output: bool = False
    origin: Provenance = provenance.ACTIVATION

    @property
    def is_float(self) -> bool:
        """Whether it holds floats."""
        return jnp.issubdtype(self.dtype, jnp.floating)

    @property
    def is_activation(self) -> bool:
        """Whether it depends on the inputs of the model."""
        return not self.static and not self.random

    @property
    def number(self) -> float | None:
        """The one number that it holds, if that is known and a constant."""
        if self.constant is not None and np.size(self.constant) == 1:
            return float(np.asarray(self.constant, np.float64).reshape(()))
        before = self.before(MOVES)
        return None if before is self else before.number

    def before(self, names: Collection[str]) -> Value:
        """What it was before operations of some names, which read one value each."""
        value = self
        while value.producer is not None and value.producer.name in names:
            value = value.producer.inputs[0]
        return value


CONVERSIONS = ("convert_element_type", "copy")
MOVES = ("broadcast_in_dim", "reshape", "squeeze", "expand_dims", *CONVERSIONS)
"""What gives a value other axes of length 1, repeats it, or converts it."""


class Place(NamedTuple):
    """Where in a model an operation is.

    Attributes:
      module_path: the path of its module.
      scope: the scopes around it.
      scans: the length of each loop around it that goes over params; 0 for any other.
      derivative: the function with a derivative rule of its own that it is part of.
    """

    module_path: str = ""
    scope: str = ""
    scans: tuple[int, ...] = ()
    derivative: str | None = None

    @property
    def in_batch_norm(self) -> bool:
        """Whether it is in a batch normalization layer of Flax."""
        return scopes.is_batch_norm(self.scope)


@dataclasses.dataclass(eq=False)
class Node:
    """An operation: an equation of the trace, or several that count as one.

    Attributes:
      name: the primitive, or the name of what several equations compute.
      params: the parameters of the equation.
      inputs: what it reads.
      outputs: what it computes.
      place: where in the model it is.
      run: computes the outputs, as a list, from arrays for the inputs.
      parts: the nodes that it stands for, if it stands for several.
      has_effects: whether it does more than compute, such as print.
    """

    name: str
    params: Any
    inputs: list[Value]
    outputs: list[Value]
    place: Place
    run: Callable[..., list[Any]]
    parts: tuple[Node, ...] = ()
    has_effects: bool = False

    @property
    def out(self) -> Value:
        """The first output."""
        return self.outputs[0]

    @property
    def is_activation(self) -> bool:
        """Whether it computes anything from the inputs of the model."""
        return any(value.is_activation for value in self.outputs)


class Graph:
    """The graph of a traced call.

    Attributes:
      nodes: the operations, in the order in which they run.
      inputs: the inputs of the traced call.
      outputs: its results.
    """

    def __init__(
        self, nodes: list[Node], inputs: Sequence[Value], outputs: Sequence[Value]
    ):
        self.nodes: list[Node] = nodes
        self.inputs: tuple[Value, ...] = tuple(inputs)
        self.outputs: tuple[Value, ...] = tuple(outputs)
        self.link()

    def link(self) -> None:
        """Finds what reads what; leaves out nodes whose results nothing reads."""
        needed = set(map(id, self.outputs))
        kept = []
        for node in reversed(_sorted(self.nodes)):
            if node.has_effects or any(id(v) in needed for v in node.outputs):
                kept.append(node)
                needed.update(map(id, node.inputs))
        self.nodes = kept[::-1]
        for node in self.nodes:
            for value in (*node.inputs, *node.outputs):
                value.consumers = []
        for value in (*self.inputs, *self.outputs):
            value.consumers = []
        for node in self.nodes:
            for value in node.outputs:
                value.producer = node
            for value in node.inputs:
                value.consumers.append(node)
        for value in self.outputs:
            value.is_output = True

    def replace(self, old: Sequence[Node], new: Sequence[Node]) -> None:
        """Puts nodes in the place of others; `link` has to follow.

        Args:
          old: nodes of which only the last is read from outside.
          new: what computes the same value, in order.
        """
        at = max(map(self.nodes.index, old))
        removed = set(map(id, old))
        before = [n for n in self.nodes[:at] if id(n) not in removed]
        self.nodes = [*before, *new, *self.nodes[at + 1 :]]

    def copy_outputs(self) -> None:
        """Has results be copies, which may have other ranges than what they copy."""
        outputs = list(self.outputs)
        for index, value in enumerate(outputs):
            if value.is_float and value.is_activation:
                value.is_output = False
                self.nodes.append(_copy(value))
                outputs[index] = self.nodes[-1].out
        self.outputs = tuple(outputs)
        self.link()

    def run(self, values: Sequence[Any], evaluate: Evaluate | None = None) -> list[Any]:
        """The results of the graph.

        Args:
          values: an array for each input.
          evaluate: computes the outputs of a node, from a function that gives the
            array of a value; the node itself if None.
        """
        env = dict(zip(map(id, self.inputs), values, strict=True))
        read = run_nodes(self.nodes, env, evaluate)
        return list(map(read, self.outputs))


def run_nodes(
    nodes: Sequence[Node], env: dict[int, Any], evaluate: Evaluate | None = None
) -> Read:
    """Runs nodes, one after the other; gives what reads values.

    Args:
      nodes: the nodes.
      env: arrays by the ids of values; those of all outputs are added.
      evaluate: see `Graph.run`.
    """

    def read(value: Value) -> Any:
        return env[id(value)] if id(value) in env else value.constant

    for node in nodes:
        if evaluate is None:
            results = node.run(*map(read, node.inputs))
        else:
            results = evaluate(node, read)
        env.update(zip(map(id, node.outputs), results, strict=True))
    return read


def _sorted(nodes: Sequence[Node]) -> list[Node]:
    """Nodes in an order in which each comes after what it reads, stable otherwise."""
    producers = {id(value): node for node in nodes for value in node.outputs}
    order: dict[int, Node] = {}
    for node in nodes:
        stack = [node]
        while stack:
            made_by = (producers.get(id(value)) for value in stack[-1].inputs)
            waiting = [p for p in made_by if p is not None and id(p) not in order]
            if waiting:
                stack += reversed(waiting)
            else:
                done = stack.pop()
                order[id(done)] = done
    return list(order.values())


Read = Callable[[Value], Any]
# evaluate(node, read) -> the outputs
Evaluate = Callable[[Node, Read], Sequence[Any]]


def build_graph(traced: TracedCall) -> Graph:
    """The graph of a traced call.

    Args:
      traced: the call.

    Raises:
      ValueError: if a loop is too long to be unrolled.
    """
    body = traced.body
    inputs = [
        Value(
            tuple(var.aval.shape),
            var.aval.dtype,
            static=held,
            index=index,
            origin=provenance.param(param.path, var.aval.shape)
            if param
            else provenance.ACTIVATION,
        )
        for index, (var, held, param) in enumerate(
            zip(body.jaxpr.invars, traced.held, traced.params, strict=True)
        )
    ]
    builder = _Builder(traced.module_path)
    outputs = builder.walk(body, inputs)
    # A result may be an input, or twice the same value.
    seen: set[int] = set(map(id, inputs))
    for index, value in enumerate(outputs):
        if id(value) in seen or value.constant is not None:
            builder.nodes.append(_copy(value))
            outputs[index] = builder.nodes[-1].out
        seen.add(id(outputs[index]))
    return Graph(builder.nodes, inputs, outputs)


def graph_of(function: Callable[..., Any], *shapes: Any) -> Graph:
    """The graph of a function of arrays alone; nothing in it is static.

    Args:
      function: the function.
      *shapes: its arguments, or their shapes.
    """
    body = jax_versions.body_of(jax.make_jaxpr(function)(*shapes))
    inputs = [
        Value(tuple(var.aval.shape), var.aval.dtype, index=index)
        for index, var in enumerate(body.jaxpr.invars)
    ]
    builder = _Builder("")
    return Graph(builder.nodes, inputs, builder.walk(body, inputs))


class _Builder(bodies.Walk[Value]):
    def __init__(self, prefix: str):
        self.prefix = prefix
        self.nodes: list[Node] = []
        # Around the body that is walked.
        self.place = Place()

    def constant(self, value, aval):
        traced = isinstance(value, core.Tracer)
        origin = provenance.ACTIVATION if traced else provenance.CONSTANT
        shape = tuple(aval.shape)
        return Value(shape, aval.dtype, static=True, constant=value, origin=origin)

    def equation(self, eqn, operands, key):
        before, self.place = self.place, self.place_of(eqn)
        name, kind = eqn.primitive.name, ops.by_primitive(eqn.primitive.name)
        named = name if kind is None else kind.name_in(self.place.scope)
        shapes = [
            (tuple(getattr(v.aval, "shape", ())), getattr(v.aval, "dtype", None))
            for v in eqn.outvars
        ]
        run = functools.partial(run_equation, eqn)
        outputs = self.add(named, operands, shapes, run, eqn.params)
        origins = provenance.propagate(
            name,
            eqn.params,
            [x.origin for x in operands],
            [x.shape for x in operands],
            [shape for shape, _ in shapes],
        )
        for value, origin in zip(outputs, origins, strict=True):
            value.origin = origin
        self.nodes[-1].has_effects = bool(eqn.effects)
        self.place = before
        return outputs

    def enter(self, eqn, inside, operands, key):
        if inside.kind not in _TAKEN_APART:
            return self.equation(eqn, operands, key)
        before, place = self.place, self.place_of(eqn)
        if inside.kind is Kind.CALL:
            place = place._replace(scope=f"{place.scope}/{bodies.call_scope(eqn)}")
        if inside.kind is Kind.CUSTOM:
            function = jax_versions.custom_source(eqn)
            known = _JAX_FOLDER in function
            function = place.derivative or (None if known else function)
            place = place._replace(derivative=function)
        self.place = place
        if inside.kind is Kind.SCAN:
            results = self.unroll(eqn, inside, operands)
        else:
            results = self.walk(inside.bodies[0].body, operands)
        self.place = before
        return results

    def place_of(self, eqn) -> Place:
        scope = filter(None, (self.place.scope, str(eqn.source_info.name_stack)))
        return self.place._replace(scope="/".join(scope))

    def unroll(self, eqn, inside, operands) -> list[Value]:
        """Adds a loop, one iteration after the other."""
        start, stop = inside.carry.start, inside.carry.stop
        params, num_carry = eqn.params, stop - start
        length = params["length"]
        if length > MAX_UNROLLED:
            where = scopes.module_path_of(self.place.scope) or "the model"
            raise ValueError(
                f"{where}: a scan of {length} iterations would be unrolled, as LiteRT "
                f"has no quantized loops; at most {MAX_UNROLLED} are. Give the model "
                "shorter inputs, or call one iteration from outside of it."
            )
        body = inside.bodies[0].body
        consts, carry = operands[:start], operands[start:stop]
        scanned = operands[stop:]
        stacked: list[list[Value]] = []
        outside, order = self.place, range(length)
        over_params = any(isinstance(x.origin, provenance.Weight) for x in scanned)
        scans = (*outside.scans, length if over_params else 0)
        for i in reversed(order) if params["reverse"] else order:
            slices = []
            for x in scanned:
                slices += self.add(
                    "slice",
                    [x],
                    [(x.shape[1:], x.dtype)],
                    lambda x, i=i: [lax.index_in_dim(x, i, keepdims=False)],
                )
                slices[-1].origin = provenance.per_iteration(x.origin)
            self.place = outside._replace(scans=scans)
            outs = self.walk(body, [*consts, *carry, *slices])
            self.place = outside
            carry = outs[:num_carry]
            stacked.append(outs[num_carry:])
        if params["reverse"]:
            stacked.reverse()
        results = list(carry)
        avals = [var.aval for var in body.jaxpr.outvars][num_carry:]
        for place, aval in enumerate(avals):
            parts = [outs[place] for outs in stacked]
            shape = (length, *aval.shape)
            results += self.add(
                "concatenate",
                parts,
                [(shape, aval.dtype)],
                lambda *xs, to=shape, of=aval.dtype: [
                    jnp.stack(xs) if xs else jnp.empty(to, of)
                ],
            )
        return results

    def add(self, name, operands, shapes, run, params=None) -> list[Value]:
        """Adds a node; gives its outputs."""
        path = scopes.module_path_of(self.place.scope)
        path = "/".join(filter(None, (self.prefix, path)))
        place = self.place._replace(module_path=path)
        static = all(x.static for x in operands) and name not in _RANDOM
        random = not static and all(x.static or x.random for x in operands)
        if name in _RANDOM:
            static, random = False, True
        elif name in _REDUCTIONS and place.in_batch_norm:
            # Statistics of the batch, which a converted model has as constants.
            static, random = True, False
        outputs = [Value(shape, dtype, static, random) for shape, dtype in shapes]
        self.nodes.append(Node(name, params or {}, list(operands), outputs, place, run))
        return outputs


def _copy(value: Value) -> Node:
    """A node that copies a value."""
    out = Value(value.shape, value.dtype, value.static, value.random)

    def run(x):
        if jnp.issubdtype(value.dtype, jnp.number):
            # The converter wants an operation between an input and a result.
            return [x + jnp.zeros((), value.dtype)]
        return [x]  # Booleans, and random keys

    return Node("copy", {}, [value], [out], Place(), run)


def known_value(value: Value) -> np.ndarray | None:
    """What a value holds, if it is made of constants of the trace alone."""
    order: dict[int, Node] = {}

    def is_known(value: Value) -> bool:
        node, constant = value.producer, value.constant
        if node is None:
            return constant is not None and not isinstance(constant, core.Tracer)
        if id(node) not in order:
            if not all(map(is_known, node.inputs)):
                return False
            order[id(node)] = node
        return True

    if not value.static or not is_known(value):
        return None
    with jax.ensure_compile_time_eval():
        return np.asarray(run_nodes(list(order.values()), {})(value))


def statistics_nodes(graph: Graph) -> set[int]:
    """The ids of nodes that only the statistics of a batch are made from.

    Those of a batch normalization layer in training, such as the squares of its inputs.
    """
    found: set[int] = set()
    for node in reversed(graph.nodes):
        if not node.place.in_batch_norm or any(
            value.is_output for value in node.outputs
        ):
            continue
        consumers = [c for value in node.outputs for c in value.consumers]
        # Their sums and means count as static.
        if node.is_activation and all(
            c.place.in_batch_norm and (id(c) in found or not c.is_activation)
            for c in consumers
        ):
            found.add(id(node))
    return found
