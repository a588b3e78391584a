"""Freezing by the patterns of paths."""

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from jax import numpy as jnp

from qwix_train import optim, quantize
from qwix_train.core.how import HowToQuantize
from qwix_train.core.qarray import WithAux
from tests import models

PARAMS = {
    "embed": {"table": jnp.ones((5, 3))},
    "layers": [{"kernel": jnp.ones((3, 3))}, {"kernel": 2 * jnp.ones((3, 3))}],
}
GRADS = jax.tree.map(lambda x: 3 * x, PARAMS)


@pytest.mark.parametrize(
    "patterns",
    [
        {"freeze": "embed/table"},
        {"freeze": ["embed/.*"]},
        {"train": "layers/.*"},
        {"train": ["layers/0/kernel", "layers/1/kernel"]},
    ],
)
def test_what_is_frozen(patterns):
    # A global norm over what is trained alone.
    inner = optax.chain(optax.clip_by_global_norm(0.1), optax.adam(0.1))
    tx = optim.selective_transform(inner, **patterns)
    state = tx.init(PARAMS)
    updates, new_state = tx.update(GRADS, state, PARAMS)
    assert (updates["embed"]["table"] == 0).all()
    alone, _ = inner.update(GRADS["layers"], inner.init(PARAMS["layers"]))
    models.assert_same(updates["layers"], alone)
    # Moments of the layers, and none of the table.
    for tree in state, new_state:
        shapes = sorted(x.shape for x in jax.tree.leaves(tree) if x.ndim)
        assert shapes == [(3, 3)] * 4


def test_a_pattern_is_for_the_whole_path():
    tx = optim.selective_transform(optax.sgd(1.0), freeze=["layers/1/.*", ".*/table"])
    updates, _ = tx.update(GRADS, tx.init(PARAMS))
    zeros = jax.tree.map(lambda x: bool((x == 0).all()), updates)
    assert zeros == {
        "embed": {"table": True},
        "layers": [{"kernel": False}, {"kernel": True}],
    }
    with pytest.raises(ValueError, match="'layers' of freeze= matches the whole path"):
        optim.selective_transform(optax.sgd(1.0), freeze="layers").init(PARAMS)


def test_a_quantized_array_is_one_param():
    how = HowToQuantize(qtype="int8")
    params = {
        "kernel": WithAux(quantize(jnp.ones((4, 4)), "int8"), how),
        "kernel_lora_b": jnp.ones((2, 4)),
    }
    tx = optim.selective_transform(optax.adam(0.1), freeze="kernel")
    state = tx.init(params)
    assert sorted(x.shape for x in jax.tree.leaves(state)) == [(), (2, 4), (2, 4)]
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
    moved = optax.apply_updates(params, updates)
    models.assert_same(moved["kernel"].array, params["kernel"].array)
    assert (moved["kernel_lora_b"] != 1).all()


def test_paths_of_nnx_variables():
    model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    tx = optim.selective_transform(optax.sgd(1.0), freeze="layers/0/kernel")
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    before = nnx.to_pure_dict(nnx.state(model))["layers"][0]
    grads = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    optimizer.update(model, grads)
    after = nnx.to_pure_dict(nnx.state(model))["layers"][0]
    np.testing.assert_array_equal(after["kernel"], before["kernel"])
    np.testing.assert_array_equal(after["bias"], before["bias"] - 1)


def test_errors():
    make = optim.selective_transform
    for patterns in {}, {"freeze": "a", "train": "b"}:
        with pytest.raises(ValueError, match="takes either freeze=.* or train="):
            make(optax.sgd(1.0), **patterns)
    with pytest.raises(ValueError, match=r"freeze=...\): there is no pattern"):
        make(optax.sgd(1.0), freeze=[])
    with pytest.raises(TypeError, match="a pattern is a string, not 3"):
        make(optax.sgd(1.0), train=["a", 3])
    with pytest.raises(ValueError, match=r"train=...\): '\(' is not a regular expr"):
        make(optax.sgd(1.0), train="(")
    tx = make(optax.sgd(1.0), train=[".*/kernel", "head/.*"])
    message = (
        "'head/.*' of train= matches the whole path of no param. The params are "
        "embed/table, layers/0/kernel, layers/1/kernel."
    )
    with pytest.raises(ValueError) as raised:
        tx.init(PARAMS)
    assert message in str(raised.value)
