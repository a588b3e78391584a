"""Calibration: collects the ranges of activations while an unchanged loop runs.

`Calibrator` keeps the statistics, and `observe` is its pure form. `merge_stats`
combines two statistics, and `merge_processes` those of all processes. `compare`
measures the error that each observer's ranges would cause, as a `Comparison`. A class
of yours can be an observer (`RangeObserver`, `StreamObserver`) or an averaging
(`Averaging`) of a rule.
"""

from typing import TYPE_CHECKING

from qwix_train.calib.observe import observe as observe
from qwix_train.core.late_names import late_names as _late_names
from qwix_train.observers.averaging import Averaging as Averaging
from qwix_train.observers.statistics import RangeObserver as RangeObserver
from qwix_train.observers.statistics import StreamObserver as StreamObserver

# Imported when they are used, which not every program does: see `late_names`.
if TYPE_CHECKING:
    from qwix_train.calib.calibrator import Calibrator as Calibrator
    from qwix_train.calib.comparison import compare as compare
    from qwix_train.calib.comparison_report import Comparison as Comparison
    from qwix_train.calib.merging import merge_processes as merge_processes
    from qwix_train.calib.merging import merge_stats as merge_stats
else:
    __getattr__, __dir__ = _late_names(
        __name__,
        {
            "calibrator": ("Calibrator",),
            "comparison": ("compare",),
            "comparison_report": ("Comparison",),
            "merging": ("merge_processes", "merge_stats"),
        },
    )
