"""What the processes of one computation do once, or together.

With one process these functions add nothing. With several, all of them call a function
of this module at the same point of the program, as they do for any computation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

_LONGEST = 1000


def once(action: Callable[[], Any]) -> None:
    """Runs an action in the first process; the others wait until it is done.

    Args:
      action: the action. What it returns is not used.

    Raises:
      RuntimeError: in all others, if the action failed in the first process, where its
        own error is raised.
    """
    if jax.process_count() == 1:
        action()
        return
    error = None
    if jax.process_index() == 0:
        try:
            action()
        except Exception as raised:
            error = raised
    text = "" if error is None else f"{type(error).__name__}: {error}"
    padded = text.encode()[:_LONGEST].ljust(_LONGEST, b"\0")
    encoded = np.frombuffer(padded, np.uint8)
    encoded = np.asarray(multihost_utils.broadcast_one_to_all(encoded))
    if error is not None:
        raise error
    if encoded.any():
        text = encoded.tobytes().rstrip(b"\0").decode(errors="replace")
        raise RuntimeError(f"The first process failed: {text}")


def agreed(decision: bool) -> bool:
    """What the first process decided."""
    if jax.process_count() == 1:
        return decision
    return bool(multihost_utils.broadcast_one_to_all(np.bool_(decision)))


def whole(tree: Any) -> Any:
    """A tree of arrays on the host, all of each, wherever its parts are."""

    def gathered(array: Any) -> Any:
        if isinstance(array, jax.Array) and not (
            array.is_fully_addressable or array.is_fully_replicated
        ):
            return multihost_utils.process_allgather(array, tiled=True)
        return array

    return jax.device_get(jax.tree.map(gathered, tree))
