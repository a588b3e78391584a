import jax
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import qwix_train
from qwix_train import lora
from tests import models

X = jax.device_put(np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32))
NAMES = ("data", "model")
PROVIDER = lora.LoraProvider(rank=2, alpha=1.0)


def boxed_init(with_partitioning, initializers):
    return with_partitioning(initializers.lecun_normal(), NAMES)


def test_adapters_of_a_linen_model_have_the_names_of_the_axes():
    init = boxed_init(nn.with_partitioning, nn.initializers)
    model = qwix_train.apply_lora_to_model(nn.Dense(32, kernel_init=init), PROVIDER)
    params = jax.jit(model.init)(jax.random.key(0), X)["params"]
    assert params["kernel_lora_a"].names == ("data", None)
    assert params["kernel_lora_b"].names == (None, "model")
    assert params["kernel_lora_a"].value.shape == (16, 2)
    assert model.apply({"params": params}, X).shape == (8, 32)


@pytest.mark.slow
def test_adapters_of_an_nnx_model_have_the_names_of_the_axes():
    init = boxed_init(nnx.with_partitioning, nnx.initializers)
    mesh = jax.make_mesh((2, 4), NAMES)
    with jax.set_mesh(mesh):
        model = nnx.Linear(16, 32, rngs=nnx.Rngs(0), kernel_init=init)
        model = qwix_train.apply_lora_to_model(model, PROVIDER, X, rngs=nnx.Rngs(1))
    assert isinstance(model.kernel_lora_a, nnx.LoRAParam)
    assert tuple(model.kernel_lora_a.get_metadata("out_sharding")) == ("data", None)
    assert tuple(model.kernel_lora_b.get_metadata("out_sharding")) == (None, "model")


@pytest.mark.thinned(4)
@pytest.mark.parametrize("weight_qtype", [None, "int8"])
@pytest.mark.parametrize("kind", ["dense", "heads"])
def test_adapters_of_a_sharded_param_are_sharded_as_it_is(weight_qtype, kind):
    mesh = jax.make_mesh((2, 4), NAMES)
    if kind == "dense":
        model, spec = nn.Dense(32), PartitionSpec(*NAMES)
        a_spec, b_spec = ("data", None), (None, "model")
    else:
        # The axes of A and of B that an einsum keeps apart are those of the param.
        model, spec = nn.Einsum((16, 4, 8), "bi,ihd->bhd"), PartitionSpec(*NAMES, None)
        a_spec, b_spec = ("data", None), (None, "model", None)
    params = jax.jit(model.init)(jax.random.key(0), X)["params"]
    params["kernel"] = jax.device_put(params["kernel"], NamedSharding(mesh, spec))
    rules = [lora.LoraRule(rank=2, alpha=1.0, weight_qtype=weight_qtype)]
    tx = optax.adam(1e-3)
    state = models.lora_state(model.apply, params, tx, rules, jax.random.key(1), X)
    a, b = state.params["kernel_lora_a"], state.params["kernel_lora_b"]
    for array, want in [(a, a_spec), (b, b_spec)]:
        want = NamedSharding(mesh, PartitionSpec(*want))
        assert array.sharding.is_equivalent_to(want, array.ndim)
    moments = state.opt_state[0].mu["kernel_lora_a"]
    assert moments.sharding.is_equivalent_to(a.sharding, a.ndim)


def test_boxed_params_of_a_state_keep_their_boxes():
    init = boxed_init(nn.with_partitioning, nn.initializers)
    model = nn.Dense(32, kernel_init=init)
    params = jax.jit(model.init)(jax.random.key(0), X)["params"]
    rules = [lora.LoraRule(rank=2, alpha=1.0)]
    adapters, frozen, _ = lora.init(params, model.apply, rules, jax.random.key(1), X)
    assert adapters["kernel_lora_b"].names == (None, "model")
    assert frozen["kernel"].names == NAMES
