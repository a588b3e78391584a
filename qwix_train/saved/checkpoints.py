"""Checkpoints of Orbax: those of `ptq.save`, and those of `lora.save`."""

from __future__ import annotations

import math
import pathlib
from typing import Any

from jax import numpy as jnp

from qwix_train import lora, ptq
from qwix_train.core import numerics
from qwix_train.files.text_table import aligned
from qwix_train.lora import checkpoint as adapter_checkpoint
from qwix_train.planning import table as plan_table
from qwix_train.ptq import checkpoint
from qwix_train.ptq.hugging_face.places import TensorMapping
from qwix_train.saved.contents import Adapters, Params, in_memory
from qwix_train.saved.format import Format
from qwix_train.saved.text import numbered, pairs, shape, text

# Where a manifest keeps the `config.json` of the folder that params are from.
_CONFIG = "qwix_train.config"


def _describe(path: pathlib.Path) -> str:
    manifest = ptq.read_manifest(path)
    rows = [["param", "shape", "type", "scales", "bytes", "checksum"]]
    total = 0
    for param in manifest.params:
        size = sum(map(_stored_bytes, param.arrays.values()))
        total += size
        rows.append(
            [
                param.name,
                shape(param.shape),
                param.qtype or param.dtype,
                plan_table.granularity(param.how) if param.how else "-",
                f"{size:,}",
                " ".join(array.checksum for array in param.arrays.values()),
            ]
        )
    metadata = dict(manifest.metadata or {})
    metadata.pop(_CONFIG, None)
    quantized = sum(param.qtype is not None for param in manifest.params)
    adapters = _adapters(path) if metadata.pop(adapter_checkpoint.KEY, None) else []
    return text(
        "a checkpoint of adapters" if adapters else "a checkpoint of quantized params",
        [
            "written by " + pairs(manifest.versions, " "),
            *(["metadata: " + pairs(metadata, "=")] if metadata else []),
        ],
        numbered("rules", manifest.rules),
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
        whole, a, b = map(shape, (layout.shape, layout.a_shape, layout.b_shape))
        name = "/".join(layout.path)
        rows.append([name, whole, str(layout.rank), f"{layout.alpha:g}", a, b])
    return [*numbered("rules of adapters", manifest.rules), "", aligned(rows)]


def _stored_bytes(array: Any) -> int:
    if array.packed_as is not None:
        return -(-math.prod(array.shape) * numerics.qtype_bits(array.packed_as) // 8)
    return math.prod(array.shape) * jnp.dtype(array.dtype).itemsize


def _is_checkpoint(path: pathlib.Path) -> bool:
    """Whether a folder has an item of `ptq.save`; reading it says if one is missing."""
    return any((path / item).is_dir() for item in checkpoint.ITEMS)


def _is_of_adapters(path: pathlib.Path) -> bool:
    if not _is_checkpoint(path):
        return False
    return adapter_checkpoint.KEY in (ptq.read_manifest(path).metadata or {})


def _read(path: pathlib.Path, mapping: TensorMapping | None) -> Params:
    manifest = ptq.read_manifest(path)
    metadata = dict(manifest.metadata or {})
    return in_memory(
        ptq.restore(path),
        mapping=mapping,
        rules=manifest.rules,
        config=metadata.pop(_CONFIG, None),
        metadata=metadata or None,
    )


def _write(path: pathlib.Path, params: Any, overwrite: bool) -> None:
    metadata = dict(params.metadata or {})
    if params.config:
        metadata[_CONFIG] = params.config
    ptq.save(
        path,
        params.load(params.shapes),
        rules=params.rules,
        metadata=metadata or None,
        overwrite=overwrite,
    )


def _read_adapters(path: pathlib.Path, mapping: TensorMapping | None) -> Adapters:
    manifest = lora.read_manifest(path)
    return Adapters(
        lora.restore(path),
        manifest.layouts,
        mapping,
        rules=manifest.rules,
        metadata=manifest.metadata,
    )


def _write_adapters(path: pathlib.Path, adapters: Any, overwrite: bool) -> None:
    lora.save(
        path,
        adapters.arrays,
        adapters.layouts,
        rules=adapters.rules,
        metadata=adapters.metadata,
        overwrite=overwrite,
    )


CHECKPOINT = Format(
    name="orbax",
    what="a checkpoint of ptq.save",
    holds="params",
    known_by=f"a folder with {checkpoint.MANIFEST}/, of ptq.save",
    is_one=_is_checkpoint,
    describe=_describe,
    read=_read,
    write=_write,
)
ADAPTERS = Format(
    name="orbax-adapters",
    what="a checkpoint of lora.save",
    holds="adapters",
    known_by=f"a folder with {checkpoint.MANIFEST}/, of lora.save",
    is_one=_is_of_adapters,
    describe=_describe,
    read=_read_adapters,
    write=_write_adapters,
)
