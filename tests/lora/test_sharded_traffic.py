"""What devices send one another when a base that is sharded over them is quantized."""

import jax
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.training.train_state import TrainState
from jax import lax
from jax import numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from qwix_train import attach, lora
from tests import models, traffic

WIDTH = 256
MODEL = nn.Sequential([nn.Dense(WIDTH, use_bias=False), nn.tanh, nn.Dense(WIDTH)])


def fsdp_traffic(**kwargs):
    """What a step of training sends: the params sharded as the batch is (FSDP)."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    whole, rows = (NamedSharding(mesh, PartitionSpec(*x)) for x in [(), ("data",)])

    def apply(variables, x):
        # The model is as it was; what calls it says that its weights are gathered.
        return MODEL.apply(lax.with_sharding_constraint(variables, whole), x)

    x = jax.device_put(np.ones((16, WIDTH), np.float32), rows)
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda p: np.ones(p.shape, np.float32), shapes)
    params = jax.device_put(params, rows)

    if not kwargs:
        call, given = lambda params, _, x: apply({"params": params}, x), (params, None)
    else:
        rules = [lora.LoraRule(rank=4, alpha=4.0, **kwargs)]
        state = TrainState(0, apply, params, optax.sgd(0.1), ())
        state = attach(state, rules, x, rng=jax.random.key(1))

        def call(adapters, frozen, x):
            return state.replace(frozen=frozen).apply_fn({"params": adapters}, x)

        given = (state.params, state.frozen)
    step = jax.jit(jax.grad(lambda *args: (call(*args) ** 2).mean()))
    return traffic.bytes_by(
        "dtype", traffic.collectives(step.lower(*given, x).compile())
    )


@pytest.fixture(scope="module")
def in_float():
    return sum(fsdp_traffic().values())


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    "kwargs, most",
    [
        ({"weight_qtype": "int8"}, 0.25),
        # Tiles, of which each device holds one.
        ({"weight_qtype": "int4", "tile_size": 32}, 0.25),
        ({"weight_qtype": "nf4", "tile_size": 64, "double_quant": True}, 0.15),
    ],
    ids=["int8", "int4 tiles", "packed"],
)
def test_codes_are_gathered_and_not_what_is_dequantized(in_float, kwargs, most):
    found = fsdp_traffic(**kwargs)
    # In float32 are scales, the gradients of adapters, and adapters.
    assert found["f32"] < WIDTH * WIDTH
    assert sum(found.values()) < most * in_float


def explicit_traffic(said, **kwargs):
    """The same for a plain function and a mesh that is a part of types.

    Args:
      said: whether the function says that its weights are gathered.
    """
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    rows = NamedSharding(mesh, PartitionSpec("data"))

    def apply(params, x):
        for name in "ab":
            weight = params[name]
            if said:
                weight = jax.sharding.reshard(weight, PartitionSpec(None, None))
            x = jnp.tanh(x @ weight)
        return x

    random = np.random.default_rng(0)
    x, a, b = (
        random.normal(size=(n, WIDTH)).astype(np.float32) for n in (16, 256, 256)
    )
    a, b = a / 16, b / 16
    with jax.set_mesh(mesh):
        params = jax.device_put({"a": a, "b": b}, rows)
        held = jax.device_put(x, rows)
        if not kwargs:
            call, given = lambda params, _, x: apply(params, x), (params, None)
        else:
            rules = [lora.LoraRule(rank=4, alpha=4.0, **kwargs)]
            key = jax.random.key(1)
            state = models.lora_state(apply, params, optax.sgd(0.1), rules, key, held)

            def call(adapters, frozen, x):
                return state.replace(frozen=frozen).apply_fn(adapters, x)

            given = (state.params, state.frozen)
        # An adapter is 0 at first.
        want = np.tanh(np.tanh(x.astype(np.float64) @ a) @ b)
        error = np.abs(np.asarray(jax.jit(call)(*given, held)) - want).mean()
        assert error < 0.2 * np.abs(want).mean()
        step = jax.jit(jax.grad(lambda *args: (call(*args) ** 2).mean()))
        return traffic.bytes_by(
            "dtype", traffic.collectives(step.lower(*given, held).compile())
        )


@pytest.mark.slow
@pytest.mark.parametrize("said", [False, True])
@pytest.mark.parametrize(
    "kwargs",
    [
        {"weight_qtype": "int8"},
        {"weight_qtype": "nf4", "tile_size": 64, "double_quant": True},
    ],
    ids=["int8", "packed"],
)
def test_an_explicit_mesh_needs_no_word(said, kwargs):
    in_float = sum(explicit_traffic(said).values())
    found = explicit_traffic(said, **kwargs)
    assert found["f32"] < WIDTH * WIDTH
    assert sum(found.values()) < 0.2 * in_float
