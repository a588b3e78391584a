"""Where an NNX model keeps the statistics of static ranges."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
from flax import nnx

from qwix_train.frontends import nnx_objects
from qwix_train.planning.plan import Path
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
