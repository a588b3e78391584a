"""A few cases that stand for a grid."""

import itertools
from collections.abc import Callable, Iterable
from typing import Any


def pairwise(
    *axes: Iterable[Any], allowed: Callable[..., bool] = lambda *case: True
) -> list[tuple[Any, ...]]:
    """Cases in which any two values of two axes meet, if any allowed case has both.

    Where a fault takes one value, or two together, one of these cases shows it. There
    are about as many as the two longest axes have combinations.

    Args:
        *axes: The values of each axis.
        allowed: Whether a case, given as its values, is one that exists.

    Returns:
        The cases, in the order of `itertools.product`.
    """
    values = [list(axis) for axis in axes]
    pairs = {
        case: set(itertools.combinations(enumerate(case), 2))
        for case in itertools.product(*(range(len(axis)) for axis in values))
        if allowed(*_of(values, case))
    }
    met: set[Any] = set()
    chosen = []
    # First the cases that bring the most new pairs.
    for least in range(len(values) * (len(values) - 1) // 2, 0, -1):
        for case, its_pairs in pairs.items():
            if len(its_pairs - met) >= least:
                met |= its_pairs
                chosen.append(case)
    return [_of(values, case) for case in sorted(chosen)]


def _of(values: list[list[Any]], case: tuple[int, ...]) -> tuple[Any, ...]:
    return tuple(axis[i] for axis, i in zip(values, case, strict=True))
