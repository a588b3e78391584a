"""Module paths in name stacks.

Every equation of a jaxpr carries the stack of `jax.named_scope`s it was traced
under. `module_scope(path)` marks the code of one module there, and
`module_path_of(name_stack)` reads the marks, through whatever other scopes and
transformations stand around them.
"""

from __future__ import annotations

import contextlib
import re
from typing import Any, Literal

import jax

_MARK = re.compile(r"@([^@]*)@(linen~|nnx~)?")
_BATCH_NORM = "batch_norm"
_IN_FLOAT = "~in_float~"


def module_scope(
    path: str,
    kind: Literal["linen", "nnx"] | None = None,
    *,
    batch_norm: bool = False,
) -> contextlib.AbstractContextManager[Any]:
    """A context under which traced equations belong to the module at `path`.

    Args:
      path: the path of the module within the outermost module of its kind.
      kind: the kind of module, where a model may hold modules of both.
      batch_norm: whether the module normalizes over the batch.
    """
    # A slash would be taken for the separator of two scopes.
    name = f"@{path.replace('/', '|')}@{f'{kind}~' if kind else ''}"
    return jax.named_scope(f"{name}{_BATCH_NORM}" if batch_norm else name)


def float_scope() -> contextlib.AbstractContextManager[Any]:
    """A context under which traced equations stay in float, whatever rules say."""
    return jax.named_scope(_IN_FLOAT)


def is_in_float(name_stack: str) -> bool:
    """Whether the equations in a name stack stay in float."""
    return _IN_FLOAT in name_stack


def is_batch_norm(name_stack: str) -> bool:
    """Whether the innermost module in a name stack normalizes over the batch."""
    after = name_stack.rpartition("@")[2]
    return after.removeprefix("linen~").removeprefix("nnx~").startswith(_BATCH_NORM)


def module_path_of(name_stack: str) -> str:
    """The path of the innermost module in a name stack; "" for the root.

    A mark of one kind within marks of the other is that of a module which one of
    those holds: its path continues theirs.
    """
    last: list[tuple[str, str]] = []
    for path, kind in _MARK.findall(name_stack):
        if last and last[-1][1] == kind:
            last.pop()
        last.append((path, kind))
    return "/".join(path.replace("|", "/") for path, _ in last if path)
