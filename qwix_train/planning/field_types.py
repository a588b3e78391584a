"""Types of the fields of dataclasses, checked when an object is made.

A field is checked by what its annotation says, such as `bool` or `int | float | None`.
Numbers of NumPy become those of Python, so that equal objects have equal fields.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

# Each annotation that is checked: the type of values, and what errors call them.
_KINDS: dict[str, tuple[Any, str]] = {
    "bool": (bool, "True or False"),
    "int": (int, "an int"),
    "float": (float | int, "a number"),
    "str": (str, "a str"),
    "Collection[int]": (tuple, "a collection of ints, such as (0,)"),
    "Collection[str]": (tuple, "a collection of strs"),
    "Mapping[str, Any]": (Mapping, "a mapping"),
    "Mapping[int, Any]": (Mapping, "a mapping"),
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
    if any(kind not in _KINDS for kind in kinds):
        return value
    plain = _plain(value)
    if any(_is(plain, kind) for kind in kinds):
        return plain
    # An int will do for a float, too.
    said = [_KINDS[kind][1] for kind in kinds if kind != "int" or "float" not in kinds]
    raise ValueError(f"it must be {' or '.join(said + ['None'] * ('None' in names))}")


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Collection) and not isinstance(value, str | Mapping):
        return tuple(map(_plain, value))
    return value


def _is(value: Any, kind: str) -> bool:
    if kind.startswith("Collection"):
        element = kind.removeprefix("Collection[").removesuffix("]")
        return isinstance(value, tuple) and all(_is(x, element) for x in value)
    is_bool = isinstance(value, bool)  # which Python takes for an int
    return isinstance(value, _KINDS[kind][0]) and is_bool == (kind == "bool")
