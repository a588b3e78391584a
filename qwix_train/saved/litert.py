"""LiteRT models: they are described, and not converted, as they hold a program."""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Mapping
from typing import Any

from qwix_train import odml
from qwix_train.planning import table as plan_table
from qwix_train.saved.format import Format
from qwix_train.saved.text import text


def _describe(path: pathlib.Path) -> str:
    model = odml.LiteRTModel.load(path)
    signatures = [
        f"  {name}: {_tensors(found.takes)} -> {_tensors(found.gives)}"
        for name, found in model.signatures.items()
    ]
    computes = (
        "in integers throughout"
        if model.is_full_integer
        else f"with {len(model.float_ops)} operations in float"
    )
    digest = hashlib.sha256(model.content).hexdigest()
    return text(
        f"a LiteRT model, {computes}",
        ["signatures:", *signatures],
        [str(model.ops())],
        [
            f"{len(model.ops())} operations; {plan_table.size(len(model.content))}; "
            f"sha256 {digest[:16]}"
        ],
    )


def _tensors(named: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {x.dtype}{list(x.shape)}" for name, x in named.items())


LITERT = Format(
    name="litert",
    what="a .tflite file",
    holds="a program",
    known_by="*.tflite",
    is_one=lambda path: path.is_file() and path.suffix == ".tflite",
    describe=_describe,
    advice=(
        "A .tflite file is made of a model and its float params: "
        "odml.convert(model, params, provider, *inputs). Its weights are not taken "
        "out again."
    ),
)
