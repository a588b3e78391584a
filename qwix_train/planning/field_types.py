"""Types of the fields of dataclasses, checked when an object is made.

A field is checked by what its annotation says, such as `bool` or `int | float | None`.
Numbers of NumPy become those of Python, so that equal objects have equal fields.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

_SAID = {
    "bool": "True or False",
    "int": "an int",
    "float": "a number",
    "str": "a str",
    "Collection[int]": "a collection of ints, such as (0,)",
    "Collection[str]": "a collection of strs",
    "Mapping[str, Any]": "a mapping",
}


def converted(field: dataclasses.Field[Any], value: Any) -> Any:
    """The value of a field, with types of its own made plain.

    Args:
      field: the field. Annotations other than those of Python's plain types, and
        collections of these, say nothing here.
      value: its value.

    Raises:
      ValueError: if the value is not of a type that the annotation says.

    Example:
      >>> @dataclasses.dataclass
      ... class Rule:
      ...     tile: int | None = None
      >>> tile, = dataclasses.fields(Rule)
      >>> type(converted(tile, np.int64(16)))
      <class 'int'>
      >>> converted(tile, "16")
      Traceback (most recent call last):
      ...
      ValueError: it must be an int or None
    """
    names = str(getattr(field.type, "__name__", field.type)).split(" | ")
    if value is None and "None" in names:
        return None
    kinds = [name for name in names if name != "None"]
    if any(kind not in _SAID for kind in kinds):
        return value
    plain = _plain(value)
    if any(_is(plain, kind) for kind in kinds):
        return plain
    # An int will do for a float, too.
    said = [_SAID[kind] for kind in kinds if kind != "int" or "float" not in kinds]
    raise ValueError(f"it must be {' or '.join(said + ['None'] * ('None' in names))}")


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Collection) and not isinstance(value, str | Mapping):
        return tuple(map(_plain, value))
    return value


def _is(value: Any, kind: str) -> bool:
    match kind:
        case "bool":
            return isinstance(value, bool)
        case "int":
            return isinstance(value, int) and not isinstance(value, bool)
        case "float":
            return isinstance(value, float) or _is(value, "int")
        case "str":
            return isinstance(value, str)
        case "Mapping[str, Any]":
            return isinstance(value, Mapping)
        case _:
            element = kind.removeprefix("Collection[").removesuffix("]")
            return isinstance(value, tuple) and all(_is(x, element) for x in value)
