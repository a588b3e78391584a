"""Functions that are traced once for each shape, and leave no `jit` behind."""

import functools
from collections.abc import Callable
from typing import Any

import jax

# JAX 0.10 inlines while it traces. In 0.12, True is while it lowers.
_INLINED: Any = getattr(getattr(jax, "Inline", None), "JAX_EARLY", True)


def traced_once(*static_argnums: int) -> Callable[[Callable[..., Any]], Any]:
    """Decorates a function of arrays, for `jax.jit` to keep its traces.

    A model that quantizes many arrays of one shape traces each once, and an eager call
    is one program, not one for each operation. Almost every function of `jax.numpy`
    is a `jit`, too, and would be traced for each shape on its own, which takes longer
    than all else: here they are not.

    Args:
        *static_argnums: Which arguments are not of arrays, but hashable.

    Returns:
        The decorator. Its function is to have no loop: `jax.lax.scan` without `jit`
        is a loop of Python.

    >>> @traced_once(1)
    ... def power(x, n):
    ...     return jax.numpy.power(x, n)
    >>> print(jax.make_jaxpr(lambda x: power(x, 3))(2.0).pretty_print(use_color=False))
    { lambda ; a:f32[]. let b:f32[] = integer_pow[y=3] a in (b,) }
    """

    def decorate(function: Callable[..., Any]) -> Any:
        @functools.wraps(function)
        def whole(*args: Any) -> Any:
            with jax.disable_jit():
                return function(*args)

        return jax.jit(whole, static_argnums=static_argnums, inline=_INLINED)

    return decorate
