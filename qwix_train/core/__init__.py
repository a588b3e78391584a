"""Quantized arrays and their arithmetic: the ground that the other packages stand on.

It knows no model and no rule. Of Flax it uses `struct`, for pytrees that Flax can save.
"""

from qwix_train.core import records as records
from qwix_train.core.calibration import calibrate as calibrate
from qwix_train.core.calibration import (
    compute_scale_zero_point as compute_scale_zero_point,
)
from qwix_train.core.conv import conv_general_dilated as conv_general_dilated
from qwix_train.core.dot_general import dot as dot
from qwix_train.core.dot_general import dot_general as dot_general
from qwix_train.core.einsum import einsum as einsum
from qwix_train.core.fake_quant import fake_quant as fake_quant
from qwix_train.core.fake_quant import (
    fake_quant_with_calibration as fake_quant_with_calibration,
)
from qwix_train.core.fake_quant import fake_quant_with_scale as fake_quant_with_scale
from qwix_train.core.how import HowToQuantize as HowToQuantize
from qwix_train.core.how import parse_calibration_method as parse_calibration_method
from qwix_train.core.numerics import canonical_qtype as canonical_qtype
from qwix_train.core.numerics import is_quantizable as is_quantizable
from qwix_train.core.numerics import storage_dtype as storage_dtype
from qwix_train.core.qarray import MaybeQArray as MaybeQArray
from qwix_train.core.qarray import QArray as QArray
from qwix_train.core.qarray import WithAux as WithAux
from qwix_train.core.qarray import dequantize as dequantize
from qwix_train.core.qarray import quantize as quantize
from qwix_train.core.qarray import quantize_array as quantize_array
from qwix_train.core.qarray import (
    quantize_with_scale_zero_point as quantize_with_scale_zero_point,
)
