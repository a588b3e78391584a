"""Optax transformations for quantized training, adapters, and states in 8 bits.

Each goes wherever one of Optax goes: under `jax.jit` and into `optax.chain`,
`optax.partition`, `optax.masked`, `optax.MultiSteps`, `optax.inject_hyperparams` and
`flax.nnx.Optimizer`.
"""

from qwix_train.optim._lora_plus import lora_plus as lora_plus
from qwix_train.optim._quantized_state import QuantizedState as QuantizedState
from qwix_train.optim._quantized_state import quantized_state as quantized_state
from qwix_train.optim._selective_transform import (
    selective_transform as selective_transform,
)
from qwix_train.optim._stochastic_rounding import (
    StochasticRoundingState as StochasticRoundingState,
)
from qwix_train.optim._stochastic_rounding import (
    stochastic_rounding as stochastic_rounding,
)
