"""Safetensors files of a checkpoint folder, with float8 and bfloat16 tensors."""

from __future__ import annotations

import importlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

FILE, CONFIG = "model.safetensors", "config.json"
_INDEX = "model.safetensors.index.json"
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
    """Writes the tensors and the metadata of a file.

    Raises:
        ImportError: `safetensors` is not installed.
    """
    # The package writes the memory of an array as it lies, whatever its strides.
    contiguous = {name: np.asarray(x, order="C") for name, x in tensors.items()}
    _import("safetensors.numpy").save_file(contiguous, file, metadata=metadata)


def find_files(path: pathlib.Path) -> tuple[list[pathlib.Path], pathlib.Path]:
    """Returns the files of a checkpoint, and where its config would be.

    Args:
        path: A folder with one file or with shards and their index, or one file.

    Raises:
        FileNotFoundError: A file is missing.
    """
    if path.is_file():
        return [path], path.parent / CONFIG
    index = path / _INDEX
    if index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        names = [FILE]
    missing = [name for name in names if not (path / name).exists()]
    if missing:
        raise FileNotFoundError(f"There is no {missing[0]} in {path}.")
    return [path / name for name in names], path / CONFIG


def read_file(file: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Returns the tensors and the metadata of a file.

    Raises:
        ImportError: `safetensors` is not installed.
        ValueError: A tensor has a dtype that NumPy and JAX do not have.
    """
    safetensors = _import("safetensors")
    with safetensors.safe_open(file, framework="numpy") as opened:
        metadata = opened.metadata() or {}
    tensors = {}
    # Not `get_tensor`, which does not know float8 for any framework but PyTorch.
    for name, tensor in safetensors.deserialize(file.read_bytes()):
        if tensor["dtype"] not in _DTYPES:
            raise ValueError(
                f"{name} in {file} has dtype {tensor['dtype']}, unknown to JAX."
            )
        dtype = jnp.dtype(_DTYPES[tensor["dtype"]])
        tensors[name] = np.frombuffer(tensor["data"], dtype).reshape(tensor["shape"])
    return tensors, metadata


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            "Checkpoints in this layout need the package safetensors: "
            "pip install 'qwix_train[interchange]'"
        ) from error
