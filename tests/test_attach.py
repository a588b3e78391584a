"""Leaves beside the params: attached, listed, and taken off again."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx, struct
from flax.training.train_state import TrainState
from jax import numpy as jnp

import qwix_train
from qwix_train import (
    LoraRule,
    LoraTrainState,
    PtqProvider,
    QtProvider,
    QuantizationRule,
    QuantStat,
    apply_lora_to_model,
    attach,
    attached,
    detach,
    lora,
    quantize_model,
    ranges,
    wrap_train_step,
)
from tests import models

X = models.normal(8, 6)
Y = models.normal(8, 3, seed=1)
STATIC = QuantizationRule(weight_qtype="int8", act_qtype="int8", act_static_scale=True)
LEARNED = QuantizationRule(weight_qtype="int4", weight_calibration_method="lsq")
MIXED = [
    QuantizationRule(
        weight_qtype="int4",
        weight_calibration_method="lsq",
        act_qtype="int8",
        act_static_scale=True,
    )
]
ADAPTED = [LoraRule(rank=2, alpha=4.0, weight_qtype="int8")]
KEY = jax.random.key(5)
PARAMS = {
    "kernel": models.normal(6, 3, seed=2),
    "bias": models.normal(3, seed=3),
}
MODEL = nn.Dense(3)


class OwnState(TrainState):
    batch_stats: dict


def new_state(cls: Any = TrainState, tx=None, **fields):
    tx = optax.adam(0.1) if tx is None else tx
    return cls.create(apply_fn=MODEL.apply, params=PARAMS, tx=tx, **fields)


def train_step(state, x):
    def loss(params):
        return jnp.mean((state.apply_fn({"params": params}, x) - Y) ** 2)

    return state.apply_gradients(grads=jax.grad(loss)(state.params))


def nnx_model():
    model = nnx.Linear(6, 3, rngs=nnx.Rngs(0))
    model.kernel.set_value(jax.device_put(PARAMS["kernel"]))
    model.bias.set_value(jax.device_put(PARAMS["bias"]))
    return model


def nnx_step(model, optimizer, x):
    grads = nnx.grad(lambda model: jnp.mean((model(x) - Y) ** 2))(model)
    optimizer.update(model, grads)


@pytest.mark.parametrize(
    "cls,fields", [(TrainState, {}), (OwnState, {"batch_stats": {}})]
)
def test_what_is_attached_is_taken_off_again(cls, fields):
    float_step = jax.jit(train_step)
    state = float_step(new_state(cls, **fields), X)
    given = attach(state, MIXED, X)
    assert isinstance(given, cls) and given.step == 1
    assert sorted(given.params) == ["bias", "kernel", "kernel_scale"]
    models.assert_same(given.opt_state[0].mu["kernel"], state.opt_state[0].mu["kernel"])
    back = detach(given, MIXED, X)
    models.assert_same(back, state)
    assert type(back) is cls
    assert jax.tree.structure(back) == jax.tree.structure(state)
    # The float loop goes on with what training has made of the rest.
    trained = jax.jit(wrap_train_step(train_step, MIXED))(given, X)
    after = float_step(detach(trained, MIXED, X), X)
    assert after.step == 3 and after.opt_state[0].count == 3


def test_leaves_that_are_there_stay():
    state = attach(new_state(), [STATIC], X)
    state = jax.jit(wrap_train_step(train_step, [STATIC]))(state, X)
    again = attach(state, [STATIC], X)
    models.assert_same(again, state)
    mixed = attach(state, MIXED, X)
    models.assert_same(mixed.quant_stats, state.quant_stats)
    models.assert_same(attach(mixed, MIXED, X), mixed)
    # Statistics of another kind begin anew.
    rules = [QuantizationRule(**{**vars(STATIC), "act_observer": "percentile,99"})]
    found = attach(state, rules, X).quant_stats["dot_general0_lhs"]
    assert found["count"] == 0 and "sum_of_absmax" not in found


def test_a_list_of_what_is_attached():
    state = jax.jit(wrap_train_step(train_step, MIXED))(
        attach(new_state(), MIXED, X), X
    )
    listed = {
        "dot_general0_lhs": "range of 1 batches",
        "kernel_scale": "float32[1,3]",
    }
    assert attached(state) == listed
    assert attached(new_state()) == {}
    adapted = attach(new_state(), ADAPTED, X, rng=KEY)
    adapters = {"kernel_lora_a": "float32[6,2]", "kernel_lora_b": "float32[2,3]"}
    assert attached(adapted) == adapters
    assert attached(attach(nnx_model(), MIXED, X)) == {
        **listed,
        "dot_general0_lhs": "range of 0 batches",
    }


def test_ranges_of_any_target():
    state = jax.jit(wrap_train_step(train_step, [STATIC]))(
        attach(new_state(), [STATIC], X), X
    )
    found = ranges(state, [STATIC])["dot_general0_lhs"]
    assert sorted(found) == ["count", "sum_of_absmax"]
    np.testing.assert_allclose(found["sum_of_absmax"], [[np.abs(X).max()]], 1e-6)
    models.assert_same(ranges(state, QtProvider([STATIC]))["dot_general0_lhs"], found)

    variables = attach({"params": PARAMS}, [STATIC], X, model=MODEL)
    model = quantize_model(MODEL, QtProvider([STATIC]))
    apply = jax.jit(functools.partial(model.apply, mutable=["quant_stats"]))
    _, updates = apply(variables, X)
    models.assert_same(
        ranges({**variables, **updates}, [STATIC])["dot_general0_lhs"], found
    )
    assert detach(variables, [STATIC]) == {"params": PARAMS}

    other = {"other": {"count": 1, "sum_of_absmax": np.ones((1, 1))}}
    merged = ranges(state, [STATIC], other)
    assert sorted(merged) == ["dot_general0_lhs", "other"]
    with pytest.raises(ValueError, match="no range of an activation.*attach"):
        ranges(new_state(), [STATIC])


@pytest.mark.parametrize("whole", [True, False])
def test_nnx_models_and_their_optimizers(whole):
    model = nnx_model()
    tx = optax.adam(0.1)
    if whole:
        optimizer: Any = nnx.ModelAndOptimizer(model, tx, wrt=nnx.Param)
        target, options = optimizer, {}
    else:
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        target, options = model, {"optimizer": optimizer}

    def step(model, optimizer, x):
        if whole:
            grads = nnx.grad(lambda model: jnp.mean((model(x) - Y) ** 2))(model)
            optimizer.update(grads)
        else:
            nnx_step(model, optimizer, x)

    nnx.jit(step)(model, optimizer, X)
    before = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(optimizer)))
    assert attach(target, MIXED, X, **options) is target
    assert isinstance(model.kernel_scale, nnx.Param)
    assert isinstance(model.dot_general0_lhs, QuantStat)
    adam = optimizer.opt_state[0]
    assert adam.count.get_value() == 1 and adam.mu["kernel"].get_value().any()
    assert not adam.mu["kernel_scale"].get_value().any()
    models.assert_same(
        nnx.to_pure_dict(nnx.state(detach_copy(optimizer, model, options))), before
    )
    nnx.jit(wrap_train_step(step, MIXED))(model, optimizer, X)
    assert model.dot_general0_lhs.get_value()["count"] == 1
    assert (
        adam is not None and optimizer.opt_state[0].mu["kernel_scale"].get_value().any()
    )


def detach_copy(optimizer, model, options):
    """A copy of an optimizer, and of its model, without leaves."""
    model, optimizer = nnx.clone((model, optimizer))
    target = model if options else optimizer
    detach(target, MIXED, X, **({"optimizer": optimizer} if options else {}))
    assert not hasattr(model, "kernel_scale") and not list(attached(model))
    return optimizer


def test_adapters_of_a_state_in_mid_training():
    state = jax.jit(train_step)(new_state(OwnState, batch_stats={}), X)
    adapted = attach(state, ADAPTED, X, rng=KEY)
    assert isinstance(adapted, OwnState) and isinstance(adapted, LoraTrainState)
    assert adapted.step == 1 and sorted(adapted.params) == [
        "kernel_lora_a",
        "kernel_lora_b",
    ]
    assert adapted.frozen["kernel"].array.qvalue.dtype == jnp.int8
    assert jax.tree.structure(adapted) == jax.tree.structure(
        attach(state, ADAPTED, X, rng=KEY)
    )
    after = jax.jit(train_step)(adapted, X)
    assert after.params["kernel_lora_b"].any() and after.opt_state[0].count == 1
    models.assert_same(after.frozen, adapted.frozen)
    with pytest.raises(ValueError, match="has adapters already"):
        attach(after, ADAPTED, X, rng=KEY)
    with pytest.raises(ValueError, match=r"lora\.merge"):
        detach(after, ADAPTED, X)
    with pytest.raises(TypeError, match="rng=None is not a random key"):
        attach(state, ADAPTED, X)


def test_a_state_without_optimizer_state_gets_one():
    tx = optax.adam(0.1)
    bare = TrainState(0, MODEL.apply, PARAMS, tx, ())
    whole = attach(new_state(tx=tx), ADAPTED, X, rng=KEY)
    models.assert_same(attach(bare, ADAPTED, X, rng=KEY), whole)
    models.assert_same(
        attach(bare, [LEARNED], X), attach(new_state(tx=tx), [LEARNED], X)
    )


def test_adapters_among_the_params_of_a_linen_model():
    params = attach(PARAMS, ADAPTED, X, model=MODEL, rng=KEY)
    assert sorted(params) == ["bias", "kernel", "kernel_lora_a", "kernel_lora_b"]
    model = apply_lora_to_model(MODEL, lora.LoraProvider(ADAPTED))
    state = attach(new_state(), ADAPTED, X, rng=KEY)
    want = state.apply_fn({"params": state.params}, X)
    models.assert_same(model.apply({"params": params}, X), want)
    variables = attach({"params": PARAMS}, ADAPTED, X, model=MODEL, rng=KEY)
    models.assert_same(variables, {"params": params})


def test_adapters_of_an_nnx_model_in_place():
    model = nnx_model()
    want = apply_lora_to_model(model, lora.LoraProvider(ADAPTED), X, rngs=nnx.Rngs(KEY))
    assert attach(model, ADAPTED, X, rng=KEY) is model
    assert type(model) is type(want) or isinstance(model, nnx.Linear)
    models.assert_same(
        nnx.to_pure_dict(nnx.state(model, nnx.LoRAParam)),
        nnx.to_pure_dict(nnx.state(want, nnx.LoRAParam)),
    )
    models.assert_same(model(X), want(X))
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.LoRAParam)
    diff = nnx.DiffState(0, nnx.LoRAParam)
    grads = nnx.grad(lambda m: jnp.mean((m(X) - Y) ** 2), argnums=diff)(model)
    optimizer.update(model, grads)
    assert model.kernel_lora_b.get_value().any()


def test_a_param_of_the_model_with_the_name_of_a_leaf_stays():
    def forward(params, x):
        return (x * params["w_scale"]) @ params["v"] @ params["w"]

    params = {
        "v": models.normal(6, 4),
        "w": models.normal(4, 3),
        "w_scale": models.normal(1, 6),
    }
    rules = [
        QuantizationRule(op_names=("dot_general1",)),
        LEARNED,
    ]
    given = attach(params, rules, X, model=forward)
    assert sorted(given) == ["v", "v_scale", "w", "w_scale"]
    models.assert_same(detach(given, rules, X, model=forward), params)


def test_what_cannot_be_attached_says_why():
    state = new_state()
    whole: Any = nnx.ModelAndOptimizer(nnx_model(), optax.sgd(0.1), wrt=nnx.Param)
    with pytest.raises(TypeError, match=r"wrt=nnx\.LoRAParam"):
        attach(whole, ADAPTED, X, rng=KEY)
    assert not attached(whole)
    for provider in (PtqProvider([STATIC]), QtProvider(models.INT8)):
        name = type(provider).__name__
        with pytest.raises(ValueError, match=f"nothing to attach: no rule of {name}"):
            attach(state, provider, X)
    with pytest.raises(TypeError, match="of an optimizer that optim.proximal"):
        attach(PARAMS, state.opt_state)
    with pytest.raises(TypeError, match="params and the model that takes them"):
        attach(PARAMS, [LEARNED], X)
    with pytest.raises(TypeError, match="a collection beside the params"):
        attach(PARAMS, [STATIC], X, model=MODEL)
    with pytest.raises(TypeError, match="step= makes room for ranges alone"):
        attach(state, [LEARNED], X, step=train_step)
    with pytest.raises(TypeError, match="ranges that trained scales begin with"):
        attach(state, [STATIC], X, quant_stats={})
    with pytest.raises(TypeError, match=r"detach\(state, rules, \*inputs\)"):
        detach(state, [LEARNED])
    with pytest.raises(TypeError, match="An NNX model holds its params"):
        attach(PARAMS, [LEARNED], X, model=nnx_model())


@pytest.mark.parametrize(
    ("target", "rules", "options", "message"),
    [
        ("state", [LEARNED], {"donate": True}, "donate= is for adapters"),
        ("state", [STATIC], {"rng": KEY}, "rng= is for adapters"),
        ("state", [LEARNED], {"optimizer": optax.adam(0.1)}, "A train state has its"),
        ("model", [LEARNED], {"optimizer": optax.adam(0.1)}, "expected the nnx.Optim"),
        ("model", [LEARNED], {"optimizer": "other"}, "that of another model"),
        ("model", [LEARNED], {"model": MODEL}, "a Linear is the model that is called"),
        ("state", LEARNED, {}, "got one rule: pass"),
        (TrainState, [STATIC], {}, "params and the model that takes them"),
        ("weights", [LEARNED], {}, "Weights has no field params"),
    ],
)
def test_arguments_that_have_no_use_are_refused(target, rules, options, message):
    named = {"state": new_state, "model": nnx_model, "weights": lambda: Weights(PARAMS)}
    target = named[target]() if isinstance(target, str) else target
    if options.get("optimizer") == "other":
        other = nnx.ModelAndOptimizer(nnx_model(), optax.sgd(0.1), wrt=nnx.Param)
        options = {"optimizer": other}
    with pytest.raises(TypeError, match=message):
        attach(target, rules, X, **options)


def test_what_holds_no_leaves_says_so():
    for target in (None, MODEL, TrainState, 3):
        with pytest.raises(TypeError, match="Expected a train state, an NNX model"):
            attached(target)
        with pytest.raises(TypeError, match="Expected a train state, an NNX model"):
            ranges(target, [STATIC])
    with pytest.raises(ValueError, match="nothing to detach: no rule of QtProvider"):
        detach(new_state(), models.INT8)
    with pytest.raises(TypeError, match="expected the ranges of activations in a nes"):
        ranges(attach(new_state(), [STATIC], X), [STATIC], 7)
    learned = dataclasses.replace(models.INT8[0], act_calibration_method="lsq")
    empty = {"dot_general0_lhs": {"count": 1}}
    with pytest.raises(ValueError, match=r"dot_general0_lhs' give no range: beside"):
        attach(new_state(), [learned], X, quant_stats=empty)


def test_shapes_of_a_state_are_listed():
    shapes = jax.eval_shape(lambda: attach(new_state(), MIXED, X))
    assert attached(shapes)["dot_general0_lhs"] == "range of ? batches"
    with pytest.raises(TypeError, match="ranges reads values"):
        ranges(shapes, MIXED)


@struct.dataclass
class Weights:
    """A state that calls its params something else."""

    weights: Any


def test_a_state_without_params_has_ranges():
    def step(state, x):
        return state, MODEL.apply({"params": state.weights}, x)

    state = attach(Weights(PARAMS), [STATIC], X, step=step)
    state, _ = wrap_train_step(step, [STATIC])(state, X)
    assert attached(state) == {"dot_general0_lhs": "range of 1 batches"}
    assert list(ranges(state, [STATIC])) == ["dot_general0_lhs"]


def test_attached_is_public():
    assert {"attach", "attached", "detach", "ranges"} <= set(dir(qwix_train))
