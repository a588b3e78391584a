"""Periodic actions for training loops: `Calibrate`, `QuantReport`, `Export`.

`PeriodicAction` is the base of your own.

They are called as those of `clu.periodic_actions`, after every step, and need neither
`clu` nor TensorFlow.
"""

from qwix_train.hooks.calibrate import Calibrate as Calibrate
from qwix_train.hooks.export import Export as Export
from qwix_train.hooks.periodic import PeriodicAction as PeriodicAction
from qwix_train.hooks.report import QuantReport as QuantReport
