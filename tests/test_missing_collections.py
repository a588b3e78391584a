"""A Linen model that is called without one of its collections: the error says which."""

import re

import jax
import optax
import pytest
from flax import linen as nn
from flax.errors import ScopeCollectionNotFound
from flax.training.train_state import TrainState

from qwix_train import (
    LoraProvider,
    QuantizationRule,
    apply_lora_to_model,
    attach,
    detach,
    lora,
    odml,
    plan,
    ptq,
)
from tests import models

X = models.normal(2, 8)
KEY = jax.random.key(0)
RULES = [models.rule("int8")]
LEARNED = [QuantizationRule(weight_qtype="int8", weight_calibration_method="lsq")]
STATIC = [models.rule("int8", "int8", act_static_scale=True)]
LORA = [lora.LoraRule(rank=2, alpha=2.0)]


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=True)(nn.Dense(4)(x))


MODEL = Net()
PARAMS = jax.jit(MODEL.init)(KEY, X)["params"]
STATE = TrainState.create(apply_fn=MODEL.apply, params=PARAMS, tx=optax.identity())


def convert(variables):
    provider = odml.OdmlQatProvider([], allow_unmatched=True)
    odml.convert(MODEL, variables, provider, X)


def split():
    model = apply_lora_to_model(MODEL, LoraProvider(LORA))
    lora.split(model, X, params=jax.jit(model.init)(KEY, X)["params"])


NAMED = 'Give variables={..., "batch_stats": batch_stats}.'
IN_THE_TARGET = (
    "Give a train state with such a field, or variables instead of params: "
    '{..., "batch_stats": batch_stats}.'
)


@pytest.mark.parametrize(
    "call,remedy",
    [
        (lambda: convert({"params": PARAMS}), NAMED),
        (lambda: convert({"params": PARAMS, "batch_stats": {}}), NAMED),
        (lambda: ptq.quantize(MODEL, PARAMS, RULES, X, variables={}), NAMED),
        (lambda: plan(MODEL, RULES, X, variables={"params": PARAMS}), NAMED),
        (split, NAMED),
        (lambda: lora.init(PARAMS, MODEL, LORA, KEY, X), IN_THE_TARGET),
        (lambda: attach(PARAMS, LORA, X, model=MODEL, rng=KEY), IN_THE_TARGET),
        (lambda: attach(PARAMS, LEARNED, X, model=MODEL), IN_THE_TARGET),
        (lambda: detach(PARAMS, LEARNED, X, model=MODEL), IN_THE_TARGET),
        (lambda: attach(STATE, STATIC, X), IN_THE_TARGET),
    ],
)
def test_the_collection_is_named_and_where_it_goes(call, remedy):
    message = f"Net has variables in batch_stats, and is called without them. {remedy}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        call()


def test_what_another_function_misses_is_flaxs_to_say():
    # What it takes is not known.
    with pytest.raises(ScopeCollectionNotFound):
        lora.init(PARAMS, lambda p, x: MODEL.apply({"params": p}, x), LORA, KEY, X)
