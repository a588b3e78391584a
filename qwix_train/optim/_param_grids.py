"""The grids that params are quantized to, found by their paths.

A param that ``how`` quantizes is rounded to ``level * scale``, where a level is a code
minus the zero point.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from qwix_train.core import calibration, numerics, scaling, tiling
from qwix_train.core.grid import Grid
from qwix_train.core.how import (
    HowToQuantize,
    is_learned,
    parse_calibration_method,
)
from qwix_train.optim import _paths
from qwix_train.planning.plan import Plan


def grid(array: jax.Array, how: HowToQuantize) -> Grid:
    """Returns the grid that ``how`` rounds an array to."""
    found = calibration.calibrate(array, how)
    scale, zero_point = calibration.compute_scale_zero_point(found, how.qtype)
    return Grid(scale, zero_point, how.qtype)


def extremes(
    array: jax.Array, how: HowToQuantize
) -> tuple[jax.Array, jax.Array] | None:
    """Returns the lowest and the highest value that the range comes from.

    Each group of elements that shares a scale has its own. For ``absmax`` they are plus
    and minus the largest magnitude. None for other methods than ``absmax`` and
    ``minmax``, whose ranges come from no single element.
    """
    method, _ = parse_calibration_method(how.calibration_method)
    if method not in ("absmax", "minmax"):
        return None
    how = dataclasses.replace(how, calibration_method=method)
    found = calibration.calibrate(array, how)
    return calibration.range_ends(found)


def levels(array: jax.Array, grid: Grid) -> jax.Array:
    """Returns the nearest level of each element, in float32 (float64 for float64)."""
    y = scaling.scaled_values(array, grid.scale, grid.zero_point)
    codes = numerics.round_to_level(y, grid.qtype, array.dtype)
    return _less_zero_point(codes, grid)


def clipped_scaled_values(array: jax.Array, grid: Grid) -> jax.Array:
    """Returns each element in units of the scale, cut to the codes; see `levels`."""
    low, high = grid.codes
    return jnp.clip(
        scaling.scaled_values(array, grid.scale, grid.zero_point), low, high
    )


def nearest_levels(x: jax.Array, grid: Grid) -> jax.Array:
    """Returns the level nearest to each number; numbers are in units of the scale."""
    zero = grid.zero_point
    if zero is not None:
        x = tiling.elementwise(lambda x, zero: x + zero, x, zero.astype(x.dtype))
    return _less_zero_point(numerics.round_to_level(x, grid.qtype, x.dtype), grid)


def values(levels: jax.Array, grid: Grid) -> jax.Array:
    """Returns what levels stand for, in the dtype of the scale."""
    return scaling.rescaled_values(levels, grid.scale, None)


def spread(tiled: jax.Array, array: jax.Array) -> jax.Array:
    """Returns the value of each tile, repeated for each element of an array."""
    return tiling.elementwise(lambda x, t: jnp.broadcast_to(t, x.shape), array, tiled)


def _less_zero_point(codes: jax.Array, grid: Grid) -> jax.Array:
    zero = grid.zero_point
    if zero is None:
        return codes
    return tiling.elementwise(lambda x, zero: x - zero, codes, zero.astype(codes.dtype))


class ParamGrids:
    """How each param of a tree is quantized.

    Args:
        transform: The name of the transformation, for messages.
        plan: A `Plan`, or a mapping from the pattern of a path to a `HowToQuantize`.

    Raises:
        TypeError: ``plan`` is neither of these.
        ValueError: It quantizes no param, or a pattern is no regular expression.
    """

    def __init__(self, transform: str, plan: Plan | Mapping[str, HowToQuantize]):
        self.transform = transform
        self.patterns = not isinstance(plan, Plan)
        if isinstance(plan, Plan):
            self.shapes = {
                "/".join(path): param.shape for path, param in plan.params.items()
            }
            self.hows = {
                "/".join(path): param.how
                for path, param in plan.params.items()
                if param.how is not None
            }
        else:
            self.hows = _checked_patterns(transform, plan)
        if not self.hows:
            raise ValueError(f"{transform}: the plan quantizes no param.")

    def of(self, params: Any) -> list[HowToQuantize | None]:
        """Returns how each leaf of a tree of params is quantized; None if it is not.

        Raises:
            ValueError: No param is quantized, a pattern matches none, the scale of a
                param is learned, a param is rotated, or does not fit its ``how``.
        """
        names = jax.tree.leaves(_paths.param_paths(params))
        used: set[str] = set()
        hows = []
        for name, param in zip(names, jax.tree.leaves(params), strict=True):
            how, key = self._find(name)
            if how is not None:
                used.add(key)
                self._check(name, key, param, how)
            hows.append(how)
        # A plan is of the whole model, and may list params that are not trained.
        unused = [key for key in self.hows if key not in used]
        if names and unused and (self.patterns or not used):
            raise ValueError(
                f"{self.transform}: the plan quantizes {_paths.listed(unused)}, which "
                "is the whole path of no param. The params are "
                f"{_paths.listed(names)}."
            )
        return hows

    def initial(
        self, params: Any, of_param: Callable[..., Any], fields: int
    ) -> list[Any]:
        """Returns what a state holds at first: for each field a tree like the params.

        Args:
            params: The params.
            of_param: ``of_param(param, how)`` gives the fields of a quantized param.
                Others have none.
            fields: The number of fields.
        """
        leaves, structure = jax.tree.flatten(params)
        masked = (optax.MaskedNode(),) * fields
        pairs = zip(leaves, self.of(params), strict=True)
        columns = [masked if how is None else of_param(p, how) for p, how in pairs]
        return _trees(structure, columns, fields)

    def update(
        self, updates: Any, params: Any, held: Sequence[Any], of_param: Callable
    ) -> tuple[Any, list[Any]]:
        """Returns the updates and what the state holds, changed where it is quantized.

        Args:
            updates: The updates.
            params: The params.
            held: For each field of the state a tree, as `initial` gives them.
            of_param: ``of_param(update, param, how, fields)`` gives the new update of
                a quantized param, and its new fields.
        """
        leaves, structure = jax.tree.flatten(updates)
        trees = [structure.flatten_up_to(tree) for tree in held]
        new = [
            (u, column) if how is None else of_param(u, p, how, column)
            for u, p, how, *column in zip(
                leaves, jax.tree.leaves(params), self.of(params), *trees, strict=True
            )
        ]
        columns = [column for _, column in new]
        updates = structure.unflatten([u for u, _ in new])
        return updates, _trees(structure, columns, len(trees))

    def _find(self, name: str) -> tuple[HowToQuantize | None, str]:
        if not self.patterns:
            return self.hows.get(name), name
        for pattern, how in self.hows.items():
            if re.fullmatch(pattern, name):
                return how, pattern
        return None, ""

    def _check(self, name: str, key: str, param: Any, how: HowToQuantize) -> None:
        if not numerics.is_quantizable(param.dtype):
            raise ValueError(
                f"{self.transform}: the param {name!r} is of dtype {param.dtype}, and "
                "only floats have a grid to be rounded to."
            )
        if is_learned(how.calibration_method):
            raise ValueError(
                f"{self.transform}: the scale of the param {name!r} is learned "
                f"(calibration_method={how.calibration_method!r}), so its grid is not "
                "one that can be found from the param. Give it rules with another "
                "method, such as absmax."
            )
        if how.rotation is not None:
            raise ValueError(
                f"{self.transform}: the param {name!r} is quantized in a rotated basis "
                f"(rotation={how.rotation.name!r}), and its grid is not one of the "
                "param's own elements. Give it rules without rotation."
            )
        shape = tuple(param.shape)
        if not self.patterns and shape != tuple(self.shapes[key]):
            raise ValueError(
                f"{self.transform}: the param {name!r} has the shape {shape}, and in "
                f"the plan {tuple(self.shapes[key])}: give the plan of this model."
            )
        try:
            how.scale_shape(shape)
        except ValueError as error:
            raise ValueError(f"{self.transform}: the param {name!r}: {error}") from None


def _trees(structure: Any, columns: Sequence[Any], fields: int) -> list[Any]:
    """Returns a tree for each field, which has the field of each param."""
    rows = zip(*columns, strict=True) if columns else ((),) * fields
    return [structure.unflatten(row) for row in rows]


def _checked_patterns(transform: str, plan: Any) -> dict[str, HowToQuantize]:
    if not isinstance(plan, Mapping):
        raise TypeError(
            f"{transform}(plan=...): expected a Plan, as qwix_train.plan makes it, or "
            "a mapping from the patterns of paths to HowToQuantize, not "
            f"{type(plan).__name__}."
        )
    for pattern, how in plan.items():
        if not isinstance(pattern, str) or not isinstance(how, HowToQuantize):
            raise TypeError(
                f"{transform}(plan=...): a mapping is from patterns, strings, to "
                f"HowToQuantize; got {pattern!r}: {how!r}."
            )
        _paths.check_pattern(f"{transform}(plan=...)", pattern)
    return dict(plan)
