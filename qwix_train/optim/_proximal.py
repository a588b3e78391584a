"""Proximal methods: the optimizer alone moves weights to their grid."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from qwix_train.core import numerics
from qwix_train.core.grid import Grid
from qwix_train.core.how import HowToQuantize, needs_zero_point
from qwix_train.optim import _arguments, _param_grids, _paths
from qwix_train.planning.plan import Plan

METHODS = ("proxquant", "parq")


class ProximalState(NamedTuple):
    """State of `proximal`.

    The last three are trees like the params, with `optax.MaskedNode` where a param is
    not quantized, has no zero point, or where the method has no latent weights.

    Attributes:
        count: The number of updates so far.
        strength: The strength of the last update.
        scale: The scales of the grids, in the shape of `HowToQuantize.scale_shape`.
        zero_point: The codes of 0.
        latent: The latent weights of PARQ.
    """

    count: Any  # shape=(), dtype=jnp.int32
    strength: Any  # shape=(), dtype=jnp.float32
    scale: Any  # in the dtypes of the params
    zero_point: Any  # dtype=jnp.int8
    latent: Any  # dtype=jnp.float32 (jnp.float64 for float64)


def proximal(
    plan: Plan | Mapping[str, HowToQuantize],
    schedule: float | optax.Schedule,
    method: str = "proxquant",
    calibration_period: int = 10,
) -> optax.GradientTransformationExtraArgs:
    r"""Pulls weights to the levels of their grid, until they are exactly on them.

    This is quantization-aware training by the optimizer alone. The forward stays in
    float, and each update ends with the proximal operator of a regularizer whose
    minima are the levels. Let :math:`q(w)` be the level nearest to a weight :math:`w`,
    :math:`s` the step of its grid, :math:`\lambda_t` the strength, from 0 to 1, that
    ``schedule`` gives, and

    .. math::
        \mathrm{S}_t(z) = \mathrm{sign}(z - q(z)) \,
            \max(|z - q(z)| - \lambda_t s / 2, \; 0).

    ``proxquant`` (arXiv 1810.00861) is proximal gradient descent for the W-shaped
    regularizer :math:`|w - q(w)|`. With the update :math:`u` of the optimizer,

    .. math::
        w \leftarrow q(z) + \mathrm{S}_t(z), \qquad z = w + u,

    so :math:`\lambda_t s / 2` is what the paper calls :math:`\eta_t \lambda_t`. Its
    homotopy is :math:`\lambda_t = \lambda t`; in the end it quantizes all weights. The
    pulls of all updates add up, so each should be about as large as an update. That is
    a strength of some percent, as in
    ``optax.join_schedules([optax.linear_schedule(0., 0.05, n),
    optax.constant_schedule(1.)], [n])``.

    ``parq`` (arXiv 2503.15748) keeps latent weights :math:`z`, which are the float
    weights plus all updates (dual averaging). Its piecewise affine regularizer leaves
    no gaps between the levels. With the inverse slope :math:`1 - \lambda_t`,

    .. math::
        z \leftarrow z + u, \qquad
        w \leftarrow q(z) + \mathrm{S}_t(z) / (1 - \lambda_t),

    where the second formula clips :math:`z` to the range of the grid. Weights that were
    pulled to one level can still reach another. At strength 1 this is the
    straight-through estimator. A schedule for it is
    ``optax.linear_schedule(0., 1., n)``. In the paper's code the inverse slope falls
    along a sigmoid.

    Put it last, after the learning rate:
    ``optax.chain(optax.adam(1e-3), proximal(plan, schedule))``. Nothing may change its
    updates afterwards. At strength 0 it leaves the updates as they are. From strength 1
    on, each param *is* ``dequantize(...)`` of its codes, bit for bit. A weight then
    moves by at most one level in an update, so that its sum with the update is exact.
    Let the schedule be 1 for the last few updates: a weight that is not at a level when
    the strength becomes 1 goes to the nearest level first.

    The plan's method of calibration finds the grid, from the params that the first
    update with a positive strength gets. For ``parq`` it finds it from the latent
    weights, and again every ``calibration_period`` updates until the strength is 1.
    The state keeps the grid, because calibration would not find it again: with
    ``absmax`` the largest magnitude is half a step above the top level, so an array
    that is on its grid would get another one. `attach(params, opt_state)` puts the
    scales beside the params, where `quantize_params` finds them.

    Args:
        plan: What quantizes the params, by path: a `Plan`, as `qwix_train.plan` makes
            it, whose params are a superset of those that are trained; or a mapping
            from patterns to `HowToQuantize`. A pattern is a regular expression for the
            whole path of a param, as in ``'Dense_0/kernel'``; the first that matches
            decides. The types are integers; rounding is to nearest. Other params get
            their updates as they are.
        schedule: :math:`\lambda_t`: a number, not negative, or a schedule that takes
            the number of updates. Values above 1 count as 1.
        method: ``'proxquant'`` or ``'parq'``.
        calibration_period: The number of updates from one calibration to the next,
            for ``parq``.

    Returns:
        The transformation; its state is a `ProximalState`, which holds scales and, for
        ``parq``, 4 bytes for each element of a quantized param. Updates of
        quantized params are float32 (float64 for float64), and `optax.apply_updates`
        adds in that dtype.

    Raises:
        TypeError: ``plan`` is neither a plan nor such a mapping, or ``schedule`` is
            neither a number nor a schedule.
        ValueError: ``plan`` quantizes nothing, or to a type that is not an integer, or
            another argument is out of its range; or, from ``init`` and ``update``,
            ``plan`` is not for these params; or from ``update``, there are no params.

    Examples:
        >>> import jax
        >>> import optax
        >>> from jax import numpy as jnp
        >>> from qwix_train import HowToQuantize
        >>> from qwix_train.optim import proximal
        >>> how = HowToQuantize(qtype='int4', calibration_method='fixed,-7.5,7.5')
        >>> params = {'w': jnp.array([0.25, 1.625, -2.0]), 'b': jnp.zeros(1)}
        >>> tx = optax.chain(
        ...     optax.sgd(1.0),
        ...     proximal({'w': how}, optax.linear_schedule(0.0, 1.0, 2)),
        ... )
        >>> grads, state = jax.tree.map(jnp.zeros_like, params), tx.init(params)
        >>> for _ in range(3):
        ...     updates, state = tx.update(grads, state, params)
        ...     params = optax.apply_updates(params, updates)
        ...     print(params['w'].tolist())
        [0.25, 1.625, -2.0]
        [0.0, 1.875, -2.0]
        [0.0, 2.0, -2.0]
        >>> state[-1].scale['w'].tolist()
        [1.0]

    References:
        Bai, Wang and Liberty, `ProxQuant: Quantized Neural Networks via Proximal
        Operators <https://arxiv.org/abs/1810.00861>`_, 2019, sections 3.1 and 3.3; Jin
        et al., `PARQ: Piecewise-Affine Regularized Quantization
        <https://arxiv.org/abs/2503.15748>`_, 2025, sections 3 to 5
    """
    grids = _param_grids.ParamGrids("proximal", plan)
    _check(grids, schedule, method, calibration_period)

    def init_fn(params: Any) -> ProximalState:
        _check_levels(params, grids.of(params))
        start = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32)
        held = grids.initial(params, functools.partial(_initial, method=method), 3)
        return ProximalState(*start, *held)

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        _arguments.check_params("proximal", params)
        strength = schedule(state.count) if callable(schedule) else schedule
        strength = jnp.clip(jnp.asarray(strength, jnp.float32), 0, 1)
        is_started = state.strength > 0
        if method == "parq":
            periodic = (state.count + 1) % calibration_period == 0
            is_due = (strength == 0) | ((strength < 1) & periodic)
        else:
            is_due = (strength > 0) & ~is_started
        change = functools.partial(
            _update, strength=strength, is_started=is_started, is_due=is_due
        )
        updates, held = grids.update(updates, params, state[2:], change)
        count = optax.safe_increment(state.count)
        return updates, ProximalState(count, strength, *held)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


# Compiled as a whole: eager calls would compile each operation for each shape.
@functools.partial(jax.jit, static_argnames=("how", "method"))
def _initial(param: jax.Array, how: HowToQuantize, method: str) -> tuple[Any, ...]:
    latent = optax.MaskedNode()
    if method == "parq":
        latent = param.astype(numerics.compute_dtype(param.dtype))
    return (*_calibrated(param, how), latent)


def _calibrated(array: jax.Array, how: HowToQuantize) -> tuple[Any, Any]:
    grid = _param_grids.grid(array, how)
    if grid.zero_point is None:
        return grid.scale, optax.MaskedNode()
    return grid.scale, grid.zero_point.astype(jnp.int8)


@functools.partial(jax.jit, static_argnames="how")
def _update(
    update: jax.Array,
    param: jax.Array,
    how: HowToQuantize,
    column: Any,
    strength: jax.Array,
    is_started: jax.Array,
    is_due: jax.Array,
) -> tuple[jax.Array, tuple[Any, ...]]:
    scale, zero, latent = column
    has_latent = not isinstance(latent, optax.MaskedNode)
    dtype, wide = param.dtype, numerics.compute_dtype(param.dtype)
    before = param.astype(wide)
    if has_latent:
        before = jnp.where(is_started, latent, before)
        latent = z = before + update.astype(wide)
    else:
        scale, zero = _found(is_due, param, how, scale, zero)
        z = before + update.astype(wide)
    has_zero = not isinstance(zero, optax.MaskedNode)
    grid = Grid(scale, zero if has_zero else None, how.qtype)

    level = _param_grids.levels(z, grid)
    nearest = _param_grids.values(level, grid).astype(wide)
    share = strength.astype(wide)
    threshold = _param_grids.spread(scale.astype(wide) * (_step(how) / 2 * share), z)
    if has_latent:
        ends = (_param_grids.spread(end, z) for end in grid.ends)
        distance = jnp.clip(z, *ends) - nearest
        beyond = distance - jnp.clip(distance, -threshold, threshold)
        drawn = nearest + beyond / jnp.maximum(1 - share, jnp.finfo(wide).eps)
        # The grid of the next update. To find it there would need the latent weights
        # while they are overwritten, and so a copy of them.
        scale, zero = _found(is_due, z.astype(dtype), how, scale, zero)
    else:
        drawn = z - jnp.clip(z - nearest, -threshold, threshold)
    drawn = jnp.where(strength < 1, drawn, _on_grid(level, param, how, grid))
    # What is not finite has no level. It stays, so that it is noticed.
    drawn = jnp.where(jnp.isfinite(z), drawn, z)
    update = jnp.where(strength > 0, drawn - param.astype(wide), update.astype(wide))
    return update, (scale, zero, latent)


def _found(
    is_due: jax.Array, array: jax.Array, how: HowToQuantize, scale: Any, zero: Any
) -> tuple[Any, Any]:
    """Returns the grid of an array if a new one is due, and else the present grid."""
    return jax.lax.cond(is_due, lambda: _calibrated(array, how), lambda: (scale, zero))


def _on_grid(
    level: jax.Array, param: jax.Array, how: HowToQuantize, grid: Grid
) -> jax.Array:
    """Returns the value of a level, or of one on the way that is reached exactly.

    The difference of two floats is exact if neither is more than twice the other
    (Sterbenz's lemma). That holds for a value and the level nearest to it, and for
    neighboring levels, but not for levels far apart.
    """
    wide = numerics.compute_dtype(param.dtype)
    reached = _param_grids.levels(param, grid)
    is_there = _param_grids.values(reached, grid).astype(wide) == param.astype(wide)
    most = jnp.where(is_there, _step(how), 0)
    level = jnp.clip(level, reached - most, reached + most)
    value = _param_grids.values(level, grid).astype(wide)
    # The maximum keeps LLVM from fusing the product with the difference that follows.
    # A fused product would not be rounded to the value that codes stand for.
    return jnp.maximum(value, jnp.finfo(wide).min)


def _check_levels(params: Any, hows: list[HowToQuantize | None]) -> None:
    """Checks that the dtype of each param holds all levels of its type."""
    names = jax.tree.leaves(_paths.param_paths(params))
    for name, param, how in zip(names, jax.tree.leaves(params), hows, strict=True):
        if how is None:
            continue
        # A code minus a zero point has one bit more than a code without one.
        signed = not needs_zero_point(how.calibration_method)
        bits = numerics.qtype_bits(how.qtype) - signed
        if bits > jnp.finfo(param.dtype).nmant - 1:
            raise ValueError(
                f"proximal: the param {name!r} is of dtype {param.dtype}, in which "
                f"the levels of {numerics.qtype_name(how.qtype)} are too close to "
                "stay apart, so it cannot be on its grid. Keep it in float32."
            )


def _step(how: HowToQuantize) -> int:
    """Returns the difference of two neighboring codes."""
    integers = numerics.format_of(how.qtype).integers
    return 1 if integers is None else integers.step


def _check(
    grids: _param_grids.ParamGrids, schedule: Any, method: str, calibration_period: Any
) -> None:
    _arguments.check_integer_types(
        grids, "only the evenly spaced levels of integers are supported"
    )
    _arguments.check_schedule("proximal", "schedule", schedule)
    if method not in METHODS:
        raise ValueError(
            f"proximal(method={method!r}): choose from {', '.join(METHODS)}."
        )
    # Under optax.inject_hyperparams it is an array.
    is_int = isinstance(calibration_period, int) and calibration_period >= 1
    if not is_int and not hasattr(calibration_period, "dtype"):
        raise ValueError(
            f"proximal(calibration_period={calibration_period!r}): it must be a "
            "positive int."
        )
