"""Quantization-aware training.

`QtProvider` is the mode of `wrap_train_step` and `quantize_model`. `QtRule` quantizes
the backward products. `Schedule` says when quantization begins.

`learned_scale_mask` tells trained scales from other params. `sensitivity` measures how
much quantizing each op hurts (a `Sensitivity` of `OpSensitivity` rows), and
`assign_bits` chooses the bits of each op from that.
"""

from typing import TYPE_CHECKING

from qwix_train.core.late_names import late_names as _late_names
from qwix_train.planning.schedule import Schedule as Schedule
from qwix_train.qat.provider import QtProvider as QtProvider
from qwix_train.qat.qt_rule import QtRule as QtRule
from qwix_train.qat.train_state import learned_scale_mask as learned_scale_mask

# Imported when they are used, which not every program does: see `late_names`.
if TYPE_CHECKING:
    from qwix_train.qat.bit_assignment import assign_bits as assign_bits
    from qwix_train.qat.op_sensitivity import sensitivity as sensitivity
    from qwix_train.qat.sensitivity_report import OpSensitivity as OpSensitivity
    from qwix_train.qat.sensitivity_report import Sensitivity as Sensitivity
else:
    __getattr__, __dir__ = _late_names(
        __name__,
        {
            "bit_assignment": ("assign_bits",),
            "op_sensitivity": ("sensitivity",),
            "sensitivity_report": ("OpSensitivity", "Sensitivity"),
        },
    )
