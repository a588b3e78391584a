"""The formats of saved params that this package knows: a new one is an entry here."""

from __future__ import annotations

import pathlib

from qwix_train.saved import checkpoints, litert, peft, safetensors
from qwix_train.saved.format import Format

# The first that says it is one is it.
FORMATS: tuple[Format, ...] = (
    litert.LITERT,
    peft.PEFT,
    safetensors.COMPRESSED_TENSORS,
    safetensors.HUGGING_FACE,
    checkpoints.ADAPTERS,
    checkpoints.CHECKPOINT,
)


def of(path: pathlib.Path) -> Format:
    """The format of what is at a path.

    Raises:
      FileNotFoundError: if nothing is there.
      ValueError: if it has none of the formats.
    """
    if not path.exists():
        raise FileNotFoundError(f"There is nothing at {path}.")
    for format in FORMATS:
        if format.is_one(path):
            return format
    looked_for = "; ".join(f"{format.name} ({format.known_by})" for format in FORMATS)
    raise ValueError(
        f"{path} has no known format. These were looked for: {looked_for}. Give the "
        "path of the file or folder itself, not that of a folder above it."
    )


def is_one(path: pathlib.Path, format: Format) -> bool:
    """Whether what is at a path has a format, and can be read so far as to tell."""
    try:
        return of(path) is format
    except (OSError, ValueError):
        return False


def named(name: str) -> Format:
    """The format of a name.

    Raises:
      ValueError: if no format has this name.
    """
    for format in FORMATS:
        if format.name == name:
            return format
    known = ", ".join(format.name for format in FORMATS)
    raise ValueError(f"There is no format {name!r}. Choose one of {known}.")
