"""Module paths in name stacks.

Every equation of a jaxpr carries the stack of `jax.named_scope`s it was traced
under. `module_scope(path)` marks the code of one module there, and
`module_path_of(name_stack)` reads the marks, through whatever other scopes and
transformations stand around them.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax

_MARK = re.compile(r"@([^@]*)@(linen~|nnx~)?")
_BATCH_NORM = "batch_norm"
_IN_FLOAT = "~in_float~"
_ASKS = "~asks~"


Context = Callable[[], contextlib.AbstractContextManager[Any]]


class _Thread(threading.local):
    """Where a thread is.

    Attributes:
      stack: the name stack of its modules; None outside of all, and False where what
        runs does not say.
      asks: where code that JAX calls asks where it is while a trace is evaluated: what
        makes a context for it, within that of its path.
      requests: what code asked for in the trace that is made, with its path.
    """

    stack: str | None | Literal[False] = None
    asks: Context | None = None
    requests: list[tuple[str, str]] | None = None


_thread = _Thread()


@contextlib.contextmanager
def module_scope(
    path: str,
    kind: Literal["linen", "nnx"] | None = None,
    *,
    batch_norm: bool = False,
) -> Iterator[None]:
    """A context under which traced equations belong to the module at `path`.

    Args:
      path: the path of the module within the outermost module of its kind.
      kind: the kind of module, where a model may hold modules of both.
      batch_norm: whether the module normalizes over the batch.
    """
    name = f"{_mark(path, kind)}{_BATCH_NORM}" if batch_norm else _mark(path, kind)
    with within(name), jax.named_scope(name):
        yield


def _mark(path: str, kind: str | None = None) -> str:
    # A slash would be taken for the separator of two scopes.
    return f"@{path.replace('/', '|')}@{f'{kind}~' if kind else ''}"


def part_of(path: str) -> contextlib.AbstractContextManager[None]:
    """A context in which the part of a model at `path` is traced alone.

    Its equations are not marked with the path.
    """
    return within(_mark(path))


@contextlib.contextmanager
def within(name_stack: str) -> Iterator[None]:
    """A context in which `current_path` continues a name stack.

    Args:
      name_stack: the name stack; "" for code outside of any module.
    """
    outer = _thread.stack
    _thread.stack = f"{outer or ''}/{name_stack}"
    try:
        yield
    finally:
        _thread.stack = outer


@contextlib.contextmanager
def unknown() -> Iterator[None]:
    """A context in which code of any module may run, and `current_path` says so."""
    outer, _thread.stack = _thread.stack, False
    try:
        yield
    finally:
        _thread.stack = outer


@contextlib.contextmanager
def asking(asks: Context | None) -> Iterator[None]:
    """A context in which code that JAX calls may ask for its path.

    Args:
      asks: makes another context for such code, within that of its path; None if it
        does not ask.
    """
    outer, _thread.asks = _thread.asks, asks
    try:
        yield
    finally:
        _thread.asks = outer


def is_asked() -> bool:
    """Whether an evaluation has to keep track of its path."""
    return _thread.asks is not None


@contextlib.contextmanager
def code_within(name_stack: str) -> Iterator[None]:
    """A context for code that JAX calls while what has a name stack is evaluated."""
    asks = _thread.asks or contextlib.nullcontext
    with within(name_stack), asks():
        yield


@contextlib.contextmanager
def asks_for(name: str) -> Iterator[None]:
    """A context that marks an equation: there, code asked for the rule of a name.

    Pallas drops from its kernels what is of no use, so it is taken down, too.
    """
    if _thread.requests is not None:
        _thread.requests.append((current_path() or "", name))
    with jax.named_scope(f"{_ASKS}{name}{_ASKS}"):
        yield


@contextlib.contextmanager
def recording() -> Iterator[list[tuple[str, str]]]:
    """While a function is traced: takes down what its code asks for.

    Yields:
      The paths of modules and the names, complete when the trace is.
    """
    outer, requests = _thread.requests, []
    _thread.requests = requests
    try:
        yield requests
    finally:
        _thread.requests = outer


def name_asked_for(name_stack: str) -> str | None:
    """The name that code asked for, if an equation is marked so."""
    found = re.search(f"{_ASKS}(.*){_ASKS}", name_stack)
    return found and found[1]


def current_path() -> str | None:
    """The path of the module that this thread traces or evaluates; None outside.

    Raises:
      LookupError: if it is not known.
    """
    if _thread.stack is False:
        raise LookupError("which module runs this code is not known")
    return None if _thread.stack is None else module_path_of(_thread.stack)


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
