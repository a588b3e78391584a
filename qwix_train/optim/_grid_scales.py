"""The grids of `proximal`, beside the params that lie on them."""

from collections.abc import Mapping
from typing import Any

import jax
import optax
from flax import nnx
from flax.core import unfreeze

from qwix_train.optim._proximal import ProximalState
from qwix_train.planning.leaves import Leaf, Part, Path


def with_grid_scales(params: Any, opt_state: Any) -> Any:
    """Returns the params with the scales of their grids beside them.

    `optim.proximal` takes each param to a grid that it holds in its state. Export has
    to use that grid, not one that it finds anew: wherever a tree of float params has
    ``<param>_scale`` beside ``<param>``, `quantize_params` and `ptq.quantize` quantize
    the param with exactly that scale (and with ``<param>_zero_point``).

    Args:
        params: The trained params: nested mappings, or an `nnx.State` of them.
        opt_state: The state of an optimizer that `optim.proximal` is a part of, in a
            chain, a partition, a mask and so on; for NNX ``optimizer.opt_state``.

    Returns:
        The params in nested dictionaries and lists. A param that the optimizer takes to
        a grid has a ``<param>_scale`` beside it and, where the grid has one, a
        ``<param>_zero_point``, of the rank and the dtype of the param. No array of the
        params is copied.

    Raises:
        ValueError: ``opt_state`` holds no state of `optim.proximal`; a param that has
            a grid is not in ``params``, or stands in no mapping; or there already is a
            param with the name of its scale.

    Examples:
        >>> import optax
        >>> from jax.numpy import ones, zeros
        >>> from qwix_train.core.how import HowToQuantize
        >>> from qwix_train.optim import proximal, with_grid_scales
        >>> how = HowToQuantize(qtype='int4', channelwise_axes=[1])
        >>> tx = optax.chain(optax.adam(1e-3), proximal({'.*kernel': how}, 1.0))
        >>> params = {'layer': {'kernel': ones((4, 3)), 'bias': zeros(3)}}
        >>> params = with_grid_scales(params, tx.init(params))
        >>> params['layer']['kernel_scale'].shape, sorted(params['layer'])
        ((1, 3), ['bias', 'kernel', 'kernel_scale'])
    """
    leaves = jax.tree.leaves(opt_state, is_leaf=_is_state)
    states = [leaf for leaf in leaves if _is_state(leaf)]
    if not states:
        raise ValueError(
            "with_grid_scales: the state of the optimizer has none of optim.proximal "
            f"in it; got {type(opt_state).__name__}. Give it what tx.init and "
            "tx.update return."
        )
    params = _pure(params)
    for state in states:
        params = _with_field(params, _pure(state.scale), "scale", ())
        # In the dtype of the scale, as among params there are floats alone.
        zero_point = jax.tree.map(
            lambda scale, zero: jax.tree.map(lambda x: x.astype(scale.dtype), zero),
            state.scale,
            state.zero_point,
        )
        params = _with_field(params, _pure(zero_point), "zero_point", ())
    return params


def _with_field(params: Any, field: Any, part: Part, path: Path) -> Any:
    if isinstance(field, optax.MaskedNode):
        return params
    if isinstance(field, Mapping):
        params = dict(params)
        for name, value in field.items():
            here = (*path, str(name))
            if name not in params:
                if isinstance(value, optax.MaskedNode):
                    continue
                raise ValueError(
                    f"with_grid_scales: {'/'.join(here)!r} has a grid, and is not "
                    "among the params: give the params that the optimizer trains."
                )
            if isinstance(value, Mapping | list | tuple):
                params[name] = _with_field(params[name], value, part, here)
                continue
            place = Leaf(here, part).path
            if place[-1] in params:
                raise ValueError(
                    f"with_grid_scales: there already is a param {'/'.join(place)!r}."
                )
            params[place[-1]] = value
        return params
    if isinstance(field, list | tuple):
        pairs = enumerate(zip(params, field, strict=True))
        return [_with_field(p, f, part, (*path, str(i))) for i, (p, f) in pairs]
    raise ValueError(
        f"with_grid_scales: the param {'/'.join(path)!r} stands in no mapping, so "
        "there is no name for its scale."
    )


def _pure(tree: Any) -> Any:
    return nnx.to_pure_dict(tree) if isinstance(tree, nnx.State) else unfreeze(tree)


def _is_state(node: Any) -> bool:
    return isinstance(node, ProximalState)
