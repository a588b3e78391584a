"""The observers that have names.

`CalibrationMethod` gives a range for each batch. `Percentile`, `Mse` and `Entropy`
collect the same histogram, so each of them can find its range in a state that another
one has collected.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from qwix_train.core import calibration as core
from qwix_train.core import numerics, tiling
from qwix_train.core.how import (
    CALIBRATION_METHODS,
    HowToQuantize,
    parse_calibration_method,
)
from qwix_train.observers import State, clipping, histogram

OBSERVERS = {
    **CALIBRATION_METHODS,
    "percentile": "percentile,p[,asymmetric]",
    "mse": "mse[,asymmetric]",
    "entropy": "entropy",
}
"""Each observer and how it is written."""


def parse_observer(
    text: str,
) -> "CalibrationMethod | Percentile | Mse | Entropy":
    """Makes the observer that a text names.

    Args:
        text: As `OBSERVERS` writes it, in any case.

    Raises:
        ValueError: The name is unknown, or an argument is wrong.

    >>> parse_observer('percentile,99.99')
    Percentile(percentile=99.99, symmetric=True)
    >>> parse_observer('rms,3')
    CalibrationMethod(method='rms,3')
    """
    name, *parts = (part.strip() for part in text.lower().split(","))
    if name not in OBSERVERS:
        forms = "; ".join(OBSERVERS.values())
        raise ValueError(f"Unknown observer {text!r}; choose from: {forms}.")
    if name in CALIBRATION_METHODS:
        return CalibrationMethod(text)
    error = ValueError(f"Bad observer {text!r}. Write {OBSERVERS[name]}.")
    symmetric = "asymmetric" not in parts[-1:] or name == "entropy"
    parts = parts if symmetric else parts[:-1]
    if name == "percentile":
        try:
            (percentile,) = (float(part) for part in parts)
        except ValueError:
            raise error from None
        return Percentile(percentile, symmetric)
    if parts:
        raise error
    return Mse(symmetric) if name == "mse" else Entropy()


@dataclasses.dataclass(frozen=True)
class CalibrationMethod:
    """The range that a calibration method finds in each batch.

    Attributes:
        method: One of the methods of `HowToQuantize`: ``absmax[,factor]``,
            ``minmax[,factor]``, ``rms,factor``, ``fixed,bound``, ``fixed,low,high``.

    Raises:
        ValueError: The method is not one of these.
    """

    method: str

    def __post_init__(self) -> None:
        HowToQuantize(qtype="int8", calibration_method=self.method)

    def observe(
        self, x: jax.Array, how: HowToQuantize, counts: jax.Array | None = None
    ) -> dict[str, Any]:
        """Returns the range of a batch, with `calibrate`.

        Args:
            x: The batch.
            how: Which elements share a range; the type.
            counts: Which elements count, the others being 0; None for all.

        Raises:
            ValueError: The method needs zero points, and the type has none.
        """
        how = dataclasses.replace(how, calibration_method=self.method)
        found = core.calibrate(x, how)
        if counts is None or parse_calibration_method(self.method)[0] != "rms":
            return found  # Every other range holds 0 in any case.
        groups = how.scale_shape(x.shape)
        tiles = tiling.pad_to_tiles(counts.astype(jnp.float32), groups)
        tiles, axes = tiling.split_tiled_axes(tiles, groups)
        share = tiles.mean(axes).reshape(groups)
        factor = jnp.where(share > 0, 1 / jnp.sqrt(jnp.maximum(share, 1e-12)), 0)
        return {key: value * factor for key, value in found.items()}


class HistogramObserver:
    """What the observers that read a histogram have in common.

    Attributes:
        symmetric: Whether the range is centered at zero.
    """

    symmetric: bool = True

    def init(self, shape: tuple[int, ...], how: HowToQuantize) -> State:
        """Returns an empty histogram for each range.

        Raises:
            ValueError: Ranges are per tile, or the type is not one for the observer.
        """
        self._check_qtype(how.qtype)
        if how.tiled_axes:
            raise ValueError(
                f"The observer {self} takes ranges per tensor or per channel, not per "
                f"tile (tiled_axes={how.tiled_axes}). For tiles, choose from: "
                f"{'; '.join(CALIBRATION_METHODS.values())}."
            )
        return histogram.init(how.scale_shape(shape))

    def update(
        self,
        state: State,
        x: jax.Array,
        how: HowToQuantize,
        counts: jax.Array | None = None,
    ) -> State:
        """Adds a batch to the histogram, or those of its elements that count."""
        del how
        return histogram.update(state, x, counts)

    def merge(self, a: State, b: State) -> State:
        """Adds the histograms."""
        return histogram.merge(a, b)

    def _check_qtype(self, qtype: numerics.QType) -> None:
        """Raises a ValueError for a type that the range cannot be of."""
        if not self.symmetric:
            numerics.asymmetric_bound(qtype)


@dataclasses.dataclass(frozen=True)
class Percentile(HistogramObserver):
    """The range that holds a percentage of all data, see `clipping.percentile_range`.

    Attributes:
        percentile: Above 50, at most 100.
        symmetric: Whether it is a percentage of the magnitudes. Otherwise, the range
            is from the percentile ``100 - p`` to the percentile ``p``.

    Raises:
        ValueError: The percentile is out of its bounds.
    """

    percentile: float
    symmetric: bool = True

    def __post_init__(self) -> None:
        if not 50 < self.percentile <= 100:
            raise ValueError(
                f"The percentile is {self.percentile!r}, but must be above 50 and at "
                "most 100, such as in 'percentile,99.99'."
            )

    def calibration(self, state: State, how: HowToQuantize) -> dict[str, jax.Array]:
        """Returns the range."""
        return clipping.percentile_range(
            state, self.percentile, symmetric=self.symmetric
        )


@dataclasses.dataclass(frozen=True)
class Mse(HistogramObserver):
    """The range with the least mean squared error, see `clipping.mse_range`.

    Attributes:
        symmetric: Whether the range is centered at zero.
    """

    symmetric: bool = True

    def calibration(self, state: State, how: HowToQuantize) -> dict[str, jax.Array]:
        """Returns the range."""
        return clipping.mse_range(state, how.qtype, symmetric=self.symmetric)


@dataclasses.dataclass(frozen=True)
class Entropy(HistogramObserver):
    """The range with the least KL divergence, see `clipping.entropy_range`."""

    def calibration(self, state: State, how: HowToQuantize) -> dict[str, jax.Array]:
        """Returns the range."""
        return clipping.entropy_range(state, how.qtype)

    def _check_qtype(self, qtype: numerics.QType) -> None:
        clipping.check_entropy_qtype(qtype)
