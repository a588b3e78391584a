"""What clients import of the private module `flax_util` of `qwix`."""

from qwix_train.frontends.quant_stat import QuantStat as QuantStat
from qwix_train.values.stored import unbox as unbox
