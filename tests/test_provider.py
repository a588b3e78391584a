"""Providers in the place of rules, and a mode that has a plan of its own."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import numpy as jnp

import qwix_train
from qwix_train import (
    LoraProvider,
    PtqProvider,
    QtProvider,
    QuantizationProvider,
    Schedule,
    attach,
    calib,
    quantize_model,
    wrap_eval_step,
    wrap_train_step,
)
from tests import models
from tests.test_step_ranges import (
    BATCHES,
    RULES,
    Mlp,
    NnxMlp,
    eval_step,
    new_state,
    train_step,
)


class FirstOp(QtProvider):
    """A mode that quantizes the first op of a call, whatever the rules match."""

    def plan(self, traced):
        plan = super().plan(traced)
        first, *others = plan.ops
        left = [
            dataclasses.replace(op, weights=(), activations=(None, None), static=False)
            for op in others
        ]
        params = {
            path: param
            if path in first.weights
            else dataclasses.replace(param, how=None, op=None)
            for path, param in plan.params.items()
        }
        return dataclasses.replace(plan, ops=(first, *left), params=params)


class Float(QuantizationProvider):
    """A mode that does nothing yet."""

    def transform(self, traced, plan):
        return traced.run([], None, lambda _: None)


def first_layer_quantized(params, x):
    hidden = nn.tanh(models.dense(params["Dense_0"], x))
    return hidden @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"]


@pytest.mark.thinned(3)
@pytest.mark.parametrize("door", ["linen", "nnx", "function", "step"])
def test_a_plan_of_its_own_is_what_every_door_carries_out(door):
    provider, x = FirstOp(models.INT8), BATCHES[0]
    state = new_state()
    params = state.params
    want = first_layer_quantized(params, x)
    if door == "linen":
        out = quantize_model(Mlp(), provider).apply({"params": params}, x)
    elif door == "nnx":
        out = quantize_model(NnxMlp(params), provider, x)(x)
    elif door == "function":
        model = qwix_train.quantize_fn(Mlp().apply, provider)
        out = model({"params": params}, x)
    else:
        out, want = wrap_eval_step(eval_step, provider)(state, x), jnp.mean(want**2)
    models.assert_close(out, want)


def test_plans_of_providers_are_shown():
    for model in (Mlp(), NnxMlp(new_state().params)):
        table = qwix_train.plan(model, FirstOp(models.INT8), BATCHES[0])
        assert [op.quantized for op in table.ops] == [True, False]


def test_a_plan_that_quantizes_nothing_is_an_error_of_the_step():
    class NoOp(QtProvider):
        def plan(self, traced):
            plan = super().plan(traced)
            ops = [
                dataclasses.replace(op, weights=(), activations=(None, None))
                for op in plan.ops
            ]
            return dataclasses.replace(plan, ops=tuple(ops))

    with pytest.raises(ValueError, match="train_step: No rule quantizes"):
        wrap_train_step(train_step, NoOp(models.INT8))(new_state(), BATCHES[0])


@pytest.mark.slow
@pytest.mark.parametrize("wrap", [wrap_train_step, wrap_eval_step])
def test_a_wrapped_step_takes_a_qt_provider(wrap):
    step = train_step if wrap is wrap_train_step else eval_step
    args = new_state(), BATCHES[0]
    by_rules = wrap(step, models.INT8)(*args)
    models.assert_same(wrap(step, QtProvider(models.INT8))(*args), by_rules)
    models.assert_differ(
        jax.tree.leaves(step(*args))[-1], jax.tree.leaves(by_rules)[-1]
    )
    # Either says that a model may stay in float.
    nothing = QtProvider(models.NOTHING)
    with pytest.raises(ValueError, match="No rule quantizes"):
        wrap(step, nothing)(*args)
    allowed = QtProvider(models.NOTHING, allow_unmatched=True)
    for quantized in (wrap(step, nothing, allow_unmatched=True), wrap(step, allowed)):
        models.assert_same(quantized(*args), step(*args))
    assert not nothing.allow_unmatched


@pytest.mark.slow
def test_ranges_of_a_provider_are_collected_and_stay():
    provider, state = QtProvider(RULES), new_state()
    calibrators = calib.Calibrator(RULES), calib.Calibrator(provider)
    for x in BATCHES[:3]:
        for calibrator in calibrators:
            calibrator.wrap(eval_step)(state, x)
    by_rules, stats = (calibrator.quant_stats for calibrator in calibrators)
    models.assert_same(stats, by_rules)
    assert calibrators[0].rules == calibrators[1].rules == tuple(RULES)
    bound = np.mean([np.abs(x).max() for x in BATCHES[:3]]) * models.MARGIN
    found = stats["Dense_0"]["dot_general0_lhs"]
    np.testing.assert_allclose(found["sum_of_absmax"] / found["count"], [[bound]], 1e-6)
    observed = calib.observe(eval_step, provider)
    pure = functools.reduce(lambda s, x: observed(s, state, x)[0], BATCHES[:3], {})
    models.assert_same(observed.quant_stats(pure), by_rules)

    x = BATCHES[3]
    want = wrap_train_step(train_step, RULES, quant_stats=stats)(state, x)
    fixed = QtProvider(RULES, quant_stats=stats)
    models.assert_same(wrap_train_step(train_step, fixed)(state, x), want)
    step = wrap_train_step(train_step, provider, quant_stats=stats)
    models.assert_same(step(state, x), want)
    assert provider.keeps_quant_stats and provider.quant_stats is None


@pytest.mark.slow
def test_ranges_of_a_provider_are_kept_in_the_state():
    provider, x = QtProvider(RULES), BATCHES[0]
    by_rules = attach(new_state(), RULES, x)
    state = attach(new_state(), provider, x)
    models.assert_same(state.quant_stats, by_rules.quant_stats)
    options = {"schedule": Schedule(quant_stats_warmup=2, quant_stats_freeze_step=3)}
    expected = wrap_train_step(train_step, RULES, **options)
    step = wrap_train_step(train_step, provider, **options)
    for x in BATCHES:
        by_rules, _ = expected(by_rules, x)
        state, _ = step(state, x)
        models.assert_same(
            (state.params, state.quant_stats), (by_rules.params, by_rules.quant_stats)
        )
    assert state.quant_stats["Dense_0"]["dot_general0_lhs"]["count"] == 3
    models.assert_same(
        wrap_eval_step(eval_step, provider)(state, x),
        wrap_eval_step(eval_step, RULES)(state, x),
    )
    model = attach(NnxMlp(new_state().params), provider, x)
    ranges = nnx.state(model, qwix_train.QuantStat)
    found = {path[:-1] for path, _ in nnx.to_flat_state(ranges)}
    assert len(found) == 2


def test_providers_that_cannot_are_refused():
    lora = LoraProvider(module_path=".*", rank=2, alpha=4.0)
    state, x = new_state(), BATCHES[0]
    for provider in (PtqProvider(RULES), lora):
        name = type(provider).__name__
        for wrap in (wrap_train_step, wrap_eval_step):
            with pytest.raises(TypeError, match=f"{name} changes the params"):
                wrap(train_step, provider)
    with pytest.raises(TypeError, match="A wrapped step adds no adapters"):
        wrap_train_step(train_step, lora.rules)
    for provider in (PtqProvider(RULES), lora, Float(RULES)):
        message = f"{type(provider).__name__} collects no ranges of activations"
        with pytest.raises(TypeError, match=message):
            calib.Calibrator(provider)
        with pytest.raises(TypeError, match=message):
            calib.observe(eval_step, provider)
    for provider in (PtqProvider(RULES), Float(RULES)):
        message = f"nothing to attach: no rule of {type(provider).__name__} sets"
        with pytest.raises(ValueError, match=message):
            attach(state, provider, x)
    with pytest.raises(TypeError, match="Float takes no quant_stats"):
        wrap_train_step(train_step, Float(RULES), quant_stats={})
    with pytest.raises(ValueError, match="No rule sets act_static_scale=True"):
        calib.Calibrator(QtProvider(models.INT8))


@pytest.mark.parametrize("base", [QtProvider, PtqProvider, QuantizationProvider])
@pytest.mark.parametrize("name", ["dot_general", "einsum", "get_intercept_map"])
def test_overridden_operations_are_refused(base, name):
    message = rf"Fp8\.{name} would never be called.* plan\(traced\).* transform\("
    operation = {name: lambda self, *args, **kwargs: None}
    with pytest.raises(TypeError, match=message):
        type("Fp8", (base,), operation)([])
    mixin = type("Mixin", (), operation)
    with pytest.raises(TypeError, match=message):
        type("Fp8", (mixin, base), {})([])
