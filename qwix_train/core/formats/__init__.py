"""Types that arrays are quantized to, each as one entry of a table."""

from qwix_train.core.formats.format import Format as Format
from qwix_train.core.formats.format import Integers as Integers
from qwix_train.core.formats.format import entries as entries
from qwix_train.core.formats.format import find as find
from qwix_train.core.formats.format import register_table as register_table
from qwix_train.core.formats.scales import E4M3 as E4M3
from qwix_train.core.formats.scales import E8M0 as E8M0
from qwix_train.core.formats.scales import CodedScale as CodedScale
from qwix_train.core.formats.scales import Scales as Scales
from qwix_train.core.formats.scales import coded as coded
from qwix_train.core.formats.scales import covering as covering
from qwix_train.core.formats.scales import is_coded as is_coded
from qwix_train.core.formats.scales import scale_value as scale_value
from qwix_train.core.formats.small_floats import SmallFloat as SmallFloat
from qwix_train.core.formats.table import table as table
