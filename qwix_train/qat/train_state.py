"""What a train state holds for the call of its model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

_OTHERS = ("params", "opt_state", "quant_stats")


def collections_of(state: Any) -> dict[str, Any]:
    """The collections of a train state but for the params, such as `batch_stats`.

    Args:
      state: a dataclass; the name of a field is that of the collection, by convention.
    """
    return {
        field.name: getattr(state, field.name)
        for field in dataclasses.fields(state)
        if field.name not in _OTHERS and isinstance(getattr(state, field.name), Mapping)
    }
