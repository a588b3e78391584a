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
    data_of,
    dtype_of,
    op_name,
    read_model,
    tools,
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
            _free_constants(_Op(model, graph, op), _Op(other, twin, same))
        for a, b in _computed(graph, twin):
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
class _Op:
    """An operation of a model."""

    model: Any
    graph: Any
    op: Any

    @property
    def name(self) -> str:
        return op_name(self.model, self.op)

    def tensor(self, place: int) -> Any:
        """An operand."""
        return self.graph.tensors[self.op.inputs[place]]

    def shape(self, place: int) -> np.ndarray:
        """The shape of an operand."""
        return np.asarray(self.tensor(place).shape or [], np.int64)

    def data(self, place: int) -> Any:
        """The bytes of an operand; None if it is not a constant."""
        return data_of(self.model, self.tensor(place))

    def integers(self, place: int) -> Any:
        """The values of an operand; None if they are not constant integers."""
        data, dtype = self.data(place), dtype_of(self.tensor(place))
        return (
            data.view(dtype)
            if data is not None and dtype in ("int32", "int64")
            else None
        )

    def become(self, name: str, version: int) -> None:
        """Makes it another operator, one without options."""
        schema, codes = tools().schema_fb, self.model.operatorCodes
        code = schema.OperatorCodeT()
        code.builtinCode = getattr(schema.BuiltinOperator, name)
        code.deprecatedBuiltinCode, code.version = code.builtinCode, version
        codes.append(code)
        self.op.opcodeIndex = len(codes) - 1
        self.op.builtinOptionsType, self.op.builtinOptions = 0, None

    def replace(self, place: int, data: Any, shape: Any = None) -> None:
        """Gives the operation another constant; others may read the one it had."""
        new = copy.copy(self.tensor(place))
        new.buffer = add_buffer(self.model, np.ascontiguousarray(data).tobytes())
        if shape is not None:
            new.shape = shape
        self.op.inputs[place] = len(self.graph.tensors)
        self.graph.tensors.append(new)


def _free_constants(op: _Op, twin: _Op) -> None:
    """Makes constant operands such that fit a batch of any length.

    Args:
      op: the operation.
      twin: the same of the model for more examples.
    """
    for place, index in enumerate(op.op.inputs):
        if index < 0:
            continue
        data, expected = op.data(place), twin.data(place)
        if data is None or (expected is not None and np.array_equal(data, expected)):
            continue
        name, shape = op.name, tuple(op.shape(place).tolist())
        if not _free_constant(op, twin, place):
            raise ValueError(
                f"dynamic_batch=True: a constant of {name}, of the shape "
                f"{shape} for {SIZES[0]} examples, depends on the length of the "
                f"batch. {_ADVICE}"
            )
    # A copy of the shape that the operand holds.
    options = op.op.builtinOptions
    shape = getattr(options, "newShape", None)
    if shape is not None:
        options.newShape = _freed(shape, twin.op.builtinOptions.newShape)


def _free_constant(op: _Op, twin: _Op, place: int) -> bool:
    """Whether a constant operand could be made one for a batch of any length."""
    if op.name in _BROADCAST:
        return _free_broadcast(op, twin, place)
    free = _SHAPES.get((op.name, place))
    values, others = op.integers(place), twin.integers(place)
    if free is None or values is None or np.shape(values) != np.shape(others):
        return False
    freed = free(op, twin, values, others)
    if freed is not None:
        op.replace(place, np.asarray(freed, values.dtype))
    return freed is not None


def _free_broadcast(op: _Op, twin: _Op, place: int) -> bool:
    """Has a constant that is the same for each example hold one of them."""
    (data, twin_data), (shape, twin_shape) = (
        (f(place), g(place)) for f, g in ((op.data, twin.data), (op.shape, twin.shape))
    )
    if twin_data is None or len(shape) != len(twin_shape):
        return False
    axes = np.flatnonzero(shape != twin_shape)
    count = int(np.prod(shape))
    if len(axes) != 1 or count == 0 or data.size % count:
        return False
    (axis,) = axes
    examples = data.reshape(*shape, -1)
    first = examples.take([0], axis)
    if (examples != first).any() or (twin_data.reshape(*twin_shape, -1) != first).any():
        return False
    if op.name == "SELECT":
        # The one that repeats.
        op.become("SELECT_V2", 1)
    shape[axis] = 1
    op.replace(place, first, shape.tolist())
    return True


def _reshape(op: _Op, twin: _Op, shape: Any, twin_shape: Any) -> Any:
    return _freed(shape, twin_shape) if (shape != twin_shape).sum() == 1 else None


def _slice(op: _Op, twin: _Op, sizes: Any, twin_sizes: Any) -> Any:
    """The sizes of a slice that takes all along the axes that depend on the batch."""
    starts = op.integers(1)
    if starts is None or not np.array_equal(starts, twin.integers(1)):
        return None
    to_the_end = starts + sizes == op.shape(0)
    to_the_end &= starts + twin_sizes == twin.shape(0)
    return _freed(sizes, twin_sizes) if to_the_end[sizes != twin_sizes].all() else None


def _strided_slice(op: _Op, twin: _Op, ends: Any, twin_ends: Any) -> Any:
    """The same of a slice with strides, which has a bit for each axis to say so."""
    strides, options = op.integers(3), op.op.builtinOptions
    if strides is None or options.newAxisMask or options.ellipsisMask:
        return None
    to_the_end = (ends == op.shape(0)) & (twin_ends == twin.shape(0)) & (strides >= 1)
    for axis in np.flatnonzero(ends != twin_ends).tolist():
        if not to_the_end[axis]:
            return None
        options.endMask |= 1 << axis
    return ends


def _broadcast_to(op: _Op, twin: _Op, shape: Any, twin_shape: Any) -> Any:
    """How often a repetition repeats along each axis, which it then says instead."""
    source, twin_source = op.shape(0), twin.shape(0)
    if len(source) != len(shape):
        return None
    times = shape // source
    if (times != twin_shape // twin_source).any():
        return None
    # Of version 3 on it takes 8-bit integers.
    op.become("TILE", 3)
    return times


# By the operator, and the place of the operand: what it is in a model for any batch,
# from its values in the two models; None if there is no such.
_SHAPES = {
    ("RESHAPE", 1): _reshape,
    ("SLICE", 2): _slice,
    ("STRIDED_SLICE", 2): _strided_slice,
    ("BROADCAST_TO", 1): _broadcast_to,
}


def _computed(graph: Any, twin: Any) -> Iterator[tuple[int, int]]:
    """The tensors that are computed, each with that in the same place of the twin."""
    yield from zip(graph.inputs, twin.inputs, strict=True)
    for op, same in zip(graph.operators, twin.operators, strict=True):
        yield from zip(op.outputs, same.outputs, strict=True)


def _free_tensor(tensor: Any, twin: Any) -> None:
    """Leaves the lengths of axes open that depend on the batch."""
    shape, twin_shape = tensor.shape or [], twin.shape or []
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


def _freed(shape: Any, other: Any) -> list[int]:
    return [-1 if a != b else int(a) for a, b in zip(shape, other, strict=True)]


def _differing(names: list[str], twins: list[str]) -> str:
    for a, b in zip(names, twins, strict=False):
        if a != b:
            return f"{a} in the place of {b}"
    return f"{len(names)} in the place of {len(twins)}"
