"""How what is saved is described, in every format."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from qwix_train.files.text_table import aligned
from qwix_train.planning import table as plan_table
from qwix_train.ptq import safetensors_files


def text(what: str, *parts: Sequence[str]) -> str:
    """Paragraphs, below a line that says what it is."""
    return "\n\n".join([what, *("\n".join(part) for part in parts if part)])


def shape(shape: Sequence[int]) -> str:
    """A shape, such as `(8, 6)`."""
    return "(" + ", ".join(map(str, shape)) + ")"


def pairs(values: Mapping[str, Any], between: str) -> str:
    """Names and values in a line."""
    return ", ".join(f"{name}{between}{value}" for name, value in values.items())


def numbered(title: str, values: Iterable[Any]) -> list[str]:
    """Values with their numbers, a line each, below a title."""
    lines = [f"  {number}  {value}" for number, value in enumerate(values)]
    return [f"{title}:", *lines] if lines else []


def tensors(named: Mapping[str, np.ndarray]) -> list[str]:
    """A table of tensors, and what they take together."""
    rows = [["tensor", "shape", "type", "bytes", "checksum"]]
    for name, tensor in sorted(named.items()):
        checksum = safetensors_files.checksum(tensor)
        size = f"{tensor.nbytes:,}"
        rows.append([name, shape(tensor.shape), tensor.dtype.name, size, checksum])
    total = sum(tensor.nbytes for tensor in named.values())
    return [aligned(rows), "", f"{len(named)} tensors; {plan_table.size(total)}"]
