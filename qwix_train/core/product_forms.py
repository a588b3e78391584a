"""Tells a plan in which form a product is computed.

`dot_general`, `weight_only`, `cpu_dots` and `integer_dot` choose the form while the
product is traced, by its operands, shapes and platform. They call `tell` where they
choose, so that a plan shows what runs.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")

_listener: contextvars.ContextVar[Callable[[str], Any] | None] = contextvars.ContextVar(
    "listener", default=None
)


@contextlib.contextmanager
def listening(listener: Callable[[str], Any]) -> Iterator[None]:
    """Calls a listener with the form of each product that is traced.

    A product may have several forms, for several platforms, and one form may be told
    more than once.

    >>> import jax.numpy as jnp
    >>> from qwix_train import dot, quantize
    >>> found = []
    >>> with listening(found.append):
    ...     _ = dot(jnp.ones((1, 64)), quantize(jnp.ones((64, 8)), 'int8'))
    >>> list(dict.fromkeys(found))
    ['rows on CPU', 'codes, then scaled']
    """
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def tell(form: str) -> None:
    """Tells the listener, if there is one, of a form."""
    listener = _listener.get()
    if listener is not None:
        listener(form)


def traced(jitted: Callable[_P, _T]) -> Callable[_P, _T]:
    """Returns a jitted function, or what it wraps if there is a listener.

    JAX does not trace a jitted function again for shapes that it knows, so it would
    tell nothing.
    """
    if _listener.get() is None:
        return jitted
    return jitted.__wrapped__  # pyright: ignore[reportFunctionMemberAccess]
