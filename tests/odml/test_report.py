"""Tables of a LiteRT model."""

import numpy as np
import pytest

from qwix_train.odml.flatbuffer import OpInfo, TensorInfo
from qwix_train.odml.report import OpTable, Report, output_report


def test_differences_in_steps_of_the_scale():
    expected = np.array([0.0, 0.5, 1.0, 1.5], np.float32)
    got = expected + np.array([0, 0.5, -0.25, 0], np.float32)
    out = output_report("y", 0.25, got, expected)
    assert (out.max_steps, out.mean_steps, out.equal) == (2, 0.75, 0.5)


def test_differences_of_floats_are_in_parts_of_their_range():
    expected = np.array([0.0, 2.55], np.float32)
    out = output_report("y", None, expected + np.float32([0.0, 0.02]), expected)
    np.testing.assert_allclose([out.max_steps, out.mean_steps], [2, 1], rtol=1e-4)


def test_differences_of_indices():
    out = output_report("y", None, np.array([3, 4]), np.array([3, 7]))
    assert (out.max_steps, out.equal) == (3, 0.5)
    assert output_report("y", None, np.zeros((0, 2)), np.zeros((0, 2))).equal == 1


def test_outputs_of_other_shapes():
    with pytest.raises(ValueError, match=r"'y' has the shape \(1,\) .* \(2,\)"):
        output_report("y", 0.1, np.zeros(1), np.zeros(2))


def test_a_report_as_text():
    report = Report([output_report("y", 0.25, np.array([0.0]), np.array([0.5]))])
    assert str(report).splitlines() == [
        "output  scale  max steps  mean steps  equal",
        "-------------------------------------------",
        "y       0.25   2.00       2.000       0.0%",
    ]


def test_operations_as_text():
    x = TensorInfo("x", (-1, 4), "int8", (0.5,), (-128,), 0, False, True, False)
    w = TensorInfo("w", (2, 4), "int8", (0.5, 0.25), (0, 0), 0, True, False, False)
    y = TensorInfo("y", (-1, 2), "float32", (), (), 0, False, False, True)
    table = OpTable(
        [OpInfo("FULLY_CONNECTED", (x, w), (x,)), OpInfo("SIN", (x,), (y,))]
    )
    lines = str(table).splitlines()
    assert lines[2].startswith("FULLY_CONNECTED  int8[?x4] int8[2x4] per channel  int8")
    assert lines[2].endswith("0 to 127.5")
    assert lines[3].endswith("float32[?x2]")
