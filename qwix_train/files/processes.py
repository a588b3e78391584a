"""What the processes of one computation do once, or together.

With one process these functions add nothing. With several, all of them call a function
of this module at the same point of the program, as they do for any computation.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

T = TypeVar("T")

_LONGEST = 1000
_SHOWN = 50


def once(action: Callable[[], Any]) -> None:
    """Runs an action in the first process; the others wait until it is done.

    Args:
      action: the action. What it returns is not used.

    Raises:
      RuntimeError: in all others, if the action failed in the first process, where its
        own error is raised.
    """
    together(lambda: action() if jax.process_index() == 0 else None)


def together(action: Callable[[], T]) -> T:
    """Runs an action in every process. If it fails in one of them, all of them fail.

    Args:
      action: the action, which does not wait for other processes itself.

    Returns:
      What it returned in this process.

    Raises:
      RuntimeError: if the action failed in other processes alone. The message names
        them, and has the error of the first of them. A process in which it failed
        raises its own error.
    """
    if jax.process_count() == 1:
        return action()
    result, error = None, None
    try:
        result = action()
    except Exception as raised:
        error = raised
    failed = np.ravel(multihost_utils.process_allgather(np.bool_(error is not None)))
    if failed.any():
        text = "" if error is None else f"{type(error).__name__}: {error}"
        texts = multihost_utils.process_allgather(_padded(text.encode(), _LONGEST))
        if error is not None:
            raise error
        (indices,) = np.nonzero(failed)
        names = ", ".join(map(str, indices[:8])) + (", ..." if len(indices) > 8 else "")
        noun = "Process" if len(indices) == 1 else "Processes"
        raise RuntimeError(f"{noun} {names} failed: {_text(texts[indices[0]])}")
    return result  # pyright: ignore[reportReturnType]


def check_same(what: str, lines: Iterable[str]) -> None:
    """Complains in all processes of what is not the same in all of them.

    Args:
      what: what it is, in the plural, such as "the rules".
      lines: it as text; not read if there is one process. What is compared is a hash;
        the message has the first line that differs.

    Raises:
      ValueError: in the processes that have other lines than the first one.
      RuntimeError: in all others; the message names those.
    """
    if jax.process_count() == 1:
        return
    own_lines = list(lines)
    text = "\n".join(own_lines).encode()
    digest = np.frombuffer(hashlib.sha256(text).digest(), np.uint8)
    digests = multihost_utils.process_allgather(digest)
    if (digests == digests[0]).all():
        return
    longest = int(multihost_utils.process_allgather(np.int64(len(text))).max())
    first = multihost_utils.broadcast_one_to_all(_padded(text, longest))
    known = _text(first).split("\n")

    def compare() -> None:
        for own, other in itertools.zip_longest(own_lines, known, fillvalue="nothing"):
            if own != other:
                start = max(0, len(os.path.commonprefix([own, other])) - _SHOWN)
                here, there = (x[start : start + 3 * _SHOWN] for x in (own, other))
                raise ValueError(
                    f"{what} have to be the same in all processes. In process "
                    f"{jax.process_index()} there is {here!r}, and in the first "
                    f"{there!r}."
                )

    together(compare)


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


def _padded(text: bytes, length: int) -> np.ndarray:
    return np.frombuffer(text[:length].ljust(length, b"\0"), np.uint8)


def _text(padded: Any) -> str:
    return np.asarray(padded).tobytes().rstrip(b"\0").decode(errors="replace")
