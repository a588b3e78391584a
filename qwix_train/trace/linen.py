"""Calls of Flax Linen modules, as pure functions that can be traced and rewritten."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flax import linen as nn

from qwix_train.trace import function, scopes, session


def interceptor(
    next_function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: nn.module.InterceptorContext,
) -> Any:
    """For `nn.intercept_methods`: rewrites calls while a session is open.

    The outermost call of a module is what is rewritten. That is the model's own
    method for `model.apply` and `nn.apply`, and a submodule's where a function was
    applied that calls one.
    """
    module = context.module
    if session.marking():
        return mark(next_function, args, kwargs, context)
    open_session = session.current()
    if open_session is None or module.scope is None or module.is_initializing():
        return next_function(*args, **kwargs)
    return rewrite_call(
        module,
        context.method_name,
        lambda: next_function(*args, **kwargs),
        args,
        kwargs,
        open_session.rewrite,
    )


def mark(next_function, args, kwargs, context):
    """For `nn.intercept_methods`: marks traced equations with their module."""
    with scopes.module_scope("/".join(context.module.path)):
        return next_function(*args, **kwargs)


def rewrite_call(
    module: nn.Module,
    method_name: str,
    original: Callable[[], Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    rewrite: session.Rewrite,
) -> Any:
    """Calls a method of a bound module, rewritten.

    Args:
      module: the bound module.
      method_name: the method.
      original: calls the method as it is; used when there is nothing to rewrite.
      args: the positional arguments.
      kwargs: the keyword arguments.
      rewrite: the rewrite.
    """
    scope = module.scope
    assert scope is not None
    unbound, variables = module.unbind()
    mutable = scope.mutable
    # `LazyRng`s keep the path of the module, so that a submodule that is called on
    # its own draws the same numbers as it would within the model.
    rngs = dict(scope.rngs)

    def pure(variables, args, kwargs):
        # `capture_intermediates` and the like stay in force: they are interceptors
        # of their own. `mutable=False` returns the result alone.
        with nn.intercept_methods(mark):
            return unbound.apply(
                variables,
                *args,
                rngs=rngs,
                method=method_name,
                mutable=mutable,
                **kwargs,
            )

    with session.tracing():
        traced = function.trace(
            pure,
            (dict(variables), args, kwargs),
            param_name,
            module_path="/".join(module.path),
        )
    with session.suspended():
        out = rewrite(traced)
        if out is session.UNCHANGED:
            return original()
    if mutable is False:
        return out
    out, updates = out
    for collection, values in updates.items():
        for name, value in values.items():
            module.put_variable(collection, name, value)
    return out


def param_name(path: tuple[str, ...]) -> tuple[str, ...] | None:
    """The path of a param, from that of a leaf of the variables."""
    collection, *names = path
    if collection != "params":
        return None
    # A boxed param, such as `nn.Partitioned`, holds its array in `value`.
    if len(names) > 1 and names[-1] == "value":
        names.pop()
    return tuple(names)
