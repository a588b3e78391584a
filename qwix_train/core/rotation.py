"""Orthogonal changes of basis, in which an array is quantized.

    y = x @ w = (x @ R) @ (R.T @ w)

A product is the same if its operands are rotated along what it contracts. A rotation is
named by text, such as ``name,64``, and `core.rotations` lists the classes.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import ClassVar, Self

import jax


@dataclasses.dataclass(frozen=True)
class Rotation(abc.ABC):
    """An orthogonal change of basis along one axis.

    Attributes:
      name: its name.
      form: how it is written.
      axis: the axis.
    """

    name: ClassVar[str]
    form: ClassVar[str]
    axis: int

    @classmethod
    @abc.abstractmethod
    def parse(cls, numbers: tuple[int, ...], axis: int, length: int | None) -> Self:
        """The rotation that numbers behind its name ask for.

        Args:
          numbers: the numbers.
          axis: the axis.
          length: the length of the axis; None if it is not known yet.

        Raises:
          ValueError: if the numbers are wrong, or do not fit the axis.
        """

    @abc.abstractmethod
    def apply(self, x: jax.Array) -> jax.Array:
        """An array in the rotated basis, in its dtype."""

    @abc.abstractmethod
    def undo(self, x: jax.Array) -> jax.Array:
        """An array of the rotated basis in that of before, in its dtype."""

    def at(self, axis: int) -> Self:
        """The same along another axis."""
        return dataclasses.replace(self, axis=axis)
