"""Quantization-aware training.

`QtProvider` is the mode of `wrap_train_step` and `quantize_model`, `QtRule` quantizes
the backward products, `Schedule` says when quantization begins.

Scales that are trained: `with_learned_scales` for a train state,
`attach_learned_scales` for params, `learned_scale_mask`, `learned_quant_stats`.
Bits by op: `sensitivity` (a `Sensitivity` of `OpSensitivity` rows) and `assign_bits`.
"""

from typing import TYPE_CHECKING

from qwix_train.core.late_names import late_names as _late_names
from qwix_train.planning.schedule import Schedule as Schedule
from qwix_train.qat.provider import QtProvider as QtProvider
from qwix_train.qat.qt_rule import QtRule as QtRule

# What not every program uses is imported when it is: see `late_names`.
if TYPE_CHECKING:
    from qwix_train.qat.attach_scales import (
        attach_learned_scales as attach_learned_scales,
    )
    from qwix_train.qat.attach_scales import learned_scale_mask as learned_scale_mask
    from qwix_train.qat.attach_scales import with_learned_scales as with_learned_scales
    from qwix_train.qat.bit_assignment import assign_bits as assign_bits
    from qwix_train.qat.learned_ranges import learned_quant_stats as learned_quant_stats
    from qwix_train.qat.op_sensitivity import sensitivity as sensitivity
    from qwix_train.qat.sensitivity_report import OpSensitivity as OpSensitivity
    from qwix_train.qat.sensitivity_report import Sensitivity as Sensitivity
else:
    __getattr__, __dir__ = _late_names(
        __name__,
        {
            "attach_scales": (
                "attach_learned_scales",
                "learned_scale_mask",
                "with_learned_scales",
            ),
            "bit_assignment": ("assign_bits",),
            "learned_ranges": ("learned_quant_stats",),
            "op_sensitivity": ("sensitivity",),
            "sensitivity_report": ("OpSensitivity", "Sensitivity"),
        },
    )
