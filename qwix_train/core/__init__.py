"""Quantized arrays and their arithmetic: the ground that the other packages stand on.

It knows no model and no rule. Of Flax it uses `struct`, for pytrees that Flax can save.
"""

# Tells `jax.export` of these arrays.
from qwix_train.core import records as records
