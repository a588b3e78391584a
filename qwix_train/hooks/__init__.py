"""Periodic actions for training loops: `Calibrate`, `QuantReport`, `Export`.

Derive your own from `PeriodicAction`. Call each after every step, as you call those of
`clu.periodic_actions`. Neither `clu` nor TensorFlow is needed.
"""

from qwix_train.hooks.calibrate import Calibrate as Calibrate
from qwix_train.hooks.export import Export as Export
from qwix_train.hooks.periodic import PeriodicAction as PeriodicAction
from qwix_train.hooks.report import QuantReport as QuantReport
