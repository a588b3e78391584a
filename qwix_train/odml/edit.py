"""Changes to a `.tflite` file that the converter has no option for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qwix_train.odml.flatbuffer import (
    code_name,
    data_of,
    dtype_of,
    op_name,
    read_model,
    schema,
    write_model,
)

# Operations whose results do not depend on the scale of the codes that they read.
_READ_CODES = ("ARG_MAX", "ARG_MIN")


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
        made_by = {int(i): op for op in graph.operators for i in op.outputs}
        for op in graph.operators:
            if op_name(model, op) not in _READ_CODES:
                continue
            before = made_by.get(int(op.inputs[0]))
            if before is not None and op_name(model, before) == "DEQUANTIZE":
                op.inputs = [int(before.inputs[0]), *map(int, op.inputs[1:])]
                changed = True
        _drop_unread(graph)
    if not changed:
        return content
    for code in model.operatorCodes:
        # 8-bit inputs came with the second version of these operators.
        if code_name(code) in _READ_CODES:
            code.version = max(code.version, 2)
    return write_model(model)


def in_order(content: bytes, inputs: Sequence[str], outputs: Sequence[str]) -> bytes:
    """A model whose signature lists its inputs and outputs in an order.

    The converter sorts them by name.

    Args:
      content: the file, of one signature.
      inputs: the names of the inputs, in order.
      outputs: those of the outputs.
    """
    model = read_model(content)
    (signature,) = model.signatureDefs
    for entries, names in ((signature.inputs, inputs), (signature.outputs, outputs)):
        places = {name: place for place, name in enumerate(names)}
        (entries or []).sort(key=lambda entry: places[entry.name.decode()])
    return write_model(model)


def integer_ends(content: bytes, inputs: bool, outputs: bool) -> bytes:
    """A model that takes, or gives, codes in the place of floats.

    Inputs and outputs that hold integers anyway, such as the indices of tokens, and
    inputs that nothing reads, stay as they are.

    Args:
      content: the file.
      inputs: whether it takes codes.
      outputs: whether it gives codes.

    Raises:
      ValueError: if an input or output in floats has no codes, or more than one kind.
    """
    model = read_model(content)
    for index, graph in enumerate(model.subgraphs):
        moved: dict[int, int] = {}
        kept = []
        graph_inputs, graph_outputs = map(set, (graph.inputs, graph.outputs))
        for op in graph.operators:
            name = op_name(model, op)
            source, target = int(op.inputs[0]), int(op.outputs[0])
            if inputs and name == "QUANTIZE" and source in graph_inputs:
                if moved.setdefault(source, target) != target:
                    raise ValueError(
                        "integer_inputs=True: the input "
                        f"{_end_name(model, index, source)!r} is quantized in two "
                        "ways, so there are no codes of it to give."
                    )
            elif outputs and name == "DEQUANTIZE" and target in graph_outputs:
                moved[target] = source
            else:
                kept.append(op)
        read = {int(i): op_name(model, op) for op in kept for i in op.inputs}
        made = {int(i) for op in kept for i in op.outputs}
        for option, asked, ends in (
            ("integer_inputs", inputs, graph.inputs),
            ("integer_outputs", outputs, graph.outputs),
        ):
            for end in map(int, ends) if asked else ():
                if "float" not in dtype_of(graph.tensors[end]):
                    continue
                what = "input" if option == "integer_inputs" else "output"
                if end in read:
                    raise ValueError(
                        f"{option}=True: {read[end]} reads the {what} "
                        f"{_end_name(model, index, end)!r} in floats."
                    )
                if end not in moved and (end in made or what == "output"):
                    raise ValueError(
                        f"{option}=True: the {what} {_end_name(model, index, end)!r} "
                        "is not quantized. Give it a range with a rule that sets "
                        f"act_qtype, or leave {option} out."
                    )
        graph.operators = kept
        graph.inputs = [moved.get(int(i), int(i)) for i in graph.inputs]
        graph.outputs = [moved.get(int(i), int(i)) for i in graph.outputs]
        for signature in model.signatureDefs or ():
            if signature.subgraphIndex == index:
                for entry in (*(signature.inputs or ()), *(signature.outputs or ())):
                    entry.tensorIndex = moved.get(entry.tensorIndex, entry.tensorIndex)
    return write_model(model)


def merged(contents: Sequence[bytes]) -> bytes:
    """One model with the functions of several, which hold equal weights once.

    Args:
      contents: the files.
    """
    models = list(map(read_model, contents))
    first = models[0]
    buffers: dict[bytes, int] = {}
    all_buffers = [schema().BufferT()]
    codes: dict[tuple[Any, ...], int] = {}
    all_codes: list[Any] = []
    subgraphs: list[Any] = []
    signatures: list[Any] = []

    def place_of_buffer(buffer: Any) -> int:
        data = b"" if buffer.data is None else np.asarray(buffer.data).tobytes()
        if not data:
            return 0
        if data not in buffers:
            buffers[data] = len(all_buffers)
            all_buffers.append(buffer)
        return buffers[data]

    def place_of_code(code: Any) -> int:
        key = (code_name(code), code.customCode, code.version)
        if key not in codes:
            codes[key] = len(all_codes)
            all_codes.append(code)
        return codes[key]

    for model in models:
        before = len(subgraphs)
        for graph in model.subgraphs:
            for tensor in graph.tensors:
                tensor.buffer = place_of_buffer(model.buffers[tensor.buffer])
            for op in graph.operators:
                op.opcodeIndex = place_of_code(model.operatorCodes[op.opcodeIndex])
                _shift_subgraphs(op.builtinOptions, before)
            subgraphs.append(graph)
        for signature in model.signatureDefs or ():
            signature.subgraphIndex += before
            signatures.append(signature)
    for entry in first.metadata or ():
        entry.buffer = place_of_buffer(first.buffers[entry.buffer])
    first.buffers, first.operatorCodes = all_buffers, all_codes
    first.subgraphs, first.signatureDefs = subgraphs, signatures
    return write_model(first)


def with_metadata(content: bytes, metadata: Mapping[str, str | bytes]) -> bytes:
    """A model with entries in its metadata, in the place of those of the same name.

    Args:
      content: the file.
      metadata: the entries, by name.

    Raises:
      TypeError: if an entry is neither text nor bytes.
    """
    model = read_model(content)
    model.metadata = [
        entry for entry in model.metadata or () if entry.name.decode() not in metadata
    ]
    for name, value in metadata.items():
        if not isinstance(value, str | bytes):
            raise TypeError(
                f"The metadata {name!r} is {value!r}; give text or bytes, such as "
                "json.dumps(value)."
            )
        data = value.encode() if isinstance(value, str) else value
        entry = schema().MetadataT()
        entry.name, entry.buffer = name, add_buffer(model, data)
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
        data = data_of(model, entry)
        found[entry.name.decode()] = b"" if data is None else data.tobytes()
    return found


def add_buffer(model: Any, data: bytes) -> int:
    """Adds data to a model; gives its place."""
    buffer = schema().BufferT()
    buffer.data = np.frombuffer(data, np.uint8)
    model.buffers.append(buffer)
    return len(model.buffers) - 1


def _drop_unread(graph: Any) -> None:
    """Leaves out the operations whose results nothing reads."""
    read = set(map(int, graph.outputs))
    kept = []
    for op in reversed(graph.operators):
        if any(int(i) in read for i in op.outputs):
            kept.append(op)
            read.update(map(int, op.inputs))
    graph.operators = kept[::-1]


def _end_name(model: Any, subgraph: int, tensor: int) -> str:
    """The name that a signature gives an input or output."""
    for signature in model.signatureDefs or ():
        if signature.subgraphIndex == subgraph:
            for entry in (*(signature.inputs or ()), *(signature.outputs or ())):
                if entry.tensorIndex == tensor:
                    return entry.name.decode()
    return (model.subgraphs[subgraph].tensors[tensor].name or b"").decode()


def _shift_subgraphs(options: Any, count: int) -> None:
    """Changes the indices of subgraphs, such as those of a loop."""
    for name, value in vars(options).items() if options is not None else ():
        if name.lower().endswith(("subgraphindex", "subgraph")):
            setattr(options, name, value + count)
