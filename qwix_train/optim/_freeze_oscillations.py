"""Freezing of weights that oscillate between two levels of quantization."""

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from qwix_train.core import numerics, tiling
from qwix_train.core.how import HowToQuantize, needs_zero_point
from qwix_train.optim import _param_grids
from qwix_train.planning import Plan


class FreezeOscillationsState(NamedTuple):
    """State of `freeze_oscillations`.

    All but the count are trees like the params, with `optax.MaskedNode` where a param
    is not quantized.

    Attributes:
        count: The number of updates so far.
        frequency: The moving average of the number of oscillations in an update.
        average: The moving average of the level.
        level: The level, a code less its zero point; that of a frozen weight stays.
        direction: The sign of the last change of the level; 0 if there was none.
        frozen: Whether the weight is frozen.
    """

    count: Any  # shape=(), dtype=jnp.int32
    frequency: Any  # dtype=jnp.float32
    average: Any  # dtype=jnp.float32
    level: Any  # dtype=jnp.int8, or jnp.int16 where there are zero points
    direction: Any  # dtype=jnp.int8
    frozen: Any  # dtype=jnp.bool_


def freeze_oscillations(
    plan: Plan | Mapping[str, HowToQuantize],
    threshold: float | optax.Schedule,
    momentum: float = 0.01,
) -> optax.GradientTransformationExtraArgs:
    r"""Freezes the weights that oscillate between two levels of their grid.

    A weight oscillates where its level :math:`w_{int}` changes, in the direction
    opposite to that of its last change. With :math:`o^t` 1 for weights that do so in
    update :math:`t` and 0 for others, and with the momentum :math:`m`,

    .. math::
        f^t &= m \, o^t + (1 - m) f^{t-1} \\
        b^t &= b^{t-1} \lor (f^t > f_{th}) \\
        w_{int}^t &\leftarrow \mathrm{round}(\psi^{t-1})
            \quad \text{where a weight is frozen by this update} \\
        \psi^t &= m \, w_{int}^t + (1 - m) \psi^{t-1}

    where :math:`f` starts with 0, :math:`\psi` with the levels of the initial params,
    and :math:`b` is what is frozen: forever, and at the level where it was most of the
    time.

    Put it last, after the learning rate:
    ``optax.chain(optax.adam(1e-3), freeze_oscillations(plan, 0.02))``. It is for a step
    that is quantization-aware, with the rules of the plan, and exporting with them
    gives the frozen levels (but see Note). In the paper the threshold :math:`f_{th}`
    shrinks along a cosine; its code lets it shrink from 0.1 to 0.01, which is
    ``optax.cosine_decay_schedule(0.1, steps, alpha=0.1)``. A threshold below :math:`m`
    freezes at the first oscillation.

    Note:
        What is frozen is the level, as in the paper, so the value follows the scale.
        A frozen weight gets updates of 0 as long as it is rounded to its level; if it
        is not, because the range of its group changed or because it was frozen at
        another level, it is put on the value of its level. The weight that the range
        comes from (the largest magnitude with ``absmax``, the lowest and the highest
        value with ``minmax``) keeps its value instead, and no other is put beyond it.

    Args:
        plan: What quantizes the params, by path: a `Plan`, as `qwix_train.plan` makes
            it, whose params are a superset of those that are trained; or a mapping
            from patterns to `HowToQuantize`. A pattern is a regular expression for the
            whole path of a param, as in ``'Dense_0/kernel'``; the first that matches
            decides. The types are integers; rounding is to nearest. Other params get
            their updates as they are.
        threshold: :math:`f_{th}`; not negative, or a schedule of the number of
            updates. With ``jnp.inf`` nothing is frozen, for a start.
        momentum: :math:`m`; positive, at most 1.

    Returns:
        The transformation; its state is a `FreezeOscillationsState`, which takes 11
        bytes for each element of a quantized param (12 with zero points). Updates keep
        their dtype.

    Raises:
        TypeError: ``plan`` is neither a plan nor such a mapping.
        ValueError: ``plan`` quantizes nothing, or to a type that is no integer, or
            ``threshold`` or ``momentum`` is out of its range; or, from ``init`` and
            ``update``, ``plan`` is not for these params; or from ``update``, there are
            no params.

    Examples:
        >>> how = HowToQuantize(qtype='int4', calibration_method='fixed,-7.5,7.5')
        >>> params = {'w': jnp.array([0.6, 3.1])}
        >>> tx = freeze_oscillations({'w': how}, threshold=0.7, momentum=0.5)
        >>> state = tx.init(params)
        >>> for step in -0.2, 0.2, -0.2:
        ...     updates = {'w': jnp.array([step, step])}
        ...     updates, state = tx.update(updates, state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> state.frequency['w'].tolist(), state.frozen['w'].tolist()
        ([0.75, 0.0], [True, False])
        >>> [round(x, 3) for x in params['w'].tolist()]
        [1.0, 2.9]

    References:
        Nagel et al., `Overcoming Oscillations in Quantization-Aware Training
        <https://arxiv.org/abs/2203.11086>`_, 2022, sections 4.1 and 4.3, algorithm 1
    """
    grids = _param_grids.ParamGrids("freeze_oscillations", plan)
    _check(grids, threshold, momentum)

    def init_fn(params: Any) -> FreezeOscillationsState:
        leaves, structure = jax.tree.flatten(params)
        masked = (optax.MaskedNode(),) * 5
        pairs = zip(leaves, grids.of(params), strict=True)
        columns = [masked if how is None else _initial(p, how) for p, how in pairs]
        return _state(jnp.zeros((), jnp.int32), structure, columns)

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        if params is None:
            raise ValueError(
                "freeze_oscillations needs the params: give them to update, "
                "as in tx.update(updates, state, params)."
            )
        highest = threshold(state.count) if callable(threshold) else threshold
        leaves, structure = jax.tree.flatten(updates)
        hows = grids.of(params)
        columns = zip(*map(structure.flatten_up_to, state[1:]), strict=True)
        new_leaves, new_columns = [], []
        for u, p, how, column in zip(
            leaves, jax.tree.leaves(params), hows, columns, strict=True
        ):
            if how is not None:
                u, column = _update(u, p, how, column, highest, momentum)
            new_leaves.append(u)
            new_columns.append(column)
        count = optax.safe_increment(state.count)
        return structure.unflatten(new_leaves), _state(count, structure, new_columns)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _state(count: Any, structure: Any, columns: Any) -> FreezeOscillationsState:
    """Returns the state of what is there for each param: the fields of its column."""
    fields = zip(*columns, strict=True) if columns else ((),) * 5
    return FreezeOscillationsState(count, *map(structure.unflatten, fields))


# Compiled as a whole: eager calls would else compile each operation for each shape.
@functools.partial(jax.jit, static_argnames="how")
def _initial(param: jax.Array, how: HowToQuantize) -> tuple[jax.Array, ...]:
    level = _param_grids.levels(param, _param_grids.grid(param, how))
    # Levels with a zero point are up to 255 from 0.
    wide = needs_zero_point(how.calibration_method)
    zeros = jnp.zeros_like(level, jnp.float32)
    return (
        zeros,
        level.astype(jnp.float32),
        level.astype(jnp.int16 if wide else jnp.int8),
        zeros.astype(jnp.int8),
        zeros.astype(jnp.bool_),
    )


@functools.partial(jax.jit, static_argnames="how")
def _update(
    update: jax.Array,
    param: jax.Array,
    how: HowToQuantize,
    column: Any,
    threshold: Any,
    momentum: Any,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    frequency, average, level, direction, frozen = column
    update = jnp.where(frozen, 0, update)
    # As `optax.apply_updates` adds; the state is that of the new params.
    new = numerics.round_to_dtype(param + update, param.dtype).astype(param.dtype)
    grid = _param_grids.grid(new, how)
    reached = _param_grids.levels(new, grid).astype(jnp.float32)
    before = level.astype(jnp.float32)
    now = jnp.where(frozen, before, reached)

    turned = jnp.sign(now - before).astype(jnp.int8)
    oscillated = (turned * direction == -1).astype(jnp.float32)
    frequency = momentum * oscillated + (1 - momentum) * frequency
    direction = jnp.where(turned == 0, direction, turned)
    newly = (frequency > threshold) & ~frozen
    now = jnp.where(newly, _param_grids.nearest_levels(average, grid), now)
    average = momentum * now + (1 - momentum) * average
    frozen = frozen | newly

    target = _param_grids.values(now, grid)
    is_moved = frozen & (reached != now)
    extremes = _param_grids.extremes(new, how)
    if extremes is not None:
        # To move the weight that a range comes from would move the range, and so that
        # weight again in the next update: a frozen group would shrink to nothing.
        is_moved &= ~tiling.elementwise(_is_either, new, *extremes)
        target = tiling.elementwise(jnp.clip, target, *extremes)
    update = jnp.where(is_moved, (target - param).astype(update.dtype), update)
    column = (
        frequency.astype(jnp.float32),
        average.astype(jnp.float32),
        now.astype(level.dtype),
        direction,
        frozen,
    )
    return update, column


def _is_either(x: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    return (x == low) | (x == high)


def _check(grids: _param_grids.ParamGrids, threshold: Any, momentum: Any) -> None:
    for name, how in grids.hows.items():
        if not numerics.is_integer_qtype(how.qtype):
            raise ValueError(
                f"freeze_oscillations: {name!r} is quantized to "
                f"{numerics.qtype_name(how.qtype)}, and only integer codes can be "
                "frozen. Give it a plan or a mapping of the params with integer types."
            )
    is_number = isinstance(threshold, int | float)
    if is_number and (math.isnan(threshold) or threshold < 0):
        raise ValueError(
            f"freeze_oscillations(threshold={threshold!r}): it must not be negative."
        )
    if isinstance(momentum, int | float) and not 0 < momentum <= 1:
        raise ValueError(
            f"freeze_oscillations(momentum={momentum!r}): it must be positive, and at "
            "most 1."
        )
