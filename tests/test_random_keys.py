"""Where random keys are needed, and what is refused in their place."""

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from qwix_train import (
    LoraProvider,
    LoraRule,
    attach,
    attached,
    plan,
    ptq,
    quantize_model,
)
from qwix_train.frontends.random_keys import checked
from tests import models

X = np.ones((2, 4), np.float32)
LORA = [LoraRule(rank=1, alpha=2.0)]
PARAMS = {"w": np.ones((4, 3), np.float32)}
DOORS = {
    "plan": lambda key: plan(models.Mlp(), models.INT8, X, rngs={"dropout": key}),
    "ptq": lambda key: ptq.quantize(models.Mlp(), {}, models.INT8, X, rngs=key),
    "nnx": lambda key: quantize_model(
        nnx.Linear(4, 3, rngs=nnx.Rngs(0)), LoraProvider(LORA), X, rngs=key
    ),
    "lora": lambda key: models.lora_state(
        lambda params, x: x @ params["w"], PARAMS, optax.sgd(0.1), LORA, key, X
    ),
}


@pytest.mark.parametrize("door", DOORS)
def test_an_int_is_not_a_random_key(door):
    message = r"rngs?(\['dropout'\])?=3 is not a random key.* jax\.random\.key\(3\)"
    with pytest.raises(TypeError, match=message):
        DOORS[door](3)


def test_a_plan_and_what_is_attached_draw_nothing():
    model = models.Everything()
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    variables = model.init(keys, X)
    planned = plan(model, models.INT8, X)
    assert planned.records() == plan(model, models.INT8, X, rngs=keys).records()
    rules = [models.rule("int8", "int8", act_static_scale=True)]
    assert len(attached(attach(variables, rules, X, model=model))) == 3


def test_what_is_a_key():
    for key in (jax.random.key(0), jax.random.PRNGKey(0)):
        assert checked(key) is key
        shape = jax.eval_shape(lambda key=key: key)
        assert checked({"params": shape}) == {"params": shape}
    for other in (True, None, "0", np.float32(0), np.uint32(0)):
        with pytest.raises(TypeError, match="is not a random key"):
            checked(other)
