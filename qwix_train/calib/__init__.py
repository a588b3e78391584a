"""Calibration: the ranges of activations, collected by loops that do not know of it."""

from qwix_train.calib.calibrator import Calibrator as Calibrator
from qwix_train.calib.compare import compare as compare
from qwix_train.calib.comparison_report import Comparison as Comparison
from qwix_train.calib.merge import merge_stats as merge_stats
from qwix_train.calib.observe import observe as observe
from qwix_train.calib.ranges import collected_ranges as collected_ranges
