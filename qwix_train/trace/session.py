"""Which rewrite is in force, in this thread, right now.

A rewrite applies to model calls made while a `Session` is open. The session is a
JAX user context, so it is part of the key of every `jax.jit` cache: a function that
was compiled without the session, or under another one, is traced again, and what is
traced under this one is never used outside it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax

from qwix_train.trace import scopes, subclasses
from qwix_train.trace.function import TracedCall

# Runs a traced call with ops replaced, or returns `UNCHANGED` to have the original
# called as if nothing had been in the way.
Rewrite = Callable[[TracedCall], Any]
UNCHANGED = object()

# The value while a model is traced. It is not None, so that a jitted function that
# was traced before, without the marks of its modules, is traced again with them.
_TRACING = object()
_context = jax.make_user_context(None)


class Session:
    """An open rewrite. Compared and hashed by identity, as JAX's caches need."""

    def __init__(self, rewrite: Rewrite):
        self.rewrite = rewrite

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Applies the rewrite to the model calls made in this thread."""
        with _context(self):
            yield


def current() -> Session | None:
    """The session in force in this thread, if any."""
    value = _context.value
    return value if isinstance(value, Session) else None


def marking() -> bool:
    """Whether a model is being traced, so that modules must mark their scopes."""
    return _context.value is _TRACING


@contextlib.contextmanager
def tracing() -> Iterator[None]:
    """While a model is traced: no session is in force, and modules mark scopes."""
    with _context(_TRACING):
        yield


@contextlib.contextmanager
def suspended() -> Iterator[None]:
    """While results are computed: no session is in force."""
    with _context(None):
        yield


@contextlib.contextmanager
def in_float() -> Iterator[None]:
    """While calls run that stay in float: those of a step, and those in a model."""
    with scopes.float_scope() if marking() else suspended():
        yield


def calls_of(model: Any) -> contextlib.AbstractContextManager[None]:
    """While a method of a model runs, which may be one whose calls stay in float."""
    return in_float() if subclasses.in_float(model) else contextlib.nullcontext()
