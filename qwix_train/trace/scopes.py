"""Module paths in name stacks.

Every equation of a jaxpr carries the stack of `jax.named_scope`s it was traced
under. `module_scope(path)` marks the code of one module there, and
`module_path_of(name_stack)` reads the innermost mark, through whatever other scopes
and transformations stand around it.
"""

from __future__ import annotations

import re

import jax

_MARK = re.compile(r"@([^@]*)@")
_BATCH_NORM = "batch_norm"
_IN_FLOAT = "~in_float~"


def module_scope(path: str, *, batch_norm: bool = False):
    """A context under which traced equations belong to the module at `path`.

    Args:
      path: the path of the module.
      batch_norm: whether the module normalizes over the batch.
    """
    # A slash would be taken for the separator of two scopes.
    name = f"@{path.replace('/', '|')}@"
    return jax.named_scope(f"{name}{_BATCH_NORM}" if batch_norm else name)


def float_scope():
    """A context under which traced equations stay in float, whatever rules say."""
    return jax.named_scope(_IN_FLOAT)


def is_in_float(name_stack: str) -> bool:
    """Whether the equations in a name stack stay in float."""
    return _IN_FLOAT in name_stack


def is_batch_norm(name_stack: str) -> bool:
    """Whether the innermost module in a name stack normalizes over the batch."""
    return name_stack.rpartition("@")[2].startswith(_BATCH_NORM)


def module_path_of(name_stack: str) -> str:
    """The path of the innermost module in a name stack; "" for the root."""
    marks = _MARK.findall(name_stack)
    return marks[-1].replace("|", "/") if marks else ""
