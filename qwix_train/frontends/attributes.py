"""Attributes of objects of any class, which may have a `__getattr__` of its own."""

from __future__ import annotations

import inspect
from typing import Any


def has(value: Any, *names: str) -> bool:
    """Whether an object holds attributes, without asking its `__getattr__`.

    That may do anything: a Linen module that hands on to what it holds asks itself
    without end where it does not hold that yet.

    Args:
      value: the object.
      *names: the attributes. It must hold all.

    Example:
      >>> has("text", "upper", "lower"), has("text", "apply_fn")
      (True, False)
    """
    missing = object()
    return all(
        inspect.getattr_static(value, name, missing) is not missing for name in names
    )
