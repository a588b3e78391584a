"""Annotated functions, and the converter."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from qwix_train.core.grid import Grid
from qwix_train.odml import LiteRTModel
from qwix_train.odml.converter import annotate, to_flatbuffer
from tests.odml.small import normal

UNIT = Grid(np.float32(0.25), np.int64(-3))


def test_the_file_has_the_grids():
    w = np.float32([[0.5, -0.75], [-3.5, 1.75], [1.0, 0.25]])
    grid = Grid(np.float32([[0.5, 0.25]]), np.zeros((1, 2), np.int64), "int4_narrow")
    content = to_flatbuffer(
        lambda x: annotate(annotate(x, UNIT) @ annotate(jax.device_put(w), grid), UNIT),
        [normal(2, 3)],
        "product",
        ("x",),
        ("y",),
    )
    model = LiteRTModel(content)
    assert [op.name for op in model.ops()] == [
        "QUANTIZE",
        "FULLY_CONNECTED",
        "DEQUANTIZE",
    ]
    x, weight = model.ops()[1].inputs[:2]
    assert (x.dtype, x.scale, x.zero_point) == ("int8", (0.25,), (-3,))
    assert (weight.dtype, weight.scale, weight.axis) == ("int4", (0.5, 0.25), 0)
    # All are on their grids.
    x = np.float32([[1, -2, 0.25], [0.5, 0, 3]])
    expected = np.round(x.astype(np.float64) @ w * 4) / 4
    assert np.abs(model(x) - expected).max() <= 0.25
    assert (model(x) == expected).mean() >= 0.5


@pytest.mark.parametrize("scale", [0.0, np.nan, np.inf])
def test_scales_that_are_none(scale):
    with pytest.raises(ValueError, match=r"shape \(2, 3\) has the scale"):
        annotate(normal(2, 3), Grid(np.float32(scale), np.int64(0)))


def test_a_function_of_annotated_tensors():
    content = to_flatbuffer(
        lambda b, unused, a: (annotate(annotate(b, UNIT) + annotate(a, UNIT), UNIT), a),
        [normal(2, 3)] * 3,
        "add",
        ("b", "unused", "a"),
        ("sum", "same"),
    )
    model = LiteRTModel(content)
    # Neither sorted, nor without what nothing reads.
    assert model.signatures["add"].inputs == ("b", "unused", "a")
    assert model.signatures["add"].outputs == ("sum", "same")
    b, a = np.float32([[0, 1, 2]] * 2), np.float32([[0.25, -2, 0.5]] * 2)
    total, same = model(b, np.zeros((2, 3)), a)
    np.testing.assert_array_equal(total, a + b)
    np.testing.assert_array_equal(same, a)


def test_as_many_names_as_inputs_and_outputs():
    with pytest.raises(ValueError, match="'f' has 1 inputs, and names for 2: a, b"):
        to_flatbuffer(jnp.sin, [normal(2)], "f", ("a", "b"), ("y",))
    with pytest.raises(ValueError, match="'f' has 1 outputs, and names for 0"):
        to_flatbuffer(jnp.sin, [normal(2)], "f", ("a",), ())
