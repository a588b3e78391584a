"""Writes float params as a checkpoint that PyTorch implementations of a model load."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from qwix_train.files import json_text, processes, writing
from qwix_train.planning.leaves import Leaf
from qwix_train.ptq import safetensors_files, stored_arrays, trees
from qwix_train.ptq.hugging_face import places
from qwix_train.ptq.hugging_face.places import Assembly, TensorMapping


def save(
    directory: str | pathlib.Path,
    params: Any,
    mapping: TensorMapping,
    *,
    config: Mapping[str, Any] | None = None,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
) -> None:
    """Writes float params as a safetensors checkpoint, the reverse of `load`.

    If a save is killed, the files that were there stay, or nothing is left that readers
    take for a checkpoint. With several processes, all call this, and the first writes.

    Args:
        directory: The folder, made if it does not exist. ``model.safetensors`` is
            written, or shards and their index.
        params: Nested dictionaries of arrays, or an NNX model.
        mapping: The `Place` of each tensor, by its name. If a tensor has several
            places, they must hold the same numbers.
        config: The entries of ``config.json``, such as the ``model_type``. If None, the
            file is not changed.
        max_shard_bytes: How many bytes of tensors a file holds at most, if it holds
            more than one.
        overwrite: Whether to replace the checkpoint that is there, in the same files.

    Raises:
        FileExistsError: There is a checkpoint and ``overwrite`` is not set; or there
            are other files that readers would take for part of it.
        ImportError: `safetensors` is not installed.
        OSError: The files cannot be written; those that were there stay.
        TypeError: A param has no values, or the mapping has something else than places.
        ValueError: A param is quantized; the places of a tensor differ; or the mapping
            does not fit the params, and the message lists all that does not.

    >>> import pathlib, tempfile
    >>> import numpy as np
    >>> from qwix_train.ptq import hugging_face
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> mapping = {"fc.weight": hugging_face.Place("kernel", "out in -> in out")}
    >>> hugging_face.save(folder, {"kernel": np.ones((4, 2), np.float32)}, mapping)
    >>> [file.name for file in folder.iterdir()]
    ['model.safetensors']
    """
    safetensors_files.check_installed()
    held = stored_arrays.params_of(trees.to_tree(params))
    named = {tuple(map(str, param.path)): param for param in held}
    beside = {names for names in named if Leaf.parse(names, named) is not None}
    if wrong := [p.name for n, p in named.items() if p.qtype or n in beside]:
        raise ValueError(
            f"These are quantized, or ranges and scales: {', '.join(wrong)}. Write "
            "float params, or quantized ones with ptq.save_compressed_tensors."
        )
    stored_arrays.check_values(held)
    values = {n: processes.whole(p.arrays["value"]) for n, p in named.items()}
    found = places.assemblies(
        mapping, {n: v.shape for n, v in values.items()}, None, "the checkpoint"
    )
    tensors: dict[str, Callable[[], np.ndarray]] = {}
    sizes: dict[str, int] = {}
    for assembly in found:
        value = np.asarray(values[assembly.path])
        for name, read in _tensors_of(assembly, value).items():
            if name in tensors and not np.array_equal(tensors[name](), read()):
                raise ValueError(
                    f"Tensor {name} has several places, and {'/'.join(assembly.path)} "
                    "has other numbers than the first of them. Make them the same, or "
                    "give it a tensor of its own in the mapping."
                )
            sizes.setdefault(name, value.nbytes // len(assembly.names))
            tensors.setdefault(name, read)
    folder = pathlib.Path(directory)
    contents = safetensors_files.contents(
        tensors, sizes, {"format": "pt"}, max_shard_bytes
    )
    if config is not None:
        text = json_text.dump(config, "the config", indent=2) + "\n"
        contents[safetensors_files.CONFIG] = text.encode()
    processes.once(lambda: _write(folder, contents, overwrite))


def _tensors_of(
    assembly: Assembly, value: np.ndarray
) -> dict[str, Callable[[], np.ndarray]]:
    """What gives the tensors that a param is made of, by name."""
    return {
        name: functools.partial(assembly.axes.tensor_at, value, assembly.sizes, at)
        for name, at in assembly.tensors()
    }


def _write(
    folder: pathlib.Path, contents: Mapping[str, writing.Content], overwrite: bool
) -> None:
    writing.finish(folder)
    file = folder / safetensors_files.CONFIG
    if file.name not in contents and file.exists():
        if "quantization_config" in json_text.read(file):
            raise FileExistsError(
                f"{file} says how the tensors beside it are quantized, and float "
                "params are to be written. Pass config, or another folder."
            )
    safetensors_files.check_folder(
        folder,
        list(contents),
        what="a file of such a checkpoint",
        is_one=pathlib.Path.is_file,
        overwrite=overwrite,
    )
    writing.write_together(folder, contents)
