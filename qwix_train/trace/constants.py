"""The values of arrays that depend on no input, computed where they are asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.extend import core as jex

from qwix_train.trace import jax_versions


class Constants:
    """The constants of one body.

    Args:
      body: the body.
      outside: the constants of the body around it.
      atoms: what some of its inputs are there.
    """

    def __init__(
        self,
        body: jax_versions.Body,
        outside: Constants | None = None,
        atoms: Mapping[Any, Any] | None = None,
    ):
        self._body = body
        self._outside = outside
        self._atoms = atoms or {}
        self._values = dict(zip(body.jaxpr.constvars, body.consts, strict=True))

    def value(self, atom: Any) -> Any:
        """The value of a literal or a variable; None if it is not known.

        Args:
          atom: one that depends on no input of the whole function.
        """
        if isinstance(atom, jex.Literal):
            return atom.val
        # What has to be computed for it, from the last equation to the first.
        needed, equations, inputs = {atom}, [], {}
        for eqn in reversed(self._body.jaxpr.eqns):
            if needed.isdisjoint(eqn.outvars):
                continue
            if eqn.effects:
                return None
            equations.append(eqn)
            needed.difference_update(eqn.outvars)
            needed.update(v for v in eqn.invars if isinstance(v, jex.Var))
        for var in needed:
            inputs[var] = self._input(var)
            if inputs[var] is None or isinstance(inputs[var], Tracer):
                return None
        with jax.ensure_compile_time_eval():
            (value,) = jax_versions.evaluate_equations(
                equations[::-1], list(inputs), [atom], list(inputs.values())
            )
        return value

    def _input(self, var: Any) -> Any:
        if var in self._values:
            return self._values[var]
        if self._outside is None or var not in self._atoms:
            return None
        return self._outside.value(self._atoms[var])


def moves_elements(value: Any, contracted: Sequence[int]) -> bool:
    """Whether each sum over some axes of a constant takes one element, or nothing.

    A product with it is then no arithmetic: its results are elements of the other
    operand, and zeros.

    >>> moves_elements(np.eye(3)[[2, 0]], (1,)), moves_elements(np.ones((2, 2)), (1,))
    (True, False)
    """
    value = np.asarray(value)
    is_one = value == 1
    return bool(
        np.all(is_one | (value == 0)) and np.all(is_one.sum(tuple(contracted)) <= 1)
    )
