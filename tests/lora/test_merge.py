"""Adapters merged into their base, against float64 and against the adapted model."""

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from flax import nnx
from jax import numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import qwix_train
from qwix_train import QuantizationRule, lora, ptq
from qwix_train.values import stored
from tests import models
from tests.lora.test_adapted_weight import reference_weight
from tests.models import Layers, Mlp

X = models.normal(5, 6, seed=1)
RULE = dict(rank=2, alpha=3.0)
INT4 = dict(weight_qtype="int4", tile_size=2)


def random_like(adapters, seed=3):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jax.device_put(rng.uniform(0.5, 1.5, x.shape).astype(x.dtype)),
        adapters,
    )


def state_of(model, *rules, x=X, **kwargs):
    """A state with adapters that do something, and the float params."""
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]
    rules = rules or (lora.LoraRule(**RULE),)
    state = models.lora_state(
        model.apply, params, optax.sgd(0.1), rules, jax.random.key(2), x, **kwargs
    )
    return state.replace(params=random_like(state.params)), params


def flat(tree):
    return {
        "/".join(path): leaf for path, leaf in lora.train_state.by_path(tree).items()
    }


def wanted(state, base):
    """The merged weights in float64."""
    adapters = lora.train_state.by_path(state.params)
    base = lora.train_state.by_path(base)
    return {
        "/".join(path): reference_weight(layout, base[path], adapters)
        for path, layout in state.layouts.items()
    }


class Heads(nn.Module):
    """An embedding, heads over several axes, and a convolution."""

    @nn.compact
    def __call__(self, x):
        tokens = (jnp.abs(x) * 3).astype(int) % 7
        x = nn.Embed(7, 8)(tokens)
        x = nn.DenseGeneral((2, 3))(x)
        x = nn.DenseGeneral(4, axis=(-2, -1))(x)
        return nn.Conv(3, (3,))(x)


@pytest.mark.slow
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(
    "model", [Mlp(), Layers(), Heads()], ids=lambda m: type(m).__name__
)
def test_a_float_base_is_merged_exactly(model, dora):
    names = ("dot_general", "einsum", "conv_general_dilated", "gather")
    rank = 1 if isinstance(model, Heads) else 2
    rule = lora.LoraRule(rank=rank, alpha=3.0, dora=dora, op_names=names)
    state, params = state_of(model, rule)
    merged = lora.merge(state)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    got = flat(merged)
    for name, weight in wanted(state, params).items():
        np.testing.assert_allclose(got.pop(name), weight, 2e-6, 2e-6)
    base = flat(params)
    assert all(leaf is base[name] for name, leaf in got.items())  # biases
    y = jax.jit(state.apply_fn)({"params": state.params}, X)
    found = jax.jit(model.apply)({"params": merged}, X)
    np.testing.assert_allclose(found, y, 2e-5, 2e-5)
    again = lora.merge(state.frozen, state.params, state.layouts)
    for name, leaf in flat(again).items():
        np.testing.assert_array_equal(leaf, flat(merged)[name])


@pytest.mark.slow
def test_bfloat16_is_rounded_once():
    model = nn.Dense(8, param_dtype=jnp.bfloat16)
    state, params = state_of(model)
    got = lora.merge(state)["kernel"]
    (weight,) = wanted(state, params).values()
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, weight.astype(jnp.bfloat16))


@pytest.mark.parametrize("dtype, most", [(jnp.float32, 1e-6), (jnp.bfloat16, 0.02)])
def test_unmerge_gives_the_base_to_rounding(dtype, most):
    state, params = state_of(nn.Dense(8, param_dtype=dtype))
    base = lora.unmerge(lora.merge(state), state.params, state.layouts)
    assert base["kernel"].dtype == dtype and base["bias"] is params["bias"]
    np.testing.assert_allclose(
        np.float64(base["kernel"]), np.float64(params["kernel"]), atol=most
    )


def test_unmerge_refuses_what_is_lost():
    state, _ = state_of(Mlp(), lora.LoraRule(**RULE, **INT4))
    with pytest.raises(
        ValueError, match="'Dense_0/kernel' is quantized.*Keep the base"
    ):
        lora.unmerge(lora.merge(state), state.params, state.layouts)
    state, _ = state_of(Mlp(), lora.LoraRule(**RULE, dora=True))
    with pytest.raises(ValueError, match="'Dense_0/kernel' has a magnitude"):
        lora.unmerge(lora.merge(state), state.params, state.layouts)


@pytest.mark.thinned(6)
@pytest.mark.parametrize("qtype", ["int4", "nf4", "int8", "float8_e4m3fn"])
def test_a_quantized_base_is_quantized_again_as_it_was(qtype):
    rule = lora.LoraRule(**RULE, weight_qtype=qtype, tile_size=2)
    state, _ = state_of(Mlp(), rule)
    merged = lora.merge(state)
    base = jax.tree.map(
        lambda x: stored.dequantized(x) if stored.is_quantized(x) else x,
        state.frozen,
        is_leaf=stored.is_quantized,
    )
    for name, weight in wanted(state, base).items():
        got = flat(merged)[name]
        assert got.how == flat(state.frozen)[name].how
        direct = stored.quantize_param(jnp.asarray(weight, jnp.float32), got.how)
        np.testing.assert_allclose(
            stored.dequantized(got), stored.dequantized(direct), 1e-5, 1e-5
        )
        got = flat(lora.merge(state, to_float=True))[name]
        np.testing.assert_allclose(got, weight, 2e-6, 2e-6)


@pytest.mark.slow
def test_the_merged_tree_runs_with_ptq_and_is_saved(tmp_path):
    rules = [
        lora.LoraRule(module_path="Dense_0", **RULE, **INT4),
        QuantizationRule(weight_qtype="int8"),
    ]
    state, _ = state_of(Mlp(), *rules)
    merged = lora.merge(state)
    model = qwix_train.quantize_model(Mlp(), qwix_train.PtqProvider(rules))
    y = model.apply({"params": merged}, X)
    values = lora.merge(state, to_float=True)
    assert not any(map(stored.is_quantized, flat(values).values()))
    # The error of rounding once more is no more than half a step of each weight.
    np.testing.assert_allclose(y, Mlp().apply({"params": values}, X), atol=2)
    quantized = flat(merged)["Dense_0/kernel"]
    half = np.max(quantized.array.scale) / 2 * 1.01
    error = stored.dequantized(quantized) - values["Dense_0"]["kernel"]
    assert 0 < np.max(np.abs(error)) <= half
    ptq.save(tmp_path / "a", merged, rules=rules)
    abstract = jax.eval_shape(model.init, jax.random.key(0), X)["params"]
    restored = ptq.restore(tmp_path / "a", abstract)
    np.testing.assert_array_equal(model.apply({"params": restored}, X), y)


@pytest.mark.slow
def test_the_report_is_per_layer_and_right():
    state, _ = state_of(Layers(), lora.LoraRule(**RULE, weight_qtype="int4"))
    params, report = lora.merge_with_report(state)
    assert [record.layer for record in report.weights] == [(0,), (1,), (2,)]
    ((name, exact),) = wanted(state, dequantized(state.frozen)).items()
    base = np.float64(flat(dequantized(state.frozen))[name])
    value = np.float64(flat(dequantized(params))[name])
    scale = np.float64(flat(params)[name].array.scale)
    norm = np.linalg.norm
    for index, record in enumerate(report.weights):
        error, delta = (value - exact)[index], (exact - base)[index]
        assert record.param == name and record.qtype == "int4"
        close = dict(rel=1e-4)
        assert record.error == pytest.approx(norm(error) / norm(exact[index]), **close)
        assert record.adapter_error == pytest.approx(norm(error) / norm(delta), **close)
        want = norm(delta) / norm(base[index])
        assert record.adapter_size == pytest.approx(want, **close)
        steps = np.broadcast_to(scale, exact.shape)[index]
        want = norm(delta) / norm(steps)
        assert record.adapter_in_steps == pytest.approx(want, **close)
    assert f"{name}[2]" in str(report).splitlines()[-1]
    assert len(report.records()) == 3


def dequantized(tree):
    return jax.tree.map(
        lambda x: stored.dequantized(x) if stored.is_quantized(x) else x,
        tree,
        is_leaf=stored.is_quantized,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "qtype, want",
    [("nf4", 1 - 0.7229568362236023), ("float8_e4m3fn", 32.0), ("int1", 2.0)],
)
def test_steps_of_types_that_are_not_uniform(qtype, want):
    # All elements are the largest code; its neighbor is `want` below.
    rule = lora.LoraRule(rank=1, alpha=1.0, weight_qtype=qtype)
    adapters, frozen, layouts = lora.init(
        {"kernel": jnp.ones((4, 4))},
        lambda params, x: x @ params["kernel"],
        [rule],
        jax.random.key(0),
        X[:, :4],
    )
    adapters = jax.tree.map(lambda x: jnp.full_like(x, 0.5), adapters)
    merged, report = lora.merge_with_report(frozen, adapters, layouts)
    step = want * float(merged["kernel"].array.scale.max())
    assert report.weights[0].adapter_in_steps == pytest.approx(0.25 / step, rel=1e-5)


def test_a_report_of_float_shows_no_loss():
    state, _ = state_of(Mlp())
    report = lora.merge_with_report(state).report
    assert [record.param for record in report.weights] == [
        "Dense_0/kernel",
        "Dense_1/kernel",
    ]
    for record in report.weights:
        assert record.qtype is None and record.adapter_in_steps is None
        assert record.error < 1e-7 < record.adapter_size


@pytest.mark.slow
def test_params_of_a_linen_model():
    model = qwix_train.apply_lora_to_model(
        Mlp(), lora.LoraProvider([lora.LoraRule(**RULE, **INT4)])
    )
    params = jax.jit(model.init)(jax.random.key(0), X)["params"]
    adapters, base, layouts = lora.split(model, X, params=params)
    adapters = random_like(adapters)
    joined = jax.tree.map(lambda x: x, params)
    for module, held in adapters.items():
        joined[module] |= held
    y = model.apply({"params": joined}, X)
    merged = lora.merge(base, adapters, layouts, to_float=True)
    assert sorted(flat(merged)) == sorted(
        flat(Mlp().init(jax.random.key(0), X)["params"])
    )
    np.testing.assert_allclose(Mlp().apply({"params": merged}, X), y, 2e-5, 2e-5)


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(6, 6, rngs=rngs) for _ in range(2)])
        self.head = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return self.head(x)


def nnx_model(**kwargs):
    provider = lora.LoraProvider(module_path="layers.*", **RULE, **kwargs)
    model = qwix_train.apply_lora_to_model(
        NnxNet(nnx.Rngs(0)), provider, X, rngs=nnx.Rngs(1)
    )
    state = nnx.state(model, nnx.LoRAParam)
    nnx.update(model, random_like(state))
    return model


@pytest.mark.thinned(3)
@pytest.mark.parametrize("kwargs", [{}, {"dropout": 0.5}, {"dora": True}])
def test_an_nnx_model(kwargs):
    model = nnx_model(**kwargs)
    model.eval()
    merged = lora.merge(model, X)
    assert type(merged) is NnxNet
    assert not jax.tree.leaves(nnx.state(merged, nnx.LoRAParam))
    structure = jax.tree.structure(nnx.state(NnxNet(nnx.Rngs(0))))
    assert jax.tree.structure(nnx.state(merged)) == structure
    np.testing.assert_allclose(merged(X), model(X), 2e-5, 2e-5)
    assert jax.tree.leaves(nnx.state(model, nnx.LoRAParam))  # as it was


@pytest.mark.slow
def test_a_quantized_nnx_model(tmp_path):
    model = nnx_model(**INT4)
    merged, report = lora.merge_with_report(model, X)
    assert len(report.weights) == 2
    assert not jax.tree.leaves(nnx.state(merged, nnx.LoRAParam))
    in_float = lora.merge(model, X, to_float=True)
    assert type(in_float) is NnxNet
    np.testing.assert_allclose(in_float(X), model(X), 2e-5, 2e-5)
    direct = qwix_train.quantize_model(
        in_float, qwix_train.PtqProvider(lora.parts.provider_of(model).rules), X
    )
    np.testing.assert_array_equal(merged(X), direct(X))
    ptq.save(tmp_path / "a", merged)
    np.testing.assert_array_equal(ptq.restore(tmp_path / "a", direct)(X), merged(X))
    with pytest.raises(TypeError, match="no model with adapters"):
        lora.merge(merged, X)


def test_it_stays_on_the_mesh():
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    state, params = state_of(nn.Dense(8), x=jnp.ones((2, 8)))
    sharding = NamedSharding(mesh, PartitionSpec("a", "b"))
    frozen = {**params, "kernel": jax.device_put(params["kernel"], sharding)}
    merged = lora.merge(frozen, state.params, state.layouts)["kernel"]
    assert merged.sharding.is_equivalent_to(sharding, 2)
    want = lora.merge(params, state.params, state.layouts)["kernel"]
    np.testing.assert_allclose(merged, want, 1e-6, 1e-6)


def test_boxes_are_kept():
    kernel = nn.with_partitioning(nn.initializers.ones, ("in", "out"))
    for kwargs in ({}, INT4):
        state, params = state_of(
            nn.Dense(8, kernel_init=kernel), lora.LoraRule(**RULE, **kwargs)
        )
        merged = lora.merge(state)
        assert jax.tree.structure(merged) == jax.tree.structure(state.frozen)
        merged = lora.merge(state, to_float=True)
        assert jax.tree.structure(merged) == jax.tree.structure(params)


def test_bad_input():
    state, params = state_of(Mlp())
    adapters, layouts = state.params, state.layouts
    with pytest.raises(TypeError, match=r"lora.merge\(frozen, adapters, layouts\)"):
        lora.merge(state.frozen, adapters)
    with pytest.raises(ValueError, match=r"Missing: Dense_1/kernel_lora_a, Dense_1"):
        lora.merge(params, {"Dense_0": adapters["Dense_0"]}, layouts)
    with pytest.raises(ValueError, match=r"Of no layout: Dense_0/bias.*lora.split"):
        lora.merge(
            params,
            {**adapters, "Dense_0": {**adapters["Dense_0"], **params["Dense_0"]}},
            layouts,
        )
    other, _ = state_of(Mlp(), lora.LoraRule(rank=3, alpha=3.0))
    with pytest.raises(ValueError, match=r"lora_a has shape \(6, 3\), .* \(6, 2\)"):
        lora.merge(params, other.params, layouts)
    wide, _ = state_of(Mlp(width=17))
    with pytest.raises(
        ValueError,
        match=r"'Dense_0/kernel' of the base has shape \(6, 17\).*another model",
    ):
        lora.merge(wide.frozen, adapters, layouts)
    with pytest.raises(ValueError, match="base has no param 'Dense_0/kernel'"):
        lora.merge({"Dense_1": params["Dense_1"]}, adapters, layouts)


@pytest.mark.slow
def test_a_packed_base():
    rule = lora.LoraRule(**RULE, weight_qtype="nf4", tile_size=2, double_quant=True)
    state, _ = state_of(Layers(), rule)
    ((_, exact),) = wanted(state, dequantized(state.frozen)).items()
    (kernel,) = jax.tree.leaves(
        lora.merge(state, to_float=True), is_leaf=stored.is_quantized
    )
    np.testing.assert_allclose(kernel, exact, 2e-6, 2e-6)
    merged, report = lora.merge_with_report(state)
    (quantized,) = jax.tree.leaves(merged, is_leaf=stored.is_quantized)
    direct = stored.quantize_param(jnp.asarray(exact, jnp.float32), quantized.how)
    np.testing.assert_allclose(
        stored.dequantized(quantized), stored.dequantized(direct), 1e-5, 1e-5
    )
    assert [record.qtype for record in report.weights] == ["nf4"] * 3
    model = qwix_train.quantize_model(Layers(), qwix_train.PtqProvider([rule]))
    abstract = jax.eval_shape(model.init, jax.random.key(0), X)["params"]
    assert jax.tree.structure(abstract) == jax.tree.structure(merged)
    assert model.apply({"params": merged}, X).shape == X.shape
