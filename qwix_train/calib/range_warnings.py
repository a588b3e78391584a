"""Warnings of static ranges that are unlikely to fit the data."""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from qwix_train.files import processes
from qwix_train.observers.statistics import Statistics, per_layer, range_width
from qwix_train.planning import table as plan_table

# From this ratio of the widest batch to the range on, most large values are clipped.
# With batches of a few examples such a batch is not rare, so the ratio is lower. From
# the third ratio, of the widest batch to the narrowest, on, one range fits neither.
_CLIPPED, _CLIPPED_IF_SMALL, _SPREAD = 2.0, 4 / 3, 16.0
_FEW_EXAMPLES = 4
_SHOWN = 4


def warn_of_ranges(
    found: Iterable[tuple[str, Statistics, Mapping[str, Any], tuple[int, ...] | None]],
) -> None:
    """Warns of ranges far below what was seen, and of batches that differ much.

    Observers that collect all data clip on purpose, so there is no warning of them.

    Args:
        found: For each range its name, the statistics and their state, and the shape of
            the activation, or None if that is not known.

    Warns:
        UserWarning: Once for all ranges, with their names.
    """
    clipped, spread = [], []
    few = False
    for name, statistics, state, shape in found:
        if "widest" not in state:
            continue
        widest, narrowest = (processes.whole(state[k]) for k in ("widest", "narrowest"))
        calibration = per_layer(statistics.calibration, state)(state)
        width = processes.whole(range_width(calibration))
        # The channel with the largest values: those that hold little do not matter.
        at = np.unravel_index(np.argmax(widest), widest.shape)
        if not widest[at] > 0:
            continue
        is_few = shape is not None and _examples(state, shape) < _FEW_EXAMPLES
        limit = _CLIPPED_IF_SMALL if is_few else _CLIPPED
        if widest[at] >= limit * width[at]:
            few |= is_few
            clipped.append(f"{name} (range {width[at]:.3g}, seen {widest[at]:.3g})")
        elif widest[at] >= _SPREAD * narrowest[at]:
            spread.append(f"{name} (from {narrowest[at]:.3g} to {widest[at]:.3g})")
    messages = []
    if clipped:
        small = " The batches have only a few examples, so this is not rare."
        messages.append(
            f"{len(clipped)} static ranges are far below what was seen, and clip it: "
            f"{plan_table.some(clipped, _SHOWN)}.{small if few else ''} Take "
            "act_averaging='minmax' for ranges that hold every batch, "
            "act_observer='mse', or larger batches."
        )
    if spread:
        messages.append(
            f"{len(spread)} static ranges are of batches that differ much: "
            f"{plan_table.some(spread, _SHOWN)}. With one range, most of these batches "
            "use few codes. Dynamic ranges (act_static_scale=False) follow each batch."
        )
    if messages:
        messages.append("See docs/static_ranges.md.")
        warnings.warn(" ".join(messages), stacklevel=3)


def _examples(state: Mapping[str, Any], shape: tuple[int, ...]) -> float:
    """Returns the mean length of the first axis of batches."""
    if "mean_size" not in state or len(shape) < 2 or shape[0] == 0:
        return np.inf
    sizes = processes.whole(state["mean_size"])
    layers = np.ndim(state["count"])
    in_batch = sizes.reshape(*sizes.shape[:layers], -1).sum(-1).max()
    return float(in_batch) / max(np.prod(shape[1:]), 1)
