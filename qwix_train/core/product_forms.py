"""Which form a product takes, told to who asks while it is traced.

Operands, shapes and the platform choose among the forms, where the product is computed:
`dot_general`, `weight_only`, `cpu_dots`, `integer_dot`. A plan shows what they chose.
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
    """Tells a listener the forms of the products that are traced, one of them twice.

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
    """A function under `jax.jit`, or where someone listens the function itself.

    The jitted one is not traced again for shapes that it knows.
    """
    if _listener.get() is None:
        return jitted
    return jitted.__wrapped__  # pyright: ignore[reportFunctionMemberAccess]
