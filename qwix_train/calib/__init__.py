"""Calibration: the ranges of activations, collected by loops that do not know of it."""

from qwix_train.calib.calibrator import Calibrator as Calibrator
from qwix_train.calib.observe import observe as observe
