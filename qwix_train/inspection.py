"""What is in a file or a folder that this package reads, as text."""

from __future__ import annotations

import hashlib
import math
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jax import numpy as jnp

from qwix_train import lora, odml, ptq
from qwix_train.core import numerics
from qwix_train.core.errors import located
from qwix_train.files import json_text
from qwix_train.files.text_table import aligned
from qwix_train.lora import checkpoint as adapter_checkpoint
from qwix_train.lora import peft
from qwix_train.planning import table as plan_table
from qwix_train.ptq import compressed_config, compressed_tensors, safetensors_files

SUMMARY = "print the plan, the types, the sizes and the checksums of saved params"
FORMATS = (
    "a checkpoint of ptq.save or lora.save, a .safetensors file or a folder of "
    "compressed-tensors or PEFT, or a .tflite file"
)


def describe(path: str | os.PathLike[str]) -> str:
    """Describes saved params: plan, types, sizes and checksums.

    Of a checkpoint of `ptq.save` or `lora.save` only the manifest is read. Files of
    other formats are read as a whole, and checked against their checksums if they have
    any.

    Args:
      path: a checkpoint of `ptq.save` or `lora.save`, a folder that has safetensors of
        compressed-tensors or of PEFT, a `.safetensors` file, or a `.tflite` file.

    Raises:
      FileNotFoundError: if nothing is there.
      ImportError: if the packages of the format are not installed.
      ValueError: if it has none of these formats, or is damaged.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"There is nothing at {path}.")
    if path.is_file():
        if path.suffix == ".safetensors":
            return _safetensors(path)
        if path.suffix == ".tflite":
            return _tflite(path)
        raise ValueError(f"{path} is not {FORMATS}.")
    if (path / peft.CONFIG).exists():
        return _peft(path)
    if any(path.glob("*.safetensors")):
        return _safetensors(path)
    return _checkpoint(path)


def _checkpoint(path: pathlib.Path) -> str:
    """A checkpoint of `ptq.save` or `lora.save`, from its manifest."""
    manifest = ptq.read_manifest(path)
    rows = [["param", "shape", "type", "scales", "bytes", "checksum"]]
    total = 0
    for param in manifest.params:
        size = sum(map(_stored_bytes, param.arrays.values()))
        total += size
        rows.append(
            [
                param.name,
                _shape(param.shape),
                param.qtype or param.dtype,
                plan_table.granularity(param.how) if param.how else "-",
                f"{size:,}",
                " ".join(array.checksum for array in param.arrays.values()),
            ]
        )
    metadata = dict(manifest.metadata or {})
    quantized = sum(param.qtype is not None for param in manifest.params)
    adapters = _adapters(path) if metadata.pop(adapter_checkpoint.KEY, None) else []
    return _text(
        "a checkpoint of adapters" if adapters else "a checkpoint of quantized params",
        [
            "written by " + _pairs(manifest.versions, " "),
            *(["metadata: " + _pairs(metadata, "=")] if metadata else []),
        ],
        _numbered("rules", manifest.rules),
        ["plan:", plan_table.of_records(manifest.plan)] if manifest.plan else [],
        adapters,
        [
            aligned(rows),
            "",
            f"{len(manifest.params)} params, {quantized} of them quantized; "
            f"{plan_table.size(total)}",
        ],
    )


def _adapters(path: pathlib.Path) -> list[str]:
    """The rules and the adapters of a checkpoint of `lora.save`."""
    manifest = lora.read_manifest(path)
    rows = [["adapter of", "shape", "rank", "alpha", "A", "B"]]
    for layout in manifest.layouts.values():
        shapes = map(_shape, (layout.shape, layout.a_shape, layout.b_shape))
        shape, a, b = shapes
        name = "/".join(layout.path)
        rows.append([name, shape, str(layout.rank), f"{layout.alpha:g}", a, b])
    return [*_numbered("rules of adapters", manifest.rules), "", aligned(rows)]


def _safetensors(path: pathlib.Path) -> str:
    """A checkpoint in the layout of compressed-tensors, or one of plain tensors."""
    tensors, _, config_file = safetensors_files.read_checkpoint(path)
    whole = json_text.read(config_file) if config_file.exists() else {}
    config = whole.get("quantization_config")
    layers: list[str] = []
    if config is not None:
        with located(f"{config_file}, quantization_config"):
            compressed_config.check_config(config)
        parts: dict[str, list[str]] = {}
        for name in sorted(tensors):
            layer, _, part = name.rpartition(".")
            parts.setdefault(layer, []).append(part)
        rows = [["layer", "weights", "activations"]]
        for layer in parts:
            if not compressed_tensors.is_layer(parts[layer]):
                continue
            scheme = compressed_config.find_scheme(config, layer)
            sides = (scheme.get(side) for side in ("weights", "input_activations"))
            rows.append([layer, *map(_scheme, sides)])
        layers = ["plan:", aligned(rows)] if len(rows) > 1 else []
    kind = "compressed-tensors" if config is not None else "safetensors"
    return _text(f"a checkpoint of {kind}", layers, _tensors(tensors))


def _peft(path: pathlib.Path) -> str:
    """A folder of adapters as PEFT writes it."""
    config = json_text.read(path / peft.CONFIG)
    if not (path / peft.FILE).exists():
        raise FileNotFoundError(f"There is no {peft.FILE} in {path}.")
    tensors, _ = safetensors_files.read_file(path / peft.FILE)
    said = {name: value for name, value in sorted(config.items()) if value}
    return _text(
        "adapters of PEFT",
        ["config:", *(f"  {name}: {value}" for name, value in said.items())],
        _tensors(tensors),
    )


def _tflite(path: pathlib.Path) -> str:
    """A LiteRT model."""
    model = odml.LiteRTModel.load(path)
    signatures = [
        f"  {name}: {_takes(found.takes)} -> {_takes(found.gives)}"
        for name, found in model.signatures.items()
    ]
    computes = (
        "in integers throughout"
        if model.is_full_integer
        else f"with {len(model.float_ops)} operations in float"
    )
    digest = hashlib.sha256(model.content).hexdigest()
    return _text(
        f"a LiteRT model, {computes}",
        ["signatures:", *signatures],
        [str(model.ops())],
        [
            f"{len(model.ops())} operations; {plan_table.size(len(model.content))}; "
            f"sha256 {digest[:16]}"
        ],
    )


def _tensors(tensors: Mapping[str, np.ndarray]) -> list[str]:
    rows = [["tensor", "shape", "type", "bytes", "checksum"]]
    for name, tensor in sorted(tensors.items()):
        checksum = safetensors_files.checksum(tensor)
        size = f"{tensor.nbytes:,}"
        rows.append([name, _shape(tensor.shape), tensor.dtype.name, size, checksum])
    total = sum(tensor.nbytes for tensor in tensors.values())
    return [aligned(rows), "", f"{len(tensors)} tensors; {plan_table.size(total)}"]


def _scheme(args: Mapping[str, Any] | None) -> str:
    """How one side of a layer is quantized, by the entries of its config."""
    if args is None:
        return "float"
    parts = [f"{args.get('type', 'int')}{args.get('num_bits', '')}"]
    parts += [str(args[key]) for key in ("strategy", "group_size") if args.get(key)]
    parts += [key for key in ("dynamic",) if args.get(key)]
    return " ".join(parts)


def _stored_bytes(array: Any) -> int:
    if array.packed_as is not None:
        return -(-math.prod(array.shape) * numerics.qtype_bits(array.packed_as) // 8)
    return math.prod(array.shape) * jnp.dtype(array.dtype).itemsize


def _takes(tensors: Mapping[str, Any]) -> str:
    named = (f"{name} {x.dtype}{list(x.shape)}" for name, x in tensors.items())
    return ", ".join(named)


def _shape(shape: Sequence[int]) -> str:
    return "(" + ", ".join(map(str, shape)) + ")"


def _pairs(values: Mapping[str, Any], between: str) -> str:
    return ", ".join(f"{name}{between}{value}" for name, value in values.items())


def _numbered(title: str, values: Iterable[Any]) -> list[str]:
    lines = [f"  {number}  {value}" for number, value in enumerate(values)]
    return [f"{title}:", *lines] if lines else []


def _text(what: str, *parts: Sequence[str]) -> str:
    """Paragraphs, below a line that says what it is."""
    return "\n\n".join([what, *("\n".join(part) for part in parts if part)])
