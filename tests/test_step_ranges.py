"""Static ranges that training keeps up to date, against loops that thread them."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import nnx, struct
from flax.training import train_state
from jax import numpy as jnp

import qwix_train
from qwix_train import QuantizationRule, QuantTrainState, Schedule, attach
from tests import models

RATE = 0.1
RULES = [models.rule("int8", "int8", act_static_scale=True)]
BATCHES = [
    np.random.default_rng(i).normal(size=(8, 6)).astype(np.float32) * (1 + i % 3)
    for i in range(5)
]
KEY = jax.random.key(0)
STATIC = {"weight_qtype": "int8", "act_qtype": "int8", "act_static_scale": True}


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(7)(x)
        return nn.Dense(3)(nn.tanh(x))


class NnxMlp(nnx.Module):
    def __init__(self, params):
        self.Dense_0 = nnx.Linear(6, 7, rngs=nnx.Rngs(0))
        self.Dense_1 = nnx.Linear(7, 3, rngs=nnx.Rngs(1))
        for name, layer in params.items():
            for leaf, value in layer.items():
                getattr(getattr(self, name), leaf).set_value(value)

    def __call__(self, x):
        return self.Dense_1(nnx.tanh(self.Dense_0(x)))


def new_state(cls=train_state.TrainState, **kwargs) -> Any:
    model = Mlp()
    params = models.params_of(model, BATCHES[0])
    return cls.create(apply_fn=model.apply, params=params, tx=optax.sgd(RATE), **kwargs)


def train_step(state, x):
    def loss_fn(params):
        return jnp.mean(state.apply_fn({"params": params}, x) ** 2)

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads), loss


def eval_step(state, x):
    return jnp.mean(state.apply_fn({"params": state.params}, x) ** 2)


def static_fake_quant(x, bound):
    """Fake quantization in a range, and its straight-through gradient."""
    scale = bound / 127.5
    codes = jnp.clip(jnp.round(x / scale), -128, 127)
    passed = jnp.where(jnp.abs(x) <= bound, x, jax.lax.stop_gradient(x))
    return passed + jax.lax.stop_gradient(codes * scale - passed)


@functools.partial(jax.jit, static_argnames="update")
def forward_with_ranges(params, x, past, update):
    """The loss, and what each layer measured: `past` has the ranges summed before."""
    seen = []
    for i, (total, weight, decay) in enumerate(past):
        layer = params[f"Dense_{i}"]
        kernel = models.fake_quant(layer["kernel"], 8, 0)
        measured = jax.lax.stop_gradient(models.MARGIN * jnp.max(jnp.abs(x)))
        seen.append(measured)
        if update:
            bound = (decay * total + measured) / (decay * weight + 1)
        else:
            bound = jnp.where(weight > 0, total / weight, measured)
        x = static_fake_quant(x, bound) @ kernel + layer["bias"]
        x = jnp.tanh(x) if i == 0 else x
    return jnp.mean(x**2), seen


class Threaded:
    """The same training, with ranges threaded by hand."""

    def __init__(self, combine="mean"):
        self.params = new_state().params
        self.history = ([], [])
        self.decay = 1.0 if combine == "mean" else float(combine)

    def past(self):
        for history in self.history:
            weights = self.decay ** np.arange(len(history))[::-1]
            yield np.float32([np.dot(weights, history), sum(weights), self.decay])

    def forward(self, params, x, update):
        return forward_with_ranges(params, x, [*self.past()], update)[0]

    def step(self, x, update=True):
        grad = jax.value_and_grad(forward_with_ranges, has_aux=True)
        (loss, seen), grads = grad(self.params, x, [*self.past()], update)
        self.params = jax.tree.map(lambda p, g: p - RATE * g, self.params, grads)
        for history, measured in zip(self.history, seen, strict=True):
            if update:
                history.append(float(measured))
        return loss

    def check(self, params, quant_stats, name="sum_of_absmax"):
        models.assert_close(params, self.params)
        for i, history in enumerate(self.history):
            stats = quant_stats[f"Dense_{i}"]["dot_general0_lhs"]
            assert stats["count"] == len(history)
            if name == "sum_of_absmax":
                np.testing.assert_allclose(stats[name], [[sum(history)]], 1e-6)


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    "how",
    ["jit", "jitted before", pytest.param("eager", marks=pytest.mark.slow)],
)
def test_ranges_are_updated_and_used_in_an_unchanged_step(how):
    state = attach(new_state(), RULES, BATCHES[0])
    step = jax.jit(train_step) if how == "jitted before" else train_step
    step = qwix_train.wrap_train_step(step, RULES)
    step = jax.jit(step) if how == "jit" else step
    evaluate = jax.jit(qwix_train.wrap_eval_step(eval_step, RULES))
    expected = Threaded()
    for x in BATCHES:
        np.testing.assert_allclose(
            evaluate(state, x), expected.forward(expected.params, x, False), 1e-5
        )
        state, loss = step(state, x)
        np.testing.assert_allclose(loss, expected.step(x), 1e-5)
    expected.check(state.params, state.quant_stats)
    assert int(state.step) == len(BATCHES)


def nnx_step(model, optimizer, x):
    loss, grads = nnx.value_and_grad(lambda model: jnp.mean(model(x) ** 2))(model)
    optimizer.update(model, grads)
    return loss


@pytest.mark.thinned(6)
@pytest.mark.parametrize("how", ["jit", "eager", "jitted before"])
def test_the_same_with_nnx_objects(how):
    expected = Threaded()
    model = NnxMlp(expected.params)
    assert attach(model, RULES, BATCHES[0]) is model
    optimizer = nnx.Optimizer(model, optax.sgd(RATE), wrt=nnx.Param)
    step = nnx.jit(nnx_step) if how == "jitted before" else nnx_step
    step = qwix_train.wrap_train_step(step, RULES)
    step = nnx.jit(step) if how == "jit" else step
    evaluate = nnx.jit(
        qwix_train.wrap_eval_step(lambda model, x: jnp.mean(model(x) ** 2), RULES)
    )
    for x in BATCHES:
        np.testing.assert_allclose(
            evaluate(model, x), expected.forward(expected.params, x, False), 1e-5
        )
        np.testing.assert_allclose(step(model, optimizer, x), expected.step(x), 1e-5)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    stats = nnx.to_pure_dict(nnx.state(model, qwix_train.QuantStat))
    expected.check(params, stats)
    # The model is what it was, in float, but for its ranges.
    x = BATCHES[0]
    np.testing.assert_allclose(
        model(x), new_state().apply_fn({"params": expected.params}, x), 1e-4, 1e-5
    )


def test_a_moving_average():
    rules = [dataclasses.replace(RULES[0], act_averaging="ema,0.75")]
    state = attach(new_state(), rules, BATCHES[0])
    step = jax.jit(qwix_train.wrap_train_step(train_step, rules))
    expected = Threaded("0.75")
    for x in BATCHES:
        state, loss = step(state, x)
        np.testing.assert_allclose(loss, expected.step(x), 1e-5)
    expected.check(state.params, state.quant_stats, "ema_of_absmax")


@pytest.mark.slow
@pytest.mark.parametrize("observer", ["percentile,99", "mse"])
def test_observers_of_all_data(observer):
    """The range is that of a calibration over the same activations."""
    rules = [dataclasses.replace(RULES[0], act_observer=observer)]
    state = attach(new_state(), rules, BATCHES[0])
    step = jax.jit(qwix_train.wrap_train_step(train_step, rules))
    first = qwix_train.calib.Calibrator(rules)
    collect = first.wrap(jax.jit(eval_step))
    for x in BATCHES:
        collect(state, x)
        state, loss = step(state, x)
        assert np.isfinite(loss)
    # The input of the first layer is the batch, whatever the params.
    ours = state.quant_stats["Dense_0"]["dot_general0_lhs"]
    models.assert_close(ours, first.state["Dense_0/dot_general0_lhs"])
    ranges = qwix_train.ranges(state, rules)
    models.assert_close(ranges["Dense_0"], first.quant_stats["Dense_0"])
    with pytest.raises(ValueError, match="Find the ranges with qwix_train.ranges"):
        qwix_train.ptq.quantize(
            Mlp(), state.params, rules, BATCHES[0], quant_stats=state.quant_stats
        )
    model, params = qwix_train.ptq.quantize(
        Mlp(), state.params, rules, BATCHES[0], quant_stats=ranges
    )
    evaluate = jax.jit(qwix_train.wrap_eval_step(eval_step, rules))
    np.testing.assert_allclose(
        np.mean(jax.jit(model.apply)({"params": params}, BATCHES[0]) ** 2),
        evaluate(state, BATCHES[0]),
        1e-4,
    )


def test_frozen_paused_and_warming_up():
    state = attach(new_state(), RULES, BATCHES[0])
    frozen = jax.jit(
        qwix_train.wrap_train_step(
            train_step, RULES, schedule=Schedule(quant_stats_freeze_step=2)
        )
    )
    expected = Threaded()
    for i, x in enumerate(BATCHES):
        state, loss = frozen(state, x)
        np.testing.assert_allclose(loss, expected.step(x, update=i < 2), 1e-5)
    expected.check(state.params, state.quant_stats)

    paused = qwix_train.wrap_train_step(train_step, RULES, update_quant_stats=False)
    before = state.quant_stats
    state, loss = jax.jit(paused)(state, BATCHES[0])
    np.testing.assert_allclose(loss, expected.step(BATCHES[0], update=False), 1e-5)
    models.assert_same(before, state.quant_stats)

    step = jax.jit(
        qwix_train.wrap_train_step(
            train_step, RULES, update_quant_stats=lambda state, x: state.step % 2 == 0
        )
    )
    for x in BATCHES:
        update = int(state.step) % 2 == 0
        state, loss = step(state, x)
        np.testing.assert_allclose(loss, expected.step(x, update), 1e-5)
    expected.check(state.params, state.quant_stats)


def test_until_statistics_are_warm_the_batch_has_its_own_range():
    state = attach(new_state(), RULES, BATCHES[0])
    step = jax.jit(
        qwix_train.wrap_train_step(
            train_step, RULES, schedule=Schedule(quant_stats_warmup=3)
        )
    )
    losses = []
    for x in BATCHES[:3]:
        alone = Threaded()
        alone.params = state.params
        state, loss = step(state, x)
        losses.append((loss, alone.step(x)))
    (_, _), (second, own), (third, not_own) = losses
    np.testing.assert_allclose(second, own, 1e-5)
    assert abs(third - not_own) > 1e-5 * abs(not_own)
    cold = Schedule(quant_stats_warmup=99, start_step=7)
    outlier = jax.device_put(BATCHES[0]).at[0, 0].set(40.0)
    found = [
        qwix_train.wrap_eval_step(eval_step, RULES, schedule=schedule)(state, outlier)
        for schedule in (None, cold)
    ]
    fresh = Threaded()
    fresh.params = state.params
    np.testing.assert_allclose(found[1], fresh.step(outlier), 1e-5)
    assert abs(found[0] - found[1]) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["nested", False, True])
def test_scanned_layers_remat_and_micro_batches_at_once(remat):
    model = models.Layers(bool(remat))
    params = jax.jit(model.init)(KEY, BATCHES[0])["params"]
    state = train_state.TrainState.create(
        apply_fn=model.apply, params=params, tx=optax.sgd(RATE)
    )

    def step(state, batches):
        def loss_fn(params, x):
            return jnp.mean(state.apply_fn({"params": params}, x) ** 2)

        whole = jax.checkpoint(loss_fn) if remat == "nested" else loss_fn

        def body(total, x):
            loss, grads = jax.value_and_grad(whole)(state.params, x)
            return jax.tree.map(jnp.add, total, grads), loss

        zeros = jax.tree.map(jnp.zeros_like, params)
        grads, losses = jax.lax.scan(body, zeros, batches)
        return state.apply_gradients(grads=grads), losses

    state = attach(state, RULES, jnp.stack(BATCHES), step=step)
    stats = state.quant_stats["layers"]["Dense_0"]["dot_general0_lhs"]
    assert stats["count"].shape == (3,) and stats["sum_of_absmax"].shape == (3, 1, 1)
    kernels = params["layers"]["Dense_0"]["kernel"]
    wrapped = jax.jit(qwix_train.wrap_train_step(step, RULES))
    state, losses = wrapped(state, jnp.stack(BATCHES))
    # Each micro-batch measures itself; what the step started with was empty.
    ranges, expected = [], []
    for x in BATCHES:
        ranges.append([])
        for kernel in kernels:
            ranges[-1].append(models.MARGIN * np.abs(x).max())
            x = static_fake_quant(x, ranges[-1][-1])
            x = np.tanh(3 * (x @ models.fake_quant(kernel, 8, 0)))
        expected.append(np.mean(x**2))
    stats = state.quant_stats["layers"]["Dense_0"]["dot_general0_lhs"]
    np.testing.assert_array_equal(stats["count"], [5, 5, 5])
    np.testing.assert_allclose(
        np.ravel(stats["sum_of_absmax"]), np.sum(ranges, 0), 1e-5
    )
    np.testing.assert_allclose(losses, expected, 1e-5)


def test_what_was_trained_is_what_is_exported():
    state = attach(new_state(), RULES, BATCHES[0])
    step = jax.jit(qwix_train.wrap_train_step(train_step, RULES))
    for x in BATCHES:
        state, _ = step(state, x)
    evaluate = qwix_train.wrap_eval_step(
        lambda state, x: state.apply_fn({"params": state.params}, x), RULES
    )
    for rules in (RULES, [dataclasses.replace(RULES[0], act_averaging="minmax")]):
        model, params = qwix_train.ptq.quantize(
            Mlp(), state.params, rules, BATCHES[0], quant_stats=state.quant_stats
        )
        np.testing.assert_allclose(
            model.apply({"params": params}, BATCHES[0]),
            evaluate(state, BATCHES[0]),
            1e-5,
            1e-5,
        )


@pytest.mark.thinned(3)
@pytest.mark.parametrize("averaging", ["ema,0.9", "minmax", "last"])
def test_other_averages_are_exported_too(averaging):
    rules = [dataclasses.replace(RULES[0], act_averaging=averaging)]
    state = attach(new_state(), rules, BATCHES[0])
    step = jax.jit(qwix_train.wrap_train_step(train_step, rules))
    for x in BATCHES:
        state, _ = step(state, x)
    model, params = qwix_train.ptq.quantize(
        Mlp(), state.params, rules, BATCHES[0], quant_stats=state.quant_stats
    )
    evaluate = qwix_train.wrap_eval_step(
        lambda state, x: state.apply_fn({"params": state.params}, x), rules
    )
    np.testing.assert_allclose(
        model.apply({"params": params}, BATCHES[0]),
        evaluate(state, BATCHES[0]),
        1e-5,
        1e-5,
    )


@pytest.mark.slow
def test_a_run_goes_on_from_a_checkpoint(tmp_path):
    state = attach(new_state(), RULES, BATCHES[0])
    step = jax.jit(qwix_train.wrap_train_step(train_step, RULES))
    for x in BATCHES[:2]:
        state, _ = step(state, x)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
    fresh = attach(new_state(), RULES, BATCHES[0])
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "state", fresh)
    for x in BATCHES[2:]:
        state, loss = step(state, x)
        restored, again = step(restored, x)
        assert loss == again
    models.assert_same(state.quant_stats, restored.quant_stats)


class OwnState(train_state.TrainState):
    batch_stats: dict


@struct.dataclass
class Bare:
    params: Any
    quant_stats: dict = struct.field(default_factory=dict)


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(7)(x))
        return nn.Dense(3)(nn.tanh(x))


def test_states_of_your_own():
    model = Normed()
    variables = jax.jit(model.init)(KEY, BATCHES[0])
    state = OwnState.create(apply_fn=model.apply, tx=optax.sgd(RATE), **variables)
    made = attach(state, RULES, BATCHES[0])
    assert isinstance(made, OwnState)
    again = attach(state, RULES, BATCHES[0])
    assert jax.tree.structure(made) == jax.tree.structure(again)

    def step(state, x):
        def loss_fn(params):
            variables = {"params": params, "batch_stats": state.batch_stats}
            out, updates = state.apply_fn(
                variables, x, train=True, mutable=["batch_stats"]
            )
            return jnp.mean(out**2), updates

        grads, updates = jax.grad(loss_fn, has_aux=True)(state.params)
        return state.apply_gradients(grads=grads, **updates)

    step = jax.jit(qwix_train.wrap_train_step(step, RULES), donate_argnums=0)
    made: Any = step(made, BATCHES[0])
    assert made.quant_stats["Dense_1"]["dot_general0_lhs"]["count"] == 1
    assert not np.allclose(made.batch_stats["BatchNorm_0"]["mean"], 0)

    created = new_state(QuantTrainState)
    assert created.quant_stats == {}
    assert type(attach(created, RULES, BATCHES[0])) is QuantTrainState


@pytest.mark.slow
def test_a_dataclass_with_a_step_that_closes_over_the_model():
    model: Any = Mlp()

    def step(bare, x):
        grads = jax.grad(lambda p: jnp.mean(model.apply({"params": p}, x) ** 2))(
            bare.params
        )
        params = jax.tree.map(lambda p, g: p - RATE * g, bare.params, grads)
        return bare.replace(params=params)

    bare = Bare(new_state().params)
    bare = attach(bare, RULES, BATCHES[0], step=step)
    wrapped = jax.jit(qwix_train.wrap_train_step(step, RULES))
    expected = Threaded()
    for x in BATCHES:
        bare = wrapped(bare, x)
        expected.step(x)
    expected.check(bare.params, bare.quant_stats)


def test_a_batch_that_is_not_finite_changes_no_range():
    state = attach(new_state(), RULES, BATCHES[0])
    step = jax.jit(qwix_train.wrap_train_step(train_step, RULES))
    state, _ = step(state, BATCHES[0])
    before = state.quant_stats["Dense_0"]["dot_general0_lhs"]
    after, _ = step(state, np.inf * BATCHES[0])
    after = after.quant_stats["Dense_0"]["dot_general0_lhs"]
    assert after["skipped"] == 1 and after["count"] == 1
    assert after["sum_of_absmax"] == before["sum_of_absmax"]


@pytest.mark.slow
def test_a_sharded_step_gives_the_same_ranges():
    mesh = jax.make_mesh((8,), ("data",))
    sharded = jax.sharding.NamedSharding(mesh, jax.P("data"))
    everywhere = jax.sharding.NamedSharding(mesh, jax.P())
    step = jax.jit(qwix_train.wrap_train_step(train_step, RULES))
    one = attach(new_state(), RULES, BATCHES[0])
    many = jax.device_put(one, everywhere)
    for x in BATCHES:
        one, loss = step(one, x)
        many, again = step(many, jax.device_put(x, sharded))
        np.testing.assert_allclose(loss, again, 1e-5)
    models.assert_close(one.quant_stats, many.quant_stats, 1e-5)


def test_errors():
    x = BATCHES[0]
    with pytest.raises(ValueError, match="its state has no quant_stats"):
        qwix_train.wrap_train_step(train_step, RULES)(new_state(), x)
    with pytest.raises(TypeError, match="needs inputs of the model"):
        attach(new_state(), RULES)
    with pytest.raises(Exception) as raised:
        attach(new_state(), RULES, {"image": x})
    assert any("step=train_step" in note for note in raised.value.__notes__)
    with pytest.raises(TypeError, match="Expected a TrainState or an NNX model"):
        attach({"params": {}}, RULES, x)
    with pytest.raises(ValueError, match="There is nothing to attach"):
        attach(new_state(), models.INT8, x)
    frozen = qwix_train.wrap_train_step(
        train_step, RULES, schedule=Schedule(quant_stats_freeze_step=1)
    )
    with pytest.raises(ValueError, match="its state has no quant_stats"):
        frozen(new_state(), x)
    first = [dataclasses.replace(RULES[0], module_path="Dense_0")]
    state = attach(new_state(), first, x)
    with pytest.raises(ValueError, match="no range for 'Dense_1/dot_general0_lhs'"):
        qwix_train.wrap_train_step(train_step, RULES)(state, x)
    with pytest.raises(ValueError, match="returns no state that has"):
        qwix_train.wrap_train_step(eval_step, RULES)(attach(new_state(), RULES, x), x)
    two = functools.partial(attach, new_state(), RULES, x)
    both = qwix_train.wrap_train_step(lambda a, b, x: train_step(a, x), RULES)
    with pytest.raises(ValueError, match="Two arguments of the step have quant_stats"):
        both(two(), two(), x)
    with pytest.raises(ValueError, match="needs the number of steps so far"):
        bare = attach(
            Bare(new_state().params),
            RULES,
            x,
            step=lambda bare, x: Mlp().apply({"params": bare.params}, x),
        )
        qwix_train.wrap_train_step(
            lambda bare, x: bare, RULES, schedule=Schedule(quant_stats_freeze_step=1)
        )(bare, x)


def test_a_model_inside_of_vmap_is_refused():
    def step(state, x):
        call = jax.vmap(lambda x: state.apply_fn({"params": state.params}, x))
        return state, jnp.mean(call(x))

    state = attach(new_state(), RULES, BATCHES[0][0])
    with pytest.raises(
        ValueError, match="Dense_0/dot_general0_lhs: the model is called"
    ):
        qwix_train.wrap_train_step(step, RULES)(state, BATCHES[0])
    with pytest.raises(ValueError, match="is called inside of vmap"):
        qwix_train.calib.observe(step, RULES)({}, state, BATCHES[0])


@pytest.mark.slow
def test_tiles_along_the_contracted_axis_have_a_range_each():
    rules = [
        QuantizationRule(module_path="Dense_0", tile_size=3, **STATIC),
        QuantizationRule(**STATIC),
    ]
    state = attach(new_state(), rules, BATCHES[0])
    step = jax.jit(qwix_train.wrap_train_step(train_step, rules))
    for x in BATCHES:
        state, _ = step(state, x)
    tiles = np.reshape(BATCHES, (5, 8, 2, 3))
    found = state.quant_stats["Dense_0"]["dot_general0_lhs"]["sum_of_absmax"]
    np.testing.assert_allclose(found, [np.abs(tiles).max((1, 3)).sum(0)], 1e-6)


@pytest.mark.slow
def test_the_mean_of_the_ranges_of_examples():
    rules = [QuantizationRule(act_batch_axes=(0,), **STATIC)]
    state = attach(new_state(), rules, BATCHES[0])
    step = jax.jit(qwix_train.wrap_train_step(train_step, rules))
    for x in BATCHES:
        state, _ = step(state, x)
    found = state.quant_stats["Dense_0"]["dot_general0_lhs"]["sum_of_absmax"]
    expected = sum(np.abs(x).max(1).mean() for x in BATCHES)
    np.testing.assert_allclose(found, [[expected]], 1e-6)
