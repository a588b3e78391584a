"""Folders of safetensors: of compressed-tensors, and those of Hugging Face in float."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import traverse_util

from qwix_train.core.errors import located
from qwix_train.core.numerics import qtype_name
from qwix_train.files import json_text
from qwix_train.files.text_table import aligned
from qwix_train.planning.rules import QuantizationRule
from qwix_train.ptq import (
    compressed_config,
    compressed_tensors,
    hugging_face,
    safetensors_files,
)
from qwix_train.ptq.hugging_face import places, quantized_tensors
from qwix_train.ptq.hugging_face.places import Place, TensorMapping
from qwix_train.ptq.hugging_face.quantized_tensors import QUANTIZED
from qwix_train.saved.contents import Params, in_memory
from qwix_train.saved.format import Format
from qwix_train.saved.text import tensors, text

_ENTRY = "quantization_config"


def _is_safetensors(path: pathlib.Path) -> bool:
    if path.is_file():
        return path.suffix == ".safetensors"
    return any(path.glob("*.safetensors"))


def _is_compressed(path: pathlib.Path) -> bool:
    if not _is_safetensors(path):
        return False
    entry = _config(path).get(_ENTRY) or {}
    return entry.get("quant_method") == "compressed-tensors"


def _config(path: pathlib.Path) -> dict[str, Any]:
    folder = path if path.is_dir() else path.parent
    file = folder / safetensors_files.CONFIG
    return json_text.read(file) if file.exists() else {}


def _describe_compressed(path: pathlib.Path) -> str:
    found, _, config_file = safetensors_files.read_checkpoint(path)
    config = _config(path)[_ENTRY]
    with located(f"{config_file}, {_ENTRY}"):
        compressed_config.check_config(config)
    parts: dict[str, list[str]] = {}
    for name in sorted(found):
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
    return text("a checkpoint of compressed-tensors", layers, tensors(found))


def _describe_float(path: pathlib.Path) -> str:
    """The tensors, and how others quantized them: what is not read is seen, too."""
    found, _, _ = safetensors_files.read_checkpoint(path)
    method = (_config(path).get(_ENTRY) or {}).get("quant_method")
    said = [f"quant_method: {method}"] if method else []
    return text("a checkpoint of safetensors", said, tensors(found))


def _scheme(args: Mapping[str, Any] | None) -> str:
    """How one side of a layer is quantized, by the entries of its config."""
    if args is None:
        return "float"
    parts = [f"{args.get('type', 'int')}{args.get('num_bits', '')}"]
    parts += [str(args[key]) for key in ("strategy", "group_size") if args.get(key)]
    parts += [key for key in ("dynamic",) if args.get(key)]
    return " ".join(parts)


def _read_compressed(path: pathlib.Path, mapping: TensorMapping | None) -> Params:
    rename = None if mapping is None else functools.partial(places.path_of, mapping)
    tree = compressed_tensors.load_compressed_tensors(path, rename=rename)
    return in_memory(tree, mapping=mapping, config=_config(path))


def _write_compressed(path: pathlib.Path, params: Any, overwrite: bool) -> None:
    if not params.quantized:
        raise ValueError(
            "No param is quantized, and a folder of compressed-tensors has quantized "
            "ones. Say their type (rules=, --weights int4), or write hugging-face."
        )
    compressed_tensors.save_compressed_tensors(
        path,
        params.load(params.shapes),
        mapping=params.mapping,
        act_qtype=_activations(params.rules),
        config=_without_entry(params.config),
        overwrite=overwrite,
    )


def _activations(rules: Sequence[QuantizationRule]) -> Any:
    """The type that readers give to activations, which is one for all layers."""
    types = {
        None if rule.act_qtype is None else qtype_name(rule.act_qtype)
        for rule in rules
        if rule.weight_qtype is not None and not rule.act_static_scale
    }
    if len(types) > 1:
        names = ", ".join(sorted(name or "float" for name in types))
        raise ValueError(
            f"The rules give activations several types ({names}). Write the file with "
            "ptq.save_compressed_tensors, and say the one for all with act_qtype."
        )
    return types.pop() if types else None


def _without_entry(config: Mapping[str, Any] | None) -> dict[str, Any]:
    return {k: v for k, v in (config or {}).items() if k != _ENTRY}


def _read_float(path: pathlib.Path, mapping: TensorMapping | None) -> Params:
    found = quantized_tensors.joined(safetensors_files.open_checkpoint(path), path)
    sizes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    used = _default_places(sizes) if mapping is None else mapping
    shapes = places.param_shapes(used, sizes)
    structs = {}
    for assembly in places.assemblies(used, shapes, sizes, str(path)):
        tensor = found[next(iter(assembly.names.values()))]
        structs[assembly.path] = jax.ShapeDtypeStruct(
            shapes[assembly.path], tensor.dtype
        )
    types = {x.qtype for x in found.values() if isinstance(x, QUANTIZED)}
    return Params(
        traverse_util.unflatten_dict(structs),
        lambda wanted: hugging_face.load(path, used, wanted),
        mapping,
        are_named=mapping is not None,
        types_in_file=tuple(sorted(types)),
        config=_config(path),
    )


def _default_places(sizes: Mapping[str, Sequence[int]]) -> dict[str, Place]:
    """The params of tensors by their names: a matrix `weight` is a `kernel`."""
    found = {}
    for name, shape in sizes.items():
        where = compressed_tensors.param_path(name, len(shape))
        moved = compressed_tensors.is_transposed(tuple(where.split("/")), len(shape))
        found[name] = Place(where, "out in -> in out" if moved else "")
    return found


def _write_float(path: pathlib.Path, params: Any, overwrite: bool) -> None:
    if params.quantized:
        raise ValueError(
            f"{len(params.quantized)} arrays are quantized ({', '.join(params.types)}),"
            " and a folder of Hugging Face holds float params. Make float ones of them "
            "(to_float=True, --weights float), or write compressed-tensors."
        )
    hugging_face.save(
        path,
        params.load(params.shapes),
        params.places,
        config=_without_entry(params.config) or None,
        overwrite=overwrite,
    )


COMPRESSED_TENSORS = Format(
    name="compressed-tensors",
    what="a folder of compressed-tensors, or one of its .safetensors files",
    holds="params",
    known_by=f"*.safetensors beside a {safetensors_files.CONFIG} that names the format",
    is_one=_is_compressed,
    describe=_describe_compressed,
    read=_read_compressed,
    write=_write_compressed,
)

HUGGING_FACE = Format(
    name="hugging-face",
    what="a folder of Hugging Face, or one of its .safetensors files",
    holds="params",
    known_by="*.safetensors",
    is_one=_is_safetensors,
    describe=_describe_float,
    read=_read_float,
    write=_write_float,
)
