"""Dampening of weights that oscillate between two levels of quantization."""

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from qwix_train.core import numerics
from qwix_train.core.how import HowToQuantize
from qwix_train.optim import _arguments, _param_grids
from qwix_train.planning.plan import Plan


class DampenOscillationsState(NamedTuple):
    """State of `dampen_oscillations`.

    Attributes:
        count: The number of updates so far.
    """

    count: Any  # shape=(), dtype=jnp.int32


def dampen_oscillations(
    plan: Plan | Mapping[str, HowToQuantize],
    coefficient: float | optax.Schedule,
) -> optax.GradientTransformationExtraArgs:
    r"""Adds the gradient of a loss that pulls weights to the levels of their grid.

    In quantization-aware training with a straight-through gradient, a weight whose
    optimum lies between two levels does not converge: its gradient changes sign as it
    is rounded up or down, and it oscillates about the threshold between the two. The
    loss that prevents this is, for a param :math:`w` with scale :math:`s` and codes
    from :math:`n` to :math:`p`,

    .. math::
        \mathcal{L} + \lambda \mathcal{L}_{dampen}, \qquad
        \mathcal{L}_{dampen} = \lVert \hat{w} - \mathrm{clip}(w, sn, sp) \rVert_F^2,

    where :math:`s` and the quantized param :math:`\hat{w}` count as constants. So the
    gradients :math:`g` become

    .. math::
        g \leftarrow g + 2 \lambda (w - \hat{w}) \,\mathbf{1}_{sn \le w \le sp}.

    Put it before the optimizer, as `optax.add_decayed_weights` for an L2 penalty:
    ``optax.chain(dampen_oscillations(plan, schedule), optax.adam(1e-3))``. The step
    must be quantization-aware, with the rules of the plan. In the paper
    :math:`\lambda` grows from 0 along a cosine, so that weights move freely at first.
    In its code it grows to 0.1, which is
    ``lambda t: 0.1 * (1 - optax.cosine_decay_schedule(1.0, steps)(t))``.

    Args:
        plan: What quantizes the params, by path: a `Plan`, as `qwix_train.plan` makes
            it, whose params are a superset of those that are trained; or a mapping
            from patterns to `HowToQuantize`. A pattern is a regular expression for the
            whole path of a param, as in ``'Dense_0/kernel'``; the first that matches
            decides. All types and methods of calibration are allowed; rounding is to
            nearest. Other params get their gradients as they are.
        coefficient: :math:`\lambda`: a number, not negative, or a schedule that takes
            the number of updates.

    Returns:
        The transformation; its state is a `DampenOscillationsState`. Gradients keep
        their dtype.

    Raises:
        TypeError: ``plan`` is neither a plan nor such a mapping, or ``coefficient`` is
            neither a number nor a schedule.
        ValueError: ``plan`` quantizes nothing, or ``coefficient`` is negative or
            infinite; or, from ``init`` and ``update``, ``plan`` is not for these
            params; or from ``update``, there are no params.

    Examples:
        >>> import jax
        >>> from jax import numpy as jnp
        >>> from qwix_train import HowToQuantize
        >>> from qwix_train.optim import dampen_oscillations
        >>> how = HowToQuantize(qtype='int4', calibration_method='fixed,-7.5,7.5')
        >>> params = {'kernel': jnp.array([0.25, 1.75, 7.25]), 'bias': jnp.ones(1)}
        >>> tx = dampen_oscillations({'.*kernel': how}, 0.5)
        >>> grads = jax.tree.map(jnp.zeros_like, params)
        >>> grads, state = tx.update(grads, tx.init(params), params)
        >>> grads['kernel'].tolist(), grads['bias'].tolist()
        ([0.25, -0.25, 0.0], [0.0])

    References:
        Nagel et al., `Overcoming Oscillations in Quantization-Aware Training
        <https://arxiv.org/abs/2203.11086>`_, 2022, section 4.2
    """
    grids = _param_grids.ParamGrids("dampen_oscillations", plan)
    _arguments.check_schedule("dampen_oscillations", "coefficient", coefficient)
    if isinstance(coefficient, float) and math.isinf(coefficient):
        raise ValueError("dampen_oscillations(coefficient=inf): it must be finite.")

    def init_fn(params: Any) -> DampenOscillationsState:
        grids.of(params)
        return DampenOscillationsState(jnp.zeros((), jnp.int32))

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        _arguments.check_params("dampen_oscillations", params)
        factor = coefficient(state.count) if callable(coefficient) else coefficient

        def change(update, param, how, fields):
            return _dampened(update, param, factor, how), fields

        updates, _ = grids.update(updates, params, (), change)
        count = optax.safe_increment(state.count)
        return updates, DampenOscillationsState(count)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


# Compiled as a whole: eager calls would compile each operation for each shape.
@functools.partial(jax.jit, static_argnames="how")
def _dampened(
    update: jax.Array, param: jax.Array, factor: Any, how: HowToQuantize
) -> jax.Array:
    """Returns the gradient of a param with that of the loss added."""
    # In units of the scale, values are clipped as they are for rounding, and a level
    # needs no product. On a CPU, XLA computes this twice, in the loops of the first and
    # the second moment.
    grid = _param_grids.grid(param, how)
    scaled = _param_grids.clipped_scaled_values(param, grid)
    distance = scaled - numerics.round_to_level(scaled, grid.qtype, param.dtype)
    pull = _param_grids.spread(2 * factor * grid.scale.astype(scaled.dtype), distance)
    return (update.astype(pull.dtype) + pull * distance).astype(update.dtype)
