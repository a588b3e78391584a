"""The ranges that statistics in a train state give, against those of a calibration."""

import jax
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import numpy as jnp

from qwix_train import (
    QuantizationRule,
    attach,
    calib,
    ptq,
    ranges,
    wrap_train_step,
)
from tests import models

STATIC = {"weight_qtype": "int8", "act_qtype": "int8", "act_static_scale": True}
MODEL = nn.Dense(3)
BATCHES = [
    np.random.default_rng(i).normal(size=(8, 6)).astype(np.float32) for i in range(3)
]
PARAMS = {"params": models.params_of(MODEL, BATCHES[0])}


def held(stats):
    """Variables of a model that has no params."""
    return {"quant_stats": stats}


def observed(rule, batches):
    run = calib.observe(lambda x: MODEL.apply(PARAMS, x), [rule])
    stats = run.init(BATCHES[0])
    for x in batches:
        stats, _ = run(stats, jax.device_put(x))
    return run.quant_stats(stats) if batches else None, {
        run.ranges[name].path[-1]: state for name, state in stats.items()
    }


@pytest.mark.thinned(4)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"act_averaging": "ema,0.5"},
        {"act_observer": "percentile,95"},
        {"act_observer": "mse"},
        {"act_calibration_method": "minmax", "act_averaging": "minmax"},
    ],
)
def test_ranges_of_statistics(fields):
    rule = QuantizationRule(**STATIC, **fields)
    expected, stats = observed(rule, BATCHES)
    models.assert_same(ranges(held(stats), [rule]), expected)


def test_ranges_of_stacked_layers():
    rule = QuantizationRule(**STATIC, module_path="layers")
    statistics = {
        "count": jnp.array([2, 1]),
        "skipped": jnp.zeros(2, jnp.int32),
        "sum_of_absmax": jnp.array([[[3.0]], [[5.0]]]),
    }
    stats = {"layers": {"dot_general0_lhs": statistics}}
    found = ranges(held(stats), [rule])["layers"]["dot_general0_lhs"]
    assert sorted(found) == ["count", "sum_of_absmax"]
    models.assert_same(found["sum_of_absmax"], statistics["sum_of_absmax"])


@pytest.mark.parametrize(
    ("name", "op"),
    [("tanh0", "tanh"), ("relu_n1_to_10_output", "relu_n1_to_1"), ("log1p2", "log1p")],
)
def test_ranges_of_operations_of_litert(name, op):
    # Those with one operand have no name for it, and some end in a number.
    rules = [QuantizationRule(**STATIC, op_names=(names,)) for names in ("relu", op)]
    statistics = {"count": jnp.array(2), "sum_of_absmax": jnp.array([[3.0]])}
    found = ranges(held({name: statistics}), rules)
    models.assert_same(found[name]["sum_of_absmax"], jnp.array([[3.0]]))


def test_errors():
    rule = QuantizationRule(**STATIC)
    _, empty = observed(rule, [])
    with pytest.raises(
        ValueError, match="No range was collected for 'dot_general0_lhs"
    ):
        ranges(held(empty), [rule])
    with pytest.raises(ValueError, match="no rule gives that a static range"):
        ranges(held(empty), [QuantizationRule(module_path="other", **STATIC)])


@pytest.mark.slow
def test_the_statistics_of_an_nnx_model_with_a_list_of_layers():
    rules = [QuantizationRule(**STATIC, act_observer="percentile,99")]
    model = nnx.Sequential(nnx.Linear(6, 3, rngs=nnx.Rngs(0)))
    attach(model, rules, BATCHES[0])
    nnx.jit(wrap_train_step(lambda model, x: model(x), rules))(model, BATCHES[0])
    whole = ranges(model, rules)
    found = whole["layers"]["0"]["dot_general0_lhs"]["sum_of_absmax"].item()
    expected = np.percentile(np.abs(BATCHES[0]), 99)
    np.testing.assert_allclose(found, expected, rtol=0.05)
    ptq.quantize(model, None, rules, BATCHES[0], quant_stats=whole)
