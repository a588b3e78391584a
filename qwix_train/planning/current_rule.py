"""What rules say to a kernel that asks for them while its model is traced.

A kernel, such as one of Pallas, quantizes by itself: the trace has nothing in it that
could be replaced. `current_rule` tells it the rule of its module. What it does with
that is in the trace, which is why JAX must not use what it has kept of a trace that was
made under other rules: see `key`.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import numpy as np
from jax import lax

from qwix_train.planning.rules import QuantizationRule
from qwix_train.trace import scopes


class _Thread(threading.local):
    """The rules that are in force in a thread."""

    rules: tuple[QuantizationRule, ...] | None = None


_thread = _Thread()
# The names that were ever asked for in this process.
_asked: set[str] = set()
# The rules that were the answers, which need not have a hash.
_given: list[QuantizationRule] = []


def current_rule(op_name: str) -> QuantizationRule | None:
    """The rule for an op that the code of a model runs by itself, such as a kernel.

    Call it while a model is traced: in its methods, in functions that they call, jitted
    or not, in Pallas code, and in the function and the forward rule of a
    `jax.custom_vjp`. A backward rule runs after the model, where the module is not
    known: ask in the function, and hand the rule on.

    Args:
      op_name: the name of the op, which `op_names` of rules may hold. It may be one
        that only the kernel knows, such as `"gmm"`.

    Returns:
      The first rule that matches the name and the path of the module that is running;
      None if none does, or no model is traced that is quantized.

    Raises:
      ValueError: in a forward rule inside of a loop or a branch.

    Example:
      >>> from flax import linen as nn
      >>> import jax
      >>> from qwix_train import QtProvider, QuantizationRule, current_rule, quantize_fn
      >>> rule = QuantizationRule(op_names=("gmm",), weight_qtype="int8")
      >>> def kernel(params, x):
      ...     print(current_rule("gmm"))
      ...     return x
      >>> _ = quantize_fn(kernel, QtProvider([rule]))({"w": 1.0}, 2.0)
      QuantizationRule(op_names=('gmm',), weight_qtype='int8')
      >>> _ = kernel({"w": 1.0}, 2.0)
      None
    """
    rules = _thread.rules
    try:
        path = None if rules is None else scopes.current_path()
    except LookupError:
        raise ValueError(
            f"current_rule({op_name!r}) was called by the forward rule of a "
            "jax.custom_vjp in a loop or a branch, where the path of its module is "
            "not known. Call it in the function that jax.custom_vjp decorates, or in "
            "what calls that, and hand the rule on (nondiff_argnums)."
        ) from None
    if rules is None or path is None:
        return None
    _asked.add(op_name)
    with scopes.asks_for(op_name):
        # An equation, so that the plan finds it also where JAX has kept the trace. The
        # compiler drops it.
        lax.add(np.int32(0), np.int32(0))
    answer = _answer(rules, path, op_name)
    if answer is not None and not was_given(answer):
        _given.append(answer)
    return answer


def was_given(rule: QuantizationRule) -> bool:
    """Whether a rule was ever the answer to a kernel.

    One that JAX has compiled does not ask again, so that a plan may not list it.
    """
    return rule in _given


def _answer(
    rules: Sequence[QuantizationRule], path: str, op_name: str
) -> QuantizationRule | None:
    matching = (rule for rule in rules if rule.matches(path, op_name, op_name))
    return next(matching, None)


@contextlib.contextmanager
def answering(rules: Sequence[QuantizationRule]) -> Iterator[None]:
    """While models are called by rules: these answer.

    Args:
      rules: the rules.
    """
    outer, _thread.rules = _thread.rules, tuple(rules)
    try:
        yield
    finally:
        _thread.rules = outer


class _Key:
    """Rules as a part of the key of JAX's caches: they need not have a hash."""

    def __init__(self, *rules: Any):
        self.rules = rules

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.rules == other.rules

    def __hash__(self) -> int:
        return hash(len(self.rules))


def key() -> Hashable | None:
    """What code depends on where a thread is, for JAX's caches.

    Returns:
      A key that stands for the answers to all that was ever asked for; None as long as
      nothing was: what JAX keeps of `jnp.einsum` and the like then serves all rules.
      Once a kernel has asked, JAX keeps them for each set of rules, and for good.
    """
    rules = _thread.rules
    if not _asked or rules is None:
        return None
    try:
        path = scopes.current_path()
    except LookupError:
        path = None
    if path is None:
        return _Key(rules)
    return _Key(*((name, _answer(rules, path, name)) for name in sorted(_asked)))
