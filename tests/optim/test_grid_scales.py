"""Scales of grids beside the params: which tree comes out of which optimizer."""

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import freeze
from jax import numpy as jnp

import qwix_train
from qwix_train import dequantize, optim
from qwix_train.core import qarray
from qwix_train.core.how import HowToQuantize
from tests import models

HOW = HowToQuantize(qtype="int4", channelwise_axes=[1])
ZERO = HowToQuantize(qtype="int4", calibration_method="minmax")
GRIDS = {".*kernel": HOW, "embedding": ZERO}
PARAMS = {
    "embedding": np.arange(8, dtype=np.float32).reshape(4, 2),
    "a": {"kernel": np.eye(3, dtype=np.float32) * 7.5, "bias": np.ones(3, np.float32)},
    "b": {"kernel": np.full((2, 2), 15, np.float32)},
}
EXPECTED = {
    "embedding": (4, 2),
    "embedding_scale": (1, 1),
    "embedding_zero_point": (1, 1),
    "a": {"kernel": (3, 3), "kernel_scale": (1, 3), "bias": (3,)},
    "b": {"kernel": (2, 2), "kernel_scale": (1, 2)},
}


def shapes(tree):
    return jax.tree.map(jnp.shape, tree)


@pytest.mark.parametrize(
    "tx",
    [
        optim.proximal(GRIDS, 1.0),
        optax.MultiSteps(optax.chain(optax.sgd(0.1), optim.proximal(GRIDS, 1.0)), 2),
        optax.inject_hyperparams(lambda rate: optim.proximal(GRIDS, 1.0))(rate=0.1),
        optax.partition(
            {
                "one": optim.proximal({"embedding": ZERO, "a/kernel": HOW}, 1.0),
                "two": optim.proximal({".*kernel": HOW}, 1.0, "parq"),
            },
            {"embedding": "one", "a": "one", "b": "two"},
        ),
    ],
    ids=["alone", "multi_steps", "inject_hyperparams", "partition"],
)
def test_wherever_the_state_is(tx):
    result = qwix_train.attach(PARAMS, tx.init(PARAMS))
    assert shapes(result) == EXPECTED
    np.testing.assert_allclose(result["a"]["kernel_scale"], 1)
    np.testing.assert_allclose(result["b"]["kernel_scale"], 2)
    assert result["embedding_zero_point"].item() == -8
    assert result["embedding_zero_point"].dtype == jnp.float32


def test_frozen_dicts_and_lists():
    params = freeze(PARAMS)
    state = optim.proximal(GRIDS, 1.0).init(params)
    assert shapes(qwix_train.attach(params, state)) == EXPECTED
    tx = optim.proximal({".*w": HOW}, 1.0)
    params = {"layers": [{"w": jnp.ones((2, 3))}, {"w": jnp.ones((3, 2))}]}
    result = qwix_train.attach(params, tx.init(params))
    assert shapes(result) == {
        "layers": [
            {"w": (2, 3), "w_scale": (1, 3)},
            {"w": (3, 2), "w_scale": (1, 2)},
        ]
    }


@pytest.mark.slow
def test_a_trained_nnx_model():
    rules = [models.rule("int4")]
    x = jax.device_put(np.random.default_rng(0).normal(size=(8, 12)).astype(np.float32))
    model = nnx.Sequential(
        nnx.Linear(12, 6, rngs=nnx.Rngs(0)), nnx.Linear(6, 3, rngs=nnx.Rngs(1))
    )
    plan = qwix_train.plan(model, rules, x)
    tx = optax.chain(
        optax.adam(0.01), optim.proximal(plan, optax.linear_schedule(0.0, 1.0, 5))
    )
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda model: (model(x) ** 2).sum())(model)
        optimizer.update(model, grads)

    for _ in range(8):
        step(model, optimizer)
    state = nnx.state(model, nnx.Param)
    tree = qwix_train.attach(state, optimizer.opt_state)
    floats = nnx.to_pure_dict(state)
    for index, shape in ((0, (1, 6)), (1, (1, 3))):
        layer = tree["layers"][index]
        assert sorted(layer) == ["bias", "kernel", "kernel_scale"]
        assert layer["kernel_scale"].shape == shape
        kernel = floats["layers"][index]["kernel"]
        stored = qarray.quantize_with_scale_zero_point(
            kernel, "int4", layer["kernel_scale"], None
        )
        models.assert_same(dequantize(stored), kernel)


def test_errors():
    tx = optim.proximal({".*kernel": HOW}, 1.0)
    params = {"a": {"kernel": jnp.ones((2, 2))}}
    state = tx.init(params)
    make = qwix_train.attach
    with pytest.raises(TypeError, match="of an optimizer that optim.proximal is a"):
        make(params, optax.adam(0.1).init(params))
    with pytest.raises(ValueError, match="'a/kernel' has a grid, and is not among"):
        make({"a": {"bias": jnp.ones(2)}}, state)
    with pytest.raises(ValueError, match="There already is a param 'a/kernel_scale'"):
        make({"a": {**params["a"], "kernel_scale": jnp.ones(2)}}, state)
    alone = optim.proximal({"": HOW}, 1.0)
    with pytest.raises(ValueError, match="The params are one array"):
        make(jnp.ones((2, 2)), alone.init(jnp.ones((2, 2))))
