"""What ranges of activations are found with: observers, and averagings over batches.

They know arrays and types, and neither rules nor models: rules name them.
"""

from typing import TypeAlias

import jax

State: TypeAlias = dict[str, jax.Array]
"""What an observer or an averaging has collected so far: arrays by name."""
