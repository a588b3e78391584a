"""Axes of an operand, mapped to axes of the stored param."""

import pytest

from qwix_train.planning.weights import Axes, absolute_tile, stored_axes
from qwix_train.trace.factors import Atom
from qwix_train.trace.provenance import View


def view(shape, *dims):
    return View(("w",), shape, dims)


PLAIN = view((12, 5), (Atom(0, 12, 1),), (Atom(1, 5, 1),))
SPLIT = view((12, 5), (Atom(0, 3, 4),), (Atom(0, 4, 1),), (Atom(1, 5, 1),))
MERGED = view((3, 4, 5), (Atom(0, 3, 1), Atom(1, 4, 1)), (Atom(2, 5, 1),))


@pytest.mark.parametrize(
    "seen, axes, expected",
    [
        (PLAIN, Axes((1,), {}), Axes((1,), {})),
        (PLAIN, Axes((1,), {0: 4}), Axes((1,), {0: 4})),
        (PLAIN, Axes((1,), {0: 12}), Axes((1,), {})),
        (PLAIN, Axes((), {}), Axes((), {})),
        # Both parts of a split axis, the minor one alone, the major one alone.
        (SPLIT, Axes((2,), {}), Axes((2 - 1,), {})),
        (SPLIT, Axes((0, 2), {}), Axes((1,), {0: 4})),
        (SPLIT, Axes((1, 2), {}), Axes((1,), {})),
        (SPLIT, Axes((0, 2), {1: 2}), Axes((1,), {0: 2})),
        (SPLIT, Axes((2,), {1: 2}), Axes((1,), {})),
        # A tile over merged axes, within the minor one and beyond.
        (MERGED, Axes((1,), {0: 2}), Axes((2,), {0: 1, 1: 2})),
        (MERGED, Axes((1,), {0: 4}), Axes((2,), {0: 1})),
        (MERGED, Axes((1,), {0: 12}), Axes((2,), {})),
        # An axis of which one element was taken has a scale for each.
        (view((3, 4), (), (Atom(1, 4, 1),)), Axes((0,), {}), Axes((0,), {})),
        # One of three parts, contiguous; a slice from anywhere; every third element.
        (view((12,), (Atom(0, 4, 1),)), Axes((), {}), Axes((), {0: 4})),
        (view((12,), (Atom(0, 4, 1, False),)), Axes((), {}), Axes((), {})),
        (view((12,), (Atom(0, 4, 3, False),)), Axes((), {}), Axes((), {})),
        # Elements in an order that is not tracked share one scale, or have their own.
        (view((12,), (Atom(0, 12, 0, False),)), Axes((), {0: 4}), Axes((), {})),
        (view((12,), (Atom(0, 12, 0, False),)), Axes((0,), {}), Axes((0,), {})),
    ],
)
def test_stored_axes(seen, axes, expected):
    assert stored_axes(seen, axes) == expected


def test_a_tile_that_does_not_fit_merged_axes():
    with pytest.raises(
        ValueError, match=r"tile of 6 does not fit the factors \(3, 4\)"
    ):
        stored_axes(MERGED, Axes((1,), {0: 6}))


@pytest.mark.parametrize(
    "size, length, expected",
    [(4, 12, 4), (0.25, 12, 3), (1 / 3, 12, 4), (1.0, 12, 12), (0.01, 12, 1)],
)
def test_absolute_tile(size, length, expected):
    assert absolute_tile(size, length) == expected
