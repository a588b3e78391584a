"""Quantizes a JAX model while it trains, without changing the model or the loop.

Rules: `QuantizationRule`, or `QtRule` with quantized backward products, `LoraRule` with
adapters. `Schedule` says when they begin. `plan` shows what they do (a `Plan`, or a
`StepPlan` of a wrapped step). A kernel asks for its own with `current_rule`.

Steps: `wrap_train_step`, `wrap_eval_step`; `as_model` and `in_float` mark functions and
teachers in them.

Leaves: `attach` gives a state, params or a model what the rules need beside the params:
statistics of ranges (`QuantTrainState`, `QuantStat`), trained scales, adapters
(`LoraTrainState`). `attached` lists them, `ranges` reads ranges, `detach` takes off.

Models: `quantize_model`, `quantize_fn`, `apply_lora_to_model` with a
`QuantizationProvider`: `QtProvider`, `PtqProvider`, `LoraProvider`, `OdmlQatProvider`,
`OdmlConversionProvider`. `quantize_params` quantizes params for a `PtqProvider`.

Arrays: `quantize`, `dequantize`, `QArray`, `WithAux`, `HowToQuantize`, and `dot`,
`dot_general`, `einsum`, `conv_general_dilated`, `ragged_dot`, `ragged_dot_general`;
`pallas_products` has them computed by a kernel, `scaled_dots` by JAX's own product of
operands in blocks.

Long work says how far it is (`Progress`) on a terminal; `progress` says where else.

Packages: `qat`, `calib`, `ptq`, `lora`, `odml`, `optim`, `hooks`, `saved`;
`formats`, the types.
"""

from typing import TYPE_CHECKING

from qwix_train import calib as calib
from qwix_train import qat as qat
from qwix_train.attach import attach as attach
from qwix_train.attach import attached as attached
from qwix_train.attach import detach as detach
from qwix_train.core import formats as formats
from qwix_train.core.conv import conv_general_dilated as conv_general_dilated
from qwix_train.core.dot_general import dot as dot
from qwix_train.core.dot_general import dot_general as dot_general
from qwix_train.core.einsum import einsum as einsum
from qwix_train.core.how import HowToQuantize as HowToQuantize
from qwix_train.core.late_names import late_names as _late_names
from qwix_train.core.pallas_dot import pallas_products as pallas_products
from qwix_train.core.qarray import QArray as QArray
from qwix_train.core.qarray import WithAux as WithAux
from qwix_train.core.qarray import dequantize as dequantize
from qwix_train.core.qarray import quantize as quantize
from qwix_train.core.scaled_dots import scaled_dots as scaled_dots
from qwix_train.files.progress import Progress as Progress
from qwix_train.files.progress import progress as progress
from qwix_train.frontends.model import apply_lora_to_model as apply_lora_to_model
from qwix_train.frontends.model import quantize_fn as quantize_fn
from qwix_train.frontends.model import quantize_model as quantize_model
from qwix_train.frontends.plan_of import plan as plan
from qwix_train.frontends.quant_stat import QuantStat as QuantStat
from qwix_train.frontends.step_models import as_model as as_model
from qwix_train.frontends.step_models import in_float as in_float
from qwix_train.ops.ragged_dot import ragged_dot as ragged_dot
from qwix_train.ops.ragged_dot import ragged_dot_general as ragged_dot_general
from qwix_train.planning.current_rule import current_rule as current_rule
from qwix_train.planning.plan import Plan as Plan
from qwix_train.planning.plan import StepPlan as StepPlan
from qwix_train.planning.provider import QuantizationProvider as QuantizationProvider
from qwix_train.planning.rules import QuantizationRule as QuantizationRule
from qwix_train.planning.schedule import Schedule as Schedule
from qwix_train.qat import QtProvider as QtProvider
from qwix_train.qat import QtRule as QtRule
from qwix_train.qat.ranges import ranges as ranges
from qwix_train.qat.state import QuantTrainState as QuantTrainState
from qwix_train.step import wrap_eval_step as wrap_eval_step
from qwix_train.step import wrap_train_step as wrap_train_step

__version__ = "0.1.0"

# What not every program uses is imported when it is: see `late_names`.
if TYPE_CHECKING:
    from qwix_train import hooks as hooks
    from qwix_train import lora as lora
    from qwix_train import odml as odml
    from qwix_train import optim as optim
    from qwix_train import ptq as ptq
    from qwix_train import saved as saved
    from qwix_train.lora import LoraProvider as LoraProvider
    from qwix_train.lora import LoraRule as LoraRule
    from qwix_train.lora import LoraTrainState as LoraTrainState
    from qwix_train.odml import OdmlConversionProvider as OdmlConversionProvider
    from qwix_train.odml import OdmlQatProvider as OdmlQatProvider
    from qwix_train.ptq import PtqProvider as PtqProvider
    from qwix_train.ptq import quantize_params as quantize_params
else:
    __getattr__, __dir__ = _late_names(
        __name__,
        {
            "hooks": (),
            "lora": ("LoraProvider", "LoraRule", "LoraTrainState"),
            "odml": ("OdmlConversionProvider", "OdmlQatProvider"),
            "optim": (),
            "ptq": ("PtqProvider", "quantize_params"),
            "saved": (),
        },
    )
