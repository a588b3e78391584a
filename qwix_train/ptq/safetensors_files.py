"""Safetensors files of a checkpoint folder, with float8 and bfloat16 tensors.

Files that are written here hold checksums in their metadata, which other readers
ignore: one for each tensor, and one for the other metadata. They are checked when such
a file is read.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import pathlib
import re
import reprlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from qwix_train.core.errors import imported
from qwix_train.files import json_text, writing
from qwix_train.planning import table as plan_table

FILE, CONFIG = "model.safetensors", "config.json"
INDEX = "model.safetensors.index.json"
_SHARD_NAME = "model-{:05}-of-{:05}.safetensors"
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
    # The package writes the memory of an array in order, and ignores its strides.
    contiguous = {name: np.asarray(x, order="C") for name, x in tensors.items()}
    sums = {name: checksum(x) for name, x in contiguous.items()}
    metadata = {**metadata, _CHECKSUMS: json.dumps(sums)}
    metadata[_SEAL] = _seal(metadata)
    _import("safetensors.numpy").save_file(contiguous, file, metadata=metadata)


def check_fits(tensor: np.ndarray, dtype: Any) -> None:
    """Complains of integers that a cast would change.

    Args:
        tensor: What a file holds, of any dtype.
        dtype: The dtype that it is cast to.

    Raises:
        ValueError: An integer lies outside of the range of the dtype.
    """
    if not np.issubdtype(tensor.dtype, np.integer) or not tensor.size:
        return
    if np.can_cast(tensor.dtype, dtype):
        return
    low, high, info = tensor.min(), tensor.max(), jnp.iinfo(dtype)
    if low < info.min or high > info.max:
        raise ValueError(
            f"its {tensor.dtype} numbers from {low} to {high} do not fit into "
            f"{jnp.dtype(dtype)}, the dtype of its param. Give the param a wider one. "
            "JAX has 64 bits only if jax_enable_x64 is set."
        )


def contents(
    tensors: Mapping[str, Callable[[], np.ndarray]],
    sizes: Mapping[str, int],
    metadata: Mapping[str, str],
    max_shard_bytes: int,
) -> dict[str, writing.Content]:
    """Returns the files of a checkpoint, for `writing.write_together`.

    Args:
        tensors: Functions that give each tensor when its file is written.
        sizes: The bytes of each tensor.
        metadata: The metadata, of each file.
        max_shard_bytes: How many bytes of tensors a file holds at most, if it holds
            more than one.

    Returns:
        One file, or the index, and then the shards that it names.
    """
    shards: list[list[str]] = [[]]
    held = 0
    for name in sorted(tensors):
        if shards[-1] and held + sizes[name] > max_shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += sizes[name]

    def writer(names: Sequence[str]) -> Callable[[pathlib.Path], None]:
        return lambda file: write_file(
            file, {name: tensors[name]() for name in names}, dict(metadata)
        )

    if len(shards) == 1:
        return {FILE: writer(shards[0])}
    files = {_SHARD_NAME.format(i + 1, len(shards)): n for i, n in enumerate(shards)}
    index = {
        "metadata": {"total_size": sum(sizes.values())},
        "weight_map": {name: file for file, names in files.items() for name in names},
    }
    text = json.dumps(index, indent=2) + "\n"
    return {INDEX: text.encode(), **{f: writer(names) for f, names in files.items()}}


def check_folder(
    folder: pathlib.Path,
    names: Collection[str],
    *,
    what: str,
    is_one: Callable[[pathlib.Path], bool],
    overwrite: bool,
) -> None:
    """Checks that files of a checkpoint may be written to a folder.

    Args:
        folder: The folder.
        names: The names of all of them.
        what: The kind of files.
        is_one: Whether a file that is there is of this kind.
        overwrite: Whether to replace files that are there.

    Raises:
        FileExistsError: A file is there and `overwrite` is not set; or there is another
            file that readers would take for part of the checkpoint.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file, and a folder is to be written.")
    for other in sorted(folder.glob("*.safetensors*")):
        # Readers prefer the index, or take all files for parts of one checkpoint.
        if other.name not in (*names, "adapter_model.safetensors"):
            raise FileExistsError(
                f"{folder} holds {other.name}, which readers would take for the "
                "checkpoint, or for part of it. Remove it, or pass another folder."
            )
    for name in names:
        writing.check_target(
            folder / name,
            what=what,
            is_one=functools.partial(is_one, folder / name),
            overwrite=overwrite,
        )


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
        ValueError: A file is damaged, or files and index do not agree.
    """
    files, where = checkpoint_files(path)
    tensors: dict[str, np.ndarray] = {}
    metadata: dict[str, str] = {}
    for file in files:
        found, own = read_file(file)
        tensors |= found
        metadata |= own
        check_index(path, where, file, found)
    return tensors, metadata, files[0].parent / CONFIG


def checkpoint_files(path: pathlib.Path) -> tuple[list[pathlib.Path], dict[str, str]]:
    """Returns the files of a checkpoint, and the name of the file of each tensor.

    Args:
        path: A folder with one file or with shards and their index, or one file.

    Returns:
        The files, and the names. Without an index there are no names.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: The folder holds two checkpoints, or the index names no files.
    """
    if path.is_file():
        return [path], {}
    index, single = path / INDEX, path / FILE
    if not index.exists():
        if not single.exists():
            raise FileNotFoundError(f"There is no {FILE} in {path}.")
        return [single], {}
    if single.exists():
        raise ValueError(
            f"{path} holds two checkpoints, {FILE} and the shards of {INDEX}. Remove "
            "the one that is not to be read."
        )
    where = _weight_map(index)
    files = [path / name for name in sorted(set(where.values()))]
    for file in files:
        if not file.exists():
            raise FileNotFoundError(f"There is no {file.name} in {path}.")
    return files, where


def check_index(
    path: pathlib.Path,
    where: Mapping[str, str],
    file: pathlib.Path,
    names: Collection[str],
) -> None:
    """Checks that a file has the tensors that the index says.

    Args:
        path: The folder, for messages.
        where: The name of the file of each tensor, as the index has it; empty if there
            is no index.
        file: The file.
        names: The tensors in it.

    Raises:
        ValueError: A tensor is in another file than the index says, or in none.
    """
    if not where:
        return
    for tensor in names:
        if where.get(tensor) != file.name:
            raise ValueError(
                f"{tensor} is in {file}, and {INDEX} has it in "
                f"{where.get(tensor, 'no file')}."
            )
    listed = {tensor for tensor, name in where.items() if name == file.name}
    if missing := sorted(listed - set(names)):
        raise ValueError(
            f"{path / INDEX} has tensors that no shard holds: "
            f"{plan_table.some(missing, 3)}."
        )


def read_file(file: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Returns the tensors and the metadata of a file.

    Raises:
        ImportError: `safetensors` is not installed.
        ValueError: The file is incomplete or not of this format; or a tensor has a
            dtype that NumPy and JAX do not have, or another checksum than when it was
            written.
    """
    safetensors = _import("safetensors")
    try:
        metadata = _metadata(file)
        # Not `get_tensor`, which knows float8 for PyTorch alone.
        stored = safetensors.deserialize(file.read_bytes())
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} is not a whole safetensors file: {error}.") from None
    tensors = {}
    for name, tensor in stored:
        dtype = _dtype(file, name, tensor["dtype"])
        tensors[name] = np.frombuffer(tensor["data"], dtype).reshape(tensor["shape"])
    sums = _checksums(file, metadata, tensors)
    bad = [name for name in sums if sums[name] != checksum(tensors[name])]
    if bad:
        raise ValueError(_damaged(file, bad))
    return tensors, metadata


@dataclasses.dataclass(frozen=True)
class TensorInFile:
    """A tensor that is not read yet.

    Attributes:
        file: The file.
        name: Its name there.
        dtype: Its dtype.
        shape: Its shape.
        offset: Where it begins in the file, in bytes.
        checksum: Its checksum, if the file has one.
    """

    file: pathlib.Path
    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    checksum: str | None = None

    def mapped(self) -> np.ndarray:
        """Returns the tensor. Only the parts of the file that are used are read."""
        if not math.prod(self.shape):
            return np.empty(self.shape, self.dtype)
        return np.memmap(self.file, self.dtype, "r", self.offset, self.shape)

    def verify(self) -> None:
        """Reads the tensor, and checks it against its checksum, if it has one.

        Raises:
            ValueError: They differ. The message names the file and the tensor.
        """
        if self.checksum is not None and checksum(self.mapped()) != self.checksum:
            raise ValueError(_damaged(self.file, [self.name]))


def open_checkpoint(path: pathlib.Path) -> dict[str, TensorInFile]:
    """Returns where the tensors of a checkpoint are, by name. No tensor is read.

    Args:
        path: A folder with one file or with shards and their index, or one file.

    Raises:
        FileNotFoundError: A file is missing.
        ImportError: `safetensors` is not installed.
        ValueError: A file is damaged, files and index do not agree, or a tensor has a
            dtype that NumPy and JAX do not have.
    """
    files, where = checkpoint_files(path)
    tensors: dict[str, TensorInFile] = {}
    for file in files:
        found = _tensors_in(file)
        check_index(path, where, file, found)
        tensors |= found
    return tensors


def _tensors_in(file: pathlib.Path) -> dict[str, TensorInFile]:
    safetensors = _import("safetensors")
    try:
        metadata = _metadata(file)  # which checks the header, and the file's length
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} is not a whole safetensors file: {error}.") from None
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json_text.parse(opened.read(length), f"The header of {file}")
    header.pop("__metadata__", None)
    sums = _checksums(file, metadata, header)
    return {
        name: TensorInFile(
            file,
            name,
            _dtype(file, name, entry["dtype"]),
            tuple(entry["shape"]),
            8 + length + entry["data_offsets"][0],
            sums.get(name),
        )
        for name, entry in header.items()
    }


def read_metadata(file: pathlib.Path) -> dict[str, str]:
    """Returns the metadata of a file; empty if the file cannot be read."""
    safetensors = _import("safetensors")
    try:
        return _metadata(file)
    except (OSError, safetensors.SafetensorError):
        return {}


def _metadata(file: pathlib.Path) -> dict[str, str]:
    with _import("safetensors").safe_open(file, framework="numpy") as opened:
        return opened.metadata() or {}


def _dtype(file: pathlib.Path, tensor: str, name: str) -> np.dtype:
    if name not in _DTYPES:
        raise ValueError(f"{tensor} in {file} has dtype {name}, unknown to JAX.")
    return jnp.dtype(_DTYPES[name])


def config_metadata(entries: Mapping[str, Any]) -> dict[str, str]:
    """Returns metadata that hold the entries of the config beside a file."""
    return {_CONFIG_ENTRIES: json.dumps(entries)}


def check_config(
    metadata: Mapping[str, str], config: Mapping[str, Any], file: pathlib.Path
) -> None:
    """Checks that a config still has the entries that `config_metadata` was given.

    Args:
        metadata: The metadata of the tensors. Files of other libraries have no such
            entry.
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


def _checksums(
    file: pathlib.Path, metadata: Mapping[str, str], names: Collection[str]
) -> dict[str, str]:
    """The checksums of the tensors of a file; empty if it was written without them."""
    if not {_CHECKSUMS, _SEAL} & metadata.keys():
        return {}
    if metadata.get(_SEAL) != _seal(metadata):
        raise ValueError(f"{file} is damaged: its metadata have another checksum.")
    sums = json_text.parse(metadata[_CHECKSUMS], f"{_CHECKSUMS} in {file}")
    if sums.keys() != set(names):
        raise ValueError(_damaged(file, sorted(sums.keys() ^ set(names))))
    return sums


def _damaged(file: pathlib.Path, tensors: Sequence[str]) -> str:
    return (
        f"{file} is damaged: these tensors are missing or have another checksum: "
        f"{plan_table.some(tensors, 3)}."
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
