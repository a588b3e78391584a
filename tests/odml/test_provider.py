"""The mode in every kind of loop: ranges, gradients, placement."""

import functools

import jax
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training import train_state
from jax import numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from qwix_train import (
    QuantizationRule,
    as_model,
    attach,
    calib,
    odml,
    quantize_fn,
    quantize_model,
    wrap_eval_step,
    wrap_train_step,
)
from qwix_train.frontends.model import trace_function
from tests import models

RULES = [QuantizationRule(weight_qtype="int8", act_qtype="int8")]
X = models.normal(16, 4, seed=0)


class Model(nn.Module):
    """What differs between training and evaluation."""

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.Dense(8)(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.Dropout(0.25, deterministic=not train)(nn.relu(x))
        x = nn.LayerNorm()(x)
        return nn.Dense(3)(x * 0.5)


class NnxModel(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.l1 = nnx.Linear(4, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.25, rngs=rngs)
        self.l2 = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.l2(self.dropout(nnx.relu(self.norm(self.l1(x)))))


class State(train_state.TrainState):
    batch_stats: dict


@functools.cache
def variables():
    init = jax.jit(functools.partial(Model().init, train=False))
    return init({"params": jax.random.key(1), "dropout": jax.random.key(2)}, X)


def state():
    made = variables()
    return State.create(
        apply_fn=Model().apply,
        params=made["params"],
        batch_stats=made["batch_stats"],
        tx=optax.sgd(0.1),
    )


def train_step(state, x):
    def loss_fn(params):
        out, updated = state.apply_fn(
            {"params": params, "batch_stats": state.batch_stats},
            x,
            rngs={"dropout": jax.random.key(3)},
            mutable=["batch_stats"],
        )
        return jnp.mean((out - 1) ** 2), updated

    (loss, updated), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    state = state.apply_gradients(grads=grads, batch_stats=updated["batch_stats"])
    return state, (loss, grads)


def eval_step(state, x):
    return state.apply_fn(
        {"params": state.params, "batch_stats": state.batch_stats}, x, train=False
    )


def flat(tree):
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def plan_names(**kwargs):
    traced = trace_function(Model().apply, (variables(), X), kwargs)
    return [t.name for t in odml.OdmlQatProvider(RULES).plan(traced).measured]


TRAINING = {"rngs": {"dropout": jax.random.key(3)}, "mutable": ["batch_stats"]}


def test_training_and_evaluation_have_the_same_ranges():
    names = plan_names(train=True, **TRAINING)
    assert names == plan_names(train=False)
    assert len(set(names)) == len(names) > 5


def test_a_wrapped_step_trains_and_keeps_ranges():
    provider = odml.OdmlQatProvider(RULES)
    start = attach(state(), provider, X, train=False)
    step = jax.jit(wrap_train_step(train_step, provider))
    after, (loss, grads) = step(start, X)
    for _ in range(8):
        after, (last, _) = step(after, X)
    assert last < loss
    for path, leaf in flat(grads).items():
        assert np.isfinite(leaf).all(), path
    nonzero = {path for path, leaf in flat(grads).items() if np.abs(leaf).max() > 0}
    # The bias before a batch normalization has none, in float neither.
    assert flat(grads).keys() - nonzero <= {"['Dense_0']['bias']"}
    ranges = flat(after.quant_stats)
    counts = [leaf for path, leaf in ranges.items() if "count" in path]
    assert len(counts) == len(plan_names(train=False))
    assert all(count == 9 for count in counts)
    # The range of the input is that of the data.
    found = after.quant_stats["Dense_0"]["dot_general0_lhs"]
    np.testing.assert_allclose(found["sum_of_max"] / 9, X.max(), 1e-5)
    np.testing.assert_allclose(found["sum_of_min"] / 9, X.min(), 1e-5)
    # What evaluates finds these ranges, and leaves them.
    out = jax.jit(wrap_eval_step(eval_step, provider))(after, X)
    np.testing.assert_allclose(out, eval_step(after, X), atol=0.3)
    assert np.abs(out - eval_step(after, X)).max() > 0


@pytest.mark.slow
def test_a_step_on_eight_devices_is_that_on_one():
    provider = odml.OdmlQatProvider(RULES)
    start = attach(state(), provider, X, train=False)
    step = jax.jit(wrap_train_step(train_step, provider))
    mesh = jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,))
    sharded = jax.device_put(X, NamedSharding(mesh, P("data")))
    replicated = jax.device_put(start, NamedSharding(mesh, P()))
    one, (loss, grads) = step(start, X)
    many, (loss_of_many, grads_of_many) = step(replicated, sharded)
    np.testing.assert_allclose(loss_of_many, loss, 1e-5)
    for a, b in ((many.quant_stats, one.quant_stats), (many.params, one.params)):
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            np.testing.assert_allclose(x, y, 1e-3, 1e-4)
    for path, leaf in flat(grads_of_many).items():
        np.testing.assert_allclose(leaf, flat(grads)[path], 1e-2, 1e-3)


@pytest.mark.slow
def test_a_collection_is_made_by_init_and_updated_where_mutable():
    quantized = quantize_model(Model(), odml.OdmlQatProvider(RULES))
    init = jax.jit(functools.partial(quantized.init, train=False))
    made = init({"params": jax.random.key(1), "dropout": jax.random.key(2)}, X)
    counts = [v for k, v in flat(made["quant_stats"]).items() if "count" in k]
    assert len(counts) == len(plan_names(train=False))
    start = {
        **variables(),
        "quant_stats": jax.tree.map(jnp.zeros_like, made["quant_stats"]),
    }
    apply = jax.jit(quantized.apply, static_argnames=("mutable", "train"))
    both = ("batch_stats", "quant_stats")
    out, updated = apply(start, X, rngs=TRAINING["rngs"], mutable=both)
    assert {
        v.item() for k, v in flat(updated["quant_stats"]).items() if "count" in k
    } == {1}
    once = {**variables(), "quant_stats": updated["quant_stats"]}
    # Not mutable: the ranges are used, and stay.
    again, others = apply(once, X, rngs=TRAINING["rngs"], mutable=("batch_stats",))
    assert "quant_stats" not in others
    np.testing.assert_allclose(again, out, atol=1e-5)
    wide = apply(once, 100 * X, train=False)
    assert np.isfinite(wide).all()
    # What lies outside of the range is cut off.
    assert np.abs(wide).max() < 10 * np.abs(apply(once, X, train=False)).max()


@pytest.mark.slow
def test_linen_nnx_and_functions_compute_the_same():
    model = NnxModel()
    model.eval()
    params = {
        "w1": model.l1.kernel.get_value(),
        "b1": model.l1.bias.get_value(),
        "w2": model.l2.kernel.get_value(),
        "b2": model.l2.bias.get_value(),
    }

    def function(p, x):
        x = x @ p["w1"] + p["b1"]
        x = x / jnp.sqrt(1.0 + 1e-5)
        return nn.relu(x) @ p["w2"] + p["b2"]

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(use_running_average=True)(nn.Dense(8)(x))
            return nn.Dense(3)(nn.relu(x))

    linen = jax.jit(Linen().init)(jax.random.key(0), X)
    linen["params"]["Dense_0"] = {"kernel": params["w1"], "bias": params["b1"]}
    linen["params"]["Dense_1"] = {"kernel": params["w2"], "bias": params["b2"]}

    def calibrated(step, *args):
        calibrator = calib.Calibrator(odml.OdmlQatProvider(RULES))
        calibrator.wrap(step)(*args, X)
        return odml.OdmlQatProvider(RULES, quant_stats=calibrator.quant_stats)

    forward = as_model(function)
    fixed = calibrated(lambda p, x: forward(p, x), params)
    assert set(fixed.quant_stats) == {
        "dot_general0_lhs",
        "dot_general1_lhs",
        "final_output0",
    }
    of_function = jax.jit(quantize_fn(function, fixed))(params, X)
    fixed = calibrated(lambda v, x: Linen().apply(v, x), linen)
    of_linen = jax.jit(quantize_model(Linen(), fixed).apply)(linen, X)
    fixed = calibrated(lambda m, x: m(x), model)
    of_nnx = quantize_model(model, fixed, X)(X)
    np.testing.assert_allclose(of_linen, of_function, atol=1e-5)
    np.testing.assert_allclose(of_nnx, of_function, atol=1e-5)
    np.testing.assert_allclose(of_function, function(params, X), atol=0.1)


@pytest.mark.slow
def test_an_nnx_step():
    provider = odml.OdmlQatProvider(RULES)
    model = NnxModel()
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    attach(model, provider, X)

    def step(model, optimizer, x):
        def loss_fn(model):
            return jnp.mean((model(x) - 1) ** 2)

        loss, grads = nnx.value_and_grad(loss_fn)(model)
        optimizer.update(model, grads)
        return loss, grads

    wrapped = nnx.jit(wrap_train_step(step, provider))
    losses = []
    for _ in range(6):
        loss, grads = wrapped(model, optimizer, X)
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    for leaf in jax.tree.leaves(grads):
        assert np.isfinite(leaf).all()
    assert np.abs(grads["l1"]["kernel"].get_value()).max() > 0


@pytest.mark.slow
@pytest.mark.parametrize("axis", [None, 0])
def test_gradients_of_a_function_under_vmap_and_jit(axis):
    params = {"w": jax.random.normal(jax.random.key(4), (4, 3))}
    stats = {
        name: {
            "count": 1,
            "sum_of_min": jnp.full(1, -4.0),
            "sum_of_max": jnp.full(1, 4.0),
        }
        for name in ("dot_general0_lhs", "tanh0")
    }
    provider = odml.OdmlQatProvider(RULES, quant_stats=stats)

    def fn(p, x):
        return jnp.tanh(x @ p["w"])

    quantized = quantize_fn(fn, provider)
    if axis is None:
        got = jax.jit(lambda p, x: jax.grad(lambda p: quantized(p, x).sum())(p))(
            params, X
        )
        want = jax.grad(lambda p: fn(p, X).sum())(params)
    else:
        per_example = jax.vmap(
            jax.grad(lambda p, x: quantized(p, x[None]).sum()), (None, 0)
        )
        got = per_example(params, X)
        want = jax.vmap(jax.grad(lambda p, x: fn(p, x[None]).sum()), (None, 0))(
            params, X
        )
    np.testing.assert_allclose(got["w"], want["w"], 0, 0.1 * np.abs(want["w"]).max())


def test_a_range_that_is_missing_is_an_error_that_names_it():
    quantized = quantize_model(Model(), odml.OdmlQatProvider(RULES, quant_stats={}))
    with pytest.raises(ValueError, match="Dense_0/dot_general0_lhs"):
        quantized.apply(variables(), X, train=False)


BAD = {
    "int2 weights": (
        dict(weight_qtype="int2"),
        {},
        "weight_qtype='int2'.*int8 and int4",
    ),
    "fp8 activations": (
        dict(weight_qtype="int8", act_qtype="float8_e4m3fn"),
        {},
        "act_qtype",
    ),
    "tiles": (dict(weight_qtype="int8", tile_size=2), {}, "tile_size=2"),
    "asymmetric weights": (
        dict(weight_qtype="int8", weight_calibration_method="minmax"),
        {},
        "weight_calibration_method",
    ),
    "a range of inputs": (
        dict(weight_qtype="int8"),
        {"fixed_range_for_inputs": (1, 2)},
        r"fixed_range_for_inputs=\(1, 2\) must go from 0 or less",
    ),
    "a range of outputs": (
        dict(weight_qtype="int8"),
        {"fixed_range_for_outputs": (-2, -1)},
        "fixed_range_for_outputs",
    ),
    "no pair": (
        dict(weight_qtype="int8"),
        {"fixed_range_for_inputs": 5},
        "fixed_range_for_inputs=5 must be a pair",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_litert_does_not_have_is_an_error(name):
    rule, options, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        odml.OdmlQatProvider([QuantizationRule(**rule)], **options)


@pytest.mark.slow
def test_a_teacher_in_a_step_is_named():
    model, x = nn.Dense(2), jnp.ones((3, 4))
    params = [model.init(jax.random.key(seed), x) for seed in (0, 1)]

    def step(params, teacher, x):
        return model.apply(params, x) - model.apply(teacher, x)

    rules = [
        QuantizationRule(weight_qtype="int8", act_qtype="int8", act_static_scale=False)
    ]
    wrapped = wrap_train_step(step, odml.OdmlQatProvider(rules))
    with pytest.warns(UserWarning, match="2 different trees .* 'kernel'"):
        wrapped(*params, x)
