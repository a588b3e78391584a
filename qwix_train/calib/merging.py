"""Merges statistics of ranges that were collected apart into those of one pass."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any, Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils

from qwix_train.calib.observe import Stats, has_batches
from qwix_train.core.records import to_record
from qwix_train.files import processes
from qwix_train.observers.statistics import per_layer


class HasRanges(Protocol):
    """An object that collects statistics of arrays that it can name."""

    @property
    def ranges(self) -> Mapping[str, Any]:
        """What is collected, by name."""
        ...


def merge_stats(observed: HasRanges, a: Stats, b: Stats) -> dict[str, Any]:
    """Returns the statistics of the batches of both, as if one host had seen them all.

    Histograms (percentile, mse, entropy) and ranges with the averaging `minmax` are
    exactly those of one pass over the data, however it is cut into batches. With
    `mean`, each batch counts by its number of values. With `ema` and `last`, the
    batches of ``b`` come after those of ``a``. With these three, the halves of a batch
    count as two batches.

    Statistics are trees of arrays, so they may come from a checkpoint.
    `merge_processes` merges those of other processes. A batch that is one sharded array
    needs no merging.

    Args:
        observed: The object that collected them: a function made by `observe` that was
            called or initialized, a `Calibrator` whose step ran, or a
            `ptq.WeightMethod` such as `ptq.Gptq`.
        a: Statistics: those of `observe`, or `Calibrator.state`.
        b: Other statistics. A range that only one of the two has is taken as it is.

    Raises:
        ValueError: There are statistics of a range that the step does not have, or of
            another shape.

    >>> import jax
    >>> from flax import linen as nn
    >>> from jax import numpy as jnp
    >>> from qwix_train import QuantizationRule
    >>> from qwix_train.calib import merge_stats, observe
    >>> rule = QuantizationRule(
    ...     weight_qtype='int8', act_qtype='int8', act_static_scale=True,
    ...     act_averaging='minmax',
    ... )
    >>> model, x = nn.Dense(2), jnp.arange(12.).reshape(3, 4)
    >>> params = model.init(jax.random.key(0), x)
    >>> observed = observe(model.apply, [rule])
    >>> one, _ = observed({}, params, x[:2])
    >>> other, _ = observed({}, params, x[2:])
    >>> merged = merge_stats(observed, one, other)
    >>> merged['dot_general0_lhs']['extreme_of_absmax'].item()
    11.0
    """
    ranges = observed.ranges
    _check_known(ranges, {**a, **b})
    merged = {}
    for name in {**a, **b}:
        if name not in a or name not in b:
            merged[name] = a[name] if name in a else b[name]
            continue
        shapes = [jax.tree.map(np.shape, dict(stats[name])) for stats in (a, b)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"The statistics of {name!r} do not fit together: they are of the "
                f"shapes {shapes[0]} and {shapes[1]}. Were they collected by the same "
                "rules?"
            )
        merge = per_layer(ranges[name].statistics.merge, a[name])
        merged[name] = merge(a[name], b[name])
    return merged


def merge_processes(observed: HasRanges, stats: Stats) -> dict[str, Any]:
    """Returns the statistics of the batches of all processes, in each of them.

    For loops in which each process has its own batches, which no other process sees.
    The result is that of `merge_stats` over the processes, in their order. All
    processes must call this. With one process it only checks. If the batch is one array
    that is sharded over processes, the statistics are those of the whole batch, and
    need no merging.

    Args:
        observed: As in `merge_stats`.
        stats: The statistics that this process has collected.

    Raises:
        ValueError: In a process that has no batch that counts for one of the ranges,
            because its shard was empty or not finite; that has statistics of a range
            that the step does not have; or that has other ranges than the first
            process, as with other rules or another model.
        RuntimeError: In all other processes then. The message names that process.

    >>> import jax
    >>> from flax import linen as nn
    >>> from jax import numpy as jnp
    >>> from qwix_train import QuantizationRule
    >>> from qwix_train.calib import Calibrator, merge_processes
    >>> rule = QuantizationRule(
    ...     weight_qtype='int8', act_qtype='int8', act_static_scale=True
    ... )
    >>> model, x = nn.Dense(2), jnp.ones((3, 4))
    >>> calibrator = Calibrator([rule])
    >>> eval_step = calibrator.wrap(jax.jit(model.apply))
    >>> out = eval_step(model.init(jax.random.key(0), x), x)
    >>> calibrator.state = merge_processes(calibrator, calibrator.state)
    >>> calibrator.quant_stats['dot_general0_lhs']['count'].item()
    1
    """
    processes.together(lambda: _check_batches(observed, stats))
    processes.check_same("The ranges", _lines(observed, stats))
    if jax.process_count() == 1:
        return dict(stats)
    gathered = multihost_utils.process_allgather(processes.whole(dict(stats)))
    parts = [
        jax.tree.map(lambda x, index=index: x[index], gathered)
        for index in range(jax.process_count())
    ]
    return functools.reduce(functools.partial(merge_stats, observed), parts)


def _lines(observed: HasRanges, stats: Stats) -> Iterator[str]:
    """What must be equal for statistics to be merged, a line for each range."""
    for name in sorted(stats):
        statistics = observed.ranges[name].statistics
        parts = [statistics.observer, statistics.averaging]
        # Other objects print where they are in memory.
        known = [x if is_dataclass(x) else type(x).__name__ for x in parts]
        how = to_record(statistics.how)
        yield f"{name}: {known}, {how}, {jax.tree.map(np.shape, dict(stats[name]))}"


def _check_known(ranges: Mapping[str, Any], names: Iterable[str]) -> None:
    for name in names:
        if name not in ranges:
            known = ", ".join(map(repr, ranges)) or "none; has the step been traced?"
            raise ValueError(
                f"There are statistics of {name!r}, a range that the step does not "
                f"have. Those it has: {known}"
            )


def _check_batches(observed: HasRanges, stats: Stats) -> None:
    _check_known(observed.ranges, stats)
    empty = [x for x in observed.ranges if x not in stats or not has_batches(stats[x])]
    if empty or not stats:
        names = ", ".join(map(repr, empty[:3])) + (", ..." if len(empty) > 3 else "")
        raise ValueError(
            f"In process {jax.process_index()} no batch counts for {names or 'any'}: "
            "its shard of the data is empty, every batch was not finite, or the step "
            "did not reach the op."
        )
