"""Traces a whole train or eval step, whatever its arguments are."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from qwix_train.frontends import nnx as nnx_calls
from qwix_train.frontends import nnx_objects
from qwix_train.trace import function


@contextlib.contextmanager
def tracing_step(
    step: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    whole: bool = False,
) -> Iterator[tuple[function.TracedCall, Callable[[Any], Any]]]:
    """Traces a step.

    Args:
      step: the step.
      args: its arguments, NNX objects among them or not.
      kwargs: its keyword arguments.
      whole: whether the trace returns all that NNX objects hold; see
        `nnx.tracing_call`.

    Yields:
      The traced call, and a function that takes its result, updates the NNX objects
      among the arguments, and returns what the step does.
    """
    leaves = jax.tree.leaves((args, kwargs), is_leaf=nnx_objects.is_node)
    if any(map(nnx_objects.is_node, leaves)):
        with nnx_calls.tracing_call(
            step, args, dict(kwargs), mark=False, whole=whole
        ) as traced_and_finish:
            yield traced_and_finish
        return
    traced = function.trace(
        lambda args, kwargs: step(*args, **kwargs),
        (tuple(args), dict(kwargs)),
        lambda key_path: None,
        as_arrays=False,
    )
    yield traced, lambda out: out
