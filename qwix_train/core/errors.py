"""Errors that say where something is wrong, or what has to be installed."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def located(where: str, end: str = "") -> Iterator[None]:
    """Says in a `ValueError` where something is wrong.

    Args:
      where: what stands before the message, and a colon.
      end: what stands behind it.

    Raises:
      ValueError: if one is raised inside.

    Example:
      >>> with located("Param 'kernel'", end="."):
      ...     raise ValueError("it has no axes")
      Traceback (most recent call last):
      ...
      ValueError: Param 'kernel': it has no axes.
    """
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}{end}") from error


def imported(name: str, remedy: str) -> Any:
    """A module that is not installed with this package.

    Args:
      name: its full name.
      remedy: what needs it, and how to install it.

    Raises:
      ImportError: if it cannot be imported. The message is the remedy.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(remedy) from error
