"""Freezing of weights that oscillate between two levels of quantization."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from qwix_train.core import numerics, tiling
from qwix_train.core.how import HowToQuantize
from qwix_train.optim import _arguments, _param_grids
from qwix_train.planning.plan import Plan


class FreezeOscillationsState(NamedTuple):
    """State of `freeze_oscillations`.

    All but the count are trees like the params, with `optax.MaskedNode` where a param
    is not quantized.

    Attributes:
        count: The number of updates so far.
        frequency: The moving average of the number of oscillations in an update.
        average: The moving average of the level.
        status: Level, direction and whether the weight is frozen, in one number: fewer
            arrays take less time to read and write.
    """

    count: Any  # shape=(), dtype=jnp.int32
    frequency: Any  # dtype=jnp.float32
    average: Any  # dtype=jnp.float32
    status: Any  # dtype=jnp.int16

    @property
    def level(self) -> Any:
        """The level: the code minus the zero point. That of a frozen weight stays.

        dtype=jnp.int16
        """
        return jax.tree.map(lambda x: _unpacked(x)[0], self.status)

    @property
    def direction(self) -> Any:
        """The sign of the last change of the level; 0 if there was none.

        dtype=jnp.int16
        """
        return jax.tree.map(lambda x: _unpacked(x)[1], self.status)

    @property
    def frozen(self) -> Any:
        """Whether the weight is frozen; dtype=jnp.bool_."""
        return jax.tree.map(lambda x: _unpacked(x)[2], self.status)


def freeze_oscillations(
    plan: Plan | Mapping[str, HowToQuantize],
    threshold: float | optax.Schedule,
    momentum: float = 0.01,
) -> optax.GradientTransformationExtraArgs:
    r"""Freezes the weights that oscillate between two levels of their grid.

    A weight oscillates in an update if its level :math:`w_{int}` changes in the
    direction opposite to that of its last change. Let :math:`o^t` be 1 for weights that
    oscillate in update :math:`t`, and 0 for others. With the momentum :math:`m`,

    .. math::
        f^t &= m \, o^t + (1 - m) f^{t-1} \\
        b^t &= b^{t-1} \lor (f^t > f_{th}) \\
        w_{int}^t &\leftarrow \mathrm{round}(\psi^{t-1})
            \quad \text{where a weight is frozen by this update} \\
        \psi^t &= m \, w_{int}^t + (1 - m) \psi^{t-1}

    where :math:`f` starts at 0, :math:`\psi` at the levels of the initial params, and
    :math:`b` says which weights are frozen. They stay frozen, each at the level where
    it was most of the time.

    Put it last, after the learning rate:
    ``optax.chain(optax.adam(1e-3), freeze_oscillations(plan, 0.02))``. The step must be
    quantization-aware, with the rules of the plan. An export with these rules has the
    frozen levels (but see Note). In the paper the threshold :math:`f_{th}` shrinks
    along a cosine. In its code it shrinks from 0.1 to 0.01, which is
    ``optax.cosine_decay_schedule(0.1, steps, alpha=0.1)``. A threshold below :math:`m`
    freezes a weight at its first oscillation.

    Note:
        The level is frozen, as in the paper, so the value follows the scale. A frozen
        weight gets updates of 0 as long as it rounds to its level. It may round to
        another one, because the range of its group changed or because it was frozen at
        another level. Then its update puts it on the value of its level. A weight that
        the range comes from (the largest magnitude with ``absmax``, the lowest and the
        highest value with ``minmax``) keeps its value instead, and no other weight is
        put beyond it.

    Args:
        plan: What quantizes the params, by path: a `Plan`, as `qwix_train.plan` makes
            it, whose params are a superset of those that are trained; or a mapping
            from patterns to `HowToQuantize`. A pattern is a regular expression for the
            whole path of a param, as in ``'Dense_0/kernel'``; the first that matches
            decides. The types are integers; rounding is to nearest. Other params get
            their updates as they are.
        threshold: :math:`f_{th}`: a number, not negative, or a schedule that takes the
            number of updates. With ``jnp.inf`` nothing is frozen.
        momentum: :math:`m`; positive, at most 1.

    Returns:
        The transformation; its state is a `FreezeOscillationsState`, which takes 10
        bytes for each element of a quantized param. Updates keep their dtype.

    Raises:
        TypeError: ``plan`` is neither a plan nor such a mapping, or ``threshold`` is
            neither a number nor a schedule.
        ValueError: ``plan`` quantizes nothing, or to a type that is not an integer, or
            ``threshold`` or ``momentum`` is out of its range; or, from ``init`` and
            ``update``, ``plan`` is not for these params; or from ``update``, there are
            no params.

    Examples:
        >>> import optax
        >>> from jax import numpy as jnp
        >>> from qwix_train import HowToQuantize
        >>> from qwix_train.optim import freeze_oscillations
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
        count = jnp.zeros((), jnp.int32)
        return FreezeOscillationsState(count, *grids.initial(params, _initial, 3))

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        _arguments.check_params("freeze_oscillations", params)
        highest = threshold(state.count) if callable(threshold) else threshold
        change = functools.partial(_update, threshold=highest, momentum=momentum)
        updates, held = grids.update(updates, params, state[1:], change)
        count = optax.safe_increment(state.count)
        return updates, FreezeOscillationsState(count, *held)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _packed(level: jax.Array, direction: jax.Array, frozen: jax.Array) -> jax.Array:
    level, direction = (x.astype(jnp.int16) for x in (level, direction))
    return level << 3 | frozen.astype(jnp.int16) << 2 | (direction + 1)


def _unpacked(status: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    return status >> 3, (status & 3) - 1, (status & 4) != 0


# Compiled as a whole: eager calls would compile each operation for each shape.
@functools.partial(jax.jit, static_argnames="how")
def _initial(param: jax.Array, how: HowToQuantize) -> tuple[jax.Array, ...]:
    level = _param_grids.levels(param, _param_grids.grid(param, how))
    zeros = jnp.zeros_like(level, jnp.float32)
    return (
        zeros,
        level.astype(jnp.float32),
        _packed(level, zeros, jnp.zeros_like(level, jnp.bool_)),
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
    # On a CPU, XLA computes each of the four results in a loop over the arrays. No loop
    # needs what one before it has overwritten, or large parts of what another computes:
    # copies and intermediate arrays would take most of the time.
    frequency, average, status = column
    before, direction, was_frozen = _unpacked(status)
    update = jnp.where(was_frozen, 0, update)
    # Added as `optax.apply_updates` adds, because the state is that of the new params.
    new = numerics.round_to_dtype(param + update, param.dtype).astype(param.dtype)
    grid = _param_grids.grid(new, how)
    reached = _param_grids.levels(new, grid).astype(status.dtype)

    turned = jnp.where(was_frozen, 0, jnp.sign(reached - before))
    oscillated = (turned * direction == -1).astype(jnp.float32)
    frequency = momentum * oscillated + (1 - momentum) * frequency
    frequency = frequency.astype(jnp.float32)

    def level(average: jax.Array) -> jax.Array:
        nearest = _param_grids.nearest_levels(average, grid).astype(status.dtype)
        level = jnp.where(frequency > threshold, nearest, reached)
        return jnp.where(was_frozen, before, level)

    now = level(average).astype(jnp.float32)
    average = (momentum * now + (1 - momentum) * average).astype(jnp.float32)
    # The average has moved towards its nearest level, which is still the same one.
    frozen = was_frozen | (frequency > threshold)
    direction = jnp.where(turned == 0, direction, turned)
    status = _packed(level(average), direction, frozen)

    held, _, frozen = _unpacked(status)
    is_off = reached != held
    target = _param_grids.values(held, grid)
    extremes = _param_grids.extremes(new, how)
    if extremes is not None:
        # Moving the weight that a range comes from would move the range, and so move
        # that weight again in the next update. A frozen group would shrink to nothing.
        is_off &= ~tiling.elementwise(_is_either, new, *extremes)
        target = tiling.elementwise(jnp.clip, target, *extremes)
    move = (target - param).astype(update.dtype)
    update = jnp.where(frozen & is_off, move, update)
    return update, (frequency, average, status)


def _is_either(x: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    return (x == low) | (x == high)


def _check(grids: _param_grids.ParamGrids, threshold: Any, momentum: Any) -> None:
    _arguments.check_integer_types(grids, "only integer codes can be frozen")
    _arguments.check_schedule("freeze_oscillations", "threshold", threshold)
    if isinstance(momentum, int | float) and not 0 < momentum <= 1:
        raise ValueError(
            f"freeze_oscillations(momentum={momentum!r}): it must be positive, and at "
            "most 1."
        )
