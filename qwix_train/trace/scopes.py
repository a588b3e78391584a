"""Module paths in name stacks.

Every equation of a jaxpr carries the stack of `jax.named_scope`s it was traced
under. `module_scope(path)` marks the code of one module there, and
`module_path_of(name_stack)` reads the innermost mark, through whatever other scopes
and transformations stand around it.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import jax

_MARK = re.compile(r"@([^@]*)@")


# Part of the key of every `jax.jit` cache, so that a module whose method is compiled
# (`nn.jit`) does not get the trace, and with it the mark, of another one.
_module = jax.make_user_context("")


@contextlib.contextmanager
def module_scope(path: str) -> Iterator[None]:
    """A context under which traced equations belong to the module at `path`."""
    # A slash would be taken for the separator of two scopes.
    with _module(path), jax.named_scope(f"@{path.replace('/', '|')}@"):
        yield


def module_path_of(name_stack: str) -> str:
    """The path of the innermost module in a name stack; "" for the root."""
    marks = _MARK.findall(name_stack)
    return marks[-1].replace("|", "/") if marks else ""
