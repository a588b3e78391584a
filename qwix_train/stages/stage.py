"""What a stage is, and how stages apply to an operand or to a param."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import jax

from qwix_train.trace.analyze import Op
from qwix_train.trace.carried import Carried, Deferred


class At(NamedTuple):
    """Where an operand is.

    Attributes:
      op: the operation.
      side: which of its operands it is.
      operands: all of its operands, before any stage.
    """

    op: Op
    side: int
    operands: Sequence[Any]


class Stage(abc.ABC):
    """What happens to an operand before an operation, or to a param.

    A stage is a pytree (a `flax.struct.dataclass`). Its arrays are its leaves: for an
    operation inside of a scan over layers they have one leading axis for each such
    scan, and `apply` finds those of its layer. Two stages are equal if their other
    fields are, and they hold the same arrays. It knows no mode.

    Attributes:
      exact: whether the model computes the same with it, as with a rotation of both
        operands of a product.
      takes_carried: whether it takes what is carried for an array, too.
    """

    exact: ClassVar[bool] = False
    takes_carried: ClassVar[bool] = False

    @abc.abstractmethod
    def apply(self, x: Any, at: At | None = None) -> Any:
        """What takes the place of an array.

        Args:
          x: the array.
          at: the operand that it is; None if it is a param.
        """

    def of_slice(self) -> Stage | None:
        """The stage for one slice of a param along axis 0, with the same arrays.

        Returns:
          None if the slices of the result are not the results for slices.
        """
        return None


class ParamStage(abc.ABC):
    """What happens to a param, and gives more than an array that is made when used.

    Attributes:
      exact: see `Stage`.
    """

    exact: ClassVar[bool] = False

    @abc.abstractmethod
    def on_param(self, value: Any) -> Any:
        """What stands for the param.

        Args:
          value: what stands for it so far: an array, or a `Carried`.
        """


class Constant:
    """An array that is the same for all layers, as a field that is not a leaf."""

    def __init__(self, value: Any):
        self.value = value


def applied(stages: Sequence[Stage], x: Any, at: At | None = None) -> Any:
    """What stages make of an array, one after the other."""
    for stage in stages:
        x = stage.apply(x, at)
    return x


def of_slice(stages: Sequence[Stage]) -> tuple[Stage, ...] | None:
    """The stages for one slice along axis 0; None if one has no such."""
    slices = [stage.of_slice() for stage in stages]
    return None if None in slices else tuple(slices)  # type: ignore[return-value]


def on_param(stages: Sequence[Stage | ParamStage], value: Any) -> Any:
    """What stands for a param with stages.

    Args:
      stages: the stages.
      value: the param: an array, or what is carried for one.
    """
    plain: list[Stage] = []
    for stage in stages:
        if isinstance(stage, Stage):
            plain.append(stage)
        else:
            value = stage.on_param(_deferred(plain, value))
            plain = []
    return _deferred(plain, value)


def _deferred(stages: Sequence[Stage], value: Any) -> Any:
    """A param that stages apply to where it is used."""
    if not stages:
        return value
    if isinstance(value, Carried):
        raise TypeError(
            f"{type(stages[0]).__name__} applies to an array, and the param is a "
            f"{type(value).__name__}: put the stage before the one that makes it."
        )

    def change(stages: Sequence[Stage]) -> Callable[..., Any]:
        structure = jax.tree.structure(tuple(stages))

        def transform(x, *arrays):
            return applied(jax.tree.unflatten(structure, arrays), x)

        return transform

    slices = of_slice(stages)
    per_slice = None if slices is None else change(slices)
    return Deferred(value, change(stages), per_slice, jax.tree.leaves(tuple(stages)))
