"""Ranges that are given: what cannot be some is refused where it is given."""

import numpy as np
import pytest
from flax import linen as nn

from qwix_train import (
    QuantizationRule,
    calib,
    ptq,
    quantize_params,
    wrap_eval_step,
    wrap_train_step,
)
from qwix_train.qat import QtProvider

STATIC = QuantizationRule(weight_qtype="int8", act_qtype="int8", act_static_scale=True)
DYNAMIC = QuantizationRule(weight_qtype="int8", act_qtype="int8")
STATS = {"dot_general0_lhs": {"count": 1, "sum_of_absmax": np.ones((1, 1), np.float32)}}


class Outer(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="a")(x)


def step(params, x):
    return nn.Dense(2).apply({"params": params}, x)


def test_what_is_no_dictionary():
    message = r"quant_stats=\[1\]: expected the ranges of activations in a nested"
    for give in (
        lambda stats: QtProvider([STATIC], quant_stats=stats),
        lambda stats: QtProvider([STATIC]).with_ranges(stats),
        lambda stats: wrap_train_step(step, [STATIC], quant_stats=stats),
        lambda stats: quantize_params({}, {}, stats),
        lambda stats: ptq.Gptq([STATIC]).quantize_params({}, {}, stats),
    ):
        with pytest.raises(TypeError, match=message):
            give([1])


def test_ranges_without_a_rule_that_asks_for_them():
    for give in (
        lambda: QtProvider([DYNAMIC], quant_stats=STATS),
        lambda: wrap_eval_step(step, [DYNAMIC], quant_stats=STATS),
        lambda: wrap_train_step(step, QtProvider([DYNAMIC]), quant_stats=STATS),
    ):
        with pytest.raises(ValueError, match="no rule asks for static ranges: set act"):
            give()
    QtProvider([DYNAMIC], quant_stats={})


def test_ranges_of_a_wider_model():
    rule = QuantizationRule(
        weight_qtype="int8",
        act_qtype="int8",
        act_static_scale=True,
        act_channelwise_axes=(0,),
    )
    params = {"kernel": np.ones((4, 2), np.float32), "bias": np.zeros(2, np.float32)}
    calibrator = calib.Calibrator([rule])
    x = np.ones((3, 4), np.float32)
    calibrator.wrap(step)(params, x)
    quantized = wrap_eval_step(step, [rule], quant_stats=calibrator.quant_stats)
    quantized(params, x)
    message = r"range of shape \(3, 1\), and an activation of shape \(5, 4\) takes"
    with pytest.raises(ValueError, match=message):
        quantized(params, np.ones((5, 4), np.float32))


def test_statistics_in_the_place_of_ranges_are_told_apart():
    rules = [STATIC]
    x = np.ones((1, 4), np.float32)
    params = {"kernel": np.ones((4, 2), np.float32), "bias": np.zeros(2, np.float32)}
    observed = calib.observe(lambda p, x: Outer().apply({"params": {"a": p}}, x), rules)
    stats, _ = observed({}, params, x)
    with pytest.raises(ValueError, match=r"observed\.quant_stats\(stats\)"):
        ptq.quantize(Outer(), {"a": params}, rules, x, quant_stats=stats)
    ranges = observed.quant_stats(stats)
    assert ranges["a"]["dot_general0_lhs"]["sum_of_absmax"].item() == 1.0
    ptq.quantize(Outer(), {"a": params}, rules, x, quant_stats=ranges)
