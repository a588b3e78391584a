"""Statistics of an activation: what is measured in a batch, how batches combine.

There are two kinds of observers. A `RangeObserver` gives a range for each batch; an
averaging (see `averaging`) combines those of all batches. A `StreamObserver` collects
the data of all batches, and finds one range for them in the end.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp

from qwix_train.calib.averaging import Averaging, parse_averaging
from qwix_train.calib.named_observers import parse_observer
from qwix_train.core.calibration import check_quantizable
from qwix_train.core.how import HowToQuantize
from qwix_train.core.operands import is_explicitly_sharded

State: TypeAlias = dict[str, jax.Array]
"""What was collected so far: arrays by name."""


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
        """
        ...


@runtime_checkable
class StreamObserver(Protocol):
    """What collects all batches; a class of yours with these methods will do.

    It is hashable, and its methods are pure functions that may be traced. The state is
    a flat dict of arrays, of shapes that stay the same; the names ``count`` and
    ``skipped`` are taken.
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
) -> "Statistics":
    """Makes the statistics of an activation.

    Args:
        observer: What is measured: one of
            `named_observers.OBSERVERS`, or an object with the methods of
            `RangeObserver` or `StreamObserver`.
        averaging: How batches combine: one of `averaging.AVERAGINGS`, or an object
            with the methods of `Averaging`. Observers that collect all data
            (percentile, mse, entropy) have no use for one, and take the default only.
        how: Which elements share a range, and the type of the codes.
        batch_axes: Axes that each index has a range of its own along, the mean of which
            is the range of the batch. None for one range of the whole batch.

    Raises:
        ValueError: A name is unknown, or the parts do not go together.

    >>> how = HowToQuantize(qtype='int8')
    >>> statistics = make_statistics('absmax', how=how)
    >>> state = statistics.init((2, 3), jnp.float32)
    >>> for x in jnp.full((2, 3), 1.), jnp.full((2, 3), -3.), jnp.full((2, 3), jnp.nan):
    ...     state = statistics.update(state, x)
    >>> {key: value.item() for key, value in state.items()}
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
        if batch_axes is not None:
            observer = _MeanOverAxes(observer, tuple(batch_axes))
        return Statistics(observer, averaging, how)
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
    return Statistics(observer, None, how)


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Collects the range of an activation over batches. Made by `make_statistics`.

    The methods are pure functions. A state is a flat dict of arrays: the int32 scalars
    ``count``, the batches collected, and ``skipped``, the batches that were empty or
    held NaN or infinity and are not in any other number; and what the averaging or the
    observer keeps. A state for stacked layers has one more axis in front, and goes
    through `jax.vmap`.

    Attributes:
        observer: What is measured.
        averaging: How batches combine; None for an observer that collects all data.
        how: Which elements share a range, and the type of the codes.
    """

    observer: Observer
    averaging: Averaging | None
    how: HowToQuantize

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
        if isinstance(self.observer, RangeObserver):
            assert self.averaging is not None
            state = self.averaging.init(jax.eval_shape(self._observe, x))
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
            For a `RangeObserver`, ``{'absmax': ...}`` or ``{'min': ..., 'max': ...}``,
            float32, NaN if the batch is empty. For a `StreamObserver`, the batch.
        """
        x = jax.lax.stop_gradient(x)
        if not isinstance(self.observer, RangeObserver):
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
        if isinstance(self.observer, RangeObserver):
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
        skipped = a["skipped"] + b["skipped"]
        a, b = (
            {key: value for key, value in state.items() if key != "skipped"}
            for state in (a, b)
        )
        if isinstance(self.observer, RangeObserver):
            assert self.averaging is not None
            merged = self.averaging.merge(a, b)
        else:
            merged = {**self.observer.merge(a, b), "count": a["count"] + b["count"]}
        return {**merged, "skipped": skipped}

    def calibration(self, state: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Returns the range of all batches: NaN if there were none.

        Returns:
            ``{'absmax': ...}`` or ``{'min': ..., 'max': ...}``, in the shape of the
            scale and float32.
        """
        state = dict(state)
        if isinstance(self.observer, RangeObserver):
            assert self.averaging is not None
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
        old = {key: value for key, value in state.items() if key != "skipped"}
        if isinstance(self.observer, RangeObserver):
            assert self.averaging is not None
            valid = _all_finite(*measured.values())
            new = self.averaging.update(old, measured)
        else:
            valid = _all_finite(measured)
            new = self.observer.update(old, measured, self.how)
            new["count"] = old["count"] + 1
        new = {key: jnp.where(valid, new[key], old[key]) for key in old}
        return {**new, "skipped": state["skipped"] + ~valid}

    def _observe(self, x: jax.Array) -> dict[str, jax.Array]:
        assert isinstance(self.observer, RangeObserver)
        calibration = self.observer.observe(x, self.how)
        return {key: jnp.asarray(v, jnp.float32) for key, v in calibration.items()}


@dataclasses.dataclass(frozen=True)
class _MeanOverAxes:
    """The mean, over some axes, of the ranges that each index along them has."""

    observer: RangeObserver
    axes: tuple[int, ...]

    def observe(self, x: jax.Array, how: HowToQuantize) -> Mapping[str, Any]:
        if any(not -x.ndim <= axis < x.ndim for axis in self.axes):
            raise ValueError(
                f"act_batch_axes={self.axes} does not fit an activation of shape "
                f"{x.shape}."
            )
        axes = tuple(sorted({axis % x.ndim for axis in self.axes}))
        channelwise = tuple(sorted({*how.channelwise_axes, *axes}))
        each = dataclasses.replace(how, channelwise_axes=channelwise)
        return {
            key: value.mean(axes, keepdims=True)
            for key, value in self.observer.observe(x, each).items()
        }


def _unsharded(function: Any, x: jax.Array) -> Any:
    """A function of an array whose results are on all devices of its explicit mesh."""
    if not is_explicitly_sharded(x):
        return function
    mesh = jax.typeof(x).sharding.mesh
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    axes = tuple(a for a, kind in kinds if kind == jax.sharding.AxisType.Explicit)
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.sharding.auto_axes(function, axes=axes, out_sharding=everywhere)


def _all_finite(*arrays: jax.Array) -> jax.Array:
    checks = [jnp.isfinite(a.astype(jnp.float32)).all() for a in arrays]
    return jnp.stack(checks).all()
