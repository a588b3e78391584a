"""A rule that matches nothing, though others match, is named at every door."""

import jax
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import qwix_train
from qwix_train import (
    LoraRule,
    PtqProvider,
    QtProvider,
    QuantizationRule,
    calib,
    odml,
    ptq,
)
from tests import models

X = np.ones((2, 4), np.float32)
RULES = [
    models.rule("int8", module_path="Dens_0"),
    models.rule("int8", "int8", act_static_scale=True),
    models.rule("int8", module_path=".*"),
]
PARAMS = {"w": np.ones((4, 3), np.float32)}
KEY = jax.random.key(0)


def forward(params, x):
    return x @ params["w"]


class Nnx(nnx.Module):
    def __init__(self):
        self.layer = nnx.Linear(4, 3, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.layer(x)


DYNAMIC = [RULES[0], models.rule("int8"), RULES[2]]
ADAPTED = [RULES[0], LoraRule(rank=1, alpha=2.0)]
LITERT = [
    QuantizationRule(module_path="Dens_0", weight_qtype="int8"),
    QuantizationRule(weight_qtype="int8", act_qtype="int8"),
    QuantizationRule(weight_qtype="int8"),
]
LINEN = nn.Dense(3)
ENDS = {"count": 1, "sum_of_min": -np.ones(1), "sum_of_max": np.ones(1)}
RANGES = {"dot_general0_lhs": ENDS, "final_output0": ENDS}
STEP = qwix_train.as_model(forward)
DOORS = {
    "wrap_train_step": lambda: qwix_train.wrap_train_step(STEP, DYNAMIC)(PARAMS, X),
    "wrap_eval_step": lambda: qwix_train.wrap_eval_step(STEP, DYNAMIC)(PARAMS, X),
    "Calibrator": lambda: calib.Calibrator(RULES).wrap(STEP)(PARAMS, X),
    "quantize_fn": lambda: qwix_train.quantize_fn(forward, QtProvider(DYNAMIC))(
        PARAMS, X
    ),
    "quantize_model of NNX": lambda: qwix_train.quantize_model(
        Nnx(), PtqProvider(DYNAMIC), X
    ),
    "quantize_model of Linen": lambda: qwix_train.quantize_model(
        LINEN, PtqProvider(DYNAMIC)
    ).init(KEY, X),
    "ptq.quantize": lambda: ptq.quantize(forward, PARAMS, DYNAMIC, X),
    "LiteRT steps": lambda: qwix_train.wrap_train_step(
        STEP, odml.OdmlQatProvider(LITERT, quant_stats=RANGES)
    )(PARAMS, X),
    "LiteRT ranges": lambda: calib.Calibrator(odml.OdmlQatProvider(LITERT)).wrap(STEP)(
        PARAMS, X
    ),
    "LiteRT models": lambda: qwix_train.quantize_model(
        LINEN, odml.OdmlQatProvider(LITERT)
    ).init(KEY, X),
    "LiteRT conversion": lambda: qwix_train.quantize_fn(
        forward, odml.OdmlConversionProvider(LITERT, PARAMS, RANGES)
    )(PARAMS, X),
    "lora": lambda: models.lora_state(forward, PARAMS, optax.sgd(0.1), ADAPTED, KEY, X),
}


@pytest.mark.thinned(2)
@pytest.mark.parametrize("name", DOORS)
def test_a_rule_that_matches_nothing_is_named_once(name):
    with pytest.warns(UserWarning) as caught:
        DOORS[name]()
    # Rule 1 came first for what the last rule matches.
    (message,) = {str(warning.message) for warning in caught}
    assert message.startswith(
        "Rule 0 (module_path='Dens_0') matches no op; module paths that exist: "
    )


def test_a_rule_for_one_of_several_models_of_a_step_matches():
    def step(params, x):
        small = nn.Dense(3, name="small").apply({"params": params["small"]}, x)
        return small + models.Mlp().apply({"params": params["mlp"]}, x)

    params = {
        "small": nn.Dense(3).init(KEY, X)["params"],
        "mlp": models.Mlp().init(KEY, X)["params"],
    }
    rules = [models.rule("int8", module_path=path) for path in ("", "Dense_[01]")]
    qwix_train.wrap_eval_step(step, rules)(params, X)


def test_a_rule_that_is_for_another_method_matches():
    class Codec(nn.Module):
        def setup(self):
            self.first, self.second = nn.Dense(3), nn.Dense(4)

        def __call__(self, x):
            return self.decode(self.encode(x))

        def encode(self, x):
            return self.first(x)

        def decode(self, x):
            return self.second(x)

    rules = [models.rule("int8", module_path=path) for path in ("first", "second")]
    methods = ("__call__", "encode", "decode")
    model = qwix_train.quantize_model(Codec(), QtProvider(rules), methods=methods)
    model.apply(model.init(KEY, X), X, method="encode")
