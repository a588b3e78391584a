"""Factors of axes under reshapes, against reshaped index arrays."""

import math

import hypothesis
import numpy as np
from hypothesis import strategies as st

from qwix_train.trace.factors import Atom, reshape_dims, reshape_groups, untracked


def splits(size):
    """All ways to write a size as a product, by prime factors in order."""
    primes, rest, prime = [], size, 2
    while rest > 1:
        while rest % prime == 0:
            primes.append(prime)
            rest //= prime
        prime += 1
    return primes


@st.composite
def reshapes(draw):
    old = draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=3))
    primes = draw(st.permutations(splits(math.prod(old))))
    cuts = draw(st.lists(st.booleans(), min_size=len(primes), max_size=len(primes)))
    new = [1]
    for prime, cut in zip(primes, cuts, strict=True):
        if cut:
            new.append(prime)
        else:
            new[-1] *= prime
    return tuple(old), tuple(new)


@hypothesis.given(reshapes())
def test_tracked_factors_say_where_each_element_comes_from(shapes):
    old, new = shapes
    groups = reshape_groups(old, new)
    assert groups is not None
    dims = tuple((Atom(axis, size, 1),) for axis, size in enumerate(old))
    result = reshape_dims(dims, old, new, groups)
    assert len(result) == len(new)
    places = np.indices(old).reshape(len(old), *new)  # the old index of each element
    for axis, atoms in enumerate(result):
        if not atoms or any(atom.stride == 0 for atom in atoms):
            continue
        assert math.prod(atom.size for atom in atoms) == new[axis]
        # Moving along the new axis moves along the stored ones by the strides.
        line = np.moveaxis(places, axis + 1, 1).reshape(len(old), new[axis], -1)
        line = line[:, :, 0] - line[:, :1, 0]
        expected = np.zeros((len(old), new[axis]), int)
        minor = 1
        for atom in reversed(atoms):
            digits = np.arange(new[axis]) // minor % atom.size
            expected[atom.axis] += digits * atom.stride
            minor *= atom.size
        np.testing.assert_array_equal(line, expected)


def test_sizes_that_differ_have_no_groups():
    assert reshape_groups((2, 3), (7,)) is None
    assert reshape_groups((0, 3), (3, 0)) is None


def test_untracked_factors_keep_axis_and_size():
    assert untracked((Atom(1, 6, 2),)) == (Atom(1, 6, 0, False),)
