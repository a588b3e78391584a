"""Quantized training in models and steps: unbiased, reproducible, wherever it runs."""

import functools

import jax
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training import train_state
from jax import numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from qwix_train import (
    QtProvider,
    QtRule,
    QuantizationRule,
    attach,
    plan,
    quantize_fn,
    quantize_model,
    wrap_train_step,
)
from qwix_train import ptq as ptq_lib
from tests import models

MARGIN = {
    "weight_calibration_method": "absmax,1.1",
    "act_calibration_method": "absmax,1.1",
}
FORWARD = dict(weight_qtype="int8", act_qtype="int8", **MARGIN)
NEAREST = [QtRule(**FORWARD, bwd_qtype="int8", bwd_calibration_method="absmax,1.1")]
STOCHASTIC = [
    QtRule(
        **FORWARD,
        bwd_qtype="int8",
        bwd_stochastic_rounding="uniform",
        channelwise_noise_axes=(0, 1),
    )
]
X = models.normal(6, 8, seed=0)


def gradients_of(model, rules, params, x=X, **kwargs):
    quantized = quantize_model(model, QtProvider(rules))

    def loss(params, x, **kwargs):
        return (quantized.apply({"params": params}, x, **kwargs) ** 2).sum()

    return jax.value_and_grad(loss, (0, 1))(params, x, **kwargs)


def params_of(model, x=X):
    return jax.jit(model.init)(jax.random.key(1), x)["params"]


@pytest.mark.thinned(8)
@pytest.mark.parametrize("noise", ["uniform", "low_bit_uniform"])
@pytest.mark.parametrize("qtype", ["int8", "float8_e5m2", "int4", "float8_e4m3fn"])
def test_gradients_are_those_of_the_float_backward_on_average(qtype, noise):
    draws = 3000
    stochastic = QtRule(**FORWARD, bwd_qtype=qtype, bwd_stochastic_rounding=noise)
    model = models.Mlp(width=4)
    params = params_of(model)

    @jax.jit
    @jax.vmap
    def draw(key):
        rngs = {"stochastic_rounding": key}
        return gradients_of(model, [stochastic], params, rngs=rngs)[1]

    exact = jax.jit(
        functools.partial(gradients_of, model, [QuantizationRule(**FORWARD)])
    )(params)[1]
    drawn = draw(jax.random.split(jax.random.key(2), draws))
    spread = 0
    for got, want in zip(jax.tree.leaves(drawn), jax.tree.leaves(exact), strict=True):
        got = np.asarray(got, np.float64)
        error = got.std(0) / np.sqrt(draws)
        # Eight random bits leave a bias of up to 1/512 of a step.
        slack = 0.02 * got.std(0) if noise == "low_bit_uniform" else 0
        assert np.all(np.abs(got.mean(0) - want) < 4.5 * error + slack + 1e-4)
        spread = max(spread, (got.std(0) / np.abs(want).max()).max())
    assert spread > 1e-3


@pytest.mark.slow
def test_noise_depends_on_the_key_of_the_model_the_data_and_the_op_alone():
    model = nn.Dense(5, use_bias=False)
    params = params_of(model)
    run = jax.jit(functools.partial(gradients_of, model, STOCHASTIC))
    first = run(params)[1]
    models.assert_same(first, run(params)[1])
    keyed = jax.jit(
        lambda key: gradients_of(
            model, STOCHASTIC, params, rngs={"stochastic_rounding": key}
        )[1]
    )
    one, other = (keyed(jax.random.key(seed)) for seed in range(2))
    models.assert_differ(one, other)
    models.assert_differ(one, first)


@pytest.mark.slow
def test_ops_with_the_same_gradient_have_noise_of_their_own():
    def twice(params, x):
        return x @ params["a"] + x @ params["b"]

    w = jax.random.normal(jax.random.key(3), (8, 5))
    g = jax.random.normal(jax.random.key(4), (6, 5))
    quantized = quantize_fn(twice, QtProvider(STOCHASTIC))
    (grads,) = jax.vjp(lambda p: quantized(p, X), {"a": w, "b": w})[1](g)
    models.assert_differ(grads["a"], grads["b"])


@pytest.mark.slow
@pytest.mark.parametrize("remat", [False, True])
def test_layers_under_scan_compute_what_they_do_one_by_one(remat):
    scanned = models.Layers(remat=remat)
    x = X[:, :6]
    params = params_of(scanned, x)

    class Unrolled(nn.Module):
        @nn.compact
        def __call__(self, x):
            for index in range(3):
                x = jnp.tanh(3 * nn.Dense(6, use_bias=False, name=f"d{index}")(x))
            return x

    stacked = params["layers"]["Dense_0"]["kernel"]
    separate = {f"d{index}": {"kernel": stacked[index]} for index in range(3)}
    got = jax.jit(functools.partial(gradients_of, scanned, NEAREST))(params, x)
    want = jax.jit(functools.partial(gradients_of, Unrolled(), NEAREST))(separate, x)
    models.assert_close(got[0], want[0])
    models.assert_close(got[1][1], want[1][1], 1e-4)
    kernels = [want[1][0][f"d{index}"]["kernel"] for index in range(3)]
    models.assert_close(got[1][0]["layers"]["Dense_0"]["kernel"], np.stack(kernels))
    if not remat:
        return
    # With noise they differ, but are close.
    noisy = jax.jit(functools.partial(gradients_of, scanned, STOCHASTIC))(params, x)
    models.assert_close(noisy[0], want[0])
    models.assert_close(noisy[1][1], want[1][1], 0.05 * float(abs(want[1][1]).max()))


@pytest.mark.slow
def test_one_scale_for_each_layer_under_scan():
    rules = [QtRule(**FORWARD, bwd_qtype="int8", disable_channelwise_axes=True)]
    model, x = models.Layers(), X[:, :6]
    found = plan(model, rules, x)
    (param,), (op,) = found.params.values(), found.quantized_ops
    assert param.how.scale_shape(param.shape) == (3, 1, 1)
    assert op.activations[0].scale_shape((6, 6)) == (1, 1)
    assert op.reason == "gradients int8"
    params = params_of(model, x)
    trained = quantize_model(model, QtProvider(rules)).apply({"params": params}, x)
    served, codes = ptq_lib.quantize(model, params, rules, x)
    models.assert_close(served.apply({"params": codes}, x), trained)


def step_of(apply):
    def train_step(state, batch):
        def loss_fn(params):
            logits = apply(state, params, batch)
            return models.loss_of(logits, models.classes(batch))

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        return state.apply_gradients(grads=grads), loss

    return train_step


def state_of(model, x=X):
    return train_state.TrainState.create(
        apply_fn=model.apply, params=params_of(model, x), tx=optax.adam(0.02)
    )


def run_steps(step, state, count=20):
    losses = []
    for seed in range(count):
        state, loss = step(state, jax.random.normal(jax.random.key(seed), (32, 8)))
        losses.append(float(loss))
    return state, losses


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        dict(FORWARD, bwd_qtype="int8", bwd_stochastic_rounding="low_bit_uniform"),
        dict(
            weight_qtype="float8_e4m3fn",
            act_qtype="float8_e4m3fn",
            act_static_scale=True,
            act_averaging="amax_history,4",
            bwd_qtype="float8_e5m2",
            bwd_stochastic_rounding="uniform",
        ),
    ],
    ids=["int8", "float8 with delayed scaling"],
)
def test_a_step_trains_resumes_and_is_served(fields, tmp_path):
    rules = [QtRule(**fields)]
    model = models.Mlp()
    train_step = step_of(lambda state, p, x: state.apply_fn({"params": p}, x))
    start = state_of(model)
    if fields.get("act_static_scale"):
        start = attach(start, rules, jnp.ones((32, 8)))
    step = jax.jit(wrap_train_step(train_step, rules))
    middle, losses = run_steps(step, start)
    assert np.mean(losses[-5:]) < 0.7 * losses[0]
    # From the middle of the run, in a compilation of its own.
    again = jax.jit(wrap_train_step(train_step, rules))
    restored = jax.tree.map(np.asarray, middle)
    models.assert_same(run_steps(again, restored, 2), run_steps(step, middle, 2))
    # PTQ serves what the rules say of the forward.
    x = jax.random.normal(jax.random.key(9), (4, 8))
    stats = middle.quant_stats if fields.get("act_static_scale") else None
    served, params = ptq_lib.quantize(model, middle.params, rules, x, quant_stats=stats)
    provider = QtProvider(rules, quant_stats=stats)
    apply = jax.jit(quantize_model(model, provider).apply)
    trained = apply({"params": middle.params}, x)
    models.assert_close(jax.jit(served.apply)({"params": params}, x), trained, 1e-4)


@pytest.mark.slow
def test_an_nnx_step_under_accumulation():
    model = models.NnxMlp(nnx.Rngs(0), rate=0.0)
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)

    def train_step(model, optimizer, x):
        def loss_fn(model, x):
            return models.loss_of(model(x), models.classes(x))

        grads = [nnx.grad(loss_fn)(model, part) for part in jnp.split(x, 2)]
        optimizer.update(model, jax.tree.map(lambda a, b: (a + b) / 2, *grads))

    def run(rules):
        copy, update = nnx.clone((model, optimizer))
        step = train_step if rules is None else wrap_train_step(train_step, rules)
        nnx.jit(step)(copy, update, X[:, :4])
        return nnx.to_pure_dict(nnx.state(copy, nnx.Param))

    before = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    plain, quantized = run([QuantizationRule(**FORWARD)]), run(STOCHASTIC)
    models.assert_differ(plain, quantized)
    change = jax.tree.map(lambda a, b: abs(a - b).max(), plain, before)
    apart = jax.tree.map(lambda a, b: abs(a - b).max(), plain, quantized)
    assert max(jax.tree.leaves(apart)) < 0.05 * max(jax.tree.leaves(change))


@pytest.mark.slow
@pytest.mark.parametrize("rules", [NEAREST, STOCHASTIC], ids=["nearest", "stochastic"])
def test_per_example_and_sharded_gradients(rules):
    model = models.Mlp()
    params = params_of(model)
    one = jax.jit(lambda x: gradients_of(model, rules, params, x[None])[1][1][0])
    mapped = jax.jit(jax.vmap(one))(X)
    models.assert_close(mapped, jnp.stack([one(x) for x in X]), 1e-4)
    mesh = jax.make_mesh((8,), ("d",), (jax.sharding.AxisType.Auto,))
    x = jax.random.normal(jax.random.key(7), (16, 8))
    run = jax.jit(lambda x: gradients_of(model, rules, params, x))
    sharded = run(jax.device_put(x, NamedSharding(mesh, PartitionSpec("d"))))
    tolerance = 1e-4 if rules is NEAREST else 0.05 * float(abs(run(x)[1][1]).max())
    models.assert_close(sharded, run(x), tolerance)


def test_without_bwd_qtype_it_is_a_quantization_rule():
    model = models.Mlp()
    params = params_of(model)
    texts = [
        str(
            jax.make_jaxpr(functools.partial(gradients_of, model, [cls(**FORWARD)]))(
                params
            )
        )
        for cls in (QtRule, QuantizationRule)
    ]
    assert texts[0] == texts[1]


@pytest.mark.slow
def test_ops_of_other_rules_read_the_same_weight():
    table = jax.random.normal(jax.random.key(1), (7, 8))

    def tied(params, tokens):
        x = params["table"][tokens]
        return jnp.tanh(x) @ params["table"].T * params["table"].sum()

    tokens = jnp.array([1, 5, 2])
    quantized = quantize_fn(tied, QtProvider(NEAREST))
    want = quantize_fn(tied, QtProvider([QuantizationRule(**FORWARD)]))
    params = {"table": table}
    models.assert_close(quantized(params, tokens), want(params, tokens))
    got = jax.grad(lambda p: quantized(p, tokens).sum())(params)["table"]
    plain = jax.grad(lambda p: want(p, tokens).sum())(params)["table"]
    models.assert_close(got, plain, 0.02 * float(abs(plain).max()))


def test_forward_mode_is_refused_as_documented():
    quantized = quantize_fn(lambda w, x: x @ w, QtProvider(NEAREST))
    w = jnp.ones((8, 3))
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(lambda w: quantized(w, X), (w,), (w,))


@pytest.mark.parametrize("power", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_second_derivatives_are_refused_as_documented(power):
    quantized = quantize_fn(lambda w, x: x @ w, QtProvider(NEAREST))
    w = jnp.ones((8, 3))

    def gradient(x, given=lambda g: g):
        grads = jax.grad(lambda w: (quantized(w, x) ** power).sum())(w)
        return (given(grads) ** 2).sum()

    with pytest.raises(NotImplementedError, match="dot_general0: .* no gradient of"):
        jax.grad(gradient)(X)
    # It is not needed here.
    assert not jax.grad(lambda x: gradient(x, jax.lax.stop_gradient))(X).any()
