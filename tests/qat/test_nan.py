"""NaN stays NaN in training, whatever the ranges, so that a loop can act on it.

`optax.apply_if_finite` and its like look at gradients: a NaN that is clipped to the
nearest code on the way would train the model on garbage.
"""

import jax
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.training import train_state
from jax import numpy as jnp

from qwix_train import (
    QtProvider,
    QtRule,
    QuantizationRule,
    calib,
    odml,
    quantize_model,
    wrap_train_step,
)
from qwix_train.core import learned_quant, numerics
from qwix_train.core.fake_quant import (
    fake_quant,
    fake_quant_with_calibration,
    fake_quant_with_scale,
)
from qwix_train.core.how import HowToQuantize
from qwix_train.core.qarray import quantize, with_nan
from tests.core.reference import QTYPE_NAMES
from tests.models import loss_of

X = jax.device_put(np.random.default_rng(0).uniform(0.1, 1, (4, 6)).astype(np.float32))
BAD = X.at[1, 2].set(jnp.nan)
INT8 = dict(weight_qtype="int8", act_qtype="int8")


def only_the_bad_one_is_nan(out):
    assert np.isnan(np.asarray(out, np.float32)).tolist() == np.isnan(BAD).tolist()


@pytest.mark.thinned(3)
@pytest.mark.parametrize("qtype", QTYPE_NAMES)
def test_fake_quantization_with_a_range_that_is_given(qtype):
    how = HowToQuantize(qtype=qtype, calibration_method="fixed,2")
    only_the_bad_one_is_nan(fake_quant(BAD, how))
    one = jnp.ones((1, 1))
    only_the_bad_one_is_nan(fake_quant_with_scale(BAD, qtype, one))
    only_the_bad_one_is_nan(fake_quant_with_calibration(BAD, qtype, {"absmax": one}))
    if numerics.is_integer_qtype(qtype):
        ends = {"min": -one, "max": one}
        only_the_bad_one_is_nan(fake_quant_with_calibration(BAD, qtype, ends))


def test_learned_scales():
    one = jnp.ones((1, 1))
    only_the_bad_one_is_nan(learned_quant.lsq(BAD, "int4", one))
    only_the_bad_one_is_nan(learned_quant.lsq_plus(BAD, "int4", one, -one))
    only_the_bad_one_is_nan(learned_quant.pact(BAD, "int4", one))


def test_codes_show_nan_in_the_scale_of_its_tile():
    q = quantize(BAD, "int8", calibration_method="fixed,2")
    assert np.isfinite(q.scale).all()
    assert np.isnan(with_nan(q, BAD).scale).all()
    scale = jnp.ones((4, 3))
    tiled = with_nan(q.replace(scale=scale), BAD).scale
    assert np.isnan(tiled).tolist() == (np.arange(12) == 4).reshape(4, 3).tolist()


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.relu(nn.Dense(6)(x)))


def state_of(rules):
    model = Model()
    tx = optax.apply_if_finite(optax.adam(1e-2), 10)
    if any(rule.learns_scales for rule in rules):
        model = quantize_model(model, QtProvider(rules))
    params = jax.jit(model.init)(jax.random.key(0), X)["params"]
    return train_state.TrainState.create(apply_fn=Model().apply, params=params, tx=tx)


def train_step(state, x):
    def loss(params):
        logits = state.apply_fn({"params": params}, x)
        return loss_of(logits, jnp.arange(4) % 3)

    return state.apply_gradients(grads=jax.grad(loss)(state.params))


FIXED = dict(**INT8, act_calibration_method="fixed,8")
BACKWARD = dict(bwd_qtype="int8", bwd_calibration_method="fixed,1")
RULES = {
    "dynamic": QuantizationRule(**INT8),
    "fixed": QuantizationRule(**FIXED, weight_calibration_method="fixed,1"),
    "fixed int1": QuantizationRule(
        weight_qtype="int1", act_qtype="int1", act_calibration_method="fixed,8"
    ),
    "static": QuantizationRule(**INT8, act_static_scale=True),
    "static asymmetric": QuantizationRule(
        **INT8, act_static_scale=True, act_calibration_method="minmax"
    ),
    "lsq": QuantizationRule(
        **INT8, act_calibration_method="lsq", weight_calibration_method="lsq"
    ),
    "codes": QtRule(**FIXED, **BACKWARD, weight_calibration_method="fixed,1"),
    "codes static": QtRule(**INT8, **BACKWARD, act_static_scale=True),
}


@pytest.mark.thinned(9)
@pytest.mark.parametrize("name", RULES)
def test_a_batch_with_nan_is_skipped(name):
    rules = [RULES[name]]
    state, provider = state_of(rules), QtProvider(rules)
    if rules[0].static_act_ranges and not rules[0].learns_scales:
        calibrator = calib.Calibrator(rules)
        calibrator.wrap(jax.jit(train_step))(state, X)
        provider = QtProvider(rules, quant_stats=calibrator.quant_stats)
    step = jax.jit(wrap_train_step(train_step, provider))
    good = step(state, X)
    assert good.opt_state.total_notfinite == 0
    bad = step(state, BAD)
    assert bad.opt_state.total_notfinite == 1
    jax.tree.map(np.testing.assert_array_equal, bad.params, state.params)


@pytest.mark.slow
@pytest.mark.parametrize("act_qtype", ["int8", "int16"])
def test_litert_training(act_qtype):
    rules = [QuantizationRule(weight_qtype="int8", act_qtype=act_qtype)]
    provider = odml.OdmlQatProvider(rules, fixed_range_for_inputs=(0, 1))
    model = quantize_model(Model(), provider)
    variables = jax.jit(model.init)(jax.random.key(0), X)
    apply = jax.jit(model.apply, static_argnames="mutable")
    _, stats = apply(variables, X, mutable="quant_stats")
    variables = {**variables, **stats}
    assert np.isfinite(apply(variables, X)).all()
    assert np.isnan(apply(variables, BAD)[1]).all()
