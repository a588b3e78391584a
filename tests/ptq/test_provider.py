"""A quantized model computes what QAT trained, and behaves as the float model does."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from qwix_train import PtqProvider, ptq, quantize_fn
from tests import spellings


@pytest.mark.parametrize("name", spellings.CASES)
def test_path_into_a_product(name):
    """Whatever QAT accepts, against the same float64 references."""
    case = spellings.CASES[name]
    params, x = jax.tree.map(jnp.asarray, (case.params, case.x))
    rules = [spellings.RULE]
    if all(not weights for _, weights, _ in case.ops):
        quantized = quantize_fn(case.function, PtqProvider(rules, allow_unmatched=True))
        values = params
    else:
        quantized, values = ptq.quantize(case.function, params, rules, x)
    wide = (
        spellings.cast(case.params, np.float64),
        spellings.cast(case.x, np.float64),
    )
    tolerance = 2e-2 if name == "bfloat16" else 2e-6
    np.testing.assert_allclose(
        jax.jit(quantized, compiler_options=spellings.QUICK)(values, x),
        case.reference(*wide),
        rtol=tolerance,
        atol=tolerance,
    )
