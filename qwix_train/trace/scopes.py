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


def module_scope(path: str):
    """A context under which traced equations belong to the module at `path`."""
    # A slash would be taken for the separator of two scopes.
    return jax.named_scope(f"@{path.replace('/', '|')}@")


def module_path_of(name_stack: str) -> str:
    """The path of the innermost module in a name stack; "" for the root."""
    marks = _MARK.findall(name_stack)
    return marks[-1].replace("|", "/") if marks else ""
