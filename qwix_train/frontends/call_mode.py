"""Whether a call of a model trains or evaluates it, by the switch that it is given."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from qwix_train.frontends import attributes

# The names that Flax models give the switch, and what it says if it is true.
_SWITCHES = {
    "deterministic": True,
    "train": False,
    "training": False,
    "is_training": False,
    "is_train": False,
}


def deterministic_of(
    method: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    owner: Any = None,
) -> bool | None:
    """Whether a call says that it evaluates a model.

    Args:
      method: what is called; its signature says what the arguments are.
      args: the positional arguments.
      kwargs: the keyword arguments.
      owner: the model, whose attributes say it where no argument does.

    Returns:
      None if neither says.

    Example:
      >>> deterministic_of(lambda x, train=False: x, [1.0], {})
      True
    """
    try:
        bound = inspect.signature(method).bind_partial(*args, **kwargs)
        bound.apply_defaults()
        given = {**bound.arguments, **kwargs}
    except (TypeError, ValueError):
        given = dict(kwargs)
    held = {
        name: getattr(owner, name) for name in _SWITCHES if attributes.has(owner, name)
    }
    for values in (given, held):
        for name, meaning in _SWITCHES.items():
            if isinstance(values.get(name), bool | np.bool_):
                return bool(values[name]) == meaning
    return None
