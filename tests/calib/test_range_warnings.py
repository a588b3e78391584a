"""When a calibrator warns of the ranges that it found."""

import warnings

import numpy as np
import pytest
from flax import linen as nn

from qwix_train import calib, ranges
from tests import models


def ranges_of(batches, **fields):
    rule = models.rule("int8", "int8", act_static_scale=True, **fields)
    model = nn.Dense(2)
    params = {"kernel": np.ones((6, 2), np.float32), "bias": np.zeros(2, np.float32)}
    calibrator = calib.Calibrator([rule])
    step = calibrator.wrap(lambda x: model.apply({"params": params}, x))
    for x in batches:
        step(x)
    return calibrator


def examples(*sizes):
    rng = np.random.default_rng(0)
    return [rng.normal(size=(n, 6)).astype(np.float32) for n in sizes]


@pytest.mark.slow
def test_a_range_far_below_what_was_seen_is_warned_of():
    batches = examples(8, 8, 8, 8)
    batches[2] *= 20
    with pytest.warns(UserWarning, match="1 static ranges are far below.*dot_general0"):
        _ = ranges_of(batches).quant_stats
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _ = ranges_of(batches, act_observer="mse").quant_stats
        _ = ranges_of(batches[:2]).quant_stats


def test_batches_of_one_example_are_warned_of():
    batches = examples(*[1] * 30)
    message = "have only a few examples.*act_averaging='minmax'"
    with pytest.warns(UserWarning, match=message):
        _ = ranges_of(batches).quant_stats
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _ = ranges_of(batches, act_averaging="minmax").quant_stats
        # As many examples in three batches.
        _ = ranges_of([np.concatenate(batches[i::3]) for i in range(3)]).quant_stats


def test_a_range_for_batches_that_differ_much_is_warned_of():
    batches = examples(8, 8, 8)
    batches[0] *= 50
    with pytest.warns(UserWarning, match="batches that differ much: .* few codes"):
        _ = ranges_of(batches, act_averaging="minmax").quant_stats


def test_statistics_of_a_train_state_are_warned_of_too():
    batches = examples(8, 8, 8, 8)
    batches[2] *= 20
    calibrator = ranges_of(batches)
    with pytest.warns(UserWarning, match="1 static ranges are far below"):
        ranges({"quant_stats": dict(calibrator.state)}, calibrator.rules)
