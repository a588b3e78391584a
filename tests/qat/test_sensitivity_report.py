"""A sensitivity as a table, as records, and as a plot."""

import sys

import numpy as np
import pytest

from qwix_train import qat


def measured(**kwargs):
    """What two ops with two types might have given."""
    rows = []
    for op, size in (("Dense_0", 64), ("Dense_1", 4800)):
        for bits in (2, 4):
            row = {
                "ops": (f"{op}/dot_general0",),
                "params": (f"{op}/kernel",),
                "size": size,
                "qtype": f"int{bits}",
                "bits": bits,
                "bytes": size * bits // 8,
                "sqnr_db": 6.25 * bits,
                "weight_error": 1 / bits,
                "rules": (),
            }
            increase = {"loss_increase": 0.125 / bits - 0.04}
            rows.append(qat.OpSensitivity(**row, **(kwargs or increase)))
    method = "hutchinson" if kwargs else "loss"
    return qat.Sensitivity(tuple(rows), (), method, 0.25, 2)


def test_table():
    title, header, line, *rows, note = str(measured()).splitlines()
    assert title.startswith("Increase of the loss when one op alone is quantized")
    assert title.endswith("(float loss 0.25, 2 batches)")
    assert header.split() == "op weight elements int2 dB int4 dB".split()
    assert set(line) == {"-"}
    assert rows == [
        "Dense_0/dot_general0  Dense_0/kernel  64        +0.0225  12.5  -0.00875  25.0",
        "Dense_1/dot_general0  Dense_1/kernel  4,800     +0.0225  12.5  -0.00875  25.0",
    ]
    assert note == "dB: signal to quantization noise of the output"


def test_table_of_curvature():
    found = measured(trace=3.0, trace_error=0.25, omega=-0.5, loss_increase=None)
    lines = str(found).splitlines()
    assert lines[0].startswith("Curvature times squared error of the weight (omega)")
    assert lines[1].split() == "op weight elements trace int2 dB int4 dB".split()
    assert lines[3].split()[3:] == "3 ± 0.25 -0.5 12.5 -0.5 25.0".split()
    # Of an estimate below 0 the magnitude counts.
    assert [row.cost for row in found.rows] == [0.5] * 4


def test_records():
    found = measured()
    record = found.records()[1]
    assert record["qtype"] == "int4" and record["bytes"] == 32
    assert set(record) == {
        *("ops", "params", "size", "qtype", "bits", "bytes", "sqnr_db"),
        *("weight_error", "loss_increase", "trace", "trace_error", "omega"),
    }
    assert [[row.bits for row in rows] for rows in found.groups] == [[2, 4], [2, 4]]


@pytest.mark.slow
def test_plot(tmp_path, monkeypatch):
    found = measured()
    figure = found.plot(tmp_path / "sensitivity.png")
    assert (tmp_path / "sensitivity.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(FileExistsError, match=r"sensitivity.png exists"):
        found.plot(tmp_path / "sensitivity.png")
    (axes,) = figure.axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["Dense_0/dot_general0", "Dense_1/dot_general0"]
    for line, increase in zip(axes.get_lines(), (0.0225, -0.00875), strict=True):
        np.testing.assert_allclose(line.get_xdata(), [increase] * 2)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"qwix_train\[examples\]"):
        found.plot()
