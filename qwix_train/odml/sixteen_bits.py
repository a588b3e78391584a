"""What the converter leaves undone where activations have 16 bits."""

from __future__ import annotations

from typing import Any

import numpy as np

from qwix_train.odml.flatbuffer import (
    dtype_of,
    op_name,
    read_model,
    schema,
    write_model,
)

_BIASED = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")
_SUMS = ("ADD", "SUB")


def completed(content: bytes) -> bytes:
    """A model whose products and sums of 16 bits compute what they should.

    The bias of such a product is to have 64 bits: LiteRT reads one of 32, which the
    converter writes for convolutions, as if it had 64. Sums are to say that scales are
    no powers of two, or are not loaded.

    Args:
      content: the file.
    """
    model = read_model(content)
    changed = False
    for graph in model.subgraphs:
        for op in graph.operators:
            if dtype_of(graph.tensors[int(op.inputs[0])]) != "int16":
                continue
            name = op_name(model, op)
            if name in _SUMS:
                op.builtinOptions.potScaleInt16 = False
                changed = True
            has_bias = len(op.inputs) > 2 and int(op.inputs[2]) >= 0
            if name in _BIASED and has_bias:
                changed |= _widen(model, graph.tensors[int(op.inputs[2])])
    return write_model(model) if changed else content


def _widen(model: Any, tensor: Any) -> bool:
    if dtype_of(tensor) != "int32":
        return False
    codes = np.asarray(model.buffers[tensor.buffer].data, np.uint8).view(np.int32)
    buffer = schema().BufferT()
    buffer.data = codes.astype(np.int64).view(np.uint8)
    model.buffers.append(buffer)
    tensor.buffer = len(model.buffers) - 1
    tensor.type = schema().TensorType.INT64
    return True
