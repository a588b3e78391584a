"""Optax transformations for quantized training, adapters, and states in 8 bits.

Each works wherever a transformation of Optax does: under `jax.jit`, and in
`optax.chain`, `optax.partition`, `optax.masked`, `optax.MultiSteps`,
`optax.inject_hyperparams` and `flax.nnx.Optimizer`. Some wrap a transformation. In a
chain, `dampen_oscillations` stands before the optimizer, and `freeze_oscillations` and
`proximal` stand last.

Optimizers: `quantized_state`, `stochastic_rounding`, `lora_plus`,
`selective_transform`. For quantization-aware training: `proximal` (`attach` puts its
grids beside the params), `dampen_oscillations`, `freeze_oscillations`.
"""

from qwix_train.optim._dampen_oscillations import (
    DampenOscillationsState as DampenOscillationsState,
)
from qwix_train.optim._dampen_oscillations import (
    dampen_oscillations as dampen_oscillations,
)
from qwix_train.optim._freeze_oscillations import (
    FreezeOscillationsState as FreezeOscillationsState,
)
from qwix_train.optim._freeze_oscillations import (
    freeze_oscillations as freeze_oscillations,
)
from qwix_train.optim._lora_plus import lora_plus as lora_plus
from qwix_train.optim._proximal import ProximalState as ProximalState
from qwix_train.optim._proximal import proximal as proximal
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
