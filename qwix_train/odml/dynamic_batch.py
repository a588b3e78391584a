"""A `.tflite` file whose batch may have any length, from two with a fixed one.

The converter takes no symbolic shapes. What depends on the length of the batch is what
differs between the models of two batches of different lengths: the lengths of axes, and
constants that say shapes.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from qwix_train.odml.edit import add_buffer
from qwix_train.odml.flatbuffer import (
    code_name,
    data_of,
    dtype_of,
    op_name,
    read_model,
    schema,
    write_model,
)
from qwix_train.odml.litert_model import LiteRTModel

SIZES = (2, 3)
"""The lengths of the batch in the two models.

Of one example many operations do nothing, and the converter leaves them out.
"""

TESTED_SIZE = 5
"""The length of the batch that the result is tested with."""

_ADVICE = "Convert the model, without dynamic_batch, for the batch that it is to run."
# Operators that repeat an operand along an axis where it has length 1.
_BROADCAST = frozenset(
    """ADD SUB MUL DIV POW MAXIMUM MINIMUM SQUARED_DIFFERENCE SELECT SELECT_V2 LESS
    LESS_EQUAL GREATER GREATER_EQUAL EQUAL NOT_EQUAL LOGICAL_AND LOGICAL_OR""".split()
)


def with_dynamic_batch(content: bytes, larger: bytes) -> bytes:
    """A model whose batch may have any length.

    Args:
      content: the file of a model for `SIZES[0]` examples.
      larger: that of the same model for `SIZES[1]`.

    Raises:
      ValueError: if the length of the batch is where it cannot be left open.
    """
    model, other = read_model(content), read_model(larger)
    for graph, twin in zip(model.subgraphs, other.subgraphs, strict=True):
        names = [op_name(model, op) for op in graph.operators]
        twins = [op_name(other, op) for op in twin.operators]
        if names != twins:
            raise ValueError(
                f"dynamic_batch=True: for {SIZES[0]} examples the converter chooses "
                f"other operators than for {SIZES[1]}: {_differing(names, twins)}. "
                f"{_ADVICE}"
            )
        for op, same in zip(graph.operators, twin.operators, strict=True):
            _free_constants(_Pair(model, graph, op, other, twin, same))
        for a, b in list(_tensors(graph, twin)):
            _free_tensor(graph.tensors[a], twin.tensors[b])
    return write_model(model)


def check_dynamic_batch(
    name: str, content: bytes, expected: bytes, shapes: Sequence[Any]
) -> None:
    """Checks that a model for batches of any length equals one for a fixed batch.

    Args:
      name: the name of the signature.
      content: the file of the model.
      expected: that of the same model for the fixed batch.
      shapes: the shapes of the inputs of that batch.

    Raises:
      ValueError: if it computes something else.
    """
    rng = np.random.default_rng(0)
    arrays = [
        # Positive, as what is divided by must not be zero.
        rng.uniform(0.1, 1, x.shape).astype(x.dtype)
        if np.issubdtype(x.dtype, np.floating)
        else rng.integers(0, 2, x.shape).astype(x.dtype)
        for x in shapes
    ]
    model, other = LiteRTModel(content), LiteRTModel(expected)
    feed = dict(zip(model.signatures[name].inputs, arrays, strict=True))
    wanted = jax.tree.leaves(other(**feed))
    try:
        got = jax.tree.leaves(model(**feed))
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"dynamic_batch=True: the model does not run on another batch: {error} "
            f"{_ADVICE}"
        ) from error
    for a, b in zip(got, wanted, strict=True):
        # For other shapes LiteRT may choose other kernels, which round otherwise.
        margin = 0.05 * np.abs(b).max(initial=0) if b.dtype.kind == "f" else 0
        if a.shape == b.shape:
            near = np.isclose(a, b, rtol=0, atol=margin, equal_nan=True)
            if not b.size or near.mean() > 0.9:
                continue
        raise ValueError(
            f"dynamic_batch=True: the model computes something else, of the shape "
            f"{a.shape}, than one for that batch, of the shape {b.shape}. {_ADVICE}"
        )


@dataclasses.dataclass
class _Pair:
    """An operation of the model, and the same of the model for more examples."""

    model: Any
    graph: Any
    op: Any
    other: Any
    twin: Any
    same: Any

    @property
    def name(self) -> str:
        return op_name(self.model, self.op)

    def tensors(self, place: int) -> tuple[Any, Any]:
        """An operand of both."""
        return (
            self.graph.tensors[int(self.op.inputs[place])],
            self.twin.tensors[int(self.same.inputs[place])],
        )

    def shapes(self, place: int) -> tuple[list[int], list[int]]:
        """The shape of an operand of both."""
        a, b = self.tensors(place)
        return _shape(a), _shape(b)

    def data(self, place: int) -> tuple[Any, Any]:
        """The bytes of an operand of both; None if it is no constant."""
        a, b = self.tensors(place)
        return data_of(self.model, a), data_of(self.other, b)

    def integers(self, place: int) -> tuple[Any, Any]:
        """The values of an operand of both; None if they are no constant integers."""
        a, b = (
            data.view(dtype_of(tensor))
            if data is not None and dtype_of(tensor) in ("int32", "int64")
            else None
            for tensor, data in zip(self.tensors(place), self.data(place), strict=True)
        )
        alike = a is not None and b is not None and a.shape == b.shape
        return (a, b) if alike else (None, None)

    def become(self, name: str, version: int) -> None:
        """Makes it another operator, one without options."""
        codes = self.model.operatorCodes
        known = [place for place, code in enumerate(codes) if code_name(code) == name]
        if not known:
            code = schema().OperatorCodeT()
            code.builtinCode = getattr(schema().BuiltinOperator, name)
            code.deprecatedBuiltinCode, code.version = code.builtinCode, version
            codes.append(code)
            known = [len(codes) - 1]
        self.op.opcodeIndex = known[0]
        self.op.builtinOptionsType, self.op.builtinOptions = 0, None

    def replace(self, place: int, data: Any, shape: Any = None) -> None:
        """Gives the operation another constant; others may read the one it had."""
        old, _ = self.tensors(place)
        new = copy.copy(old)
        new.buffer = add_buffer(self.model, np.ascontiguousarray(data).tobytes())
        if shape is not None:
            new.shape = shape
        self.op.inputs[place] = len(self.graph.tensors)
        self.graph.tensors.append(new)


def _free_constants(pair: _Pair) -> None:
    """Makes constant operands such that fit a batch of any length."""
    pair.op.inputs = list(map(int, pair.op.inputs))
    for place, index in enumerate(pair.op.inputs):
        if index < 0:
            continue
        data, expected = pair.data(place)
        if data is None or (expected is not None and np.array_equal(data, expected)):
            continue
        name = pair.name
        if name in _BROADCAST:
            done = _free_broadcast(pair, place)
        else:
            free = _SHAPES.get((name, place))
            values = None if free is None else free(pair, *pair.integers(place))
            done = values is not None
            if done:
                dtype = dtype_of(pair.tensors(place)[0])
                pair.replace(place, np.asarray(values, dtype))
        if not done:
            raise ValueError(
                f"dynamic_batch=True: a constant of {name}, of the shape "
                f"{tuple(pair.shapes(place)[0])} for {SIZES[0]} examples, depends on "
                f"the length of the batch. {_ADVICE}"
            )
    # A copy of the shape that the operand holds.
    options = pair.op.builtinOptions
    shape = getattr(options, "newShape", None)
    if shape is not None:
        options.newShape = _freed(shape, pair.same.builtinOptions.newShape)


def _free_broadcast(pair: _Pair, place: int) -> bool:
    """Has a constant that is the same for each example hold one of them."""
    (data, twin_data), (shape, twin_shape) = pair.data(place), pair.shapes(place)
    if twin_data is None or len(shape) != len(twin_shape):
        return False
    axes = [a for a, n in enumerate(shape) if n != twin_shape[a]]
    count = int(np.prod(shape))
    if len(axes) != 1 or count == 0 or data.size % count:
        return False
    (axis,) = axes
    examples = data.reshape(*shape, -1)
    first = examples.take([0], axis)
    if (examples != first).any() or (twin_data.reshape(*twin_shape, -1) != first).any():
        return False
    if pair.name == "SELECT":
        # The one that repeats.
        pair.become("SELECT_V2", 1)
    pair.replace(place, first, [1 if a == axis else n for a, n in enumerate(shape)])
    return True


def _reshape(pair: _Pair, shape: Any, twin_shape: Any) -> Any:
    if shape is None or (shape != twin_shape).sum() != 1:
        return None
    return _freed(shape, twin_shape)


def _slice(pair: _Pair, sizes: Any, twin_sizes: Any) -> Any:
    """The sizes of a slice that takes all along the axes that depend on the batch."""
    starts, twin_starts = pair.integers(1)
    if sizes is None or starts is None or (starts != twin_starts).any():
        return None
    shape, twin_shape = map(np.asarray, pair.shapes(0))
    to_the_end = (starts + sizes == shape) & (twin_starts + twin_sizes == twin_shape)
    return _freed(sizes, twin_sizes) if to_the_end[sizes != twin_sizes].all() else None


def _strided_slice(pair: _Pair, ends: Any, twin_ends: Any) -> Any:
    """The same of a slice with strides, which has a bit for each axis to say so."""
    strides, _ = pair.integers(3)
    options = pair.op.builtinOptions
    if ends is None or strides is None or options.newAxisMask or options.ellipsisMask:
        return None
    shape, twin_shape = pair.shapes(0)
    for axis in map(int, np.flatnonzero(ends != twin_ends)):
        to_the_end = ends[axis] == shape[axis] and twin_ends[axis] == twin_shape[axis]
        if not to_the_end or strides[axis] < 1:
            return None
        options.endMask |= 1 << axis
    return ends


def _broadcast_to(pair: _Pair, shape: Any, twin_shape: Any) -> Any:
    """How often a repetition repeats along each axis, which it then says instead."""
    source, twin_source = pair.shapes(0)
    if shape is None or len(source) != len(shape):
        return None
    times = shape // np.asarray(source)
    if (times != twin_shape // np.asarray(twin_source)).any():
        return None
    # Of version 3 on it takes 8-bit integers.
    pair.become("TILE", 3)
    return times


# By the operator, and the place of the operand: what it is in a model for any batch,
# from its values in the two models; None if there is no such.
_SHAPES = {
    ("RESHAPE", 1): _reshape,
    ("SLICE", 2): _slice,
    ("STRIDED_SLICE", 2): _strided_slice,
    ("BROADCAST_TO", 1): _broadcast_to,
}


def _tensors(graph: Any, twin: Any) -> Iterator[tuple[int, int]]:
    """The tensors that are computed, each with that in the same place of the twin."""
    ends = [(graph.inputs, twin.inputs)]
    for op, same in zip(graph.operators, twin.operators, strict=True):
        ends.append((op.outputs, same.outputs))
    for some, others in ends:
        yield from ((int(a), int(b)) for a, b in zip(some, others, strict=True))


def _free_tensor(tensor: Any, twin: Any) -> None:
    """Leaves the lengths of axes open that depend on the batch."""
    shape, twin_shape = _shape(tensor), _shape(twin)
    if shape == twin_shape:
        return
    tensor.shapeSignature = _freed(shape, twin_shape)
    # The shape for one example, which is what a file says of an open one.
    first, second = SIZES
    steps = [
        (b - a) // (second - first) for a, b in zip(shape, twin_shape, strict=True)
    ]
    tensor.shape = [
        max(1, n - (first - 1) * step) for n, step in zip(shape, steps, strict=True)
    ]


def _shape(tensor: Any) -> list[int]:
    return [] if tensor.shape is None else list(map(int, tensor.shape))


def _freed(shape: Any, other: Any) -> list[int]:
    return [-1 if a != b else int(a) for a, b in zip(shape, other, strict=True)]


def _differing(names: list[str], twins: list[str]) -> str:
    for a, b in zip(names, twins, strict=False):
        if a != b:
            return f"{a} in the place of {b}"
    return f"{len(names)} in the place of {len(twins)}"
