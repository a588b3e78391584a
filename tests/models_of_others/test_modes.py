"""Every mode on models that are written as other projects write theirs.

The reference rounds the weights by hand, in NumPy, and calls the float model.
"""

import functools

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from jax import numpy as jnp

import qwix_train
from qwix_train import calib, lora, ptq
from tests import models
from tests.compare import assert_close, assert_differ, assert_same
from tests.models_of_others.cases import CASES, by_hand

INT8 = [models.rule("int8")]
STATIC = [
    models.rule("int8", "int8", act_static_scale=True, act_calibration_method="absmax")
]
LINEN = [name for name, case in CASES.items() if case.is_linen]
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def plan_of(case, rules):
    if case.is_linen:
        return qwix_train.plan(case.model, rules, *case.inputs)
    return qwix_train.plan(case.params(), rules, *case.inputs)


@pytest.mark.thinned(3)
@every_case
def test_the_plan_lists_every_weight_and_its_channels(case):
    plan = plan_of(case, INT8)
    found = {
        "/".join(map(str, path)): param.how.channelwise_axes
        for path, param in plan.params.items()
        if param.how is not None
    }
    assert found == case.weights


@pytest.mark.thinned(3)
@every_case
def test_an_unchanged_train_step_sees_rounded_weights(case):
    def train_step(params):
        def loss(params):
            return jnp.mean(case.call(params) ** 2)

        if case.is_linen:
            return jax.value_and_grad(loss)(params)
        value, grads = nnx.value_and_grad(loss)(params)
        return value, nnx.state(grads, nnx.Param)

    jit = jax.jit if case.is_linen else nnx.jit
    got = jit(qwix_train.wrap_train_step(train_step, INT8))(case.params())
    # The range is wider than the weights: nothing is clipped, and gradients pass.
    plain = jit(train_step)
    # Some gradients are sums that cancel.
    assert_close(got, plain(by_hand(case, case.params())), 1e-4, atol=1e-5)
    assert_differ(got, plain(case.params()))


@pytest.mark.thinned(3)
@every_case
def test_the_quantized_model_computes_with_rounded_weights(case):
    params = case.params()
    if case.is_linen:
        model, quantized = ptq.quantize(case.model, params, INT8, *case.inputs)
        got = jax.jit(model.apply)({"params": quantized}, *case.inputs)
    else:
        model, quantized = ptq.quantize(params, None, INT8, *case.inputs)
        got = nnx.jit(lambda model, x: model(x))(model, *case.inputs)

    def is_weight(x):
        return isinstance(x, qwix_train.WithAux)

    stored = jax.tree.leaves(quantized, is_leaf=is_weight)
    assert sum(map(is_weight, stored)) == len(case.weights)
    assert_close(got, case.run(by_hand(case, case.params())), 1e-4)


@pytest.mark.slow
@every_case
def test_ranges_of_an_eval_loop_quantize_activations(case):
    params = case.params()
    calibrator = calib.Calibrator(STATIC)
    jit = jax.jit if case.is_linen else nnx.jit
    first = calibrator.wrap(jit(case.call))(params)
    want = case.run(params)
    assert_close(first, want)
    step = qwix_train.wrap_eval_step(
        case.call, STATIC, quant_stats=calibrator.quant_stats
    )
    got = jit(step)(params)
    assert_differ(got, want)
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert error < 0.05


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", LINEN)
def test_adapters_begin_as_the_model_and_train_alone(name):
    case = CASES[name]
    params = case.params()
    rules = [lora.LoraRule(rank=2, alpha=4.0, op_names=("dot_general", "einsum"))]
    state = models.lora_state(
        case.model.apply,
        params,
        optax.adam(0.1),
        rules,
        jax.random.key(2),
        *case.inputs,
    )

    @jax.jit
    def train_step(state):
        def loss(params):
            out = state.apply_fn({"params": params}, *case.inputs)
            return jnp.mean(out**2), out

        (_, out), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        return state.apply_gradients(grads=grads), out

    new, before = train_step(state)
    assert_close(before, case.run(params))
    assert_same(new.frozen, state.frozen)
    assert_differ(train_step(new)[1], before)


@pytest.mark.slow
def test_adapters_of_an_nnx_model():
    case = CASES["nnx decoder"]
    provider = qwix_train.LoraProvider(module_path=".*", rank=2, alpha=4.0)
    model = qwix_train.apply_lora_to_model(
        case.params(), provider, *case.inputs, rngs=nnx.Rngs(1)
    )
    assert_close(case.run(model), case.run(case.params()))
    adapters = nnx.state(model, nnx.LoRAParam)
    assert len(jax.tree.leaves(adapters)) > 0


@pytest.mark.parametrize("method", ["encode", "decode"])
def test_each_method_of_a_model_runs_quantized(method):
    """The model was quantized for training; serving calls its parts."""
    case = CASES["vae"]
    params = case.params()
    _, quantized = ptq.quantize(case.model, params, INT8, *case.inputs)
    model = qwix_train.quantize_model(
        case.model, qwix_train.PtqProvider(INT8), methods=("encode", "decode")
    )
    x = case.inputs[0][:, : 4 if method == "decode" else 8]
    got, want = (
        jax.jit(functools.partial(run.apply, method=method))({"params": held}, x)
        for run, held in ((model, quantized), (case.model, by_hand(case, params)))
    )
    assert_close(got, want, 1e-4)


def test_a_teacher_stays_in_float():
    """Distillation: the step applies the float model beside the one it trains."""
    case = CASES["scanned on axis 1"]
    teacher = case.params()
    params = jax.tree.map(lambda p: p + 0.1, teacher)

    def train_step(params, teacher):
        target = qwix_train.in_float(case.call)(teacher)
        return jnp.mean((case.call(params) - target) ** 2)

    got = jax.jit(qwix_train.wrap_train_step(train_step, INT8))(params, teacher)
    want = jnp.mean((case.run(by_hand(case, params)) - case.run(teacher)) ** 2)
    assert_close(got, want, 1e-4)
