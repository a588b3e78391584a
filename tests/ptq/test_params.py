"""Float params in, quantized params out: the codes, the errors, and the memory."""

import jax
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.core import FrozenDict, freeze, unfreeze
from jax import numpy as jnp

from qwix_train import PtqProvider, QtProvider, ptq, quantize_model
from qwix_train.ptq import quantize_params
from qwix_train.values import stored
from tests import models

X = models.normal(6, 4, seed=0)
MODEL = models.Mlp()
PARAMS = models.params_of(MODEL, X, seed=1)
STATIC = [models.rule("int8", "int8", act_static_scale=True)]


def abstract(rules=models.INT8):
    model = quantize_model(MODEL, PtqProvider(rules))
    return jax.eval_shape(model.init, jax.random.key(0), X)["params"]


ABSTRACT = abstract()


def numbers(count, *names, value=8.0):
    shape = (1, 1)
    return {"count": jnp.array(count)} | {
        f"sum_of_{name}": jnp.full(shape, -value if name == "min" else value)
        for name in names or ("absmax",)
    }


def stats(count=2, *names, layers=("Dense_0", "Dense_1")):
    return {layer: {"dot_general0_lhs": numbers(count, *names)} for layer in layers}


def floats():
    return jax.tree.map(jnp.copy, PARAMS)


def deleted(tree):
    return {
        jax.tree_util.keystr(path): leaf.is_deleted()
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def test_a_tree_its_parts_and_other_containers():
    whole = quantize_params(PARAMS, ABSTRACT)
    assert jax.tree.structure(whole) == jax.tree.structure(ABSTRACT)
    kernel = np.asarray(PARAMS["Dense_0"]["kernel"], np.float64)
    scale = models.MARGIN * np.abs(kernel).max(0, keepdims=True) / 127.5
    array = whole["Dense_0"]["kernel"].array
    np.testing.assert_array_equal(array.qvalue, np.rint(kernel / scale))
    np.testing.assert_allclose(array.scale, scale, rtol=1e-6)
    assert whole["Dense_0"]["bias"] is PARAMS["Dense_0"]["bias"]
    for name, params in PARAMS.items():
        part = quantize_params({name: params}, ABSTRACT)
        models.assert_same(part, {name: whole[name]})
    frozen = quantize_params(freeze(PARAMS), freeze(ABSTRACT))
    assert isinstance(frozen, FrozenDict)
    models.assert_same(unfreeze(frozen), whole)
    models.assert_same(
        quantize_params(jax.tree.map(np.asarray, PARAMS), ABSTRACT), whole
    )
    models.assert_same(jax.jit(lambda p: quantize_params(p, ABSTRACT))(PARAMS), whole)
    # Params that are quantized already say how just as well.
    models.assert_same(quantize_params(PARAMS, whole), whole)
    shapes = quantize_params(jax.eval_shape(floats), ABSTRACT)
    assert shapes == jax.eval_shape(lambda: whole)


def test_lists_and_bare_arrays():
    w = jax.random.normal(jax.random.key(2), (4, 4))
    rules = [models.rule("int4")]

    def f(params, x):
        return x @ params[0] @ params[1]["a"]

    layer, params = ptq.quantize(f, [w, {"a": w}], rules, X)
    assert isinstance(params, list)
    models.assert_same(params[0], params[1]["a"])
    kernel = models.fake_quant(w, 4, 0)
    models.assert_close(layer(params, X), X @ kernel @ kernel)
    layer, params = ptq.quantize(lambda w, x: x @ w, w, rules, X)
    models.assert_close(layer(params, X), X @ kernel)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"kernel": jnp.ones((16, 4))},
            ValueError,
            r"'Dense_0/kernel' has shape \(16, 4",
        ),
        ({"kernel": jnp.ones((4, 16), int)}, ValueError, "'Dense_0/kernel': .*int32"),
        ({"kernel": [1.0]}, TypeError, "'Dense_0/kernel/0' is a float"),
        (
            {"kernel": nn.Partitioned(jnp.ones((4, 16)), ("a", "b"))},
            TypeError,
            "'Dense_0/kernel' is a Partitioned, .* flax.linen.unbox",
        ),
        (
            {"kernel": nnx.Param(jnp.ones((4, 16)))},
            TypeError,
            "'Dense_0/kernel' is a Param, .* nnx.to_pure_dict",
        ),
        ({"extra": jnp.ones(2)}, ValueError, "'Dense_0/extra' is not one of .*bias, D"),
    ],
)
def test_errors_name_the_param(change, error, message):
    params = {**PARAMS, "Dense_0": {**PARAMS["Dense_0"], **change}}
    with pytest.raises(error, match=message):
        quantize_params(params, ABSTRACT)


def test_other_errors():
    with pytest.raises(TypeError, match="'Dense_0/kernel' is quantized already"):
        quantize_params(quantize_params(PARAMS, ABSTRACT), ABSTRACT)
    model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
    quantized = quantize_model(model, PtqProvider(models.INT8), X)
    params = nnx.to_pure_dict(nnx.state(model))
    with pytest.raises(TypeError, match="Give the quantized model itself"):
        quantize_params(params, nnx.state(quantized))
    with pytest.raises(ValueError, match="Give the NNX model itself"):
        quantize_params(params, nnx.to_pure_dict(nnx.state(quantized)))
    with pytest.raises(TypeError, match="'bias' is a Param"):
        quantize_params(nnx.state(model), quantized)
    for linen in (quantize_model(MODEL, PtqProvider(models.INT8)), MODEL.init):
        with pytest.raises(TypeError, match=r"ptq.abstract_params\(model"):
            quantize_params(PARAMS, linen)


def test_extra_params_are_left_out():
    extra = {"head": {"w": jnp.ones(2)}}
    kept = quantize_params(PARAMS | extra, ABSTRACT, allow_extra_params=True)
    models.assert_same(kept, quantize_params(PARAMS, ABSTRACT))
    assert quantize_params(extra, ABSTRACT, allow_extra_params=True) == {}


def test_the_whole_state_of_an_nnx_model():
    model = models.NnxMlp(nnx.Rngs(0))
    quantized = quantize_model(model, PtqProvider(models.INT8), X)
    values = quantize_params(nnx.to_pure_dict(nnx.state(model)), quantized)
    before = nnx.to_pure_dict(nnx.state(quantized))
    assert jax.tree.structure(values) == jax.tree.structure(before)
    models.assert_same(values, before)


def test_donated_arrays_are_deleted_and_others_are_not():
    params = floats()
    quantized = quantize_params(params, ABSTRACT, donate=True)
    assert deleted(params) == {
        f"['Dense_{i}']['{name}']": name == "kernel"
        for i in range(2)
        for name in ("bias", "kernel")
    }
    models.assert_same(quantized, quantize_params(PARAMS, ABSTRACT))
    assert not any(deleted(PARAMS).values())
    # Arrays that stand in two places, and those of a trace.
    w = jax.random.normal(jax.random.key(0), (4, 4))
    tree = {"a": w, "b": w}
    shapes = ptq.abstract_params(lambda p, x: x @ p["a"] @ p["b"], tree, models.INT8, X)
    jax.jit(lambda p: quantize_params(p, shapes, donate=True))(tree)
    assert not w.is_deleted()
    both = quantize_params(tree, shapes, donate=True)
    models.assert_same(both["a"], both["b"])
    assert w.is_deleted()
    model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
    ptq.quantize(model, None, models.INT8, X, donate=True)
    assert deleted(nnx.to_pure_dict(nnx.state(model))) == {
        "['bias']": False,
        "['kernel']": True,
    }


def test_the_shapes_of_a_model_that_has_no_params_yet():
    found = ptq.abstract_params(MODEL, None, models.INT8, X)
    assert jax.tree.structure(found) == jax.tree.structure(ABSTRACT)
    assert jax.tree.leaves(found) == jax.tree.leaves(ABSTRACT)
    model = nnx.eval_shape(lambda: nnx.Linear(4, 2, rngs=nnx.Rngs(0)))
    found = ptq.abstract_params(model, None, models.INT8, X)
    scale = ptq.to_tree(found)["kernel"].array.scale
    assert scale == jax.ShapeDtypeStruct((1, 2), jnp.float32)
    with pytest.raises(TypeError, match="A function holds no params"):
        ptq.abstract_params(lambda p, x: x @ p, None, models.INT8, X)


def nbytes(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["tree", "nnx"])
@pytest.mark.parametrize("qtype", ["int8", "nf4"])
def test_the_peak_of_memory(qtype, framework, monkeypatch):
    sizes = [(64, 512), (512, 512), (512, 256), (256, 128)]
    rules = [models.rule(qtype)]

    class Layers(nnx.Module):
        def __init__(self):
            self.layers = nnx.List(
                nnx.Linear(*size, rngs=nnx.Rngs(0)) for size in sizes
            )

        def __call__(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    model, x = Layers(), jnp.ones((1, 64))
    params = nnx.to_pure_dict(nnx.state(model))
    total, largest = (
        nbytes(params),
        max(leaf.nbytes for leaf in jax.tree.leaves(params)),
    )
    quantized = quantize_model(nnx.eval_shape(Layers), PtqProvider(rules), x)
    temporary, samples = [], []
    quantize_param = stored.quantize_param

    def watched(param, how):
        if isinstance(param, jax.Array):
            compiled = jax.jit(stored.quantize_array, static_argnums=1)
            analysis = compiled.lower(param, how).compile().memory_analysis()
            temporary.append(analysis.temp_size_in_bytes / param.nbytes)
        out = quantize_param(param, how)
        jax.block_until_ready(out)
        samples.append(sum(array.nbytes for array in jax.live_arrays()))
        return out

    jax.block_until_ready(params)
    others = sum(array.nbytes for array in jax.live_arrays()) - total
    monkeypatch.setattr(stored, "quantize_param", watched)
    if framework == "tree":
        values = quantize_params(params, quantized, donate=True)
    else:
        del params
        values = ptq.quantize(model, None, rules, x, donate=True)[1]
    assert max(samples) - others <= total + nbytes(values) + 4096
    assert len(temporary) == 4 and max(temporary) <= 1
    # The float weights are gone: what is left are biases, in both trees at once.
    left = sum(array.nbytes for array in jax.live_arrays()) - others
    assert left <= nbytes(values) + 4096 and largest < total


def test_one_call_for_a_linen_model():
    trained = quantize_model(MODEL, QtProvider(models.INT8))
    model, params = ptq.quantize(MODEL, PARAMS, models.INT8, X)
    want = trained.apply({"params": PARAMS}, X)
    models.assert_close(model.apply({"params": params}, X), want)
    struct = jax.ShapeDtypeStruct(X.shape, X.dtype)
    models.assert_same(ptq.quantize(MODEL, PARAMS, models.INT8, struct)[1], params)


@pytest.mark.slow
def test_one_call_for_a_model_with_more_collections():
    network, images = (
        models.Everything(),
        jax.random.normal(jax.random.key(3), (4, 6, 6)),
    )
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    variables = network.init(keys, images)
    rest = {name: v for name, v in variables.items() if name != "params"}
    trained = quantize_model(network, QtProvider(models.INT8))
    want = trained.apply(variables, images, train=False)
    for given in ({}, {"variables": rest}):
        model, params = ptq.quantize(
            network, variables["params"], models.INT8, images, train=False, **given
        )
        got = model.apply({**rest, "params": params}, images, train=False)
        models.assert_close(got, want)


def test_one_call_for_an_nnx_model():
    float_model = models.NnxMlp(nnx.Rngs(0))
    held = nnx.to_pure_dict(nnx.state(float_model, nnx.Not(nnx.RngState)))
    model, tree = ptq.quantize(float_model, None, models.INT8, X)
    models.assert_same(
        nnx.to_pure_dict(nnx.state(float_model, nnx.Not(nnx.RngState))), held
    )
    params = nnx.to_pure_dict(nnx.state(float_model, nnx.Param))
    other = models.NnxMlp(nnx.Rngs(1))
    models.assert_same(ptq.quantize(other, params, models.INT8, X)[1], tree)
    # A part of the params: the rest is the model's own.
    mixed = ptq.quantize(other, {"l1": params["l1"]}, models.INT8, X)[1]
    models.assert_same(mixed["l1"], tree["l1"])
    models.assert_differ(mixed["l2"], tree["l2"])
    model.eval()
    float_model.eval()
    trained = quantize_model(float_model, QtProvider(models.INT8), X)
    models.assert_close(model(X), trained(X))


def test_static_ranges():
    shapes = abstract(STATIC)
    params = quantize_params(PARAMS, shapes, stats())
    scale = params["Dense_0"]["dot_general0_lhs_scale"].array
    np.testing.assert_allclose(scale, [[8 / 2 / 127.5]], rtol=1e-6)
    frozen = quantize_params(freeze(PARAMS), shapes, freeze(stats()))
    models.assert_same(unfreeze(frozen), params)
    parts = {}
    for name in PARAMS:
        part = stats(layers=(name,))
        parts |= quantize_params({name: PARAMS[name]}, shapes, part)
    models.assert_same(parts, params)
    models.assert_same(
        jax.jit(lambda p, s: quantize_params(p, shapes, s))(PARAMS, stats()), params
    )
    # The weights of one layer may come without, and the ranges without weights.
    assert "dot_general0_lhs_scale" not in quantize_params(
        {"Dense_0": PARAMS["Dense_0"]}, shapes
    )
    only = quantize_params({}, shapes, stats())
    models.assert_same(only["Dense_1"]["dot_general0_lhs_scale"].array, scale)
    model = quantize_model(MODEL, PtqProvider(STATIC))
    assert np.isfinite(model.apply({"params": params}, X)).all()


def test_static_ranges_next_to_a_collection_of_params():
    tree = {"params": {"w": jnp.eye(4)}}
    own = {"dot_general0_lhs": numbers(2)}
    for given in (own, {"params": own}):
        layer, params = ptq.quantize(
            lambda p, x: x @ p["params"]["w"], tree, STATIC, X, quant_stats=given
        )
        step = 4 / 127.5
        values = np.rint(np.asarray(X) / step) * step
        models.assert_close(layer(params, X), values, 1e-2)
        assert set(params["params"]) == {"w", "dot_general0_lhs_scale"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "2 activations .* not known, among them 'Dense_0/dot_general0_lhs'"),
        (stats(layers=("Dense_0",)), "1 activations .* 'Dense_1/dot_general0_lhs'"),
        (stats(0), "'Dense_0/dot_general0_lhs' are empty"),
        (stats(layers=("Dense_2",)), "for 'Dense_2/dot_general0_lhs', and no rule"),
        (
            stats(2, "min", "max"),
            r"have the range \['max', 'min'\], .* takes \['absmax'\]",
        ),
        (
            {"Dense_0": {"dot_general0_lhs": {"count": 1}}},
            r"'Dense_0/.* the range",
        ),
        (
            {
                "Dense_0": {
                    "dot_general0_lhs": {
                        "count": 1,
                        "sum_of_absmax": jnp.ones((3, 1, 1)),
                    }
                }
            },
            r"shape \(3, 1, 1\); in the quantized model it has \(1, 1\)",
        ),
    ],
)
def test_wrong_statistics_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        quantize_params(PARAMS, abstract(STATIC), given)


def test_an_nnx_model_keeps_the_ranges_that_it_has():
    model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
    given = {"dot_general0_lhs": numbers(2)}
    quantized, _ = ptq.quantize(model, None, STATIC, X, quant_stats=given)
    params = nnx.to_pure_dict(nnx.state(model))
    want = quantized(X)
    nnx.update(quantized, quantize_params(params, quantized))
    models.assert_same(quantized(X), want)
    fresh = quantize_model(model, PtqProvider(STATIC), X)
    with pytest.raises(ValueError, match="1 activations have a static range"):
        quantize_params(params, fresh)


def test_a_float_model_in_the_place_of_the_quantized_one_is_named():
    with pytest.warns(UserWarning, match="holds no quantized param.*stay in float"):
        assert quantize_params(PARAMS, PARAMS) == PARAMS
