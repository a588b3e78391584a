"""Quantization-aware training."""

from qwix_train.qat.attach_scales import (
    attach_learned_scales as attach_learned_scales,
)
from qwix_train.qat.attach_scales import learned_scale_mask as learned_scale_mask
from qwix_train.qat.attach_scales import with_learned_scales as with_learned_scales
from qwix_train.qat.bit_assignment import assign_bits as assign_bits
from qwix_train.qat.learned_ranges import learned_quant_stats as learned_quant_stats
from qwix_train.qat.op_sensitivity import sensitivity as sensitivity
from qwix_train.qat.provider import QtProvider as QtProvider
from qwix_train.qat.qt_rule import QtRule as QtRule
from qwix_train.qat.sensitivity_report import OpSensitivity as OpSensitivity
from qwix_train.qat.sensitivity_report import Sensitivity as Sensitivity
from qwix_train.schedule import Schedule as Schedule
