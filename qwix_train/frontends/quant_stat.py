"""Where an NNX model keeps the statistics of static ranges."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
from flax import nnx, traverse_util

from qwix_train.frontends import nnx_objects
from qwix_train.planning.leaves import Path
from qwix_train.planning.quant_stats import states_in
from qwix_train.trace.function import param_path


class QuantStat(nnx.Variable[Any]):
    """The statistics of one static range of an NNX model: a dictionary of arrays."""


def quant_stats_in(tree: Any) -> Iterator[tuple[Path, QuantStat]]:
    """The statistics of the NNX models in a tree, each with its path in its model."""
    for name, module in nnx_objects.modules_in(tree):
        path = name.split("/") if name else []
        for attribute, held in vars(module).items():
            # The parts of a Linen model in an NNX model are dictionaries.
            inner = held if isinstance(held, QuantStat | dict) else None
            leaves, _ = jax.tree_util.tree_flatten_with_path(
                inner, is_leaf=nnx_objects.is_node
            )
            for keys, leaf in leaves:
                if isinstance(leaf, QuantStat):
                    yield (*path, attribute, *param_path(keys)), leaf


def quant_stats_of(model: nnx.Module) -> tuple[dict[str, Any], bool]:
    """The statistics of an NNX model, and whether its calls change them.

    Args:
      model: the model. Its calls do not while it has a true attribute
        `disable_quant_stats_update`, as in `qwix`.

    Returns:
      The statistics as a nested dictionary, and the answer.
    """
    states = {path: dict(stat.get_value()) for path, stat in quant_stats_in(model)}
    frozen = getattr(model, "disable_quant_stats_update", False)
    return traverse_util.unflatten_dict(states), not frozen


def put_quant_stats(model: nnx.Module, quant_stats: Any) -> None:
    """Gives an NNX model statistics, in place.

    Args:
      model: the model.
      quant_stats: the statistics, as a nested dictionary.
    """
    held = dict(quant_stats_in(model))
    for path, state in states_in(quant_stats).items():
        if path in held:
            held[path].set_value(state)
        else:
            nnx_objects.put(model, path, QuantStat(state))
