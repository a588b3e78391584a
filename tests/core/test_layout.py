import jax
import pytest

from qwix_train.core.layout import conv_axes, dot_axes


def test_dot_axes():
    numbers = (((1, 3), (0, 2)), ((0,), (1,)))
    assert dot_axes(numbers, 4, "lhs") == ((0, 2), {})
    assert dot_axes(numbers, 4, "lhs", 8) == ((0, 2), {3: 8})
    assert dot_axes(numbers, 4, "rhs", 0.5) == ((1, 3), {2: 0.5})
    assert dot_axes(numbers, 4, "rhs", {0: 4, -1: 2}) == ((1,), {0: 4, 3: 2})
    assert dot_axes((((), ()), ((), ())), 2, "lhs", 8) == ((0, 1), {})


@pytest.mark.parametrize("spec", [("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW")])
def test_conv_axes(spec):
    shapes = {"NHWC": (2, 8, 8, 3), "NCHW": (2, 3, 8, 8)}
    kernels = {"HWIO": (3, 3, 3, 5), "OIHW": (5, 3, 3, 3)}
    lhs, rhs = shapes[spec[0]], kernels[spec[1]]
    numbers = jax.lax.conv_dimension_numbers(lhs, rhs, spec)
    assert conv_axes(numbers, "lhs") == ((0,), {})
    assert conv_axes(numbers, "rhs") == ((spec[1].index("O"),), {})


def test_the_side_is_lhs_or_rhs():
    with pytest.raises(ValueError, match="not 'left'"):
        dot_axes((((1,), (0,)), ((), ())), 2, "left")  # pyright: ignore
