"""Calibration: the ranges of activations, collected by loops that do not know of it.

`Calibrator` keeps the statistics; `observe` is its pure form, and `merge_stats`
combines those of several processes. `collected_ranges` gives the ranges of statistics
that a train state holds. `compare` measures the observers, as a `Comparison`.
"""

from typing import TYPE_CHECKING

from qwix_train.calib.observe import observe as observe
from qwix_train.calib.ranges import collected_ranges as collected_ranges
from qwix_train.core.late_names import late_names as _late_names

# What not every program uses is imported when it is: see `late_names`.
if TYPE_CHECKING:
    from qwix_train.calib.calibrator import Calibrator as Calibrator
    from qwix_train.calib.calibrator import merge_stats as merge_stats
    from qwix_train.calib.comparison import compare as compare
    from qwix_train.calib.comparison_report import Comparison as Comparison
else:
    __getattr__, __dir__ = _late_names(
        __name__,
        {
            "calibrator": ("Calibrator", "merge_stats"),
            "comparison": ("compare",),
            "comparison_report": ("Comparison",),
        },
    )
