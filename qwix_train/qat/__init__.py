"""Quantization-aware training."""

from qwix_train.qat.provider import QtProvider as QtProvider
from qwix_train.qat.qt_rule import QtRule as QtRule
