"""Which rewrite is in force, in this thread, right now.

A rewrite applies to model calls made while a `Session` is open. The session is a
JAX user context, so it is part of the key of every `jax.jit` cache: a function that
was compiled without the session, or under another one, is traced again, and what is
traced under this one is never used outside it.
"""

from __future__ import annotations

import collections
import contextlib
import threading
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import jax

from qwix_train.trace import jax_versions, scopes, subclasses
from qwix_train.trace.function import TracedCall

# Runs a traced call with ops replaced, or returns `UNCHANGED` to have the original
# called as if nothing had been in the way.
Rewrite = Callable[[TracedCall], Any]
UNCHANGED = object()


class _Tracing(NamedTuple):
    """The value while a model is traced.

    It is not None, so that a jitted function that was traced before, without the marks
    of its modules, is traced again with them.

    Attributes:
      key: what else the trace depends on.
      marks: whether modules mark their scopes. Not where a trace is evaluated.
    """

    key: Hashable = None
    marks: bool = True


_context = jax.make_user_context(None)


class _Key:
    """What JAX's caches know of a session: an object that is equal to itself alone."""


# The keys that no session has now, by what the sessions that they are for hold. What
# was traced under one of them is the same whatever the session was.
_free: dict[frozenset[int], list[_Key]] = collections.defaultdict(list)
# Those under which a model call was traced into what JAX keeps, by what was done to it.
_shared: dict[Hashable, _Key] = {}
_lock = threading.Lock()


class Session:
    """An open rewrite.

    JAX's caches keep the key of a session as long as what they hold, for good where
    that is the trace of a function of JAX. So sessions get their keys from those that
    ended, and find the traces of `jnp.mean` and the like there. That is safe unless a
    model call was reached while JAX traced something that it keeps, such as a jitted
    function of the user's: from then on the key belongs to the session.
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
        self._own: _Key | None = None

    @property
    def finds_traces(self) -> bool:
        """Whether it may find model calls that a session of the same key has traced."""
        return self.shared_key in _shared

    @contextlib.contextmanager
    def open(self, shared: bool = True, held: Sequence[Any] = ()) -> Iterator[None]:
        """Applies the rewrite to the model calls made in this thread.

        Args:
          shared: whether to use the shared key, if there is one.
          held: the models that other sessions may not know of, and so take no note of
            their calls. Only sessions that hold the same have keys in common.
        """
        shared = shared and not held and self.shared_key is not None
        with _lock:
            free = _free_keys(held)
            key = _shared.get(self.shared_key) if shared else self._own
            opened = _Opened(self, key)
            key = key or (free.pop() if free else _Key())
        outer, _thread.opened = _thread.opened, opened
        try:
            with _context(key):
                yield
        finally:
            _thread.opened = outer
            with _lock:
                if opened.key is None and not opened.is_kept:
                    free.append(key)
                elif shared:
                    _shared.setdefault(self.shared_key, key)
                else:
                    self._own = key


def _free_keys(held: Sequence[Any]) -> list[_Key]:
    ids = frozenset(map(id, held))
    if ids and ids not in _free:
        try:
            for model in held:
                weakref.finalize(model, _free.pop, ids, None)
        except (
            TypeError
        ):  # an `nnx.Variable` cannot be followed: another may get its id
            return []
    return _free[ids]


class _Opened:
    """What is known of the session that is open in a thread.

    Attributes:
      session: the session.
      key: its key, if that belongs to it.
      trace: what JAX was doing when it was opened.
      is_kept: whether a model call was reached in a trace that JAX keeps.
    """

    def __init__(self, session: Session, key: _Key | None):
        self.session = session
        self.key = key
        self.trace = jax_versions.current_trace()
        self.is_kept = False


class _Thread(threading.local):
    """The innermost session that was opened in a thread."""

    opened: _Opened | None = None


_thread = _Thread()


def current() -> Session | None:
    """The session in force in this thread, if any: a model call was reached."""
    opened = _thread.opened
    if opened is None or not isinstance(_context.value, _Key):
        return None
    opened.is_kept = opened.is_kept or jax_versions.is_staged_since(opened.trace)
    return opened.session


def marking() -> bool:
    """Whether a model is being traced, so that modules must mark their scopes."""
    return isinstance(_context.value, _Tracing) and _context.value.marks


@contextlib.contextmanager
def tracing(key: Hashable = None) -> Iterator[None]:
    """While a model is traced: no session is in force, and modules mark scopes.

    Args:
      key: what the trace depends on, as part of the key of JAX's caches.
    """
    with _context(_Tracing(key)):
        yield


@contextlib.contextmanager
def retracing() -> Iterator[None]:
    """While all is traced, whatever was before: no session is in force."""
    with _context(object()):
        yield


@contextlib.contextmanager
def suspended(
    key_of: Callable[[], Hashable | None] | None = None,
) -> Iterator[None]:
    """While results are computed: no session is in force.

    Args:
      key_of: gives what code depends on that JAX calls on the way, such as the forward
        rule of a `jax.custom_vjp`, in the place where the evaluation is, as part of
        the key of JAX's caches; or None where it depends on nothing.
    """
    if key_of is None or key_of() is None:
        with _context(None), scopes.asking(None):
            yield
        return

    def keyed():
        return _context(_Tracing(key_of(), marks=False))

    with keyed(), scopes.asking(keyed):
        yield


@contextlib.contextmanager
def in_float() -> Iterator[None]:
    """While calls run that stay in float: those of a step, and those in a model."""
    with scopes.float_scope() if marking() else suspended():
        yield


def calls_of(model: Any) -> contextlib.AbstractContextManager[None]:
    """While a method of a model runs, which may be one whose calls stay in float."""
    return in_float() if subclasses.in_float(model) else contextlib.nullcontext()
