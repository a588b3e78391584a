"""What an evaluation carries in the place of an array: an input not made yet.

A weight that is fake-quantized where it is used, or one that is stored quantized: the
evaluator passes it through the traced function, into the bodies of loops and branches,
and asks for the array that it stands for only where an equation needs that.
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax import lax

from qwix_train.core.operands import with_sharding

CONSTRAINT = "sharding_constraint"
"""The primitive of `jax.lax.with_sharding_constraint`."""


class Carried(abc.ABC):
    """What an evaluation carries in the place of an array.

    It holds arrays of its own, which are what enters the body of a `scan` or `remat`,
    and becomes one array where an equation has no other way to read it.
    """

    follows = False
    """Whether equations that read it are first offered to `apply`."""

    @property
    @abc.abstractmethod
    def value(self) -> Any:
        """The array that it stands for."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of that array."""
        return self.value.shape

    @property
    @abc.abstractmethod
    def arrays(self) -> tuple[Any, ...]:
        """The arrays that it holds."""

    @abc.abstractmethod
    def inside(self, arrays: Sequence[Any]) -> Carried:
        """The same, within a body that receives its arrays as `arrays`."""

    @property
    @abc.abstractmethod
    def returned(self) -> Any:
        """What a function returns that hands it on as it came."""

    @abc.abstractmethod
    def sliced(self) -> tuple[Sequence[Any], Callable[..., Carried]] | None:
        """How a `scan` iterates over it.

        Returns:
          The arrays to iterate over along axis 0, and what makes one iteration's
          value of their slices; None if the array that it stands for must be used.
        """

    def apply(
        self,
        primitive: str,
        params: Mapping[str, Any],
        operands: Sequence[Any],
        run: Callable[..., list[Any]],
    ) -> list[Any] | None:
        """The results of an equation without bodies that reads this.

        Args:
          primitive: the name of its primitive.
          params: its parameters.
          operands: its operands; at least one is a `Carried` that `follows`.
          run: the equation itself, on arrays.

        Returns:
          The results, arrays or `Carried`; None to run the equation on arrays.
        """
        del primitive, params, operands, run
        return None

    def read_by(self, primitive: str) -> None:  # noqa: B027
        """Called before an equation of a primitive reads the array itself."""

    def constrained(self, sharding: Any) -> Any:
        """The same under a sharding constraint."""
        return with_sharding(self.value, sharding)


def value_of(value: Any) -> Any:
    """The array that a value of an evaluation stands for, which may be that array."""
    return value.value if isinstance(value, Carried) else value


def read(value: Any, primitive: str) -> Any:
    """The array that a value stands for, read for an equation of a primitive."""
    if isinstance(value, Carried):
        value.read_by(primitive)
    return value_of(value)


def arrays_of(value: Any) -> tuple[Any, ...]:
    """The arrays that a value of an evaluation holds."""
    return value.arrays if isinstance(value, Carried) else (value,)


def inside(value: Any, arrays: Sequence[Any]) -> Any:
    """The same value, within a body that receives its arrays as `arrays`."""
    return value.inside(arrays) if isinstance(value, Carried) else arrays[0]


def slices(value: Any) -> tuple[Sequence[Any], Callable[..., Any]]:
    """How a `scan` iterates over a value; over an array where there is no other way."""
    cut = value.sliced() if isinstance(value, Carried) else None
    return ((value_of(value),), lambda slice_: slice_) if cut is None else cut


def constrained(value: Any, sharding: Any) -> Any:
    """A value under a sharding constraint."""
    if isinstance(value, Carried):
        return value.constrained(sharding)
    return with_sharding(value, sharding)


def results_of(
    primitive: str,
    params: Mapping[str, Any],
    operands: Sequence[Any],
    run: Callable[..., list[Any]],
) -> list[Any]:
    """The results of an equation without bodies, whatever its operands are.

    Args:
      primitive: the name of its primitive.
      params: its parameters.
      operands: arrays, and what an evaluation carries for some.
      run: runs the equation on arrays.
    """
    followed = [x for x in operands if isinstance(x, Carried) and x.follows]
    if followed:
        results = followed[0].apply(primitive, params, operands, run)
        if results is not None:
            return results
    for operand in followed:
        operand.read_by(primitive)
    return run(*map(value_of, operands))


def unpacked(
    values: Sequence[Any],
) -> tuple[list[Any], Callable[[Sequence[Any]], list[Any]]]:
    """The arrays that values hold, and what makes such values of other arrays.

    Args:
      values: arrays, and `Carried`s.
    """
    held = list(map(arrays_of, values))
    counts = [len(group) for group in held]
    # A derivative rule may keep `restore` for longer than the trace: it holds shapes in
    # the place of the arrays, which would leak.
    likes = [
        x.inside([jax.ShapeDtypeStruct(a.shape, a.dtype) for a in group])
        if isinstance(x, Carried)
        else None
        for x, group in zip(values, held, strict=True)
    ]

    def restore(arrays):
        rest = iter(arrays)
        groups = [[next(rest) for _ in range(count)] for count in counts]
        return [
            group[0] if like is None else like.inside(group)
            for like, group in zip(likes, groups, strict=True)
        ]

    return [array for group in held for array in group], restore


class Deferred(Carried):
    """An input that a transform applies to, as late as possible.

    A fake-quantized weight is made where it is first used: inside the body of a
    `remat`, so that it is not kept for the backward pass, and once per iteration of a
    `scan` over stacked layers, so that only one layer's is alive; but outside a loop
    whose every iteration reads the whole of it.

    Attributes:
      array: the untransformed input.
      transform: what to apply to it, and to the others.
      per_iteration: what to apply to one slice of each along axis 0, where that gives
        a slice of the transformed whole; None where it does not.
      others: more arrays that the transform takes.
    """

    def __init__(
        self,
        array: Any,
        transform: Callable[..., Any],
        per_iteration: Callable[..., Any] | None = None,
        others: Sequence[Any] = (),
    ):
        self.array = array
        self.transform = transform
        self.per_iteration = per_iteration
        self.others: tuple[Any, ...] = tuple(others)

    @functools.cached_property
    def value(self) -> Any:
        """The transformed input."""
        return self.transform(*self.arrays)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the input."""
        return self.array.shape

    @property
    def arrays(self) -> tuple[Any, ...]:
        """The untransformed input, and the others."""
        return (self.array, *self.others)

    def inside(self, arrays: Sequence[Any]) -> Deferred:
        """The same input, within a body."""
        array, *others = arrays
        return Deferred(array, self.transform, self.per_iteration, others)

    @property
    def returned(self) -> Any:
        """The untransformed input: a model that returns its params returns those."""
        return self.array

    def apply(
        self,
        primitive: str,
        params: Mapping[str, Any],
        operands: Sequence[Any],
        run: Callable[..., list[Any]],
    ) -> list[Any] | None:
        """See `Carried.apply`: a constraint is on the transformed input as a whole.

        XLA would take it for one on the last steps of the transform, too, and gather
        what these read, such as a scale that is as large as the array by then.
        """
        if primitive != CONSTRAINT:
            return None
        return run(lax.optimization_barrier(self.value))

    def constrained(self, sharding: Any) -> Any:
        """See `Carried.constrained`, and `apply`."""
        return with_sharding(lax.optimization_barrier(self.value), sharding)

    def sliced(self) -> tuple[Sequence[Any], Callable[..., Carried]] | None:
        """Slices of the input, if there is a transform for those."""
        change = self.per_iteration
        if change is None:
            return None
        return self.arrays, lambda slice_, *rest: Deferred(slice_, change, None, rest)
