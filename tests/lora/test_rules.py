"""Rules for adapters say what is wrong with them when they are made."""

import dataclasses
import math

import numpy as np
import pytest
from jax import numpy as jnp

from qwix_train import lora


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"rank": 0}, r"LoraRule\(rank=0\): it must be a positive int"),
        ({"rank": 1.5}, "an int"),
        ({"rank": True}, "an int"),
        ({"alpha": math.nan}, "a finite number"),
        ({"alpha": 0}, r"LoraRule\(alpha=0\): .* other than 0"),
        ({"alpha": True}, "a number"),
        ({"alpha": "16"}, "a number"),
        ({"mapped_axes": 0}, "a collection of ints"),
        ({"param_dtype": jnp.int8}, "a float dtype"),
        ({"param_dtype": "float33"}, "a float dtype"),
        ({"dropout": 1.0}, "at least 0 and below 1"),
        ({"dora": 1}, "True or False"),
        ({"lora_a_initializer": "he"}, r"function\(key, shape, dtype\)"),
        ({"init": "svd"}, "choose from pissa, loftq"),
        ({"init": "loftq,0", "weight_qtype": "int4"}, "choose from"),
        ({"init": "loftq"}, "LoftQ needs a weight_qtype"),
        (
            {"init": "loftq", "weight_qtype": "int4", "rotation": "hadamard"},
            "LoftQ fits weights in their own basis",
        ),
        ({"init": "pissa", "dora": True}, "cannot be combined with dora"),
        ({"init": "pissa", "alpha": -1.0}, "needs a positive one"),
        ({"double_quant": True}, "a weight_qtype of 4 bits"),
        ({"double_quant": True, "weight_qtype": "int8"}, "of 4 bits"),
        ({"qat": True}, "it needs a weight_qtype"),
        ({"qat": True, "weight_qtype": "int4", "dropout": 0.1}, "one merged product"),
        ({"weight_qtype": "int9"}, r"LoraRule\(weight_qtype='int9'\)"),
    ],
)
def test_wrong_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        lora.LoraRule(**{"rank": 2, "alpha": 4.0, **fields})


def test_scaling():
    rule = lora.LoraRule(rank=16, alpha=8)
    assert rule.scaling == 0.5
    # arXiv 2312.03732, theorem 3.2.
    assert dataclasses.replace(rule, rank_stabilized=True).scaling == 2.0
    assert np.isclose(
        lora.LoraRule(rank=3, alpha=1, rank_stabilized=True).scaling, 3**-0.5
    )


def test_steps_of_loftq():
    def steps(init):
        return lora.LoraRule(
            rank=2, alpha=4.0, weight_qtype="int4", init=init
        ).loftq_steps

    assert [steps(init) for init in (None, "pissa", "loftq", "loftq,3")] == [0, 0, 5, 3]
