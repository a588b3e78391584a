"""The quantization error of several ranges of an activation, from one pass over data.

While the data pass, the ranges are not known yet. So an `ErrorObserver` collects a
histogram with bins far narrower than the steps of a type. In the end `measure` finds
the ranges, and integrates the error of each over the bins, piece by piece between the
borders of the codes. The error of dynamic ranges is summed while the data pass.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qwix_train.core import tiling
from qwix_train.core.calibration import calibrate, is_inside, range_ends
from qwix_train.core.fake_quant import fake_quant
from qwix_train.core.how import HowToQuantize
from qwix_train.observers import State, clipping, histogram
from qwix_train.observers.named import HistogramObserver
from qwix_train.observers.statistics import Statistics

MANTISSA_BITS = 11
"""With so many bits, the widest bins in a range are 1/16 of a step of int8."""

_SUMS = ("elements", "error", "outside")

_SHARED_BITS = 3
"""With more than 2 to this power groups, each has fewer bins, to bound the memory."""


class Measured(NamedTuple):
    """The error of one method.

    Attributes:
        error: The sum of squared errors.
        outside: The number of elements outside of the range.
        range: ``{'absmax': ...}`` or ``{'min': ..., 'max': ...}``; empty if each batch
            has its own range.
    """

    error: jax.Array
    outside: jax.Array
    range: Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class ErrorObserver:
    """Collects what gives the errors of several methods. A `StreamObserver`.

    For one range it keeps about 650 KiB: 10 bytes for each of 65,536 bins. With many
    channels, it keeps at most 40 KiB for each.

    Attributes:
        methods: The statistics that find a range, each with its name.
        dynamic: How the activation is quantized with a range for each batch.
    """

    methods: tuple[tuple[str, Statistics], ...]
    dynamic: HowToQuantize

    def init(self, shape: tuple[int, ...], how: HowToQuantize) -> State:
        """Returns the state before any batch."""
        groups = jax.eval_shape(
            lambda x: jnp.max(*_tiles(x, how), keepdims=True),
            jax.ShapeDtypeStruct(shape, jnp.float32),
        ).shape
        many = max(0, (math.prod(groups) - 1).bit_length() - _SHARED_BITS)
        bits = max(MANTISSA_BITS - many, histogram.MANTISSA_BITS)
        parts = {"bins": histogram.init(groups, bits, positions=True)}
        for name, statistics in self._averaged():
            parts[name] = statistics.init(shape, jnp.float32)
        parts["dynamic"] = {key: jnp.zeros((), jnp.float32) for key in _SUMS}
        return _flat(parts)

    def update(
        self,
        state: State,
        x: jax.Array,
        how: HowToQuantize,
        counts: jax.Array | None = None,
    ) -> State:
        """Adds a batch.

        Args:
            state: The state before.
            x: The batch.
            how: How the activation is quantized with a range that was collected.
            counts: Which elements count; the others must be 0. None if all count.
        """
        x, old = x.astype(jnp.float32), _parts(state)
        which = None if counts is None else _tiles(counts, how)[0]
        parts = {"bins": histogram.update(old["bins"], _tiles(x, how)[0], which)}
        # Each method leaves elements that are not finite out of its range, as in use.
        given = x if counts is None else jnp.where(counts, x, jnp.nan)
        for name, statistics in self._averaged():
            parts[name] = statistics.update(old[name], given)
        error = jnp.square(fake_quant(x, self.dynamic) - x)
        outside = ~is_inside(x, range_ends(calibrate(x, self.dynamic)))
        sums = {
            "error": _sum(error),
            "outside": _sum(outside.astype(jnp.float32)),
            "elements": jnp.asarray(x.size, jnp.float32)
            if counts is None
            else _sum(counts.astype(jnp.float32)),
        }
        parts["dynamic"] = {key: old["dynamic"][key] + sums[key] for key in _SUMS}
        return _flat(parts)

    def merge(self, a: State, b: State) -> State:
        """Returns the state of the batches of both."""
        first, second = _parts(a), _parts(b)
        parts = {"bins": histogram.merge(first["bins"], second["bins"])}
        for name, statistics in self._averaged():
            parts[name] = statistics.merge(first[name], second[name])
        pairs = first["dynamic"], second["dynamic"]
        parts["dynamic"] = jax.tree.map(jnp.add, *pairs)
        return _flat(parts)

    def calibration(self, state: State, how: HowToQuantize) -> dict[str, jax.Array]:
        """Returns the range that holds all data."""
        del how
        return {"absmax": histogram.absmax(_parts(state)["bins"])}

    def _averaged(self) -> list[tuple[str, Statistics]]:
        """The methods that keep something besides the histogram, which all share."""
        return [
            (name, statistics)
            for name, statistics in self.methods
            if not isinstance(statistics.observer, HistogramObserver)
        ]


def decibels(signal: float, noise: float) -> float:
    """Returns the ratio of two energies in dB.

    It is infinite without an error, and NaN without a signal.
    """
    if not signal:
        return math.nan
    return 10 * math.log10(signal / noise) if noise else math.inf


@functools.partial(jax.jit, static_argnames=("methods", "how"))
def measure(
    state: State, methods: tuple[tuple[str, Statistics], ...], how: HowToQuantize
) -> tuple[jax.Array, jax.Array, dict[str, Measured]]:
    """Returns the number of elements, their sum of squares, and each method's error.

    Args:
        state: What an `ErrorObserver` collected, in one layer.
        methods: The methods of that observer.
        how: How the activation is quantized with a range that was collected.

    Returns:
        The number of elements and the sum of their squares, both float32 of shape (),
        and what was measured, by the name of the method. ``'dynamic'`` is the method in
        which each batch has its own range.
    """
    parts = _parts(state)
    bins = histogram.signed_bins(parts["bins"])
    usual = histogram.coarse(parts["bins"])
    low, high = bins.lower, bins.upper
    squares = (low * low + low * high + high * high) / 3
    squares = jnp.where(bins.masses > 0, squares, 0)
    measured = {}
    for name, statistics in methods:
        observer: Any = statistics.observer
        if isinstance(statistics.observer, HistogramObserver):
            found: Any = observer.calibration(usual, how)
        else:
            found = statistics.calibration(parts[name])
        by_group = {k: v.reshape(bins.masses.shape[:-1]) for k, v in found.items()}
        error = clipping.squared_error(bins, by_group, how.qtype)
        measured[name] = Measured(_sum(error), _sum(_outside(bins, by_group)), found)
    dynamic = parts["dynamic"]
    measured["dynamic"] = Measured(dynamic["error"], dynamic["outside"], {})
    return dynamic["elements"], _sum(bins.masses * squares), measured


def _outside(bins: histogram.Bins, found: Mapping[str, jax.Array]) -> jax.Array:
    """Returns the number of elements outside of the range, for each group.

    If an end of the range lies in a bin, a share of the elements of the bin counts.
    """
    low, high = (end[..., None] for end in range_ends(found))
    width = bins.upper - bins.lower
    wide = jnp.where(width > 0, width, 1)
    share = jnp.clip((bins.upper - high) / wide, 0, 1)
    share += jnp.clip((low - bins.lower) / wide, 0, 1)
    point = (bins.lower > high) | (bins.upper < low)
    return jnp.sum(bins.masses * jnp.where(width > 0, share, point), -1)


def _tiles(x: jax.Array, how: HowToQuantize) -> tuple[jax.Array, tuple[int, ...]]:
    """Returns an array split in tiles, and the axes that share a scale.

    The last tile of an axis is padded with zeros, which have no error.
    """
    counts = how.scale_shape(x.shape)
    return tiling.split_tiled_axes(tiling.pad_to_tiles(x, counts), counts)


def _sum(x: jax.Array) -> jax.Array:
    # One axis at a time: a float32 sum of millions of numbers would lose the last ones.
    while x.ndim:
        x = jnp.sum(x, -1)
    return x


def _flat(parts: Mapping[str, Mapping[str, jax.Array]]) -> State:
    """One flat dictionary, which is what statistics keep."""
    return {
        f"{name}/{key}": v for name, part in parts.items() for key, v in part.items()
    }


def _parts(state: Mapping[str, jax.Array]) -> dict[str, State]:
    """What `_flat` was given."""
    parts: dict[str, State] = {}
    for path, value in state.items():
        name, _, key = path.rpartition("/")
        parts.setdefault(name, {})[key] = value
    return parts
