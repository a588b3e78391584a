"""What is in a `.tflite` file: its operations, and whether they are all integer."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_EXTRA = "pip install 'qwix_train[odml]'"
# What carries values into integers and out of them; neither computes.
_CONVERSIONS = ("QUANTIZE", "DEQUANTIZE")
_IDENTIFIER = b"TFL3"


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
      is_input: whether it is an input of the model.
      is_output: whether it is an output of the model.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    scale: tuple[float, ...]
    zero_point: tuple[int, ...]
    axis: int
    constant: bool
    is_input: bool
    is_output: bool

    @property
    def range(self) -> tuple[float, float] | None:
        """The range that its codes stand for, if it has one scale."""
        if len(self.scale) != 1 or self.dtype not in ("int4", "int8", "int16"):
            return None
        bits = int(self.dtype[3:])
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        (scale,), (zero,) = self.scale, self.zero_point or (0,)
        return (low - zero) * scale, (high - zero) * scale

    @property
    def is_float(self) -> bool:
        """Whether it holds floats."""
        return "float" in self.dtype


@dataclasses.dataclass(frozen=True)
class OpInfo:
    """An operation of a LiteRT model.

    Attributes:
      name: the name of the operator, such as `CONV_2D`.
      inputs: what it reads.
      outputs: what it computes.
      subgraph: the index of the subgraph that it is in.
    """

    name: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    subgraph: int = 0

    @property
    def reads_float(self) -> bool:
        """Whether it reads or computes floats."""
        return any(t.is_float for t in (*self.inputs, *self.outputs))

    @property
    def computes(self) -> bool:
        """Whether it is more than a conversion of floats and integers."""
        return self.name not in _CONVERSIONS


@dataclasses.dataclass(frozen=True)
class SignatureInfo:
    """A function of a LiteRT model.

    Attributes:
      inputs: the tensors that it takes, by name, in order.
      outputs: the tensors that it gives, by name, in order.
      output_scales: the scales of outputs that stand for floats, also of those that
        are dequantized in the end, by name.
    """

    inputs: Mapping[str, TensorInfo]
    outputs: Mapping[str, TensorInfo]
    output_scales: Mapping[str, float]


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

    Raises:
      ValueError: if it is no `.tflite` file.
    """
    model = read_model(content)
    found = []
    for index, graph in enumerate(model.subgraphs):
        infos = _tensor_infos(model, graph)
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


def signatures_in(content: bytes) -> dict[str, SignatureInfo]:
    """The functions of a model, by name.

    Args:
      content: the file.

    Raises:
      ValueError: if it is no `.tflite` file.
    """
    model = read_model(content)
    found = {}
    for signature in model.signatureDefs or ():
        graph = model.subgraphs[signature.subgraphIndex]
        infos = _tensor_infos(model, graph)
        made_by = {int(i): op for op in graph.operators for i in op.outputs}
        inputs = {x.name.decode(): int(x.tensorIndex) for x in signature.inputs or ()}
        outputs = {x.name.decode(): int(x.tensorIndex) for x in signature.outputs or ()}
        scales = {}
        for name, index in outputs.items():
            op = made_by.get(index)
            if op is not None and op_name(model, op) == "DEQUANTIZE":
                index = int(op.inputs[0])
            if len(infos[index].scale) == 1:
                scales[name] = infos[index].scale[0]
        found[signature.signatureKey.decode()] = SignatureInfo(
            {name: infos[i] for name, i in inputs.items()},
            {name: infos[i] for name, i in outputs.items()},
            scales,
        )
    return found


def float_ops(ops: Sequence[OpInfo]) -> list[OpInfo]:
    """The operations that compute with floats, and those that quantize them again.

    A QUANTIZE counts if its floats are neither an input of the model nor computed: it
    has codes become floats within the model.

    Args:
      ops: all operations of a model.
    """
    computed = {id(t) for op in ops if op.computes for t in op.outputs}

    def counts(op: OpInfo) -> bool:
        if op.computes:
            return True
        floats = op.inputs[0]
        again = not floats.is_input and id(floats) not in computed
        return op.name == "QUANTIZE" and again

    return [op for op in ops if op.reads_float and counts(op)]


def is_full_integer(ops: Sequence[OpInfo]) -> bool:
    """Whether a model computes in integers alone.

    Floats may only be read by a QUANTIZE at an input of the model, and be given by a
    DEQUANTIZE at an output.

    Args:
      ops: all operations of the model.
    """
    return not float_ops(ops)


def read_model(content: bytes) -> Any:
    """The model in a file, as objects that can be changed.

    Args:
      content: the file.

    Raises:
      ImportError: if the packages of the extra are not installed.
      ValueError: if it is no `.tflite` file, or is cut off or corrupted.
    """
    if content[4:8] != _IDENTIFIER:
        raise ValueError(
            f"These {len(content)} bytes are no .tflite file: the bytes 4 to 8 of one "
            f"are {_IDENTIFIER!r}, and these are {bytes(content[4:8])!r}."
        )
    reader = schema().ModelT
    try:
        model = reader.InitFromPackedBuf(content, 0)
        _check_references(model)
    # Whatever reading meets at an offset that leads elsewhere.
    except Exception as error:
        raise ValueError(
            f"These {len(content)} bytes are a .tflite file that is cut off or "
            f"corrupted: {type(error).__name__}: {error}"
        ) from error
    return model


def _check_references(model: Any) -> None:
    """Checks that all that a model refers to is there.

    Raises:
      Exception: if it is not.
    """

    def check(index: int, things: Any, what: str) -> None:
        if not 0 <= index < len(things or ()):
            raise IndexError(f"there is no {what} {index}")

    for code in model.operatorCodes or ():
        code_name(code)
    check(0, model.subgraphs, "subgraph")
    for graph in model.subgraphs:
        for tensor in graph.tensors:
            check(tensor.buffer, model.buffers, "buffer")
            _tensor_info(model, tensor, False, False)
        ends = [*graph.inputs, *graph.outputs]
        for op in graph.operators:
            check(op.opcodeIndex, model.operatorCodes, "operator")
            op_name(model, op)
            # -1 stands for an operand that is left out.
            ends += [i for i in (*op.inputs, *op.outputs) if i != -1]
        for index in ends:
            check(int(index), graph.tensors, "tensor")
    for signature in model.signatureDefs or ():
        check(signature.subgraphIndex, model.subgraphs, "subgraph")
        signature.signatureKey.decode()
        tensors = model.subgraphs[signature.subgraphIndex].tensors
        for entry in (*(signature.inputs or ()), *(signature.outputs or ())):
            check(entry.tensorIndex, tensors, "tensor")
            entry.name.decode()
    for entry in model.metadata or ():
        check(entry.buffer, model.buffers, "buffer")
        entry.name.decode()


def write_model(model: Any) -> bytes:
    """A file of a model.

    Args:
      model: what `read_model` gives.
    """
    import flatbuffers

    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), _IDENTIFIER)
    return bytes(builder.Output())


def dtype_of(tensor: Any) -> str:
    """The name of the type of a tensor."""
    return _types()[tensor.type]


def op_name(model: Any, op: Any) -> str:
    """The name of an operation."""
    code = model.operatorCodes[op.opcodeIndex]
    name = code_name(code)
    return f"{name}:{code.customCode.decode()}" if code.customCode else name


def code_name(code: Any) -> str:
    """The name of an operator, as the files of all versions hold it."""
    return _names()[max(code.builtinCode, code.deprecatedBuiltinCode)]


def data_of(model: Any, tensor: Any) -> np.ndarray | None:
    """The bytes of a constant; None for any other tensor."""
    data = model.buffers[tensor.buffer].data
    return None if data is None or np.size(data) == 0 else np.asarray(data, np.uint8)


@functools.cache
def _names() -> dict[int, str]:
    table = vars(schema().BuiltinOperator)
    return {value: name for name, value in table.items() if isinstance(value, int)}


@functools.cache
def _types() -> dict[int, str]:
    table = vars(schema().TensorType)
    names = {value: name for name, value in table.items() if isinstance(value, int)}
    return {value: name.lower() for value, name in names.items()}


def _tensor_infos(model: Any, graph: Any) -> list[TensorInfo]:
    inputs, outputs = set(map(int, graph.inputs)), set(map(int, graph.outputs))
    return [
        _tensor_info(model, tensor, index in inputs, index in outputs)
        for index, tensor in enumerate(graph.tensors)
    ]


def _tensor_info(
    model: Any, tensor: Any, is_input: bool, is_output: bool
) -> TensorInfo:
    quantization = tensor.quantization
    scale = getattr(quantization, "scale", None)
    zero_point = getattr(quantization, "zeroPoint", None)
    signature = tensor.shapeSignature
    shape = tensor.shape if signature is None else signature
    return TensorInfo(
        name=(tensor.name or b"").decode(),
        shape=() if shape is None else tuple(int(n) for n in shape),
        dtype=dtype_of(tensor),
        scale=() if scale is None else tuple(map(float, scale)),
        zero_point=() if zero_point is None else tuple(map(int, zero_point)),
        axis=getattr(quantization, "quantizedDimension", 0) or 0,
        constant=data_of(model, tensor) is not None,
        is_input=is_input,
        is_output=is_output,
    )
