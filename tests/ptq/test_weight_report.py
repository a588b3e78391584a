"""The table of what a method made of each weight."""

import pytest

from qwix_train.ptq.weight_report import WeightRecord, WeightReport


@pytest.mark.parametrize(
    "before, after, shown",
    [
        (0.02, 0.005, "2.00% -> 0.50%"),
        (4.316e-05, 4.08e-05, "0.0043% -> 0.0041%"),
        (0.0, 0.0, "0% -> 0%"),
    ],
)
def test_small_errors_are_shown_as_what_they_are(before, after, shown):
    record = WeightRecord("w", ("op",), True, rounding_error=before, error=after)
    assert f"SmoothQuant  {shown}" in str(WeightReport("SmoothQuant", (record,)))
