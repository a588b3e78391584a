"""The rotations that there are, and what names them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from qwix_train.core.hadamard import Hadamard
from qwix_train.core.rotation import Rotation

KINDS: dict[str, type[Rotation]] = {cls.name: cls for cls in (Hadamard,)}
"""The class of each rotation, by its name."""


def register(cls: type[Rotation]) -> None:
    """Lets rules ask for another rotation.

    Raises:
      ValueError: if there is one of its name.
    """
    if cls.name in KINDS:
        raise ValueError(f"There is a rotation {cls.name!r} already.")
    KINDS[cls.name] = cls


def parse(text: str, axis: int = 0, length: int | None = None) -> Rotation:
    """The rotation that a text names.

    Args:
      text: its name, and perhaps numbers, as its class says.
      axis: the axis.
      length: the length of the axis; None to check the text alone.

    Raises:
      ValueError: if the text is wrong, or does not fit the axis.
    """
    name, *numbers = text.split(",")
    if name not in KINDS:
        forms = "; ".join(cls.form for cls in KINDS.values())
        raise ValueError(f"Unknown rotation {text!r}; choose from: {forms}.")
    cls = KINDS[name]
    try:
        return cls.parse(tuple(map(int, numbers)), axis, length)
    except ValueError as error:
        raise ValueError(f"Bad rotation {text!r}: {error}. Write {cls.form}.") from None


def to_record(rotation: Rotation | None) -> dict[str, Any] | None:
    """A rotation as values that JSON can hold."""
    return rotation and {"name": rotation.name, **dataclasses.asdict(rotation)}


def of_record(record: Mapping[str, Any] | None) -> Rotation | None:
    """Reads what `to_record` gave."""
    if record is None:
        return None
    fields = dict(record)
    return KINDS[fields.pop("name")](**fields)
