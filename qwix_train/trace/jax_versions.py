"""Every fact about jaxprs that differs between JAX versions, in one place.

The rest of the package sees a `Body`: an open jaxpr, and the values of its
constants. JAX 0.10 keeps those in two classes (`Jaxpr` and `ClosedJaxpr`); from
0.12 on one class holds both.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core as jex


class Body(NamedTuple):
    """The inside of a function or of a higher-order operation."""

    jaxpr: Any
    consts: Sequence[Any]


class ScanParts(NamedTuple):
    """How a `scan` divides its operands: constants, carry, and scanned inputs."""

    num_consts: int
    num_carry: int


# `remat2` until 0.10, `checkpoint` later; `pjit` was the name of `jit`.
JIT = frozenset({"jit", "pjit", "call", "closed_call", "core_call", "eval_jaxpr"})
REMAT = frozenset({"remat2", "checkpoint", "remat"})

# The scope that a checkpoint gives, on the way back, to its forward.
_RECOMPUTED = "rematted_computation"

_DEBUG_INFO = jex.DebugInfo("evaluate_equations", "qwix_train", None, None)


def current_trace() -> Any:
    """What JAX does with an operation now: computes it, or takes it down in a trace."""
    with jex.take_current_trace() as trace:
        return trace


@functools.cache
def _staged() -> type:
    """The class of the traces of `jax.jit`, `lax.scan` and the like."""
    found = []
    jax.eval_shape(lambda: found.append(type(current_trace())))
    return found[0]


def is_staged_since(outer: Any) -> bool:
    """Whether a jaxpr is made now that was begun within an outer trace.

    JAX may keep that jaxpr, and use it again. What else it does, such as a derivative
    or `vmap`, it does anew each time.

    Args:
      outer: what `current_trace` was outside.
    """
    trace = current_trace()
    while trace is not outer:
        if trace is None or isinstance(trace, _staged()):
            return True
        trace = getattr(trace, "parent_trace", None)
    return False


def body_of(value: Any) -> Body:
    """The body of a parameter that holds a jaxpr, closed or not."""
    jaxpr = getattr(value, "jaxpr", value)
    return Body(jaxpr, tuple(getattr(value, "consts", ())))


def scan_parts(params: dict[str, Any]) -> ScanParts:
    """The division of the operands of a `scan` equation."""
    if "num_consts" in params:
        return ScanParts(params["num_consts"], params["num_carry"])
    consts, carry, _ = params["ft_in"].unpack()
    return ScanParts(len(consts), len(carry))


def shard_map_axes(params: dict[str, Any]) -> frozenset[str]:
    """The axes of the mesh that a `shard_map` is over."""
    name = "newly_manual_axes" if "newly_manual_axes" in params else "manual_axes"
    return frozenset(params[name])


def call_body(params: dict[str, Any]) -> Body:
    """The body of a call-like equation (`jit`, `remat`, `custom_vjp_call`)."""
    return body_of(params["jaxpr"] if "jaxpr" in params else params["call_jaxpr"])


def custom_source(equation: Any) -> str:
    """The function with a derivative rule of its own: its name and the file it is from.

    JAX does not say of a `custom_vjp` which it is.
    """
    if equation.primitive.name != "custom_jvp_call":
        return "a custom_vjp"
    debug_info = getattr(call_body(equation.params).jaxpr, "debug_info", None)
    return str(getattr(debug_info, "func_src_info", None) or "a function")


def bodies(params: dict[str, Any]) -> list[Body]:
    """All the bodies in an equation's parameters; most have none."""
    found = [body_of(jaxpr) for jaxpr in jex.jaxprs_in_params(params)]
    # JAX 0.10 leaves out the values of their constants.
    return [
        Body(body.jaxpr, tuple(body.consts) or (None,) * len(body.jaxpr.constvars))
        for body in found
    ]


def is_recomputed(equation: Any) -> bool:
    """Whether an equation in the body of a checkpoint computes a forward again."""
    return _RECOMPUTED in str(equation.source_info.name_stack)


def evaluate_equations(
    equations: Sequence[Any],
    inputs: Sequence[Any],
    outputs: Sequence[Any],
    values: Sequence[Any],
) -> list[Any]:
    """Runs consecutive equations as they are.

    JAX's own evaluator does it, so that each keeps its source line, name stack,
    sharding mesh and other context, none of which has a public setter.

    Args:
      equations: consecutive equations of one jaxpr.
      inputs: the variables that they read from outside.
      outputs: the variables wanted from them.
      values: the values of `inputs`.
    """
    jaxpr = jex.Jaxpr(
        (),
        list(inputs),
        list(outputs),
        list(equations),
        debug_info=_DEBUG_INFO,
    )
    closed = jaxpr if not hasattr(jex, "ClosedJaxpr") else jex.ClosedJaxpr(jaxpr, ())
    return jex.jaxpr_as_fun(closed)(*values)


def without_scope(equation: Any) -> Any:
    """An equation that adds no scope of its own to those it is run under."""
    source = equation.source_info
    empty = type(source.name_stack)()
    return equation.replace(source_info=source.replace(name_stack=empty))


def explicit_sharding(sharding: Any) -> bool:
    """Whether a `jit` parameter is a sharding, not "unspecified"."""
    return isinstance(sharding, jax.sharding.Sharding)
