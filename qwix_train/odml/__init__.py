"""Full-integer models for LiteRT: trained with fake quantization, converted, run.

`OdmlQatProvider` stands in the place of rules while training, `convert` makes a
`LiteRTModel`, and `table` lists what becomes of each operation.
`OdmlConversionProvider` is for tools that export themselves.
"""

from qwix_train.odml.conversion_provider import (
    OdmlConversionProvider as OdmlConversionProvider,
)
from qwix_train.odml.convert import convert as convert
from qwix_train.odml.litert_model import LiteRTModel as LiteRTModel
from qwix_train.odml.ops import table as table
from qwix_train.odml.provider import OdmlQatProvider as OdmlQatProvider
