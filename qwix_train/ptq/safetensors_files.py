"""Safetensors files of a checkpoint folder, with float8 and bfloat16 tensors.

Files that are written here say in their metadata, which other readers pass over, what
the checksum of each tensor is, and those of the other metadata. They are checked when
such a file is read.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import re
import reprlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from qwix_train.core.errors import imported
from qwix_train.files import json_text
from qwix_train.planning import table as plan_table

FILE, CONFIG = "model.safetensors", "config.json"
INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"(.*)-(\d{1,9})-of-(\d{1,9})\.safetensors")
# In the metadata: the checksums of the tensors, and that of all other entries.
_CHECKSUMS, _SEAL = "qwix_train.checksums", "qwix_train.checksum_of_metadata"
# In the metadata: what the config beside the file says.
_CONFIG_ENTRIES = "qwix_train.config"
_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "U16": "uint16",
    "I32": "int32",
    "U32": "uint32",
    "I64": "int64",
    "U64": "uint64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}


def write_file(
    file: pathlib.Path, tensors: Mapping[str, np.ndarray], metadata: dict[str, str]
) -> None:
    """Writes the tensors and the metadata of a file, and their checksums.

    Raises:
        ImportError: `safetensors` is not installed.
        ValueError: A tensor has a dtype that the format lacks; the message names it.
    """
    for name, tensor in tensors.items():
        if np.asarray(tensor).dtype.name not in _DTYPES.values():
            raise ValueError(
                f"{name} has dtype {np.asarray(tensor).dtype}, which safetensors files "
                f"do not hold; they hold {', '.join(_DTYPES.values())}."
            )
    # The package writes the memory of an array as it lies, whatever its strides.
    contiguous = {name: np.asarray(x, order="C") for name, x in tensors.items()}
    sums = {name: checksum(x) for name, x in contiguous.items()}
    metadata = {**metadata, _CHECKSUMS: json.dumps(sums)}
    metadata[_SEAL] = _seal(metadata)
    _import("safetensors.numpy").save_file(contiguous, file, metadata=metadata)


def check_installed() -> None:
    """Checks that files can be written and read.

    Raises:
        ImportError: `safetensors` is not installed.
    """
    _import("safetensors.numpy")


def read_checkpoint(
    path: pathlib.Path,
) -> tuple[dict[str, np.ndarray], dict[str, str], pathlib.Path]:
    """Returns the tensors of a checkpoint, its metadata, and where its config would be.

    Args:
        path: A folder with one file or with shards and their index, or one file.

    Raises:
        FileNotFoundError: A file is missing.
        ImportError: `safetensors` is not installed.
        ValueError: A file is damaged, or files and index do not say the same.
    """
    if path.is_file():
        return (*read_file(path), path.parent / CONFIG)
    index, single = path / INDEX, path / FILE
    if not index.exists():
        if not single.exists():
            raise FileNotFoundError(f"There is no {FILE} in {path}.")
        return (*read_file(single), path / CONFIG)
    if single.exists():
        raise ValueError(
            f"{path} holds two checkpoints, {FILE} and the shards of {INDEX}. Remove "
            "the one that is not to be read."
        )
    where = _weight_map(index)
    tensors: dict[str, np.ndarray] = {}
    metadata: dict[str, str] = {}
    for name in sorted(set(where.values())):
        if not (path / name).exists():
            raise FileNotFoundError(f"There is no {name} in {path}.")
        found, own = read_file(path / name)
        for tensor in found:
            if where.get(tensor) != name:
                raise ValueError(
                    f"{tensor} is in {path / name}, and {INDEX} has it in "
                    f"{where.get(tensor, 'no file')}."
                )
        tensors |= found
        metadata |= own
    if missing := sorted(where.keys() - tensors.keys()):
        raise ValueError(
            f"{index} has tensors that no shard holds: {plan_table.some(missing, 3)}."
        )
    return tensors, metadata, path / CONFIG


def read_file(file: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Returns the tensors and the metadata of a file.

    Raises:
        ImportError: `safetensors` is not installed.
        ValueError: The file is not a whole one of this format; a tensor has a dtype
            that NumPy and JAX do not have, or another checksum than it was written
            with.
    """
    safetensors = _import("safetensors")
    try:
        with safetensors.safe_open(file, framework="numpy") as opened:
            metadata = opened.metadata() or {}
        # Not `get_tensor`, which does not know float8 for any framework but PyTorch.
        stored = safetensors.deserialize(file.read_bytes())
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} is not a whole safetensors file: {error}.") from None
    tensors = {}
    for name, tensor in stored:
        if tensor["dtype"] not in _DTYPES:
            raise ValueError(
                f"{name} in {file} has dtype {tensor['dtype']}, unknown to JAX."
            )
        dtype = jnp.dtype(_DTYPES[tensor["dtype"]])
        tensors[name] = np.frombuffer(tensor["data"], dtype).reshape(tensor["shape"])
    _verify(file, tensors, metadata)
    return tensors, metadata


def read_metadata(file: pathlib.Path) -> dict[str, str]:
    """Returns the metadata of a file; none if it cannot be read."""
    safetensors = _import("safetensors")
    try:
        with safetensors.safe_open(file, framework="numpy") as opened:
            return opened.metadata() or {}
    except (OSError, safetensors.SafetensorError):
        return {}


def config_metadata(entries: Mapping[str, Any]) -> dict[str, str]:
    """Returns the metadata that say what the config beside a file is to say."""
    return {_CONFIG_ENTRIES: json.dumps(entries)}


def check_config(
    metadata: Mapping[str, str], config: Mapping[str, Any], file: pathlib.Path
) -> None:
    """Checks that a config still says what `config_metadata` was given.

    Args:
        metadata: The metadata of the tensors; others' have no such entry.
        config: The config.
        file: Its file, for messages.

    Raises:
        ValueError: An entry differs; the message names it.
    """
    text = metadata.get(_CONFIG_ENTRIES, "{}")
    for key, written in json_text.parse(text, _CONFIG_ENTRIES).items():
        if config.get(key) != written:
            raise ValueError(
                f"{file} is damaged, or of other tensors than those beside it: "
                f"{key!r} is {reprlib.repr(config.get(key))}, and was "
                f"{reprlib.repr(written)} when these were written."
            )


def checksum(tensor: np.ndarray) -> str:
    """Returns the checksum of a tensor, its dtype and its shape, in 16 digits."""
    found = hashlib.sha256(f"{tensor.dtype.name}{list(tensor.shape)}".encode())
    found.update(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
    return found.hexdigest()[:16]


def _verify(
    file: pathlib.Path, tensors: Mapping[str, np.ndarray], metadata: dict[str, str]
) -> None:
    """Checks a file against the checksums in it, if it has them."""
    if not {_CHECKSUMS, _SEAL} & metadata.keys():
        return
    if metadata.get(_SEAL) != _seal(metadata):
        raise ValueError(f"{file} is damaged: its metadata have another checksum.")
    sums = json_text.parse(metadata[_CHECKSUMS], f"{_CHECKSUMS} in {file}")
    bad = [name for name, x in tensors.items() if sums.pop(name, "") != checksum(x)]
    if bad or sums:
        names = plan_table.some([*bad, *sums], 3)
        raise ValueError(
            f"{file} is damaged: these tensors are missing or have another checksum: "
            f"{names}."
        )


def _seal(metadata: Mapping[str, str]) -> str:
    others = {name: text for name, text in metadata.items() if name != _SEAL}
    return hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()[:16]


def _weight_map(index: pathlib.Path) -> dict[str, str]:
    """The names of the files of an index, by tensor."""
    found = json_text.read(index).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise ValueError(
            f"{index} has no 'weight_map' that names the file of a tensor."
        )
    for tensor, name in found.items():
        plain = isinstance(name, str) and name == pathlib.PurePath(name).name
        if not plain or name in ("", ".."):
            raise ValueError(
                f"{index} has {tensor!r} in {name!r}, which is not the name of a file "
                "of this folder."
            )
    # A shard that is in no entry would be passed over.
    shards: dict[tuple[str, str], set[int]] = {}
    for match in map(_SHARD.fullmatch, found.values()):
        if match:
            shards.setdefault((match[1], match[3]), set()).add(int(match[2]))
    for (stem, count), numbers in shards.items():
        if len(numbers) != int(count):
            raise ValueError(
                f"{index} has tensors in {len(numbers)} of {int(count)} shards "
                f"{stem}-...-of-{count}.safetensors."
            )
    return found


def _import(name: str) -> Any:
    return imported(
        name,
        "Checkpoints in this layout need the package safetensors: "
        "pip install 'qwix_train[interchange]'",
    )
