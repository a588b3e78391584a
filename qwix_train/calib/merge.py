"""Statistics of several hosts or runs, combined."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from qwix_train.calib.calibrator import Calibrator
from qwix_train.calib.observe import Observed, Stats


def merge_stats(observed: Observed | Calibrator, a: Stats, b: Stats) -> dict[str, Any]:
    """Returns the statistics of the batches of both, as if one host had seen them all.

    Histograms (percentile, mse, entropy) and ranges with the averaging `minmax` are
    exactly those that the data would give in one pass, cut into batches in whatever
    way. With `mean`, each batch counts by its values, and with `ema` and `last`, those
    of ``b`` come after those of ``a``; there, the halves of a batch are two batches.

    Statistics are trees of arrays: they may come out of a checkpoint, or from other
    processes by `jax.experimental.multihost_utils.process_allgather`. A batch that is
    one sharded array needs no merging.

    Args:
        observed: What collected them, after it has seen its step: a function made by
            `observe`, called or initialized before, or a `Calibrator` whose step ran.
        a: Statistics: those of `observe`, or `Calibrator.state`.
        b: The others. A range that only one of the two has is taken as it is.

    Raises:
        ValueError: There are statistics of a range that the step does not have, or of
            another shape.

    >>> from flax import linen as nn
    >>> from jax import numpy as jnp
    >>> from qwix_train import QuantizationRule
    >>> from qwix_train.calib import observe
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
    merged = {}
    for name in {**a, **b}:
        if name not in ranges:
            known = ", ".join(map(repr, ranges)) or "none; has the step been traced?"
            raise ValueError(
                f"There are statistics of {name!r}, a range that the step does not "
                f"have. Those it has: {known}"
            )
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
        merge = ranges[name].statistics.merge
        for _ in range(np.ndim(a[name]["count"])):  # layers
            merge = jax.vmap(merge)
        merged[name] = merge(a[name], b[name])
    return merged
