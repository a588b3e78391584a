"""The helper that chooses cases of a grid leaves out none with a pair of its own."""

import itertools

from tests.pairwise import pairwise


def pairs(cases):
    return {
        pair for case in cases for pair in itertools.combinations(enumerate(case), 2)
    }


def test_any_two_values_meet_in_fewer_cases():
    axes = ["abcdef", range(5), (None, True), (1, 2, 3)]
    cases = pairwise(*axes)
    grid = list(itertools.product(*axes))
    assert pairs(cases) == pairs(grid)
    assert 30 <= len(cases) <= 36 < len(grid)
    assert sorted(set(cases), key=grid.index) == cases


def test_cases_that_do_not_exist_are_not_chosen():
    def allowed(a, b, c):
        return a != 0 or b == 1 == c

    cases = pairwise(range(4), range(3), range(3), allowed=allowed)
    grid = [case for case in itertools.product(range(4), range(3), range(3))]
    assert all(allowed(*case) for case in cases)
    assert pairs(cases) == pairs(case for case in grid if allowed(*case))
