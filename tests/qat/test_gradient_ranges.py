"""Delayed scaling of gradients: their ranges are harvested from the way back."""

import dataclasses

import jax
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training import train_state
from jax import numpy as jnp
from jax.sharding import AxisType

from qwix_train import (
    QtProvider,
    QtRule,
    Schedule,
    attach,
    attached,
    ptq,
    quantize_model,
    ranges,
    wrap_eval_step,
    wrap_train_step,
)
from tests import models
from tests.core import formats_reference

HISTORY = 3
DELAYED = QtRule(
    weight_qtype="float8_e4m3fn",
    act_qtype="float8_e4m3fn",
    act_static_scale=True,
    act_averaging=f"amax_history,{HISTORY}",
    bwd_qtype="float8_e5m2",
    bwd_averaging=f"amax_history,{HISTORY}",
    disable_channelwise_axes=True,
)
GRADIENT = "dot_general0_grad"


def fp8(x, amax, dtype):
    """TransformerEngine's delayed scaling: a scale of the amax of steps before."""
    scale = amax / float(ml_dtypes.finfo(dtype).max)
    return formats_reference.rounded(x / scale, dtype) * scale


class Product(nn.Module):
    """A matrix, and what makes its gradient."""

    @nn.compact
    def __call__(self, x, g):
        w = self.param("w", nn.initializers.normal(0.5), (8, 4))
        return (x @ w * g).sum()


def product_step(state, batch):
    def loss_fn(params, x):
        return state.apply_fn({"params": params}, x, batch["g"])

    grads = jax.grad(loss_fn, (0, 1))(state.params, batch["x"])
    return state.replace(step=state.step + 1), grads


def state_of(model, *inputs, tx=None):
    params = jax.jit(model.init)(jax.random.key(0), *inputs)["params"]
    tx = tx or optax.sgd(0.1)
    return train_state.TrainState.create(apply_fn=model.apply, params=params, tx=tx)


def test_a_step_computes_what_the_recipe_does():
    """The scales are of the widest of the last steps; of this one in the first step."""
    e4m3, e5m2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2
    x, g = models.normal(6, 8, seed=1), models.normal(6, 4, seed=2)
    state = attach(state_of(Product(), x, g), [DELAYED], x, g)
    step = jax.jit(wrap_train_step(product_step, [DELAYED]))
    w = np.asarray(state.params["w"], np.float64)
    seen_x, seen_g = [], []
    for size in (1.0, 3.0, 0.5, 0.2, 0.2, 8.0):
        batch = {"x": size * x, "g": g / size}
        state, (dw, dx) = step(state, batch)
        a, b = (np.asarray(batch[name], np.float64) for name in ("x", "g"))
        before_x, before_g = seen_x[-HISTORY:], seen_g[-HISTORY:]
        qx = fp8(a, max(before_x or [np.abs(a).max()]), e4m3)
        qg = fp8(b, max(before_g or [np.abs(b).max()]), e5m2)
        qw = fp8(w, np.abs(w).max(), e4m3)
        np.testing.assert_allclose(dw["w"], qx.T @ qg, 1e-4, 1e-5)
        clipped = np.abs(a) > max(before_x or [np.inf])
        np.testing.assert_allclose(dx, (qg @ qw.T) * ~clipped, 1e-4, 1e-5)
        seen_x.append(np.abs(a).max())
        seen_g.append(np.abs(b).max())
    history = state.quant_stats[GRADIENT]
    assert history["count"] == len(seen_g)
    np.testing.assert_allclose(history["window_of_absmax"].max(), max(seen_g[-3:]))


class Unrolled(nn.Module):
    """`models.Layers`, layer by layer."""

    @nn.compact
    def __call__(self, x):
        for index in range(3):
            x = jnp.tanh(3 * nn.Dense(6, use_bias=False, name=f"d{index}")(x))
        return x


def train_step(state, x):
    def loss_fn(params):
        return (state.apply_fn({"params": params}, x) ** 2).mean()

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads), loss


@pytest.mark.slow
@pytest.mark.parametrize(
    ("remat", "rounding"),
    [
        ("no remat", None),
        ("remat", None),
        ("remat of the whole", None),
        ("remat", "uniform"),
    ],
)
def test_layers_under_scan_have_a_history_each(remat, rounding):
    rule = dataclasses.replace(DELAYED, bwd_stochastic_rounding=rounding)
    if rounding is not None:  # of e5m2, with its two bits, the noise is large
        rule = dataclasses.replace(rule, bwd_qtype="int8")
    batches = [models.normal(5, 6, seed=seed) for seed in range(4)]

    def trained(model, step, params=None):
        state = state_of(model, batches[0])
        state = state if params is None else state.replace(params=params)
        state = attach(state, [rule], batches[0])
        run = jax.jit(wrap_train_step(step, [rule]))
        for batch in batches:
            state, _ = run(state, batch)
        return state

    def step(state, x):
        if remat != "remat of the whole":
            return train_step(state, x)
        return train_step(state.replace(apply_fn=jax.checkpoint(state.apply_fn)), x)

    whole = models.Layers(remat=remat == "remat")
    found = trained(whole, step if remat == "remat of the whole" else train_step)
    first = state_of(whole, batches[0]).params["layers"]["Dense_0"]["kernel"]
    params = {f"d{index}": {"kernel": first[index]} for index in range(3)}
    wanted = trained(Unrolled(), train_step, params)
    history = found.quant_stats["layers"]["Dense_0"][GRADIENT]
    np.testing.assert_array_equal(history["count"], [4, 4, 4])
    tolerance = 1e-4 if rounding is None else 0.1
    for index in range(3):
        of_layer = wanted.quant_stats[f"d{index}"][GRADIENT]["history_absmax"]
        np.testing.assert_allclose(
            history["history_absmax"][index], of_layer, tolerance
        )


@pytest.mark.thinned(2)
@pytest.mark.parametrize("count", [1, 2])
def test_an_nnx_step_with_accumulation(count):
    """Each micro-batch is a batch of the history."""
    model = models.NnxMlp(nnx.Rngs(0), rate=0.0)
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    x = models.normal(8, 4, seed=3)

    def step(model, optimizer, x):
        def loss_fn(model, x):
            return models.loss_of(model(x), models.classes(x))

        grads = [nnx.grad(loss_fn)(model, part) for part in jnp.split(x, count)]
        optimizer.update(model, jax.tree.map(lambda *x: sum(x), *grads))

    attach(model, [DELAYED], x)
    run = nnx.jit(wrap_train_step(step, [DELAYED]))
    for _ in range(2):
        run(model, optimizer, x)
    for layer in (model.l1, model.l2):
        history = getattr(layer, GRADIENT).get_value()
        assert history["count"] == 2 * count
        assert (history["history_absmax"][: 2 * count] > 0).all()


def test_ranges_of_gradients_are_kept_by_wrapped_steps_alone():
    rule = dataclasses.replace(DELAYED, act_static_scale=None, act_averaging="mean")
    x, g = models.normal(6, 8, seed=1), models.normal(6, 4, seed=2)
    state = state_of(Product(), x, g)
    quantized = quantize_model(Product(), QtProvider([rule]))

    def loss(params):
        return quantized.apply({"params": params}, x, g)

    assert np.isfinite(loss(state.params))
    with pytest.raises(ValueError, match="dot_general0_grad: .* wrap_train_step alone"):
        jax.grad(loss)(state.params)
    message = "or bwd_averaging.*its state has no quant_stats"
    with pytest.raises(ValueError, match=message):
        wrap_train_step(product_step, [rule])(state, {"x": x, "g": g})


@pytest.mark.parametrize(
    ("averaging", "message"),
    [
        ("amax_history,5", r"are those of 3 batches, and AmaxHistory\(length=5\)"),
        ("mean", r"and Mean\(\) needs sum_of_absmax: another rule has made them"),
    ],
)
def test_statistics_of_another_rule(averaging, message):
    x, g = models.normal(6, 8, seed=1), models.normal(6, 4, seed=2)
    rule = dataclasses.replace(DELAYED, act_static_scale=None, act_averaging="mean")
    state = attach(state_of(Product(), x, g), [rule], x, g)
    other = dataclasses.replace(rule, bwd_averaging=averaging)
    step = wrap_train_step(product_step, [other])
    with pytest.raises(ValueError, match=f"{GRADIENT}: .*{message}"):
        jax.eval_shape(step, state, {"x": x, "g": g})
    jax.eval_shape(step, attach(state, [other], x, g), {"x": x, "g": g})


def test_what_overflows_is_seen():
    x, g = models.normal(6, 8, seed=1), models.normal(6, 4, seed=2)
    state = attach(state_of(Product(), x, g), [DELAYED], x, g)
    step = jax.jit(wrap_train_step(product_step, [DELAYED]))
    state, _ = step(state, {"x": x, "g": g})
    after, (dw, _) = step(state, {"x": x, "g": g.at[0, 0].set(jnp.inf)})
    assert np.isnan(dw["w"]).any()
    history = after.quant_stats[GRADIENT]
    assert history["skipped"] == 1 and history["count"] == 1


@pytest.mark.slow
def test_what_was_trained_so_is_evaluated_scheduled_and_served():
    x = models.normal(6, 8, seed=1)
    model = models.Mlp()
    state = attach(state_of(model, x), [DELAYED], x)
    schedule = Schedule(start_step=1)
    step = jax.jit(wrap_train_step(train_step, [DELAYED], schedule=schedule))
    for count in range(3):
        history = state.quant_stats["Dense_0"][GRADIENT]
        assert history["count"] == max(0, count - 1)  # none while in float
        state, _ = step(state, x)

    def eval_step(state, x):
        return state.apply_fn({"params": state.params}, x)

    wanted = jax.jit(wrap_eval_step(eval_step, [DELAYED]))(state, x)
    for stats in (state.quant_stats, ranges(state, [DELAYED])):
        served, params = ptq.quantize(
            model, state.params, [DELAYED], x, quant_stats=stats
        )
        out = jax.jit(served.apply)({"params": params}, x)
        models.assert_close(out, wanted, 1e-4)
    assert set(ranges(state, [DELAYED])["Dense_0"]) == {"dot_general0_lhs"}
    assert attached(state)[f"Dense_0/{GRADIENT}"] == "range of 2 batches"


@pytest.mark.slow
def test_an_explicit_mesh():
    x, g = models.normal(8, 8, seed=1), models.normal(8, 4, seed=2)
    state = attach(state_of(Product(), x, g), [DELAYED], x, g)
    step = jax.jit(wrap_train_step(product_step, [DELAYED]))
    wanted = step(step(state, {"x": x, "g": g})[0], {"x": x / 2, "g": g / 2})
    with jax.set_mesh(jax.make_mesh((8,), ("data",), (AxisType.Explicit,))):
        placed = jax.device_put((x, g), jax.P("data"))
        first = {"x": placed[0], "g": placed[1]}
        second = jax.tree.map(lambda x: x / 2, first)
        found = step(step(jax.device_put(state, jax.P()), first)[0], second)
        assert found[1][1].sharding.spec == jax.P("data", None)
        models.assert_close(found[1], wanted[1], 1e-4)
        models.assert_close(found[0].quant_stats, wanted[0].quant_stats)
