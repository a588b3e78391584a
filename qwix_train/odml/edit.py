"""Changes to a `.tflite` file that the converter has no option for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from qwix_train.odml.flatbuffer import op_name, read_model, schema, write_model

# Operators whose constants say shapes, where -1 stands for "whatever is left".
_SHAPES = {"RESHAPE": 1, "SLICE": 2}


def integer_ends(content: bytes, inputs: bool, outputs: bool) -> bytes:
    """A model that takes, or gives, codes in the place of floats.

    Args:
      content: the file.
      inputs: whether it takes codes.
      outputs: whether it gives codes.
    """
    model = read_model(content)
    for graph in model.subgraphs:
        moved: dict[int, int] = {}
        kept = []
        for op in graph.operators:
            name = op_name(model, op)
            source, target = int(op.inputs[0]), int(op.outputs[0])
            if inputs and name == "QUANTIZE" and source in list(graph.inputs):
                if source in moved:
                    raise ValueError(
                        "integer_inputs=True: an input is quantized in two ways."
                    )
                moved[source] = target
            elif outputs and name == "DEQUANTIZE" and target in list(graph.outputs):
                moved[target] = source
            else:
                kept.append(op)
        for op in kept:
            # What else reads the floats.
            for index in op.inputs:
                if int(index) in moved:
                    raise ValueError(
                        f"{op_name(model, op)} reads an input or output of the model "
                        "in floats, so it cannot be of integers."
                    )
        graph.operators = kept
        graph.inputs = [moved.get(int(i), int(i)) for i in graph.inputs]
        graph.outputs = [moved.get(int(i), int(i)) for i in graph.outputs]
        index = list(model.subgraphs).index(graph)
        for signature in model.signatureDefs or ():
            if signature.subgraphIndex == index:
                for entry in (*(signature.inputs or ()), *(signature.outputs or ())):
                    entry.tensorIndex = moved.get(entry.tensorIndex, entry.tensorIndex)
    return write_model(model)


def with_metadata(content: bytes, metadata: Mapping[str, str | bytes]) -> bytes:
    """A model with entries in its metadata.

    Args:
      content: the file.
      metadata: the entries, by name.
    """
    model = read_model(content)
    model.metadata = list(model.metadata or [])
    for name, value in metadata.items():
        buffer = schema().BufferT()
        data = value.encode() if isinstance(value, str) else value
        buffer.data = np.frombuffer(data, np.uint8)
        model.buffers.append(buffer)
        entry = schema().MetadataT()
        entry.name, entry.buffer = name, len(model.buffers) - 1
        model.metadata.append(entry)
    return write_model(model)


def metadata_in(content: bytes) -> dict[str, bytes]:
    """The metadata of a model, by name.

    Args:
      content: the file.
    """
    model = read_model(content)
    found = {}
    for entry in model.metadata or ():
        data = model.buffers[entry.buffer].data
        found[entry.name.decode()] = b"" if data is None else bytes(bytearray(data))
    return found


def with_dynamic_batch(content: bytes, larger: bytes) -> bytes:
    """A model whose batch may have any length.

    What depends on the length of the batch is what differs between the model of one
    example and that of two.

    Args:
      content: the file of the model of one example.
      larger: that of two.

    Raises:
      ValueError: if more differs than the lengths of axes.
    """
    model, other = read_model(content), read_model(larger)
    for graph, twin in zip(model.subgraphs, other.subgraphs, strict=True):
        names = [op_name(model, op) for op in graph.operators]
        if names != [op_name(other, op) for op in twin.operators]:
            raise ValueError(
                "dynamic_batch=True: for two examples the converter chooses other "
                "operators than for one."
            )
        pairs: dict[int, int] = {}
        for op, same in zip(graph.operators, twin.operators, strict=True):
            for a, b in zip(
                (*op.inputs, *op.outputs), (*same.inputs, *same.outputs), strict=True
            ):
                pairs[int(a)] = int(b)
        for index, twin_index in pairs.items():
            if index >= 0:
                _make_dynamic(graph.tensors[index], twin.tensors[twin_index])
        for op, same, name in zip(graph.operators, twin.operators, names, strict=True):
            for place, (a, b) in enumerate(zip(op.inputs, same.inputs, strict=True)):
                if a >= 0:
                    _free_shape(
                        model,
                        graph.tensors[int(a)],
                        _data(other, twin.tensors[int(b)]),
                        name,
                        place,
                    )
            options, others = op.builtinOptions, same.builtinOptions
            shape = getattr(options, "newShape", None)
            if shape is not None:
                options.newShape = [
                    -1 if a != b else int(a)
                    for a, b in zip(shape, others.newShape, strict=True)
                ]
    return write_model(model)


def _make_dynamic(tensor: Any, twin: Any) -> None:
    if tensor.shape is None or np.array_equal(tensor.shape, twin.shape):
        return
    tensor.shapeSignature = [
        -1 if a != b else int(a) for a, b in zip(tensor.shape, twin.shape, strict=True)
    ]


def _data(model: Any, tensor: Any) -> Any:
    data = model.buffers[tensor.buffer].data
    return None if data is None or np.size(data) == 0 else np.asarray(data, np.uint8)


def _free_shape(model, tensor, other, name, place) -> None:
    """Frees the length of the batch in a constant that says a shape."""
    data = _data(model, tensor)
    if data is None or other is None or np.array_equal(data, other):
        return
    shape, larger = data.view(np.int32), other.view(np.int32)
    differ = np.flatnonzero(shape != larger)
    if _SHAPES.get(name) != place or len(differ) != 1:
        raise ValueError(
            f"dynamic_batch=True: a constant of {name} depends on the length of the "
            "batch. Convert the model for the batch that it is to run with."
        )
    shape = shape.copy()
    shape[differ[0]] = -1
    buffer = type(model.buffers[tensor.buffer])()
    buffer.data = shape.view(np.uint8)
    model.buffers.append(buffer)
    tensor.buffer = len(model.buffers) - 1
