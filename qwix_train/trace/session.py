"""Which rewrite is in force, in this thread, right now.

A rewrite applies to model calls made while a `Session` is open. The session is a
JAX user context, so it is part of the key of every `jax.jit` cache: a function that
was compiled without the session, or under another one, is traced again, and what is
traced under this one is never used outside it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Hashable, Iterator
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
    """An open rewrite.

    JAX's caches keep the key of a session as long as what they hold, for good where
    that is the trace of a function of JAX. So the key does not hold the rewrite, and
    sessions that do the same may share one, so that such traces do not add up.
    """

    def __init__(self, rewrite: Rewrite, shared_key: Hashable | None = None):
        """Makes a session, which is not open yet.

        Args:
          rewrite: what is done to the model calls.
          shared_key: says what `rewrite` does, so that what was traced under another
            session with an equal key may be used under this one; None if nothing may.
        """
        self.rewrite = rewrite
        self.shared_key = shared_key
        self._own_key = object()

    @contextlib.contextmanager
    def open(self, shared: bool = True) -> Iterator[None]:
        """Applies the rewrite to the model calls made in this thread.

        Args:
          shared: whether to use the shared key, if there is one.
        """
        is_shared = shared and self.shared_key is not None
        outer = _opened.session
        _opened.session = self
        try:
            with _context(_Key(self.shared_key if is_shared else self._own_key)):
                yield
        finally:
            _opened.session = outer


@dataclasses.dataclass(frozen=True)
class _Key:
    """What JAX's caches know of a session."""

    content: Hashable


class _Opened(threading.local):
    """The innermost session that was opened in this thread."""

    session: Session | None = None


_opened = _Opened()


def current() -> Session | None:
    """The session in force in this thread, if any."""
    return _opened.session if isinstance(_context.value, _Key) else None


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
