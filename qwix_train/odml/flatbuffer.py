"""What is in a `.tflite` file: its operations, and whether they are all integer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qwix_train.core.errors import imported

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


@dataclasses.dataclass(frozen=True, eq=False)
class Signature:
    """A function of a LiteRT model.

    Attributes:
      takes: the tensors that it takes, by name, in order.
      gives: the tensors that it gives, by name, in order.
      output_scales: the scales of outputs that stand for floats, also of those that
        are dequantized in the end, by name.
    """

    takes: Mapping[str, TensorInfo]
    gives: Mapping[str, TensorInfo]
    output_scales: Mapping[str, float]

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of its inputs, in order."""
        return tuple(self.takes)

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of its outputs, in order."""
        return tuple(self.gives)


def tools() -> Any:
    """The module that reads and writes the format; its `schema_fb` has the classes.

    Raises:
      ImportError: if the packages of the extra are not installed.
    """
    remedy = f"LiteRT models need ai-edge-litert and litert-converter: {_EXTRA}"
    return imported("ai_edge_litert.tools.flatbuffer_utils", remedy)


def ops_in(content: bytes) -> list[OpInfo]:
    """The operations of a model, in the order in which they run.

    Args:
      content: the file.

    Raises:
      ValueError: if it is no `.tflite` file.
    """
    return _ops(read_model(content))


def signatures_in(content: bytes) -> dict[str, Signature]:
    """The functions of a model, by name.

    Args:
      content: the file.

    Raises:
      ValueError: if it is no `.tflite` file.
    """
    return _signatures(read_model(content))


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
    read = tools().read_model_from_bytearray
    try:
        model = read(content)
        # What is described without an error refers to nothing that is not there.
        for describe in (_ops, _signatures, metadata_of):
            describe(model)
    # Whatever reading meets at an offset that leads elsewhere.
    except Exception as error:
        raise ValueError(
            f"These {len(content)} bytes are a .tflite file that is cut off or "
            f"corrupted: {type(error).__name__}: {error}"
        ) from error
    return model


def write_model(model: Any) -> bytes:
    """A file of a model.

    Args:
      model: what `read_model` gives.
    """
    return bytes(tools().convert_object_to_bytearray(model))


def dtype_of(tensor: Any) -> str:
    """The name of the type of a tensor."""
    return tools().type_to_name(tensor.type).lower()


def op_name(model: Any, op: Any) -> str:
    """The name of an operation."""
    name = tools().opcode_to_name(model, op.opcodeIndex)
    if name is None:
        raise ValueError("there is no such operator")
    custom = model.operatorCodes[op.opcodeIndex].customCode
    return f"{name}:{custom.decode()}" if custom else name


def data_of(model: Any, tensor: Any) -> np.ndarray | None:
    """The bytes of a constant; None for any other tensor."""
    data = model.buffers[tensor.buffer].data
    return None if data is None or np.size(data) == 0 else np.asarray(data, np.uint8)


def metadata_of(model: Any) -> dict[str, bytes]:
    """The metadata of a model, by name."""
    found = {
        entry.name.decode(): data_of(model, entry) for entry in model.metadata or ()
    }
    return {name: b"" if x is None else x.tobytes() for name, x in found.items()}


def _ops(model: Any) -> list[OpInfo]:
    found = []
    for index, graph in enumerate(model.subgraphs):
        infos = _tensor_infos(model, graph)
        for op in graph.operators:
            # -1 stands for an operand that is left out.
            read, made = (
                tuple(infos[i] for i in places if i != -1)
                for places in (op.inputs, op.outputs)
            )
            found.append(OpInfo(op_name(model, op), read, made, index))
    return found


def _signatures(model: Any) -> dict[str, Signature]:
    found = {}
    for signature in model.signatureDefs or ():
        graph = model.subgraphs[signature.subgraphIndex]
        infos = _tensor_infos(model, graph)
        made_by = {i: op for op in graph.operators for i in op.outputs}
        scales = {}
        for end in signature.outputs or ():
            op, index = made_by.get(end.tensorIndex), end.tensorIndex
            if op is not None and op_name(model, op) == "DEQUANTIZE":
                (index,) = op.inputs
            info = infos[index]
            if len(info.scale) == 1:
                (scales[end.name.decode()],) = info.scale
        inputs, outputs = (
            {end.name.decode(): infos[end.tensorIndex] for end in ends or ()}
            for ends in (signature.inputs, signature.outputs)
        )
        name = signature.signatureKey.decode()
        found[name] = Signature(inputs, outputs, scales)
    return found


def _tensor_infos(model: Any, graph: Any) -> dict[int, TensorInfo]:
    """The tensors of a graph, by their index."""
    infos = {}
    for index, tensor in enumerate(graph.tensors):
        how = tensor.quantization
        shape = tensor.shape if tensor.shapeSignature is None else tensor.shapeSignature
        infos[index] = TensorInfo(
            name=(tensor.name or b"").decode(),
            shape=_tuple(shape, int),
            dtype=dtype_of(tensor),
            scale=_tuple(getattr(how, "scale", None), float),
            zero_point=_tuple(getattr(how, "zeroPoint", None), int),
            axis=getattr(how, "quantizedDimension", 0) or 0,
            constant=data_of(model, tensor) is not None,
            is_input=index in graph.inputs,
            is_output=index in graph.outputs,
        )
    for end in (*graph.inputs, *graph.outputs):
        infos[end]  # or it is an error
    return infos


def _tuple(values: Any, of: type) -> tuple[Any, ...]:
    return () if values is None else tuple(map(of, values))
