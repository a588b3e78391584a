"""Models that do not fit: states on the host, and models that are shapes alone."""

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import qwix_train
from qwix_train import ptq
from tests import models

X = models.normal(8, 4)
RULES = [models.rule("int8", "int8", act_static_scale=True)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pinned_host", "unpinned_host"])
def test_the_state_of_the_optimizer_lies_on_the_host(kind):
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    host = device.with_memory_kind(kind)
    model = models.Mlp(width=8)
    params = models.params_of(model, X)

    def step(state, x):
        def loss_of(params):
            return (state.apply_fn({"params": params}, x) ** 2).mean()

        state = state.replace(opt_state=jax.device_put(state.opt_state, device))
        loss, grads = jax.value_and_grad(loss_of)(state.params)
        return state.apply_gradients(grads=grads), loss

    def trained(place):
        state = TrainState.create(
            apply_fn=model.apply, params=params, tx=optax.adam(0.1)
        )
        state = jax.device_put(qwix_train.attach(state, RULES, X), device)
        state = state.replace(opt_state=jax.device_put(state.opt_state, place))
        out = jax.tree.map(lambda x: x.sharding, state)
        wrapped = qwix_train.wrap_train_step(step, RULES)
        wrapped = jax.jit(wrapped, out_shardings=(out, None))
        for _ in range(2):
            state, loss = wrapped(state, X)
        return state, loss

    (state, loss), wanted = trained(host), trained(device)
    for leaf in jax.tree.leaves(state.opt_state):
        assert leaf.sharding.memory_kind == kind
    models.assert_close(
        (state.params, state.quant_stats, loss),
        (wanted[0].params, wanted[0].quant_stats, wanted[1]),
    )
    assert jax.tree.leaves(state.params)[0].sharding.memory_kind == "device"


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_a_model_of_shapes_is_quantized_as_one_of_arrays(kind):
    rules = [models.rule("int4")]
    if kind == "nnx":
        model = models.NnxMlp(nnx.Rngs(0))
        shapes = nnx.eval_shape(lambda: models.NnxMlp(nnx.Rngs(0)))
        _, wanted = ptq.quantize(model, None, rules, X)
        _, found = ptq.quantize(shapes, None, rules, X)
    else:
        params = models.params_of(models.Mlp(width=8), X)
        shapes = jax.eval_shape(lambda: params)
        _, wanted = ptq.quantize(models.Mlp(width=8), params, rules, X)
        _, found = ptq.quantize(models.Mlp(width=8), shapes, rules, X)
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for shape, array in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        assert isinstance(shape, jax.ShapeDtypeStruct)
        assert (shape.shape, shape.dtype) == (np.shape(array), array.dtype)
