"""Folders of PEFT."""

from __future__ import annotations

import pathlib
from typing import Any

from qwix_train.files import json_text
from qwix_train.lora import peft
from qwix_train.ptq import safetensors_files
from qwix_train.ptq.hugging_face import places
from qwix_train.ptq.hugging_face.places import TensorMapping
from qwix_train.saved.contents import Adapters
from qwix_train.saved.format import Format
from qwix_train.saved.text import tensors, text

# What a config says beside what the tensors mean, and other formats keep as metadata.
_BESIDE = ("base_model_name_or_path", "lora_dropout", "task_type")
_WEIGHT = ".weight"


def _describe(path: pathlib.Path) -> str:
    config = json_text.read(path / peft.CONFIG)
    if not (path / peft.FILE).exists():
        raise FileNotFoundError(f"There is no {peft.FILE} in {path}.")
    found, _ = safetensors_files.read_file(path / peft.FILE)
    said = {name: value for name, value in sorted(config.items()) if value}
    return text(
        "adapters of PEFT",
        ["config:", *(f"  {name}: {value}" for name, value in said.items())],
        tensors(found),
    )


def _read(path: pathlib.Path, mapping: TensorMapping | None) -> Adapters:
    def path_of(module: str) -> str | None:
        # Without a mapping, its own name says it.
        return None if mapping is None else places.path_of(mapping, module + _WEIGHT)

    found = peft.read_layouts(path, path_of)
    layouts = {layout.path: layout for layout in found.values()}
    names = {"/".join(layout.path): module for module, layout in found.items()}
    config = json_text.read(path / peft.CONFIG)
    beside = {name: config[name] for name in _BESIDE if config.get(name)}
    return Adapters(
        peft.load_peft(path, layouts, names=names),
        layouts,
        mapping,
        metadata={"adapter_config": beside} if beside else None,
    )


def _write(path: pathlib.Path, adapters: Any, overwrite: bool) -> None:
    names = None
    if adapters.mapping is not None:
        paths = ["/".join(param) for param in adapters.layouts]
        found = {param: places.name_of(adapters.mapping, param) for param in paths}
        if lost := [param for param, name in found.items() if name is None]:
            raise ValueError(
                f"The mapping has no tensor for the params {', '.join(lost)}."
            )
        names = {p: name.removesuffix(_WEIGHT) for p, name in found.items() if name}
    peft.save_peft(
        path,
        adapters.arrays,
        adapters.layouts,
        names=names,
        config=(adapters.metadata or {}).get("adapter_config"),
        overwrite=overwrite,
    )


PEFT = Format(
    name="peft",
    what="a folder of PEFT",
    holds="adapters",
    known_by=f"a folder with {peft.CONFIG}",
    is_one=lambda path: (path / peft.CONFIG).exists(),
    describe=_describe,
    read=_read,
    write=_write,
)
