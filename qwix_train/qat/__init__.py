"""Quantization-aware training."""

from qwix_train.qat.bit_assignment import assign_bits as assign_bits
from qwix_train.qat.op_sensitivity import sensitivity as sensitivity
from qwix_train.qat.provider import QtProvider as QtProvider
from qwix_train.qat.qt_rule import QtRule as QtRule
from qwix_train.qat.sensitivity_report import OpSensitivity as OpSensitivity
from qwix_train.qat.sensitivity_report import Sensitivity as Sensitivity
