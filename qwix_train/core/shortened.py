"""Values in messages, which may be whole trees of arrays."""

from __future__ import annotations

from typing import Any

_MOST = 160


def shortened(value: Any) -> str:
    """A value as text, or its type if the text is too long for a message.

    Example:
      >>> shortened([1]), shortened({"kernel": list(range(1000))})
      ('[1]', 'a dict')
    """
    text = repr(value)
    if len(text) <= _MOST and "\n" not in text:
        return text
    return f"a {type(value).__name__}"
