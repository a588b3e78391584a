"""The names of `qwix` itself."""

from qwix_train.core.conv import conv_general_dilated as conv_general_dilated
from qwix_train.core.dot_general import dot as dot
from qwix_train.core.dot_general import dot_general as dot_general
from qwix_train.core.einsum import einsum as einsum
from qwix_train.core.qarray import QArray as QArray
from qwix_train.core.qarray import dequantize as dequantize
from qwix_train.core.qarray import quantize as quantize
from qwix_train.frontends.quant_stat import QuantStat as QuantStat
from qwix_train.like_qwix import contrib as contrib
from qwix_train.like_qwix.checkpoints import (
    process_prequantized_params as process_prequantized_params,
)
from qwix_train.like_qwix.checkpoints import (
    restore_quantization_rules as restore_quantization_rules,
)
from qwix_train.like_qwix.model import apply_lora_to_model as apply_lora_to_model
from qwix_train.like_qwix.model import quantize_model as quantize_model
from qwix_train.like_qwix.model import quantize_params as quantize_params
from qwix_train.like_qwix.providers import LoraProvider as LoraProvider
from qwix_train.like_qwix.providers import (
    OdmlConversionProvider as OdmlConversionProvider,
)
from qwix_train.like_qwix.providers import OdmlQatProvider as OdmlQatProvider
from qwix_train.like_qwix.providers import PtqProvider as PtqProvider
from qwix_train.like_qwix.providers import QtProvider as QtProvider
from qwix_train.like_qwix.rules import LoraRule as LoraRule
from qwix_train.like_qwix.rules import QtRule as QtRule
from qwix_train.like_qwix.rules import QuantizationRule as QuantizationRule
from qwix_train.ops.ragged_dot import ragged_dot as ragged_dot
from qwix_train.ops.ragged_dot import ragged_dot_general as ragged_dot_general
from qwix_train.planning.provider import QuantizationProvider as QuantizationProvider

__version__ = "0.1.8"
"""The version of `qwix` whose names these are."""
