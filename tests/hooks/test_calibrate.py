"""Ranges that are collected anew every so often, against NumPy."""

import jax
import numpy as np
import pytest
from flax import nnx

from qwix_train import QuantizationRule, calib, hooks
from tests import models

RULES = [QuantizationRule(weight_qtype="int8", act_qtype="int8", act_static_scale=True)]
BATCHES = [
    np.random.default_rng(i).normal(size=(8, 4)).astype(np.float32) * (i + 1)
    for i in range(4)
]
MEAN_ABSMAX = np.mean([np.abs(batch).max() for batch in BATCHES])


def absmax(quant_stats, layer):
    """The range of what enters the first layer: the batches themselves."""
    stats = quant_stats[layer]["dot_general0_lhs"]
    return np.asarray(stats["sum_of_absmax"] / stats["count"]).item()


class Loop:
    """A model, its params scaled by `scale`, and its eval loop."""

    def __init__(self, framework):
        self.calibrator = calib.Calibrator(RULES)
        if framework == "nnx":
            self.layer = "l1"
            self.state = models.NnxMlp(nnx.Rngs(0), rate=0.0)
            step = nnx.jit(lambda model, x: model(x).mean())
        else:
            self.layer = "Dense_0"
            model = models.Mlp()
            self.state = jax.jit(model.init)(jax.random.key(0), BATCHES[0])
            step = jax.jit(lambda variables, x: model.apply(variables, x).mean())
        self.eval_step = self.calibrator.wrap(step)
        self.scale = 1.0

    def evaluate(self, state):
        for batch in BATCHES:
            self.eval_step(state, self.scale * batch)


@pytest.mark.parametrize("framework", ["linen", "nnx"])
def test_each_run_starts_fresh(framework):
    loop = Loop(framework)
    hook = hooks.Calibrate(loop.calibrator, loop.evaluate, every_steps=2)
    assert (hook.quant_stats, hook.step) == (None, None)
    for step in range(1, 6):
        loop.scale = float(step)
        assert hook(step, None, loop.state) == (step in (2, 4))
        if step >= 2:
            ran = step // 2 * 2
            assert hook.step == ran
            found = absmax(hook.quant_stats, loop.layer)
            np.testing.assert_allclose(found, ran * MEAN_ABSMAX, rtol=1e-6)


def test_runs_may_add_up():
    loop = Loop("linen")
    hook = hooks.Calibrate(loop.calibrator, loop.evaluate, fresh=False, on_steps=[1, 2])
    hook(1, state=loop.state)
    loop.scale = 3.0
    with pytest.warns(UserWarning, match="far below what was seen"):
        hook(2, state=loop.state)
    found = absmax(hook.quant_stats, "Dense_0")
    np.testing.assert_allclose(found, 2 * MEAN_ABSMAX, rtol=1e-6)


def test_a_function_may_find_the_state_itself():
    loop = Loop("linen")
    hook = hooks.Calibrate(
        loop.calibrator, lambda: loop.evaluate(loop.state), on_steps=[7]
    )
    assert hook(7)
    np.testing.assert_allclose(
        absmax(hook.quant_stats, "Dense_0"), MEAN_ABSMAX, rtol=1e-6
    )


def test_a_run_without_ranges_keeps_the_last():
    loop = Loop("linen")
    hook = hooks.Calibrate(loop.calibrator, loop.evaluate, on_steps=[1, 2])
    hook(1, state=loop.state)
    before = hook.quant_stats
    loop.scale = np.nan
    with pytest.raises(ValueError, match=r"Dense_0/dot_general0_lhs.*not finite"):
        hook(2, state=loop.state)
    assert (hook.quant_stats, hook.step) == (before, 1)


def test_refuses_a_loop_that_skips_the_wrapped_step():
    hook = hooks.Calibrate(calib.Calibrator(RULES), lambda: None, on_steps=[1])
    with pytest.raises(ValueError, match="run the wrapped step first"):
        hook(1)


def test_refuses_what_is_no_loop():
    with pytest.raises(TypeError, match="runs the eval loop"):
        hooks.Calibrate(calib.Calibrator(RULES), BATCHES, every_steps=1)
