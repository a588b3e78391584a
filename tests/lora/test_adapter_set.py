"""Several adapters on one base: one program serves all, each as it was trained."""

import jax
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax import numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from qwix_train import lora
from tests import models
from tests.lora.test_merge import random_like
from tests.models import Layers, Mlp

X = models.normal(5, 6, seed=1)


class Heads(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.DenseGeneral((4, 3))(x)
        x = jnp.einsum(
            "bhd,hdf->bhf", x, self.param("w", nn.initializers.normal(), (4, 3, 5))
        )
        return nn.Conv(4, (2,))(x)


def state_of(model, rank, alpha=3.0, seed=3, x=X, **kwargs):
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]
    rules = [lora.LoraRule(rank=rank, alpha=alpha, **kwargs)]
    state = models.lora_state(
        model.apply, params, optax.sgd(0.1), rules, jax.random.key(2), x
    )
    return state.replace(params=random_like(state.params, seed))


@pytest.mark.slow
def test_switching_compiles_once():
    state = state_of(Mlp(), 3, weight_qtype="int4")
    narrow = state_of(Mlp(), 1, alpha=7.0, seed=4, weight_qtype="int4")
    known = lora.AdapterSet(state)
    known.add("wide", state)
    known.add("other", random_like(state.params, 5))
    known.add("narrow", narrow)
    traces = []

    @jax.jit
    def apply(adapters, x):
        traces.append(1)
        return state.apply_fn({"params": adapters}, x)

    outputs = {name: apply(known[name], X) for name in known}
    assert len(traces) == 1 and list(known) == ["wide", "other", "narrow"]
    want = narrow.apply_fn({"params": narrow.params}, X)
    np.testing.assert_allclose(outputs["narrow"], want, 1e-5, 1e-5)
    np.testing.assert_array_equal(outputs["wide"], apply(state.params, X))
    assert len(traces) == 1
    assert not np.allclose(outputs["wide"], outputs["other"])


@pytest.mark.parametrize("kwargs", [{}, {"dora": True}, {"rank_stabilized": True}])
@pytest.mark.parametrize("model", [Layers(), Heads()], ids=["scan", "einsum and conv"])
@pytest.mark.slow
def test_a_smaller_rank_does_what_it_did(model, kwargs):
    wide = state_of(model, 3, alpha=5.0, **kwargs)
    narrow = state_of(model, 2, seed=4, **kwargs)
    known = lora.AdapterSet(wide.layouts)
    known.add("narrow", narrow.params, narrow.layouts)
    shapes = jax.tree.map(jnp.shape, known["narrow"])
    assert shapes == jax.tree.map(jnp.shape, wide.params)
    got = lora.merge(wide.frozen, known["narrow"], wide.layouts)
    want = lora.merge(narrow)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, 1e-5, 1e-6)


def test_the_same_scaling_changes_no_bit():
    wide = state_of(Mlp(), 4, alpha=8.0, module_path="Dense_0")
    narrow = state_of(Mlp(), 2, alpha=4.0, module_path="Dense_0")
    known = lora.AdapterSet(wide)
    known.add("narrow", narrow)
    own, padded = narrow.params["Dense_0"], known["narrow"]["Dense_0"]
    np.testing.assert_array_equal(padded["kernel_lora_b"][:2], own["kernel_lora_b"])
    np.testing.assert_array_equal(padded["kernel_lora_a"][:, :2], own["kernel_lora_a"])
    assert not padded["kernel_lora_b"][2:].any()
    assert not padded["kernel_lora_a"][:, 2:].any()


@pytest.mark.slow
def test_a_batch_that_mixes_adapters():
    state = state_of(Mlp(), 2)
    known = lora.AdapterSet(state)
    known.add("a", state)
    known.add("b", random_like(state.params, 9))
    names = ["a", "b", "b", "a", "b"]

    def one(adapters, x):
        return state.apply_fn({"params": adapters}, x[None])[0]

    got = jax.jit(jax.vmap(one))(known.stacked(names), X)
    for row, x, name in zip(got, X, names, strict=True):
        want = state.apply_fn({"params": known[name]}, x[None])[0]
        np.testing.assert_allclose(row, want, 1e-5, 1e-5)


@pytest.mark.slow
def test_what_does_not_fit_is_refused():
    state = state_of(Mlp(), 2)
    known = lora.AdapterSet(state)
    known.add("a", state)
    with pytest.raises(KeyError, match="No adapters 'b'; there are 'a'"):
        known["b"]
    with pytest.raises(ValueError, match="'b': the one of 'Dense_0/kernel' has rank 3"):
        known.add("b", state_of(Mlp(), 3))
    with pytest.raises(ValueError, match=r"shape \(6, 9\) .* another model's"):
        known.add("b", state_of(Mlp(width=9), 2))
    with pytest.raises(ValueError, match=r"magnitude \(DoRA\), and the program has"):
        known.add("b", state_of(Mlp(), 2, dora=True))
    with pytest.raises(ValueError, match="None for Dense_0/kernel"):
        known.add("b", state_of(Mlp(), 2, module_path="Dense_1"))
    with pytest.raises(ValueError, match="'b': The adapters do not fit the layouts"):
        known.add("b", state_of(Mlp(), 1).params)
    assert list(known) == ["a"]


def constant_state(sharding=None, **kwargs):
    params = {"kernel": jax.device_put(np.ones((6, 8), np.float32))}
    if sharding is not None:
        params = jax.device_put(params, sharding)
    rules = [lora.LoraRule(rank=2, alpha=2.0, **kwargs)]
    return models.lora_state(
        lambda params, x: x @ params["kernel"],
        params,
        optax.sgd(0.1),
        rules,
        jax.random.key(0),
        X,
    )


@pytest.mark.parametrize("sharded", [True, False])
def test_what_is_added_lies_where_the_program_expects_it(sharded):
    sharding = NamedSharding(
        jax.make_mesh((8,), ("model",)), PartitionSpec(None, "model")
    )
    state = constant_state(sharding if sharded else None)
    known = lora.AdapterSet(state)
    known.add("numpy", jax.tree.map(lambda x: np.asarray(x) + 1, state.params))
    known.add("doubles", jax.tree.map(lambda x: np.float64(x) + 2, state.params))
    known.add(
        "committed",
        jax.tree.map(
            lambda x: jax.device_put(np.asarray(x), jax.devices()[0]), state.params
        ),
    )
    call = jax.jit(lambda adapters, x: state.apply_fn(adapters, x))
    # A compiled program refuses other dtypes and shardings.
    apply = call.lower(state.params, X).compile()
    want = apply(state.params, X)
    for name in known:
        for got, like in zip(
            jax.tree.leaves(known[name]), jax.tree.leaves(state.params), strict=True
        ):
            assert got.dtype == like.dtype
            assert got.sharding.is_equivalent_to(like.sharding, got.ndim)
            assert got.committed == like.committed
        apply(known[name], X)
    np.testing.assert_array_equal(apply(known["committed"], X), want)


def test_boxes_of_the_program_are_kept():
    state = constant_state()
    boxed = jax.tree.map(lambda x: nn.Partitioned(x, ("in", None)), state.params)
    known = lora.AdapterSet(state.replace(params=boxed))
    known.add("plain", state.params)
    assert jax.tree.structure(known["plain"]) == jax.tree.structure(boxed)


def test_a_set_of_no_layouts_is_refused():
    with pytest.raises(ValueError, match="There are no layouts"):
        lora.AdapterSet({})
    with pytest.raises(TypeError, match="LoraTrainState or layouts.*got a list"):
        lora.AdapterSet([])
    known = lora.AdapterSet(constant_state())
    with pytest.raises(ValueError, match="at least one name"):
        known.stacked([])
