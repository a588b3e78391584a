"""Turns static ranges that are given into the scales of a quantized model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from jax.core import Tracer

from qwix_train.core.how import needs_zero_point
from qwix_train.core.qarray import QArray, WithAux
from qwix_train.planning import static_range
from qwix_train.planning.leaves import Path, range_of, scale_path
from qwix_train.planning.quant_stats import is_of_gradient, states_in
from qwix_train.values import stored


def given_ranges(quant_stats: Any, flat: Mapping[Path, Any]) -> dict[Path, Any]:
    """The scales and zero points that collected ranges give."""
    ranges: dict[Path, Any] = {}
    for path, statistics in states_in(stored.unbox(quant_stats or {})).items():
        if is_of_gradient(path):  # in training alone
            continue
        # Params may stand in a collection, and the statistics in one of their own.
        places = [path, ("params", *path)]
        path = next((p for p in places if scale_path(p) in flat), path)
        scale = flat.get(scale_path(path))
        if not isinstance(scale, WithAux):
            raise ValueError(
                f"There are quant_stats for {'/'.join(path)!r}, and no rule of the "
                "quantized model gives that a static range. Set act_static_scale=True "
                "in the rule of its op, or leave it out of quant_stats."
            )
        ranges |= _range(path, statistics, scale)
    return ranges


def _stacked_as(
    wanted: tuple[int, ...], params: dict[Path, Any], num_layers: int
) -> dict[Path, Any]:
    """Ranges in the shape that the quantized model has.

    Layers come first, and are moved to the axis of the model. A range that all members
    of a `vmap` share is repeated for each of them.
    """
    ndim = len(wanted)
    for axis, length in enumerate(wanted):
        inner = wanted[:axis] + wanted[axis + 1 :]
        if all(x.shape == inner for x in jax.tree.leaves(params)):
            return jax.tree.map(
                lambda x, axis=axis, n=length: jnp.stack([x] * n, axis), params
            )
    if num_layers != 1 or any(np.ndim(x) != ndim for x in jax.tree.leaves(params)):
        return params
    for axis in range(ndim):
        moved = jax.tree.map(lambda x, axis=axis: jnp.moveaxis(x, 0, axis), params)
        if all(x.shape == wanted for x in jax.tree.leaves(moved)):
            return moved
    return params


def _range(
    path: Path, statistics: Mapping[str, Any], scale: WithAux
) -> dict[Path, Any]:
    """The scale and zero point of one range."""
    method = scale.how.calibration_method
    wanted = ["max", "min"] if needs_zero_point(method) else ["absmax"]
    given = sorted(end for _, end in static_range.ends_in(statistics))
    if not given and len(statistics) > 1:
        raise ValueError(
            f"The quant_stats of {'/'.join(path)!r} have {sorted(statistics)}, which "
            "are the data of an observer, and no range. Find the ranges with "
            "qwix_train.ranges(state, rules)."
        )
    if given != wanted:
        raise ValueError(
            f"The quant_stats of {'/'.join(path)!r} have the range {given}, and the "
            f"calibration method {method!r} takes {wanted}. Collect them by the rules "
            "of this model."
        )
    params = static_range.from_statistics(path, statistics, scale.how)
    params = _stacked_as(scale.shape, params, jnp.ndim(statistics["count"]))
    shape = params[scale_path(path)].shape
    # More than one entry along an axis is a finer range than was asked for.
    if len(shape) != len(scale.shape) or any(
        had > 1 and had != has for had, has in zip(scale.shape, shape, strict=True)
    ):
        raise ValueError(
            f"The quant_stats of {'/'.join(path)!r} give a range of shape {shape}; in "
            f"the quantized model it has {scale.shape}. Collect them by the rules of "
            "this model."
        )
    return params


def check_complete(
    names: Collection[Path], ranges: Mapping[Path, Any], target: Mapping[Path, Any]
) -> None:
    """Complains of ranges that are missing next to the params of a whole model."""
    quantized = {path: x for path, x in target.items() if stored.is_quantized(x)}
    weights = {path for path, x in quantized.items() if isinstance(x.array, QArray)}
    if not weights or not weights.issubset(names):
        return  # a part of a model, whose ranges may come with another
    missing = [
        "/".join(range_of(path))
        for path, x in quantized.items()
        if path not in weights and path not in ranges and not _is_known(x.array)
    ]
    if missing:
        raise ValueError(
            f"{len(missing)} activations have a static range that is not known, among "
            f"them {missing[0]!r}. Pass the ranges as quant_stats: those of a "
            "Calibrator, of a train state, or of the QuantStat variables of an NNX "
            "model. Learned scales come with the params that have them."
        )


def _is_known(scale: Any) -> bool:
    """Whether the scale of a quantized model has a value already."""
    if isinstance(scale, Tracer):
        return True  # which cannot be told here
    return isinstance(scale, jax.Array) and not bool(jnp.isnan(scale).any())
