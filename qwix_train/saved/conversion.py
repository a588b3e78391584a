"""From one format of saved params to another."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence

from qwix_train.files import writing
from qwix_train.planning.rules import QuantizationRule, check_rules
from qwix_train.ptq.hugging_face.places import TensorMapping
from qwix_train.saved import formats
from qwix_train.saved.contents import Adapters, Contents, Params
from qwix_train.saved.format import Format

# What to do where a format holds something else than another, by what the first holds.
_ADVICE = {
    "adapters": "Merge them into their base (lora.merge), and save what comes of it.",
    "params": "Adapters are made in training; see docs/qlora.md.",
}


def describe(path: str | os.PathLike[str]) -> str:
    """Describes saved params: plan, types, sizes and checksums.

    Of a checkpoint of `ptq.save` or `lora.save` only the manifest is read. Files of
    other formats are read as a whole, and checked against their checksums if they have
    any.

    Args:
      path: a checkpoint of `ptq.save` or `lora.save`; a folder of compressed-tensors,
        of Hugging Face or of PEFT, or a `.safetensors` file of the first two; or a
        `.tflite` file.

    Raises:
      FileNotFoundError: if nothing is there.
      ImportError: if the packages of the format are not installed.
      ValueError: if it has none of these formats, or is damaged.

    Example:
      >>> import pathlib, tempfile
      >>> from jax import numpy as jnp
      >>> from qwix_train import ptq, saved
      >>> folder = pathlib.Path(tempfile.mkdtemp()) / "export"
      >>> ptq.save(folder, {"bias": jnp.ones(3)})
      >>> saved.describe(folder).splitlines()[0]
      'a checkpoint of quantized params'
    """
    path = pathlib.Path(path)
    return formats.of(path).describe(path)


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    to: str,
    *,
    rules: Sequence[QuantizationRule] = (),
    to_float: bool = False,
    mapping: TensorMapping | None = None,
    overwrite: bool = False,
) -> None:
    """Converts saved params, or saved adapters, to another format.

    Codes and scales stay as they are, and float params stay float, unless `rules` or
    `to_float` say otherwise. Params of Hugging Face are read tensor by tensor, and
    quantized on the way.

    Args:
      source: see `describe`.
      destination: the folder to make, which is not that of `source`.
      to: the format: `"orbax"` (what `ptq.save` writes), `"compressed-tensors"` or
        `"hugging-face"` for params; `"orbax-adapters"` (what `lora.save` writes) or
        `"peft"` for adapters.
      rules: what to quantize. `module_path` is that of the param. No model is at hand,
        so the tensors say what is multiplied: a matrix `kernel`, and experts, which is
        quantized with a scale for each output, or for its tiles. Other params stay.
      to_float: whether quantized params become the floats that they stand for. Ranges
        of activations are left out.
      mapping: the place of each tensor in the params; see `ptq.hugging_face.mapping`.
        By default the matrix `a.b.weight` is `a/b/kernel`, transposed. Quantizing a
        folder of Hugging Face needs it: an embedding table is a matrix named `weight`,
        too, and must not be quantized as a layer.
      overwrite: whether to replace what is at `destination`, if it has the format.

    Raises:
      FileExistsError: if something is at `destination`.
      FileNotFoundError: if nothing is at `source`.
      ImportError: if the packages of a format are not installed.
      ValueError: if one of the formats does not hold what the other has, or the file is
        damaged, or rules match nothing. The message says what to do.

    Example:
      >>> import pathlib, tempfile
      >>> from jax import numpy as jnp
      >>> from qwix_train import QuantizationRule, ptq, saved
      >>> folder = pathlib.Path(tempfile.mkdtemp())
      >>> ptq.save(folder / "float", {"fc": {"kernel": jnp.ones((64, 8))}})
      >>> saved.convert(
      ...     folder / "float", folder / "int4", "compressed-tensors",
      ...     rules=[QuantizationRule(weight_qtype="int4", tile_size=32)],
      ... )
      >>> ptq.load_compressed_tensors(folder / "int4")["fc"]["kernel"].array.scale.shape
      (2, 8)
    """
    source, destination = pathlib.Path(source), pathlib.Path(destination)
    have, want = formats.of(source), formats.named(to)
    rules = check_rules(rules)
    if rules and to_float:
        raise ValueError("Pass rules or to_float, not both: a param is one of the two.")
    _check(source, have, want, changes=bool(rules) or to_float)
    if destination.resolve() == source.resolve():
        raise ValueError(f"{source} would be replaced by itself. Name another folder.")
    writing.check_target(
        destination,
        what=want.what,
        is_one=lambda: formats.is_one(destination, want),
        overwrite=overwrite,
        option="overwrite=True (--overwrite)",
    )
    assert have.read is not None and want.write is not None
    contents = _changed(have.read(source, mapping), rules, to_float)
    want.write(destination, contents, overwrite)


def _check(source: pathlib.Path, have: Format, want: Format, changes: bool) -> None:
    """Complains of formats that do not become each other."""
    for format in (have, want):
        if format.read is None or format.write is None:
            raise ValueError(f"{format.what} is not converted. {format.advice}")
    if have.holds != want.holds:
        alike = [f for f in formats.FORMATS if f.holds == have.holds]
        others = [format.name for format in alike if format is not have]
        raise ValueError(
            f"{source} is {have.what}, which holds {have.holds}, and {want.name} holds "
            f"{want.holds}. It can become {' or '.join(others)}. {_ADVICE[have.holds]}"
        )
    if have is want and not changes:
        raise ValueError(
            f"{source} is {have.what} already. Copy it; or say what is to be quantized "
            "(rules=, --weights TYPE) or dequantized (to_float=True, --weights float)."
        )


def _changed(
    contents: Contents, rules: Sequence[QuantizationRule], to_float: bool
) -> Contents:
    if isinstance(contents, Adapters):
        if rules or to_float:
            raise ValueError("Adapters are in float, and are converted as they are.")
        return contents
    if rules:
        return contents.quantize(rules)
    if to_float:
        return contents.to_float()
    return _as_it_is(contents)


def _as_it_is(params: Params) -> Params:
    if params.types_in_file:
        types = ", ".join(params.types_in_file)
        raise ValueError(
            f"Tensors of the folder are quantized ({types}). Say that type in rules "
            f"to keep their codes (--weights {params.types_in_file[0]}), or to_float="
            "True (--weights float) for the values that they stand for."
        )
    return params
