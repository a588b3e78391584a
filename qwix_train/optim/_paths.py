"""The paths of params in trees of Flax, Linen or NNX."""

import re
from collections.abc import Iterable
from typing import Any

import jax
from flax import nnx

from qwix_train.core.qarray import QArray, WithAux

_SHOWN = 5


def param_paths(params: Any) -> Any:
    """Returns the tree with the path of its param at every leaf.

    A path is the names from the root joined by ``/``. NNX variables and quantized
    arrays are params; the names of what is inside of them do not count.

    >>> param_paths({'Dense_0': {'kernel': 0, 'bias': 0}})
    {'Dense_0': {'bias': 'Dense_0/bias', 'kernel': 'Dense_0/kernel'}}
    """

    def named(path: Any, param: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return jax.tree.map(lambda _: name, param)

    return jax.tree_util.tree_map_with_path(named, params, is_leaf=_is_param)


def listed(paths: Iterable[str]) -> str:
    """Returns some of the paths, for a message.

    >>> listed(f'layer_{i}' for i in range(7))
    'layer_0, layer_1, layer_2, layer_3, layer_4 and 2 more'
    """
    paths = list(dict.fromkeys(paths))
    shown = ", ".join(paths[:_SHOWN])
    rest = len(paths) - _SHOWN
    return f"{shown} and {rest} more" if rest > 0 else shown


def _is_param(node: Any) -> bool:
    return isinstance(node, nnx.Variable | QArray | WithAux)


def check_pattern(where: str, pattern: str) -> None:
    """Raises a ValueError if a pattern is not a regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        message = f"{where}: {pattern!r} is not a regular expression: {error}."
        raise ValueError(message) from None
