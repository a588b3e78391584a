"""Stochastic rounding of params that are kept in bfloat16 or in integers."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from qwix_train.core.qarray import QArray, WithAux
from qwix_train.optim import _arguments, _integer_params, _noise, _paths


class StochasticRoundingState(NamedTuple):
    """State of `stochastic_rounding`.

    Attributes:
        key: The data of the random key of the next update.
        inner_state: The state of the transformation that is wrapped.
    """

    key: jax.Array  # shape=(2,), dtype=jnp.uint32, with JAX's default generator
    inner_state: Any


def stochastic_rounding(
    tx: optax.GradientTransformation, seed: int | jax.Array = 0
) -> optax.GradientTransformationExtraArgs:
    r"""Stochastically rounds params that are kept in bfloat16 or in integers.

    bfloat16 has 8 bits of precision, so an update of less than 1/512 of its param is
    lost where the sum is rounded to nearest. Here the sum :math:`s = w + u` is taken
    in float32, and rounded to one of its two neighbors in bfloat16,
    :math:`s^- \le s < s^+`:

    .. math::
        w \leftarrow \begin{cases}
            s^+ & \text{with probability } (s - s^-) / (s^+ - s^-) \\
            s^- & \text{otherwise}
        \end{cases}
        \qquad \mathbb{E}[w] = s.

    ``tx`` sees params and gradients of bfloat16 in float32. So its moments are float32
    unless you tell it otherwise: a second moment in bfloat16 would stall, as params
    would. To keep moments in 8 bits, put `optim.quantized_state` inside.

    Updates of bfloat16 params are float32: `optax.apply_updates` then adds in float32,
    and the result is exactly the rounded param. Nothing may change these updates
    afterwards, except `optim.freeze_oscillations`, which holds some params. What needs
    updates in the dtype of the gradients, such as `optax.apply_if_finite`, goes inside.
    Params of other dtypes get the updates of ``tx``.

    Params may be integers, too: `QArray`s, also within `WithAux`, as `quantize_params`
    makes them. No float copy of them is kept. Their gradients are those of the
    dequantized params: arrays, in the places of the `QArray`s. ``tx`` sees both in
    float32. Its update :math:`u` changes the codes. With the scale :math:`s` and the
    codes :math:`q`, from :math:`n` to :math:`p`,

    .. math::
        q \leftarrow \lfloor y \rfloor + \begin{cases}
            1 & \text{with probability } y - \lfloor y \rfloor \\
            0 & \text{otherwise}
        \end{cases}
        \qquad y = q + u / s.

    If some :math:`y` of a group that shares a scale lies outside of :math:`[n, p]`, the
    scale first grows until none does, and then all codes of the group are rounded to
    the wider steps. No scale becomes smaller. Codes hold neither NaN nor infinity, so
    an element whose update is not finite keeps its value. Put `optax.apply_if_finite`
    inside to leave out the whole step. The updates are `QArray`s, as the params are,
    for `optax.apply_updates`. What keeps copies of params or sums of gradients, such as
    `optax.MultiSteps`, goes inside.

    Args:
        tx: The transformation, learning rate included, such as ``optax.adamw(1e-4)``.
        seed: The seed of the random key; an int, or an array of shape ``()``.

    Returns:
        The transformation; its state is a `StochasticRoundingState`.

    Raises:
        ValueError: From ``init`` and ``update``, a param is float16, or a `QArray`
            whose type is not one of int2 to int8, or has zero points; or no param is
            bfloat16 or integers, so that nothing is to be rounded; or from ``update``,
            there are no params.
        TypeError: ``tx`` is not a transformation; or, from ``update``, a gradient is a
            `QArray`.

    Examples:
        Four updates of 1/512 move the mean by 4/512. With rounding to nearest, params
        would stay at 1:

        >>> import jax
        >>> import optax
        >>> from jax import numpy as jnp
        >>> from qwix_train.optim import stochastic_rounding
        >>> params = {'w': jnp.ones(10_000, jnp.bfloat16)}
        >>> tx = stochastic_rounding(optax.sgd(1 / 512))
        >>> grads, state = jax.tree.map(jnp.ones_like, params), tx.init(params)
        >>> for _ in range(4):
        ...     updates, state = tx.update(grads, state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> params['w'].dtype
        dtype(bfloat16)
        >>> mean = params['w'].astype(jnp.float32).mean().item()
        >>> round(512 * (1 - mean), 1)
        4.0

        Ten updates of a fifth of a step move codes by two on average:

        >>> from qwix_train import dequantize, quantize
        >>> x = jnp.linspace(-12.75, 12.75, 10_000)  # a step is 0.1
        >>> params = {'w': quantize(x, 'int8')}
        >>> tx = stochastic_rounding(optax.sgd(0.02))
        >>> grads, state = {'w': jnp.ones(10_000)}, tx.init(params)
        >>> before = dequantize(params['w']).mean()
        >>> for _ in range(10):
        ...     updates, state = tx.update(grads, state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> round((before - dequantize(params['w']).mean()).item(), 2)
        0.2

    References:
        Gupta et al., `Deep Learning with Limited Numerical Precision
        <https://arxiv.org/abs/1502.02551>`_, 2015, section 3; Zamirai et al.,
        `Revisiting BFloat16 Training <https://arxiv.org/abs/2010.06192>`_, 2020
    """
    _arguments.check_transformation("stochastic_rounding", tx)
    tx = optax.with_extra_args_support(tx)

    def init_fn(params: Any) -> StochasticRoundingState:
        _check(params)
        key = jax.random.key_data(jax.random.key(seed))
        return StochasticRoundingState(key, tx.init(_widened(params)))

    def update_fn(updates, state, params=None, **extra_args):
        _arguments.check_params("stochastic_rounding", params)
        names = _check(params)
        leaves, structure = jax.tree.flatten(params, is_leaf=_integer_params.is_one)
        for name, gradient in zip(names, structure.flatten_up_to(updates), strict=True):
            if isinstance(gradient, QArray | WithAux):
                raise TypeError(
                    f"stochastic_rounding: the gradient of {name!r} is a "
                    f"{type(gradient).__name__}. Integers have no gradients: take "
                    "those of a loss of the dequantized params, which are arrays."
                )
        updates, inner_state = tx.update(
            _widened(updates), state.inner_state, _widened(params), **extra_args
        )
        key, noise = jax.random.split(jax.random.wrap_key_data(state.key))
        pairs = zip(structure.flatten_up_to(updates), leaves, strict=True)
        rounded = []
        for i, (update, param) in enumerate(pairs):
            data = jax.random.key_data(jax.random.fold_in(noise, i))
            if _integer_params.is_one(param):
                update = _integer_params.rounding_update(update, param, data)
            elif _is_low(param):
                update = _rounding_update(update, param, data)
            rounded.append(update)
        state = StochasticRoundingState(jax.random.key_data(key), inner_state)
        return structure.unflatten(rounded), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


# Compiled as a whole: eager calls would compile each operation for each shape.
@jax.jit
def _rounding_update(update: jax.Array, param: jax.Array, key: jax.Array) -> jax.Array:
    """Returns the difference of a param and its rounded sum with an update, float32."""
    param = param.astype(jnp.float32)
    total = param + update.astype(jnp.float32)
    # A bfloat16 is the upper half of a float32. Noise in the lower half carries into
    # the upper one with the probability that the lower half stands for, away from
    # zero, and across binades, too.
    bits = jax.lax.bitcast_convert_type(total, jnp.uint32)
    bits = (bits + (_noise.bits(key, total.shape) >> 16)) & jnp.uint32(0xFFFF0000)
    rounded = jax.lax.bitcast_convert_type(bits, jnp.float32)
    # Noise would make NaN of an infinity. What is not finite stays so.
    rounded = jnp.where(jnp.isfinite(total), rounded, total)
    return rounded - param


def _is_low(x: Any) -> bool:
    return jnp.result_type(x) == jnp.bfloat16


def _widened(tree: Any) -> Any:
    def widened(x: Any) -> Any:
        if _integer_params.is_one(x):
            return _integer_params.dequantized(x)
        return x.astype(jnp.float32) if _is_low(x) else x

    return jax.tree.map(widened, tree, is_leaf=_integer_params.is_one)


def _check(params: Any) -> list[str]:
    """Returns the paths of params that can be rounded."""
    leaves, structure = jax.tree.flatten(params, is_leaf=_integer_params.is_one)
    paths = structure.flatten_up_to(_paths.param_paths(params))
    names = [jax.tree.leaves(path)[0] for path in paths]
    for name, param in zip(names, leaves, strict=True):
        if _integer_params.is_one(param):
            _integer_params.check(name, param)
        elif jnp.result_type(param) == jnp.float16:
            raise ValueError(
                f"stochastic_rounding: the param {name!r} is float16, and it rounds to "
                "bfloat16 and integers. Keep the param in one of these or float32."
            )
    if leaves and not any(_integer_params.is_one(x) or _is_low(x) for x in leaves):
        dtypes = ", ".join(sorted({jnp.result_type(x).name for x in leaves}))
        raise ValueError(
            "stochastic_rounding: it rounds params in bfloat16 and in integers, and "
            f"all of these are {dtypes}, such as {names[0]!r}. Leave it out, or keep "
            "the params in bfloat16: jax.tree.map(lambda x: x.astype(jnp.bfloat16), "
            "params)."
        )
    return names
