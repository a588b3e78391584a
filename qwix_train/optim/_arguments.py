"""Checks of what several transformations take."""

import math
from typing import Any

import optax

from qwix_train.core import numerics
from qwix_train.optim._param_grids import ParamGrids


def check_schedule(transform: str, argument: str, value: Any) -> None:
    """Checks an argument that is a number, not negative, or a schedule.

    Arrays pass, as `optax.inject_hyperparams` puts them in the places of numbers.

    Args:
        transform: The name of the transformation, for messages.
        argument: The name of its argument, for messages.
        value: What was given.

    Raises:
        TypeError: It is neither.
        ValueError: It is negative or not a number.
    """
    if isinstance(value, int | float):
        if math.isnan(value) or value < 0:
            raise ValueError(
                f"{transform}({argument}={value!r}): it must not be negative."
            )
    elif not callable(value) and not hasattr(value, "dtype"):
        raise TypeError(
            f"{transform}({argument}={value!r}): expected a number, or a schedule, as "
            f"optax.linear_schedule makes it, not a {type(value).__name__}."
        )


def check_transformation(transform: str, tx: Any) -> None:
    """Checks that what is to be wrapped is a transformation of Optax.

    Raises:
        TypeError: It is not a transformation.
    """
    if not isinstance(tx, optax.GradientTransformation):
        raise TypeError(
            f"{transform}({tx!r}): expected a transformation of Optax, such as "
            f"optax.adam(1e-3), not a {type(tx).__name__}."
        )


def check_integer_types(grids: ParamGrids, reason: str) -> None:
    """Checks that all params have the levels of an integer type.

    Args:
        grids: The grids.
        reason: Why they must, for the message.

    Raises:
        ValueError: A param has another type.
    """
    for name, how in grids.hows.items():
        if not numerics.is_integer_qtype(how.qtype):
            raise ValueError(
                f"{grids.transform}: {name!r} is quantized to "
                f"{numerics.qtype_name(how.qtype)}, and {reason}. Give it a plan or a "
                "mapping of the params with integer types."
            )


def check_params(transform: str, params: Any) -> None:
    """Checks that ``update`` was given the params.

    Raises:
        ValueError: It was not.
    """
    if params is None:
        raise ValueError(
            f"{transform} needs the params: give them to update, as in "
            "tx.update(updates, state, params)."
        )
