"""Quantization-aware training."""

from qwix_train.qat.provider import QtProvider as QtProvider
