"""Quantized models and functions: Linen, NNX, plain JAX and another library."""

import threading

import equinox as eqx
import jax
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import numpy as jnp

from qwix_train import (
    QtProvider,
    plan,
    quantize,
    quantize_fn,
    quantize_model,
    wrap_eval_step,
)
from tests import models

X = models.normal(6, 4, seed=0)
PROVIDER = QtProvider(models.INT8)


def test_a_linen_model_with_init_apply_and_tabulate():
    model = models.Mlp()
    quantized = quantize_model(model, PROVIDER)
    assert isinstance(quantized, models.Mlp) and type(model) is models.Mlp
    variables = quantized.init(jax.random.key(1), X)
    models.assert_same(variables, model.init(jax.random.key(1), X))
    want = models.mlp(variables["params"], X)
    models.assert_close(quantized.apply(variables, X), want)
    models.assert_close(jax.jit(quantized.apply)(variables, X), want)
    plain = model.apply(variables, X)
    models.assert_differ(plain, want)
    table = quantized.tabulate(jax.random.key(1), X)
    assert "Dense_0" in table and "Mlp" in table
    assert quantize_model(quantized, QtProvider(models.INT4)).width == 16


def test_quantizing_again_replaces_the_rules():
    model = quantize_model(models.Mlp(), PROVIDER)
    variables = jax.jit(model.init)(jax.random.key(1), X)
    again = quantize_model(model, QtProvider(models.INT4))
    want = models.mlp(variables["params"], X, weight_bits=4)
    models.assert_close(again.apply(variables, X), want)


class Both(nn.Module):
    """Two methods, and submodules made in `setup`."""

    def setup(self):
        self.first = nn.Dense(8)
        self.second = nn.Dense(3)

    def __call__(self, x):
        return self.decode(self.encode(x))

    def encode(this, x):
        return nn.relu(this.first(x))

    def decode(self, x):
        return self.second(x)


def test_several_methods():
    model = quantize_model(Both(), PROVIDER, methods=["__call__", "encode"])
    variables = jax.jit(model.init)(jax.random.key(1), X)
    params = variables["params"]
    hidden = nn.relu(models.dense(params["first"], X))
    models.assert_close(model.apply(variables, X, method="encode"), hidden)
    models.assert_close(
        model.apply(variables, X), models.dense(params["second"], hidden)
    )
    # `decode` was not asked for.
    with pytest.warns(UserWarning, match=r"Both\.decode runs 1 ops in float"):
        decoded = model.apply(variables, hidden, method=model.decode)
    models.assert_same(decoded, Both().apply(variables, hidden, method="decode"))


@pytest.mark.slow
def test_a_quantized_model_inside_another_module():
    class Outer(nn.Module):
        inner: nn.Module

        @nn.compact
        def __call__(self, x):
            x = self.inner(x)
            x = quantize_model(nn.Dense(4, name="made"), PROVIDER)(x)
            return nn.Dense(2, name="plain")(x)

    model = Outer(quantize_model(models.Mlp(), PROVIDER))
    variables = jax.jit(model.init)(jax.random.key(1), X)
    params = variables["params"]
    want = models.dense(params["made"], models.mlp(params["inner"], X))
    want = want @ params["plain"]["kernel"] + params["plain"]["bias"]
    models.assert_close(model.apply(variables, X), want)


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.MultiHeadDotProductAttention(num_heads=2)(x)


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.RNN(nn.OptimizedLSTMCell(4))(x)


class Tied(nn.Module):
    @nn.compact
    def __call__(self, x):
        embed = nn.Embed(7, 4)
        return embed.attend(embed(jnp.argmax(x, -1)))


class Shared(nn.Module):
    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(4)
        return layer(nn.relu(layer(x)))


class EqualShapes(nn.Module):
    @nn.compact
    def __call__(self, x):
        a = self.param("a", nn.initializers.normal(1.0), (4, 4))
        b = self.param("b", nn.initializers.normal(9.0), (4, 4))
        return (x @ a) @ b.T


class Parent(nn.Module):
    def setup(self):
        self.child = nn.Dense(4)

    def __call__(self, x):
        return self.child(x) @ self.child.variables["params"]["kernel"]


class Partitioned(nn.Module):
    @nn.compact
    def __call__(self, x):
        init = nn.with_partitioning(nn.initializers.normal(1.0), (None, "model"))
        return nn.Dense(4, kernel_init=init)(x)


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        def body(layer, x):
            return nn.tanh(layer(x)), None

        layers = nn.scan(
            body, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        return layers(nn.Dense(4), x)[0]


class Remat(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.remat(nn.Dense)(4)(x)


class Vmapped(nn.Module):
    @nn.compact
    def __call__(self, x):
        layers = nn.vmap(
            nn.Dense,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=None,
            axis_size=2,
        )
        return layers(4)(x).sum(0)


def quantized_params(params, leaves):
    """Params with each of the named leaves fake-quantized."""
    flat = nn.meta.unbox(params)
    flat = jax.tree_util.tree_flatten_with_path(flat)[0]
    values = []
    for path, value in flat:
        names = "/".join(str(key.key) for key in path)
        shared = next((s for name, s in leaves.items() if name in names), None)
        values.append(value if shared is None else models.fake_quant(value, 8, shared))
    return jax.tree.unflatten(jax.tree.structure(params), values)


# A model, its input, and the axes that share a scale for each quantized param.
LINEN = {
    "attention": (Attention(), X[None], {"out/kernel": (0, 1), "kernel": 0}),
    "lstm": (Recurrent(), X[None], {"kernel": 0}),
    "tied embedding": (Tied(), X, {"embedding": 1}),
    "shared": (Shared(), X, {"kernel": 0}),
    "equal shapes": (EqualShapes(), X, {"a": 0, "b": 1}),
    "child's weight": (Parent(), X, {"kernel": 0}),
    "partitioned": (Partitioned(), X, {"kernel": 0}),
    "scan": (Scanned(), X, {"kernel": 1}),
    "remat": (Remat(), X, {"kernel": 0}),
    "vmap": (Vmapped(), X, {"kernel": 1}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LINEN)
def test_weights_of_linen_models_are_quantized_wherever_they_are_read(name):
    # The model with fake-quantized params is the reference: values and gradients.
    model, x, leaves = LINEN[name]
    variables = jax.jit(model.init)(jax.random.key(1), x)
    quantized = quantize_model(model, QtProvider([models.rule("int8")]))

    def loss(apply, params):
        return (apply({"params": params}, x) ** 2).sum()

    got = jax.jit(jax.value_and_grad(lambda p: loss(quantized.apply, p)))(
        variables["params"]
    )
    want = jax.jit(
        jax.value_and_grad(lambda p: loss(model.apply, quantized_params(p, leaves)))
    )(variables["params"])
    models.assert_close(got, want, 1e-4)
    assert jax.tree.structure(got[1]) == jax.tree.structure(variables["params"])


@pytest.mark.parametrize("nnx_model", [False, True])
def test_two_threads_with_their_own_rules(nnx_model):
    if nnx_model:
        model = models.NnxMlp(nnx.Rngs(0), 0.0)
        model.eval()
        run = wrap_run = lambda m, x: m(x)
        args = (model, X)
    else:
        variables = models.Mlp().init(jax.random.key(1), X)
        run = wrap_run = lambda v, x: models.Mlp().apply(v, x)
        args = (variables, X)
    all_rules = [models.INT8, models.INT4, models.INT2]
    plain = run(*args)
    want = [wrap_eval_step(wrap_run, rules)(*args) for rules in all_rules]
    results = [[] for _ in all_rules]
    barrier = threading.Barrier(len(all_rules))

    def work(index):
        barrier.wait()
        for _ in range(3):
            results[index].append(wrap_eval_step(wrap_run, all_rules[index])(*args))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for outs, expected in zip(results, want, strict=True):
        assert len(outs) == 3
        for out in outs:
            models.assert_same(out, expected)
    models.assert_same(run(*args), plain)
    if nnx_model:
        assert type(model) is models.NnxMlp and type(model.l1) is nnx.Linear


def test_an_nnx_model():
    model = models.NnxMlp(nnx.Rngs(0), 0.5)
    quantized = quantize_model(
        model, PROVIDER, jax.ShapeDtypeStruct((6, 4), jnp.float32), methods=["features"]
    )
    assert isinstance(quantized, models.NnxMlp) and type(model) is models.NnxMlp
    out = quantized.features(X)
    plain = model.features(X)
    models.assert_same(out == 0, plain == 0)
    models.assert_differ(out, plain)
    models.assert_same(nnx.state(quantized, nnx.Param), nnx.state(model, nnx.Param))
    hidden = models.dense(nnx.to_pure_dict(nnx.state(model.l1)), X)
    models.assert_close(quantized.bn.mean[...], 0.01 * hidden.mean(0), 1e-4)
    jitted = nnx.jit(lambda m, x: m.features(x))
    again, plain = jitted(quantized, X), jitted(model, X)
    models.assert_same(again == 0, plain == 0)


class NnxAttention(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, 4, rngs=rngs, decode=False)
        self.embed = nnx.Embed(7, 4, rngs=rngs)
        self.cell = nnx.RNN(nnx.OptimizedLSTMCell(4, 4, rngs=rngs))

    def __call__(self, x):
        return self.embed.attend(self.cell(self.attention(x)))


@pytest.mark.slow
def test_weights_of_nnx_models_are_quantized_wherever_they_are_read():
    model = NnxAttention(nnx.Rngs(0))
    quantized = quantize_model(model, QtProvider([models.rule("int8")]), X[None])
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    leaves = {"out/kernel": (0, 1), "embedding": 1, "kernel": 0}

    def hand(params):
        flat = []
        for path, variable in nnx.to_flat_state(params):
            name = "/".join(map(str, path))
            shared = next((s for leaf, s in leaves.items() if leaf in name), None)
            value = variable[...]
            if shared is not None:
                value = models.fake_quant(value, 8, shared)
            flat.append((path, variable.replace(value)))
        merged = nnx.merge(graphdef, nnx.from_flat_state(flat), rest, copy=True)
        return (merged(X[None]) ** 2).sum()

    def loss(model):
        return (model(X[None]) ** 2).sum()

    value, grads = nnx.jit(nnx.value_and_grad(loss))(quantized)
    want, want_grads = jax.jit(jax.value_and_grad(hand))(params)
    models.assert_close(value, want)
    models.assert_close(jax.tree.leaves(grads), jax.tree.leaves(want_grads), 1e-3)


def test_a_plain_function_and_its_calls():
    def mlp(params, x, *, scale=1.0):
        for layer in params["layers"]:
            x = nn.relu(x @ layer["w"] + layer["b"])
        return x * scale

    def layer(key):
        return {"w": jax.random.normal(key, (4, 4)), "b": jnp.ones(4)}

    params = {"layers": [layer(key) for key in jax.random.split(jax.random.key(0))]}
    quantized = quantize_fn(mlp, PROVIDER)

    def hand(params, x):
        for p in params["layers"]:
            x = nn.relu(models.dense({"kernel": p["w"], "bias": p["b"]}, x))
        return x

    want = hand(params, X)
    models.assert_close(quantized(params, X), want)
    models.assert_close(quantized(params, x=X, scale=2.0), 2 * want)
    models.assert_close(jax.jit(quantized)(x=X, params=params), want)
    models.assert_close(
        jax.jit(quantized, static_argnames="scale")(params, X, scale=2), 2 * want
    )
    as_numpy = jax.tree.map(np.asarray, params)
    models.assert_close(quantized(as_numpy, np.asarray(X)), want)
    with pytest.raises(TypeError, match="first argument"):
        quantize_fn(lambda: X, PROVIDER)()
    with pytest.raises(ValueError, match="module paths"):
        quantize_fn(mlp, QtProvider(models.NOTHING))(params, X)
    lenient = QtProvider(models.NOTHING, allow_unmatched=True)
    models.assert_same(quantize_fn(mlp, lenient)(params, X), mlp(params, X))


@pytest.mark.slow
def test_equinox():
    model = eqx.nn.MLP(4, 3, 8, 1, key=jax.random.key(0))

    def loss(model, x):
        return (jax.vmap(model)(x) ** 2).sum()

    value, grads = eqx.filter_value_and_grad(quantize_fn(loss, PROVIDER))(model, X)

    def hand(params, x):
        for i, p in enumerate(params):
            x = nn.relu(x) if i else x
            x = models.fake_quant(x, 8, -1) @ models.fake_quant(p[0], 8, 1).T + p[1]
        return (x**2).sum()

    params = [(layer.weight, layer.bias) for layer in model.layers]
    want, want_grads = jax.value_and_grad(hand)(params, X)
    models.assert_close(value, want)
    got = [(layer.weight, layer.bias) for layer in grads.layers]
    models.assert_close(got, want_grads, 1e-4)


def test_plans():
    rules = models.INT8
    model = models.Mlp()
    shape = jax.ShapeDtypeStruct((6, 4), jnp.float32)
    records = plan(model, rules, shape).records()
    assert [r["weights"] for r in records] == [("Dense_0/kernel",), ("Dense_1/kernel",)]
    variables = jax.eval_shape(model.init, jax.random.key(0), shape)
    assert plan(model, rules, shape, variables=variables).records() == records
    assert "2 of 2 ops" in str(plan(quantize_model(model, PROVIDER), rules, X))
    both = Both()
    for method in ("encode", Both.encode, both.encode):
        (record,) = plan(both, rules, shape, method=method).records()
        assert record["module_path"] == "first"
    everything = plan(
        models.Everything(),
        rules,
        jax.ShapeDtypeStruct((2, 5, 5), jnp.float32),
        rngs={"dropout": jax.random.key(0)},
        train=True,
    )
    assert len(everything.quantized_ops) == 3
    nnx_model = models.NnxMlp(nnx.Rngs(0))
    abstract = nnx.eval_shape(lambda: models.NnxMlp(nnx.Rngs(0)))
    for candidate in (nnx_model, abstract):
        records = plan(candidate, rules, shape).records()
        assert [r["module_path"] for r in records] == ["l1", "l2"]
        for method in ("features", models.NnxMlp.features):
            (record,) = plan(candidate, rules, shape, method=method).records()
            assert record["module_path"] == "l1"
    assert type(nnx_model) is models.NnxMlp
    assert nnx_model.dropout.rngs.count[...] == 0
    (record,) = plan(lambda p, x: x @ p["w"], rules, {"w": X.T}, shape).records()
    assert record["weights"] == ("w",)
    with pytest.raises(TypeError, match="Flax module or a function"):
        plan(3, rules, X)


def test_bad_arguments():
    with pytest.raises(TypeError, match="quantize_fn"):
        quantize_model(lambda p, x: x, PROVIDER)
    with pytest.raises(TypeError, match=r"QtProvider\(rules\)"):
        quantize_model(models.Mlp(), models.INT8)
    with pytest.raises(TypeError, match=r"QtProvider\(rules\)"):
        quantize_fn(lambda p, x: x, models.INT8)
    with pytest.raises(ValueError, match="no method 'encode'"):
        quantize_model(models.Mlp(), PROVIDER, methods=["encode"])
    with pytest.raises(ValueError, match="without inputs"):
        quantize_model(models.Mlp(), PROVIDER, X)
    with pytest.raises(ValueError, match="'l1'"):
        quantize_model(models.NnxMlp(nnx.Rngs(0)), QtProvider(models.NOTHING), X)
    model = quantize_model(models.Mlp(), QtProvider(models.NOTHING))
    variables = jax.jit(model.init)(jax.random.key(0), X)
    with pytest.raises(ValueError, match="'Dense_0'"):
        model.apply(variables, X)


def test_an_attribute_of_an_nnx_module_may_be_a_quantized_array():
    class Holder(nnx.Module):
        def __init__(self):
            self.table = quantize(jnp.array([[1.0, 127.5]]), "int8")

    state = nnx.state(Holder())
    codes, scale = jax.tree.leaves(state)
    assert codes.tolist() == [[1, 127]] and scale.tolist() == [[1.0]]
