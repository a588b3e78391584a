"""JSON from files that anybody may have written, or damaged."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

from qwix_train.files import writing


def parse(text: str | bytes, where: str) -> dict[str, Any]:
    """The object in a text.

    Args:
      text: the text.
      where: what it is, for messages: a file, and perhaps an entry of it.

    Raises:
      ValueError: if the text is not JSON, is nested too deeply for Python, names a key
        twice, or holds no object. The message says where.

    Example:
      >>> parse('{"r": 8}', "config.json")
      {'r': 8}
      >>> parse('{"r": 8, "r": 16}', "config.json")
      Traceback (most recent call last):
      ...
      ValueError: config.json cannot be read as JSON: the key 'r' is there twice.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError(
            f"{where} cannot be read as JSON: it is nested too deeply."
        ) from None
    except ValueError as error:
        raise ValueError(f"{where} cannot be read as JSON: {error}.") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where} holds {str(value)[:40]!r}, and no JSON object.")
    return value


def read(path: pathlib.Path) -> dict[str, Any]:
    """The object in a file.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: see `parse`.
    """
    return parse(path.read_bytes(), str(path))


def dump(value: Any, what: str, **options: Any) -> str:
    """The text of a value.

    Args:
      value: the value.
      what: what it is, for messages.
      **options: those of `json.dumps`.

    Raises:
      TypeError: if JSON cannot hold the value.
      ValueError: if it is nested too deeply, or holds itself.
    """
    try:
        return json.dumps(value, **options)
    except TypeError as error:
        raise TypeError(f"JSON cannot hold {what}: {error}.") from None
    except (RecursionError, ValueError) as error:
        raise ValueError(f"JSON cannot hold {what}: {error}.") from None


def write(
    path: str | os.PathLike[str], value: Any, *, overwrite: bool = False, **options: Any
) -> None:
    """Writes a file of JSON, as a whole or not at all.

    Args:
      path: the file. Its folder must exist.
      value: an object, as a report is.
      overwrite: whether to replace a file of JSON that is there.
      **options: those of `json.dumps`; the indent is 2.

    Raises:
      FileExistsError: if there is one and `overwrite` is not set, or something else.
      OSError: if the file cannot be written; what was there stays.
      TypeError, ValueError: see `dump`.
    """
    text = dump(value, f"what is to be in {path}", **{"indent": 2, **options})
    writing.write_file(
        path,
        f"{text}\n".encode(),
        what="a file of JSON",
        signature=slice(0, 1),
        overwrite=overwrite,
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} is there twice")
    return found
