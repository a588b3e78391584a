"""Statistics of an activation: what is measured in a batch, how batches combine.

There are two kinds of observers. A `RangeObserver` gives a range for each batch; an
averaging (see `averaging`) combines those of all batches. A `StreamObserver` collects
the data of all batches, and finds one range for them in the end.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from qwix_train.core import tiling
from qwix_train.core.calibration import check_quantizable
from qwix_train.core.how import HowToQuantize
from qwix_train.core.operands import is_explicitly_sharded
from qwix_train.observers import State
from qwix_train.observers.averaging import Averaging, parse_averaging
from qwix_train.observers.named import parse_observer

LARGEST = 2.0**63
"""From this magnitude on a value counts as not finite.

float32 does not hold its square, so that nothing that a model makes of it is of use,
and the sum of some such ranges would be infinite for good.
"""

_BESIDE = ("skipped", "narrowest", "widest")


@runtime_checkable
class RangeObserver(Protocol):
    """What finds a range in each batch; a class of yours with this method will do.

    It is hashable, and its method is a pure function that may be traced.
    """

    def observe(self, x: jax.Array, how: HowToQuantize) -> Mapping[str, Any]:
        """Returns the range of a batch.

        Args:
            x: The batch, of a float dtype, not empty.
            how: Which elements share a range; the type.

        Returns:
            ``{'absmax': ...}``, or ``{'min': ..., 'max': ...}`` with
            ``min <= 0 <= max``, in the shape of the scale. If any of it is not finite,
            the batch is skipped.

        With rules that leave out what is not finite, a third argument says which
        elements of the batch count. The others are 0.
        """
        ...


@runtime_checkable
class StreamObserver(Protocol):
    """What collects all batches; a class of yours with these methods will do.

    It is hashable, and its methods are pure functions that may be traced. The state is
    a flat dict of arrays, of shapes that stay the same; the names ``count`` and
    ``skipped`` are taken. With rules that leave out what is not finite, `update` has a
    fourth argument, which says which elements count. The others are 0.
    """

    def init(self, shape: tuple[int, ...], how: HowToQuantize) -> State:
        """Returns the state before any batch, for activations of a shape."""
        ...

    def update(self, state: State, x: jax.Array, how: HowToQuantize) -> State:
        """Adds a batch, not empty; if it is not finite, the result is not used."""
        ...

    def merge(self, a: State, b: State) -> State:
        """Returns the state of the batches of both."""
        ...

    def calibration(self, state: State, how: HowToQuantize) -> dict[str, jax.Array]:
        """Returns the range of all batches, for a state that has some."""
        ...


Observer: TypeAlias = RangeObserver | StreamObserver


def make_statistics(
    observer: str | Observer,
    averaging: str | Averaging = "mean",
    *,
    how: HowToQuantize,
    batch_axes: Collection[int] | None = None,
    finite_only: bool = False,
) -> "Statistics":
    """Makes the statistics of an activation.

    Args:
        observer: What is measured: one of
            `named.OBSERVERS`, or an object with the methods of
            `RangeObserver` or `StreamObserver`.
        averaging: How batches combine: one of `averaging.AVERAGINGS`, or an object
            with the methods of `Averaging`. Observers that collect all data
            (percentile, mse, entropy) have no use for one, and take the default only.
        how: Which elements share a range, and the type of the codes.
        batch_axes: Axes that each index has a range of its own along, the mean of which
            is the range of the batch. None for one range of the whole batch.
        finite_only: Whether elements that are not finite are left out. Otherwise a
            batch that has any does not count.

    Raises:
        ValueError: A name is unknown, or the parts do not go together.

    >>> how = HowToQuantize(qtype='int8')
    >>> statistics = make_statistics('absmax', how=how)
    >>> state = statistics.init((2, 3), jnp.float32)
    >>> for x in jnp.full((2, 3), 1.), jnp.full((2, 3), -3.), jnp.full((2, 3), jnp.nan):
    ...     state = statistics.update(state, x)
    >>> {key: state[key].item() for key in ('count', 'sum_of_absmax', 'skipped')}
    {'count': 2, 'sum_of_absmax': 4.0, 'skipped': 1}
    >>> statistics.calibration(state)['absmax'].item()
    2.0
    """
    if isinstance(observer, str):
        observer = parse_observer(observer)
    elif not isinstance(observer, RangeObserver | StreamObserver):
        raise ValueError(
            f"The observer {observer!r} has neither the method of a RangeObserver, "
            "observe, nor those of a StreamObserver: init, update, merge, calibration."
        )
    if isinstance(observer, RangeObserver):
        if isinstance(averaging, str):
            averaging = parse_averaging(averaging)
        axes = () if batch_axes is None else tuple(batch_axes)
        return Statistics(observer, averaging, how, axes, finite_only)
    if batch_axes is not None:
        raise ValueError(
            f"The observer {observer} collects the data of all batches as a whole, so "
            f"act_batch_axes={tuple(batch_axes)} has no meaning. Leave it out."
        )
    if averaging != "mean":
        raise ValueError(
            f"The observer {observer} collects the data of all batches, so there is "
            f"nothing for the averaging {averaging!r} to combine. Leave it out."
        )
    return Statistics(observer, None, how, (), finite_only)


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Collects the range of an activation over batches. Made by `make_statistics`.

    The methods are pure functions. A state is a flat dict of arrays: the int32 scalars
    ``count``, the batches collected, and ``skipped``, the batches that were empty or
    held NaN, infinity or magnitudes from `LARGEST` on and are not in any other number;
    for a `RangeObserver` the ranges of the ``narrowest`` and the ``widest`` batch, as
    the widths of what shares a range; and what the averaging or the observer keeps. A
    state for stacked layers has one more axis in front, and goes through `jax.vmap`.

    Attributes:
        observer: What is measured: an `Observer`.
        averaging: How batches combine; None for an observer that collects all data.
        how: Which elements share a range, and the type of the codes.
        batch_axes: See `make_statistics`.
        finite_only: See `make_statistics`.
    """

    observer: Any
    averaging: Averaging | None
    how: HowToQuantize
    batch_axes: tuple[int, ...] = ()
    finite_only: bool = False

    @property
    def delayed(self) -> bool:
        """Whether training quantizes a batch by the range of those before it."""
        return bool(getattr(self.averaging, "delayed", False))

    def init(self, shape: tuple[int, ...], dtype: Any) -> State:
        """Returns the state before any batch.

        Args:
            shape: The shape of the activation. Axes that share a range may have other
                sizes in other batches.
            dtype: Its dtype; a float.

        Raises:
            ValueError: The dtype is not one to quantize, or the observer, the shape and
                the granularity do not go together.
        """
        x = jax.ShapeDtypeStruct(shape, dtype)
        jax.eval_shape(check_quantizable, x)
        if self.averaging is not None:
            of_shard = dataclasses.replace(self.how, axis_names=())
            alone = dataclasses.replace(self, how=of_shard)
            measured = dict(jax.eval_shape(alone._observe, x))
            size = measured.pop("size")
            state = self.averaging.init(measured)
            for name in ("narrowest", "widest"):
                state[name] = jnp.zeros(size.shape, jnp.float32)
        else:
            count = jnp.zeros((), jnp.int32)
            state = {"count": count, **self.observer.init(tuple(shape), self.how)}
        return {**state, "skipped": jnp.zeros((), jnp.int32)}

    def update(self, state: Mapping[str, jax.Array], x: jax.Array) -> State:
        """Adds a batch, or counts it as skipped.

        A batch is skipped as a whole if it is empty, or its range is not finite, in
        float32, for any group of elements that shares one. A ``fixed`` range does not
        look at the values, and skips only what is empty.

        Args:
            state: The state before.
            x: The batch; no gradient flows from it.

        Raises:
            ValueError: The batch does not fit the state.
        """
        return self.add(state, self.measure(x))

    def measure(self, x: jax.Array) -> Any:
        """Returns what `add` needs of a batch: its range, or for streams all of it.

        Args:
            x: The batch; no gradient flows from it.

        Returns:
            For a `RangeObserver`, ``{'absmax': ...}`` or ``{'min': ..., 'max': ...}``
            with the ``size`` of the batch, the number of values in each range; float32,
            NaN if the batch is empty. For a `StreamObserver`, the batch.
        """
        x = jax.lax.stop_gradient(x)
        if self.averaging is None:
            return x
        if x.size == 0:
            shape = tuple(max(n, 1) for n in x.shape)
            range_of = jax.eval_shape(
                self._observe, jax.ShapeDtypeStruct(shape, x.dtype)
            )
            return {
                key: jnp.full(v.shape, jnp.nan, v.dtype) for key, v in range_of.items()
            }
        return _unsharded(self._observe, x)(x)

    def add(self, state: Mapping[str, jax.Array], measured: Any) -> State:
        """Adds a batch that was measured; `update` is both in one.

        Args:
            state: The state before.
            measured: What `measure` gives of the batch.

        Raises:
            ValueError: The batch does not fit the state.
        """
        if self.averaging is not None:
            return self._add(dict(state), measured)
        if measured.size == 0:
            return {**state, "skipped": state["skipped"] + 1}
        return _unsharded(self._add, measured)(dict(state), measured)

    def merge(self, a: Mapping[str, jax.Array], b: Mapping[str, jax.Array]) -> State:
        """Returns the state of the batches of two states, such as those of two hosts.

        It equals the state that one host would have after all these batches. Where the
        order of batches matters (``ema``, ``last``), ``b`` comes after ``a``.

        Note that the halves of a batch, observed apart, are two batches. That makes no
        difference to histograms or the averaging ``minmax``; to a mean of maxima it
        does. An array that is sharded is observed as a whole.
        """
        beside = {"skipped": a["skipped"] + b["skipped"]}
        if "widest" in a:
            beside["widest"] = jnp.maximum(a["widest"], b["widest"])
            narrowest = jnp.minimum(a["narrowest"], b["narrowest"])
            narrowest = jnp.where(a["count"] > 0, narrowest, b["narrowest"])
            narrowest = jnp.where(b["count"] > 0, narrowest, a["narrowest"])
            beside["narrowest"] = narrowest
        a, b = (_without(state, _BESIDE) for state in (a, b))
        if self.averaging is not None:
            merged = self.averaging.merge(a, b)
        else:
            merged = {**self.observer.merge(a, b), "count": a["count"] + b["count"]}
        return {**merged, **beside}

    def calibration(self, state: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Returns the range of all batches: NaN if there were none.

        Returns:
            ``{'absmax': ...}`` or ``{'min': ..., 'max': ...}``, in the shape of the
            scale and float32.
        """
        state = dict(state)
        if self.averaging is not None:
            calibration = self.averaging.calibration(state)
        else:
            calibration = self.observer.calibration(state, self.how)
        known = state["count"] > 0
        return {key: jnp.where(known, v, jnp.nan) for key, v in calibration.items()}

    def quant_stats(self, state: Mapping[str, jax.Array]) -> State:
        """Returns the range in the layout that `quantize_params` reads.

        It is ``count``, and ``sum_of_absmax``, or ``sum_of_min`` and ``sum_of_max``:
        those of the averaging ``mean``, and a count of 1 (0 if there were no batches)
        and the range itself for all others.

        >>> how = HowToQuantize(qtype='int8')
        >>> statistics = make_statistics('absmax', 'last', how=how)
        >>> state = statistics.init((3,), jnp.float32)
        >>> for x in jnp.arange(3.), jnp.arange(3., 6.):
        ...     state = statistics.update(state, x)
        >>> {key: value.item() for key, value in statistics.quant_stats(state).items()}
        {'count': 1, 'sum_of_absmax': 5.0}
        """
        sums = {k: v for k, v in state.items() if k.startswith("sum_of_")}
        if sums:
            return {"count": state["count"], **sums}
        known = state["count"] > 0
        return {
            "count": jnp.minimum(state["count"], 1),
            **{
                f"sum_of_{key}": jnp.where(known, value, 0)
                for key, value in self.calibration(state).items()
            },
        }

    def _add(self, state: Mapping[str, jax.Array], measured: Any) -> State:
        old = _without(state, ("skipped",))
        if self.averaging is not None:
            new, valid = self._with_range(self.averaging, old, measured)
        else:
            counts = _counts_as_finite(measured)
            valid = counts.any() if self.finite_only else counts.all()
            given = self._counted(measured, self.how, counts)
            new = self.observer.update(old, *given)
            new["count"] = old["count"] + 1
        new = {key: jnp.where(valid, new[key], old[key]) for key in old}
        skipped = jnp.where(valid, 0, 1).astype(state["skipped"].dtype)
        return {**new, "skipped": state["skipped"] + skipped}

    def _counted(self, x: jax.Array, how: HowToQuantize, counts: Any) -> Any:
        """Returns what an observer is given of a batch."""
        if not self.finite_only:
            return x, how
        return jnp.where(counts, x, 0), how, counts

    def _with_range(
        self, averaging: Any, old: State, measured: Any
    ) -> tuple[State, jax.Array]:
        """Returns the state with the range of a batch, and whether that counts."""
        size = measured["size"]
        measured = _without(measured, ("size",))
        finite = [_counts_as_finite(end).all() for end in measured.values()]
        valid = jnp.stack([*finite, size.sum() > 0]).all()
        kept = _without(old, _BESIDE)
        sized = (size,) if getattr(averaging, "by_size", False) else ()
        new = averaging.update(kept, measured, *sized)
        if "widest" in old:
            width = range_width(measured)
            first = old["count"] == 0
            narrowest = jnp.minimum(old["narrowest"], width)
            new["narrowest"] = jnp.where(first, width, narrowest)
            new["widest"] = jnp.maximum(old["widest"], width)
        return new, valid

    def _observe(self, x: jax.Array) -> dict[str, jax.Array]:
        axes = self._checked_batch_axes(x)
        channelwise = tuple(sorted({*self.how.channelwise_axes, *axes}))
        how = dataclasses.replace(self.how, channelwise_axes=channelwise)
        counts = _counts_as_finite(x) if self.finite_only else None
        found = self.observer.observe(*self._counted(x, how, counts))
        found = {key: jnp.asarray(v, jnp.float32) for key, v in found.items()}
        shape = next(iter(found.values())).shape
        size = values_in_each(x.shape, shape, counts)
        if self.how.axis_names:
            size = size * jax.lax.axis_size(self.how.axis_names)
        if axes:
            # An index without any value has no range of its own.
            weights = (size > 0).astype(jnp.float32)
            weights /= jnp.maximum(weights.sum(axes, keepdims=True), 1)
            found = {
                key: (value * weights).sum(axes, keepdims=True)
                for key, value in found.items()
            }
            size = size.sum(axes, keepdims=True)
        return {**found, "size": size}

    def _checked_batch_axes(self, x: jax.Array) -> tuple[int, ...]:
        if any(not -x.ndim <= axis < x.ndim for axis in self.batch_axes):
            raise ValueError(
                f"act_batch_axes={self.batch_axes} does not fit an activation of shape "
                f"{x.shape}."
            )
        return tuple(sorted({axis % x.ndim for axis in self.batch_axes}))


def per_layer(
    function: Callable[..., Any], state: Mapping[str, Any]
) -> Callable[..., Any]:
    """A function of a state, for one in which the states of layers are stacked."""
    for _ in range(np.ndim(state["count"])):
        function = jax.vmap(function)
    return function


def in_layout_of_qwix(state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a state without what `qwix` does not keep: batches weigh the same."""
    return _without(state, (*_BESIDE, "mean_size"))


def range_width(calibration: Mapping[str, Any]) -> Any:
    """Returns how wide a range is: ``absmax``, or ``max - min``."""
    if "absmax" in calibration:
        return calibration["absmax"]
    return calibration["max"] - calibration["min"]


def values_in_each(
    shape: tuple[int, ...], groups: tuple[int, ...], counts: jax.Array | None = None
) -> jax.Array:
    """Returns how many values of an array share each range, float32.

    Args:
        shape: The shape of the array.
        groups: That of the scale.
        counts: Which elements count; None for all.
    """
    if counts is None:
        return jnp.full(groups, math.prod(shape) / math.prod(groups), jnp.float32)
    padded = tiling.pad_to_tiles(counts.astype(jnp.float32), groups)
    tiles, axes = tiling.split_tiled_axes(padded, groups)
    return tiles.sum(axes).reshape(groups)


def _unsharded(function: Any, x: jax.Array) -> Any:
    """A function of an array whose results are on all devices of its explicit mesh."""
    if not is_explicitly_sharded(x):
        return function
    mesh = jax.typeof(x).sharding.mesh
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    axes = tuple(a for a, kind in kinds if kind == jax.sharding.AxisType.Explicit)
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.sharding.auto_axes(function, axes=axes, out_sharding=everywhere)


def _counts_as_finite(x: jax.Array) -> jax.Array:
    return jnp.abs(x.astype(jnp.float32)) < LARGEST


def _without(state: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if key not in names}
