"""What is in a `.tflite` file: its operations, and whether they are all integer."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

_EXTRA = "pip install 'qwix_train[odml]'"
# What carries values into integers and out of them; neither computes.
_CONVERSIONS = ("QUANTIZE", "DEQUANTIZE")
# Operations whose results do not depend on the scale of the codes that they read.
_READ_CODES = ("ARG_MAX", "ARG_MIN")


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """A tensor of a LiteRT model.

    Attributes:
      name: its name.
      shape: its shape; -1 for an axis whose length is set at run time.
      dtype: the name of its type, such as `int8`.
      scale: its scales; empty if it is not quantized.
      zero_point: its zero points.
      axis: the axis that the scales belong to.
      constant: whether its value is in the file.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    scale: tuple[float, ...]
    zero_point: tuple[int, ...]
    axis: int
    constant: bool

    @property
    def range(self) -> tuple[float, float] | None:
        """The range that its codes stand for, if it has one scale."""
        if len(self.scale) != 1 or self.dtype not in ("int4", "int8", "int16"):
            return None
        bits = int(self.dtype[3:])
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        (scale,), (zero,) = self.scale, self.zero_point or (0,)
        return (low - zero) * scale, (high - zero) * scale


@dataclasses.dataclass(frozen=True)
class OpInfo:
    """An operation of a LiteRT model.

    Attributes:
      name: the name of the operator, such as `CONV_2D`.
      inputs: what it reads.
      outputs: what it computes.
      signature: the index of the subgraph that it is in.
    """

    name: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    subgraph: int = 0

    @property
    def reads_float(self) -> bool:
        """Whether it reads or computes floats."""
        return any("float" in t.dtype for t in (*self.inputs, *self.outputs))

    @property
    def computes(self) -> bool:
        """Whether it is more than a conversion of floats and integers."""
        return self.name not in _CONVERSIONS


def schema() -> Any:
    """The module that reads and writes the format.

    Raises:
      ImportError: if the packages of the extra are not installed.
    """
    try:
        from ai_edge_litert import schema_py_generated
    except ImportError as error:
        raise ImportError(
            f"LiteRT models need ai-edge-litert and litert-converter: {_EXTRA}"
        ) from error
    return schema_py_generated


def ops_in(content: bytes) -> list[OpInfo]:
    """The operations of a model, in the order in which they run.

    Args:
      content: the file.
    """
    model = read_model(content)
    found = []
    for index, graph in enumerate(model.subgraphs):
        infos = [_tensor_info(model, tensor) for tensor in graph.tensors]
        for op in graph.operators:
            found.append(
                OpInfo(
                    op_name(model, op),
                    tuple(infos[i] for i in op.inputs if i >= 0),
                    tuple(infos[i] for i in op.outputs if i >= 0),
                    index,
                )
            )
    return found


def float_ops(ops: Sequence[OpInfo]) -> list[OpInfo]:
    """The operations that compute with floats.

    A conversion counts where it is not at an input or an output of the model, or reads
    a constant: that is what feeds an operation in floats, which counts by itself.
    """
    return [op for op in ops if op.computes and op.reads_float]


def read_model(content: bytes) -> Any:
    """The model in a file, as objects that can be changed."""
    return schema().ModelT.InitFromPackedBuf(content, 0)


def write_model(model: Any) -> bytes:
    """A file of a model."""
    import flatbuffers

    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def dtype_of(tensor: Any) -> str:
    """The name of the type of a tensor."""
    return _types()[tensor.type]


def op_name(model: Any, op: Any) -> str:
    """The name of an operation."""
    code = model.operatorCodes[op.opcodeIndex]
    name = _names()[max(code.builtinCode, code.deprecatedBuiltinCode)]
    return f"{name}:{code.customCode.decode()}" if code.customCode else name


def read_codes(content: bytes) -> bytes:
    """A model whose operations that only compare values read codes, not floats.

    The converter has them read floats, though LiteRT runs them in integers: the largest
    code is that of the largest value.

    Args:
      content: the file.
    """
    model = read_model(content)
    changed = False
    for graph in model.subgraphs:
        made_by = {int(op.outputs[0]): op for op in graph.operators}
        for op in graph.operators:
            if op_name(model, op) not in _READ_CODES:
                continue
            before = made_by.get(int(op.inputs[0]))
            if before is not None and op_name(model, before) == "DEQUANTIZE":
                op.inputs = [int(before.inputs[0]), *map(int, op.inputs[1:])]
                changed = True
        if changed:
            read = {int(i) for op in graph.operators for i in op.inputs}
            read.update(map(int, graph.outputs))
            graph.operators = [
                op for op in graph.operators if any(int(i) in read for i in op.outputs)
            ]
    if not changed:
        return content
    for code in model.operatorCodes:
        # 8-bit inputs came with the second version of these operators.
        if _names()[max(code.builtinCode, code.deprecatedBuiltinCode)] in _READ_CODES:
            code.version = max(code.version, 2)
    return write_model(model)


@functools.cache
def _names() -> dict[int, str]:
    table = vars(schema().BuiltinOperator)
    return {value: name for name, value in table.items() if isinstance(value, int)}


@functools.cache
def _types() -> dict[int, str]:
    table = vars(schema().TensorType)
    names = {value: name for name, value in table.items() if isinstance(value, int)}
    return {value: name.lower() for value, name in names.items()}


def _tensor_info(model: Any, tensor: Any) -> TensorInfo:
    quantization = tensor.quantization
    scale = getattr(quantization, "scale", None)
    zero_point = getattr(quantization, "zeroPoint", None)
    data = model.buffers[tensor.buffer].data
    signature = tensor.shapeSignature
    shape = tensor.shape if signature is None else signature
    return TensorInfo(
        name=(tensor.name or b"").decode(),
        shape=() if shape is None else tuple(int(n) for n in shape),
        dtype=dtype_of(tensor),
        scale=() if scale is None else tuple(map(float, scale)),
        zero_point=() if zero_point is None else tuple(map(int, zero_point)),
        axis=getattr(quantization, "quantizedDimension", 0) or 0,
        constant=data is not None and np.size(data) > 0,
    )
