"""Changes to a `.tflite` file that the converter does not make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qwix_train.odml.flatbuffer import (
    data_of,
    dtype_of,
    metadata_of,
    op_name,
    read_model,
    tools,
    write_model,
)

# Operations whose results do not depend on the scale of the codes that they read.
_READ_CODES = ("ARG_MAX", "ARG_MIN")
_BIASED = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")
_SUMS = ("ADD", "SUB")


def completed(content: bytes, inputs: Sequence[str], outputs: Sequence[str]) -> bytes:
    """A model with what the converter leaves undone.

    Args:
      content: the file, of one signature.
      inputs: the names of the inputs, in the order that the signature is to have.
      outputs: those of the outputs.
    """
    model = read_model(content)
    (signature,) = model.signatureDefs
    for entries, names in ((signature.inputs, inputs), (signature.outputs, outputs)):
        # The converter sorts them by name.
        places = {name: place for place, name in enumerate(names)}
        (entries or []).sort(key=lambda entry: places[entry.name.decode()])
    for graph in model.subgraphs:
        _read_codes(model, graph)
        for op in graph.operators:
            if dtype_of(graph.tensors[op.inputs[0]]) == "int16":
                _complete_sixteen_bits(model, graph, op)
    return write_model(model)


def _read_codes(model: Any, graph: Any) -> None:
    """Has operations that only compare values read codes, not floats.

    The converter has them read floats, though LiteRT runs them in integers: the largest
    code is that of the largest value.
    """
    made_by = {i: op for op in graph.operators for i in op.outputs}
    for op in graph.operators:
        if op_name(model, op) not in _READ_CODES:
            continue
        before = made_by.get(op.inputs[0])
        if before is not None and op_name(model, before) == "DEQUANTIZE":
            op.inputs[0] = before.inputs[0]
            # 8-bit inputs came with the second version of these operators.
            code = model.operatorCodes[op.opcodeIndex]
            code.version = max(code.version, 2)
    # The conversions that nothing reads any more.
    read = set(graph.outputs)
    kept = []
    for op in reversed(graph.operators):
        if not read.isdisjoint(op.outputs):
            kept.append(op)
            read.update(op.inputs)
    graph.operators = kept[::-1]


def _complete_sixteen_bits(model: Any, graph: Any, op: Any) -> None:
    """Has a product or a sum of 16 bits compute what it should.

    The bias of such a product is to have 64 bits: LiteRT reads one of 32, which the
    converter writes for convolutions, as if it had 64. Sums are to say that scales are
    not powers of two, or they are not loaded.
    """
    name = op_name(model, op)
    if name in _SUMS:
        op.builtinOptions.potScaleInt16 = False
    if name not in _BIASED or len(op.inputs) < 3 or op.inputs[2] < 0:
        return
    bias = graph.tensors[op.inputs[2]]
    codes = data_of(model, bias)
    if dtype_of(bias) == "int32" and codes is not None:
        wide = codes.view(np.int32).astype(np.int64)
        bias.buffer = add_buffer(model, wide.tobytes())
        bias.type = tools().schema_fb.TensorType.INT64


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
        named = [
            entry
            for signature in model.signatureDefs or ()
            if signature.subgraphIndex == index
            for entry in (*(signature.inputs or ()), *(signature.outputs or ()))
        ]
        names = {entry.tensorIndex: entry.name.decode() for entry in named}
        for op in graph.operators:
            name = op_name(model, op)
            source, target = op.inputs[0], op.outputs[0]
            if inputs and name == "QUANTIZE" and source in graph.inputs:
                if moved.setdefault(source, target) != target:
                    raise ValueError(
                        f"integer_inputs=True: the input {names[source]!r} is "
                        "quantized in two ways, so there are no codes of it to give. "
                        "Leave integer_inputs out."
                    )
            elif outputs and name == "DEQUANTIZE" and target in graph.outputs:
                moved[target] = source
            else:
                kept.append(op)
        read = {i: op_name(model, op) for op in kept for i in op.inputs}
        made = {i for op in kept for i in op.outputs}
        for what, asked, ends in (
            ("input", inputs, graph.inputs),
            ("output", outputs, graph.outputs),
        ):
            for end in ends if asked else ():
                if "float" not in dtype_of(graph.tensors[end]):
                    continue
                if end in read:
                    raise ValueError(
                        f"integer_{what}s=True: {read[end]} reads the {what} "
                        f"{names[end]!r} in floats."
                    )
                if end not in moved and (end in made or what == "output"):
                    raise ValueError(
                        f"integer_{what}s=True: the {what} {names[end]!r} is not "
                        "quantized. Give it a range with a rule that sets act_qtype, "
                        f"or leave integer_{what}s out."
                    )
        graph.operators = kept
        graph.inputs = [moved.get(i, i) for i in graph.inputs]
        graph.outputs = [moved.get(i, i) for i in graph.outputs]
        for entry in named:
            entry.tensorIndex = moved.get(entry.tensorIndex, entry.tensorIndex)
    return write_model(model)


def merged(contents: Sequence[bytes]) -> bytes:
    """One model with the functions of several, which hold equal weights once.

    Args:
      contents: the files.
    """
    models = list(map(read_model, contents))
    first = models[0]
    # By what they hold; one without data stands first.
    buffers: dict[Any, Any] = {b"": (0, tools().schema_fb.BufferT())}
    codes: dict[Any, Any] = {}
    subgraphs: list[Any] = []
    signatures: list[Any] = []

    def place(known: dict[Any, Any], key: Any, thing: Any) -> int:
        return known.setdefault(key, (len(known), thing))[0]

    def place_of_buffer(buffer: Any) -> int:
        data = b"" if buffer.data is None else np.asarray(buffer.data).tobytes()
        return place(buffers, data, buffer)

    for model in models:
        before = len(subgraphs)
        for graph in model.subgraphs:
            for tensor in graph.tensors:
                tensor.buffer = place_of_buffer(model.buffers[tensor.buffer])
            for op in graph.operators:
                code = model.operatorCodes[op.opcodeIndex]
                key = (op_name(model, op), code.version)
                op.opcodeIndex = place(codes, key, code)
                _shift_subgraphs(op.builtinOptions, before)
            subgraphs.append(graph)
        for signature in model.signatureDefs or ():
            signature.subgraphIndex += before
            signatures.append(signature)
    for entry in first.metadata or ():
        entry.buffer = place_of_buffer(first.buffers[entry.buffer])
    first.buffers = [buffer for _, buffer in buffers.values()]
    first.operatorCodes = [code for _, code in codes.values()]
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
        entry = tools().schema_fb.MetadataT()
        entry.name, entry.buffer = name, add_buffer(model, data)
        model.metadata.append(entry)
    return write_model(model)


def metadata_in(content: bytes) -> dict[str, bytes]:
    """The metadata of a model, by name.

    Args:
      content: the file.
    """
    return metadata_of(read_model(content))


def add_buffer(model: Any, data: bytes) -> int:
    """Adds data to a model; gives its place."""
    buffer = tools().schema_fb.BufferT()
    buffer.data = np.frombuffer(data, np.uint8)
    model.buffers.append(buffer)
    return len(model.buffers) - 1


def _shift_subgraphs(options: Any, count: int) -> None:
    """Changes the indices of subgraphs, such as those of a loop."""
    for name, value in vars(options).items() if options is not None else ():
        if name.lower().endswith(("subgraphindex", "subgraph")):
            setattr(options, name, value + count)
