"""Which params a plan or a mapping quantizes, and what does not fit."""

import jax
import optax
import pytest
from flax import nnx
from jax import numpy as jnp

import qwix_train
from qwix_train import optim
from qwix_train.core.how import HowToQuantize
from qwix_train.optim import _param_grids
from tests import models

HOW = HowToQuantize(qtype="int4", channelwise_axes=[1])
RULES = [models.rule("int4")]
X = jnp.ones((2, 12))


def found(plan, params):
    hows = _param_grids.ParamGrids("this", plan).of(params)
    return jax.tree.unflatten(jax.tree.structure(params), [h is not None for h in hows])


def test_plans():
    model = models.Mlp()
    params = jax.jit(model.init)(jax.random.key(0), X)["params"]
    plan = qwix_train.plan(model, RULES, X)
    expected = jax.tree.map(lambda p: p.ndim == 2, params)
    assert any(jax.tree.leaves(expected))
    assert found(plan, params) == expected
    # A part of the model's params is trained.
    name = next(iter(params))
    assert found(plan, {name: params[name]}) == {name: expected[name]}
    hows = _param_grids.ParamGrids("this", plan).of({name: params[name]})
    assert plan.params[(name, "kernel")].how in hows


def test_plans_of_nnx_models():
    model = nnx.Sequential(nnx.Linear(12, 4, rngs=nnx.Rngs(0)))
    plan = qwix_train.plan(model, RULES, X)
    tx = optax.chain(optax.sgd(0.1), optim.freeze_oscillations(plan, 0.1))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    grads = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    optimizer.update(model, grads)
    levels = nnx.to_pure_dict(nnx.state(optimizer.opt_state[1].level))
    (kernel,) = [x for x in jax.tree.leaves(levels) if x.ndim]
    assert (kernel.shape, kernel.dtype) == ((12, 4), jnp.int16)


def test_patterns():
    params = {"a": {"kernel": X, "bias": X}, "b": {"kernel": X}}
    expected = {"a": {"kernel": True, "bias": False}, "b": {"kernel": True}}
    assert found({".*kernel": HOW}, params) == expected
    other = HowToQuantize(qtype="int8")
    grids = _param_grids.ParamGrids("this", {"a/kernel": other, ".*/kernel": HOW})
    assert grids.of(params) == [None, other, HOW]


def test_errors():
    make = _param_grids.ParamGrids
    with pytest.raises(TypeError, match=r"this\(plan=...\): expected a Plan, .* list"):
        make("this", RULES)
    with pytest.raises(TypeError, match="to HowToQuantize; got 'a': 'int4'"):
        make("this", {"a": "int4"})
    with pytest.raises(ValueError, match=r"'\(' is not a regular expression"):
        make("this", {"(": HOW})
    with pytest.raises(ValueError, match="the plan quantizes no param"):
        make("this", {})
    with pytest.raises(
        ValueError,
        match="this: the plan quantizes b, which is the whole path of no param. "
        "The params are a.",
    ):
        make("this", {"a": HOW, "b": HOW}).of({"a": X})
    with pytest.raises(ValueError, match="the param 'a' is of dtype int32"):
        make("this", {"a": HOW}).of({"a": X.astype(int)})
    learned = HowToQuantize(qtype="int4", calibration_method="lsq")
    with pytest.raises(ValueError, match="scale of the param 'a' is learned .*'lsq'"):
        make("this", {"a": learned}).of({"a": X})
    with pytest.raises(ValueError, match="the param 'a': Axis 1 is out of range"):
        make("this", {"a": HOW}).of({"a": jnp.ones(3)})
    plan = qwix_train.plan(lambda p, x: x @ p["w"], RULES, {"w": jnp.ones((12, 4))}, X)
    with pytest.raises(ValueError, match=r"'w' has the shape \(12, 5\), and in the "):
        make("this", plan).of({"w": jnp.ones((12, 5))})
    with pytest.raises(ValueError, match="the plan quantizes w, .* params are v"):
        make("this", plan).of({"v": jnp.ones((12, 4))})
