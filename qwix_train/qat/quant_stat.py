"""Where an NNX model keeps the statistics of static ranges."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from flax import nnx

from qwix_train.planning import Path
from qwix_train.trace import nnx as nnx_calls


class QuantStat(nnx.Variable):
    """The statistics of one static range of an NNX model: a dictionary of arrays."""


def quant_stats_in(tree: Any) -> Iterator[tuple[Path, QuantStat]]:
    """The statistics of the NNX models in a tree, each with its path in its model."""
    for name, module in nnx_calls.modules_in(tree):
        for attribute, held in vars(module).items():
            if isinstance(held, QuantStat):
                path = name.split("/") if name else []
                yield (*path, attribute), held
