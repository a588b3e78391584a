"""Which rewrite is in force, in this thread, right now.

A rewrite applies to model calls made while a `Session` is open. The session is a
JAX user context, so it is part of the key of every `jax.jit` cache: a function that
was compiled without the session, or under another one, is traced again, and what is
traced under this one is never used outside it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax

from qwix_train.trace.function import TracedCall

# Runs a traced call with ops replaced, or returns `UNCHANGED` to have the original
# called as if nothing had been in the way.
Rewrite = Callable[[TracedCall], Any]
UNCHANGED = object()

_session = jax.make_user_context(None)


class _Marking(threading.local):
    on = False


_marking = _Marking()


class Session:
    """An open rewrite. Compared and hashed by identity, as JAX's caches need."""

    def __init__(self, rewrite: Rewrite):
        self.rewrite = rewrite

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Applies the rewrite to the model calls made in this thread."""
        with _session(self):
            yield


def current() -> Session | None:
    """The session in force in this thread, if any."""
    return _session.value


def marking() -> bool:
    """Whether a model is being traced, so that modules must mark their scopes."""
    return _marking.on


@contextlib.contextmanager
def tracing() -> Iterator[None]:
    """While a model is traced: no session is in force, and modules mark scopes."""
    before = _marking.on
    _marking.on = True
    try:
        with _session(None):
            yield
    finally:
        _marking.on = before


@contextlib.contextmanager
def suspended() -> Iterator[None]:
    """While results are computed: no session is in force."""
    with _session(None):
        yield
