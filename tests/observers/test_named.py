import re

import jax
import numpy as np
import pytest

from qwix_train.core.how import HowToQuantize
from qwix_train.observers.named import (
    OBSERVERS,
    CalibrationMethod,
    Entropy,
    Mse,
    Percentile,
    parse_observer,
)


@pytest.mark.parametrize(
    "text, want",
    [
        ("absmax", CalibrationMethod("absmax")),
        ("RMS, 3", CalibrationMethod("RMS, 3")),
        ("percentile,99.9", Percentile(99.9)),
        (" Percentile, 99 ,Asymmetric", Percentile(99.0, symmetric=False)),
        ("mse", Mse()),
        ("mse,asymmetric", Mse(symmetric=False)),
        ("entropy", Entropy()),
    ],
)
def test_names(text, want):
    assert parse_observer(text) == want
    assert hash(parse_observer(text)) == hash(want)


@pytest.mark.parametrize(
    "text, message",
    [
        ("median", re.escape("; ".join(OBSERVERS.values()))),
        ("", "choose from"),
        ("rms", "rms,factor"),
        ("absmax,x", "absmax"),
        ("percentile", "percentile,p"),
        ("percentile,x", "percentile,p"),
        ("percentile,99,98", "percentile,p"),
        ("percentile,asymmetric", "percentile,p"),
        ("percentile,0.999", "above 50"),
        ("percentile,101", "at most 100"),
        ("percentile,nan", "above 50"),
        ("mse,2", "mse"),
        ("entropy,asymmetric", "Write entropy"),
    ],
)
def test_text_that_names_no_observer(text, message):
    with pytest.raises(ValueError, match=message):
        parse_observer(text)


@pytest.mark.parametrize(
    "text, how, message",
    [
        ("percentile,99", dict(qtype="int8", tiled_axes={0: 2}), "not per tile"),
        ("percentile,99,asymmetric", dict(qtype="nf4"), "no zero points"),
        ("mse,asymmetric", dict(qtype="float8_e5m2"), "no zero points"),
        ("entropy", dict(qtype="nf4"), "even levels"),
    ],
)
def test_what_does_not_go_together(text, how, message):
    with pytest.raises(ValueError, match=message):
        parse_observer(text).init((4, 2), HowToQuantize(**how))


@pytest.mark.slow
def test_a_state_of_one_is_read_by_another():
    how = HowToQuantize(qtype="int8")
    x = jax.device_put(np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32))
    state = Entropy().update(Entropy().init(x.shape, how), x, how)
    for observer in Percentile(99.0), Mse():
        own = observer.update(observer.init(x.shape, how), x, how)
        a, b = observer.calibration(state, how), observer.calibration(own, how)
        np.testing.assert_array_equal(a["absmax"], b["absmax"])
