"""Post-training quantization: quantized params, a model that runs on them, files."""

from qwix_train.ptq.params import abstract_params as abstract_params
from qwix_train.ptq.params import quantize as quantize
from qwix_train.ptq.params import quantize_params as quantize_params
from qwix_train.ptq.params import to_tree as to_tree
from qwix_train.ptq.provider import PtqProvider as PtqProvider
