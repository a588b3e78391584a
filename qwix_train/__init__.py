"""Quantizes a JAX model while it trains, without changing the model or the loop."""

from qwix_train import calib as calib
from qwix_train import hooks as hooks
from qwix_train import ptq as ptq
from qwix_train.core.conv import conv_general_dilated as conv_general_dilated
from qwix_train.core.dot_general import dot as dot
from qwix_train.core.dot_general import dot_general as dot_general
from qwix_train.core.einsum import einsum as einsum
from qwix_train.core.how import HowToQuantize as HowToQuantize
from qwix_train.core.qarray import QArray as QArray
from qwix_train.core.qarray import WithAux as WithAux
from qwix_train.core.qarray import dequantize as dequantize
from qwix_train.core.qarray import quantize as quantize
from qwix_train.model import QuantizationProvider as QuantizationProvider
from qwix_train.model import plan as plan
from qwix_train.model import quantize_fn as quantize_fn
from qwix_train.model import quantize_model as quantize_model
from qwix_train.planning import Plan as Plan
from qwix_train.ptq import PtqProvider as PtqProvider
from qwix_train.ptq import quantize_params as quantize_params
from qwix_train.qat import QtProvider as QtProvider
from qwix_train.rules import QuantizationRule as QuantizationRule
from qwix_train.state import QuantStat as QuantStat
from qwix_train.state import QuantTrainState as QuantTrainState
from qwix_train.state import with_quant_stats as with_quant_stats
from qwix_train.step import wrap_eval_step as wrap_eval_step
from qwix_train.step import wrap_train_step as wrap_train_step
