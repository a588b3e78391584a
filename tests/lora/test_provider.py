"""Adapters in Linen and NNX models."""

import jax
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax import numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

import qwix_train
from qwix_train import lora
from tests import models

X = jax.device_put(np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32))


class NnxModel(nnx.Module):
    """Two layers, as in `models.Mlp`."""

    def __init__(self, rngs):
        self.l1 = nnx.Linear(16, 32, rngs=rngs)
        self.l2 = nnx.Linear(32, 3, rngs=rngs)

    def __call__(self, x):
        return self.l2(nnx.relu(self.l1(x)))


def nnx_model(**kwargs):
    base = NnxModel(nnx.Rngs(0))
    provider = lora.LoraProvider(module_path=".*", **{"rank": 2, "alpha": 4.0} | kwargs)
    return base, qwix_train.apply_lora_to_model(base, provider, X, rngs=nnx.Rngs(1))


def numbers(tree):
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


@pytest.mark.thinned(3)
@pytest.mark.parametrize("weight_qtype", [None, "int8", "nf4"])
def test_an_nnx_loop_trains_adapters_alone(weight_qtype):
    """The way of Tunix: a filter for `nnx.LoRAParam`."""
    base, model = nnx_model(weight_qtype=weight_qtype)
    base_before = numbers(nnx.state(base))
    if weight_qtype is None:
        np.testing.assert_array_equal(model(X), base(X))
    frozen = numbers(nnx.state(model, nnx.Not(nnx.LoRAParam)))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.LoRAParam)

    @nnx.jit
    def step(model, optimizer, x):
        def loss(model):
            return jnp.mean((model(x) - 1) ** 2)

        wrt = nnx.DiffState(0, nnx.LoRAParam)
        value, grads = nnx.value_and_grad(loss, argnums=wrt)(model)
        optimizer.update(model, grads)
        return value

    losses = [float(step(model, optimizer, X)) for _ in range(20)]
    assert losses[-1] < 0.7 * losses[0]
    names = {path[-1] for path, _ in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))}
    assert names == {"kernel_lora_a", "kernel_lora_b"}
    after = numbers(nnx.state(model, nnx.Not(nnx.LoRAParam)))
    for a, b in zip(
        frozen + base_before, after + numbers(nnx.state(base)), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_rules_by_pattern_give_ranks_by_pattern():
    rules = [
        lora.LoraRule(module_path="l1", rank=4, alpha=4.0),
        lora.LoraRule(module_path="l2", rank=1, alpha=4.0),
    ]
    model = qwix_train.apply_lora_to_model(
        NnxModel(nnx.Rngs(0)), lora.LoraProvider(rules), X
    )
    assert model.l1.kernel_lora_a.shape == (16, 4)
    assert model.l2.kernel_lora_b.shape == (1, 3)


@pytest.mark.slow
def test_dropout_of_an_nnx_model_follows_train_and_eval():
    base, model = nnx_model(dropout=0.5)
    model.l1.kernel_lora_b[...] = jnp.ones((2, 32))
    model.eval()
    np.testing.assert_array_equal(model(X), model(X))
    model.train()
    first, second = model(X), model(X)
    assert np.abs(first - second).max() > 1e-3
    jitted = nnx.jit(lambda model, x: model(x))
    assert np.abs(jitted(model, X) - jitted(model, X)).max() > 1e-3


class Switched(nn.Module):
    """A model with a switch, of whatever name."""

    @nn.compact
    def __call__(self, x, deterministic=True):
        x = nn.Dense(1024, use_bias=False)(x)
        return nn.Dropout(0.0, deterministic=deterministic)(x)


class Plain(nn.Module):
    """A model without one."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(1024, use_bias=False)(x)


def with_ones(model, rate=0.25):
    """A model whose adapter sums what is left of its input."""
    provider = lora.LoraProvider(rank=1, alpha=1.0, dropout=rate)
    model = qwix_train.apply_lora_to_model(model, provider)
    params = jax.jit(model.init)(jax.random.key(0), X)["params"]
    dense = params["Dense_0"]
    dense["kernel_lora_a"] = jnp.ones_like(dense["kernel_lora_a"])
    dense["kernel_lora_b"] = jnp.ones_like(dense["kernel_lora_b"])
    return model, params


def test_dropout_of_a_linen_model_follows_its_switch():
    model, params = with_ones(Switched())
    variables, rngs = {"params": params}, {"dropout": jax.random.key(1)}
    still = model.apply(variables, X)
    np.testing.assert_array_equal(model.apply(variables, X, rngs=rngs), still)
    moved = model.apply(variables, X, deterministic=False, rngs=rngs)
    assert np.abs(moved - still).max() > 1e-3
    with pytest.raises(ValueError, match="Dense_0/dot_general0.*dropout=0.25"):
        model.apply(variables, X, False)


def test_dropout_without_a_switch_needs_a_key():
    model, params = with_ones(Plain())
    with pytest.raises(ValueError, match=r"Dense_0/dot_general0.*rngs=\{'dropout'"):
        model.apply({"params": params}, X)
    off = lora.LoraProvider(rank=1, alpha=1.0, dropout=0.25, deterministic=True)
    quiet = qwix_train.apply_lora_to_model(Plain(), off)
    assert quiet.apply({"params": params}, X).shape == (8, 1024)


def test_dropout_drops_of_the_input_of_the_adapter_alone():
    model, params = with_ones(Plain())
    ones = jnp.ones((512, 16))
    base = Plain().apply(
        {"params": {"Dense_0": {"kernel": params["Dense_0"]["kernel"]}}}, ones
    )
    rngs = {"dropout": jax.random.key(1)}
    sums = (model.apply({"params": params}, ones, rngs=rngs) - base)[:, 0]
    # The sum of 16 elements, each 4/3 with probability 3/4.
    counts = np.asarray(sums) * 0.75
    np.testing.assert_allclose(counts, np.round(counts), atol=1e-3)
    assert np.mean(counts) == pytest.approx(12, abs=4 * np.sqrt(3 / 512))
    assert np.var(counts) == pytest.approx(3, rel=0.3)


@pytest.mark.slow
def test_layers_under_scan_have_adapters_and_dropout_of_their_own():
    x = jax.device_put(np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32))
    for remat in (False, True):
        provider = lora.LoraProvider(
            rank=2, alpha=2.0, dropout=0.5, weight_qtype="int8"
        )
        model = qwix_train.apply_lora_to_model(models.Layers(remat=remat), provider)
        rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
        params = jax.jit(model.init)(rngs, x)["params"]
        dense = params["layers"]["Dense_0"]
        assert dense["kernel_lora_a"].shape == (3, 6, 2)
        assert dense["kernel_lora_b"].shape == (3, 2, 6)
        dense["kernel_lora_b"] = jax.random.normal(jax.random.key(2), (3, 2, 6))
        off = lora.LoraProvider(
            rank=2, alpha=2.0, weight_qtype="int8", deterministic=True
        )
        quiet = qwix_train.apply_lora_to_model(models.Layers(remat=remat), off)
        got = quiet.apply({"params": params}, x)
        kernel = dense["kernel"].array.qvalue * dense["kernel"].array.scale
        want = x
        for i in range(3):
            weight = kernel[i] + dense["kernel_lora_a"][i] @ dense["kernel_lora_b"][i]
            want = jnp.tanh(3 * want @ weight)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)

        def loss(params, model=model, x=x):
            rngs = {"dropout": jax.random.key(3)}
            return (model.apply({"params": params}, x, rngs=rngs) ** 2).sum()

        grads = jax.grad(loss, allow_int=True)(params)["layers"]["Dense_0"]
        assert np.all(np.abs(grads["kernel_lora_b"]).max((1, 2)) > 0)


class Tied(nn.Module):
    """A table that is looked up, and multiplied with at the end."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(11, 8)
        return embed.attend(nn.tanh(embed(tokens)))


@pytest.mark.slow
@pytest.mark.parametrize("weight_qtype", [None, "int8"])
def test_a_tied_table_has_one_adapter(weight_qtype):
    tokens = jnp.asarray([[1, 2, 3], [10, 0, 5]])
    rule = lora.LoraRule(
        op_names=("gather", "dot_general"),
        rank=2,
        alpha=2.0,
        weight_qtype=weight_qtype,
    )
    model = qwix_train.apply_lora_to_model(Tied(), lora.LoraProvider([rule]))
    params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    embed = params["Embed_0"]
    assert embed["embedding_lora_a"].shape == (11, 2)
    assert embed["embedding_lora_b"].shape == (2, 8)
    embed["embedding_lora_b"] = jax.random.normal(jax.random.key(2), (2, 8))
    table = embed["embedding"]
    if weight_qtype:
        table = table.array.qvalue * table.array.scale
    whole = table + embed["embedding_lora_a"] @ embed["embedding_lora_b"]
    want = Tied().apply({"params": {"Embed_0": {"embedding": whole}}}, tokens)
    got = jax.jit(model.apply)({"params": params}, tokens)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_convolutions_of_all_groupings(groups, transposed):
    if transposed and groups > 1:
        conv = nn.Conv(8, (3,), feature_group_count=groups, kernel_dilation=2)
    elif transposed:
        conv = nn.ConvTranspose(8, (3,), strides=(2,), transpose_kernel=True)
    else:
        conv = nn.Conv(8, (3,), feature_group_count=groups, strides=2)
    x = jax.device_put(
        np.random.default_rng(0).normal(size=(2, 9, 4)).astype(np.float32)
    )
    model = qwix_train.apply_lora_to_model(conv, lora.LoraProvider(rank=2, alpha=1.0))
    params = dict(model.init(jax.random.key(0), x)["params"])
    b = params["kernel_lora_b"]
    params["kernel_lora_b"] = jax.random.normal(jax.random.key(1), b.shape)
    if not transposed:
        assert params["kernel_lora_a"].shape == (3, 4 // groups, 2)
        assert b.shape == (2, 8)
    provider = lora.LoraProvider(rank=2, alpha=1.0)
    layout = lora.layout.find_layouts(qwix_train.plan(conv, provider, x))[("kernel",)][
        0
    ]
    merged = layout.merged(
        params["kernel"], params["kernel_lora_a"], params["kernel_lora_b"]
    )
    want = conv.apply({"params": {"kernel": merged, "bias": params["bias"]}}, x)
    got = model.apply({"params": params}, x)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_a_wrapped_nnx_step_keeps_the_adapters():
    base, model = nnx_model()
    model.l1.kernel_lora_b[...] = jnp.ones((2, 32))
    rules = [qwix_train.QuantizationRule(weight_qtype="int4")]
    wrapped = qwix_train.wrap_eval_step(lambda model, x: model(x), rules)
    got = wrapped(model, X)
    float_out = model(X)
    quantized_base = qwix_train.quantize_model(base, qwix_train.QtProvider(rules))
    assert np.abs(got - float_out).max() > 1e-3  # the base is quantized
    assert np.abs(got - quantized_base(X)).max() > 1e-2  # and the adapters are there


@pytest.mark.slow
@pytest.mark.parametrize("weight_qtype", [None, "int4"])
def test_a_wrapped_step_that_calls_a_linen_model_keeps_the_adapters(weight_qtype):
    provider = lora.LoraProvider(
        rank=2,
        alpha=4.0,
        weight_qtype=weight_qtype,
        lora_b_initializer=jax.nn.initializers.ones,
    )
    model = qwix_train.apply_lora_to_model(models.Mlp(), provider)
    params = jax.jit(model.init)(jax.random.key(0), X)["params"]
    wrapped = qwix_train.wrap_eval_step(
        lambda params, x: model.apply({"params": params}, x), models.INT8
    )

    def layer(name, x):
        held = params[name]
        kernel = held["kernel"]
        if weight_qtype is None:
            kernel = models.fake_quant(kernel, 8, 0)
        else:
            kernel = qwix_train.dequantize(kernel.array)
        added = 2.0 * (x @ held["kernel_lora_a"]) @ held["kernel_lora_b"]
        return models.fake_quant(x, 8, -1) @ kernel + added + held["bias"]

    want = layer("Dense_1", nn.relu(layer("Dense_0", X)))
    models.assert_close(jax.jit(wrapped)(params, X), want, 1e-4)


class NnxStack(nnx.Module):
    """Layers that `nnx.vmap` makes and `nnx.scan` runs."""

    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap
        def make(rngs):
            return nnx.Linear(4, 4, rngs=rngs)

        self.layers = make(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def run(layer, x):
            return jnp.tanh(layer(x))

        return run(self.layers, x)


@pytest.mark.slow
@pytest.mark.parametrize("init", [None, "pissa"])
def test_stacked_nnx_layers_have_adapters_of_their_own(init):
    base, x = NnxStack(nnx.Rngs(0)), X[:, :4]
    provider = lora.LoraProvider(rank=1, alpha=2.0, init=init)
    model = qwix_train.apply_lora_to_model(base, provider, x, rngs=nnx.Rngs(1))
    layers = model.layers
    assert layers.kernel_lora_a.shape == (3, 4, 1)
    assert layers.kernel_lora_b.shape == (3, 1, 4)
    np.testing.assert_allclose(model(x), base(x), rtol=1e-4, atol=1e-5)
    layers.kernel_lora_b[...] += 0.2
    want = x
    for i in range(3):
        added = 2.0 * layers.kernel_lora_a[...][i] @ layers.kernel_lora_b[...][i]
        kernel = layers.kernel[...][i] + added
        want = jnp.tanh(want @ kernel + layers.bias[...][i])
    np.testing.assert_allclose(model(x), want, rtol=1e-4, atol=1e-5)


class Block(nnx.Module):
    """A layer of a transformer, with the names that Tunix's models have."""

    def __init__(self, rngs):
        def einsum(subscripts, *shape):
            return nnx.Einsum(subscripts, shape, rngs=rngs)

        self.q_einsum = einsum("btd,ndh->btnh", 2, 8, 3)
        self.kv_einsum = einsum("bsd,cndh->cbsnh", 2, 2, 8, 3)
        self.attn_vec_einsum = einsum("btnh,nhd->btd", 2, 3, 8)
        self.gate_proj = nnx.Linear(8, 16, use_bias=False, rngs=rngs)
        self.down_proj = nnx.Linear(16, 8, use_bias=False, rngs=rngs)

    def __call__(self, x):
        query = self.q_einsum(x)
        key, value = self.kv_einsum(x)
        scores = jax.nn.softmax(jnp.einsum("btnh,bsnh->bnts", query, key))
        x += self.attn_vec_einsum(jnp.einsum("bnts,bsnh->btnh", scores, value))
        return x + self.down_proj(nnx.silu(self.gate_proj(x)))


class Transformer(nnx.Module):
    """Two such layers on a tied table."""

    def __init__(self, rngs):
        self.embedder = nnx.Embed(11, 8, rngs=rngs)
        self.layers = nnx.List([Block(rngs) for _ in range(2)])

    def __call__(self, tokens, positions=None):
        x = self.embedder(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.embedder.attend(x)


@pytest.mark.slow
def test_the_way_of_tunix():
    tokens = jnp.arange(20).reshape(4, 5) % 11
    float_model = Transformer(nnx.Rngs(0))
    before = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(float_model)))
    provider = lora.LoraProvider(
        module_path=".*q_einsum|.*kv_einsum|.*gate_proj|.*down_proj",
        rank=2,
        alpha=4.0,
        weight_qtype="nf4",
        tile_size=4,
    )
    inputs = {"tokens": tokens, "positions": None, "rngs": nnx.Rngs(1)}
    model = qwix_train.apply_lora_to_model(float_model, provider, **inputs)
    models.assert_same(nnx.to_pure_dict(nnx.state(float_model)), before)

    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    whole = NamedSharding(mesh, PartitionSpec())
    nnx.update(model, jax.device_put(nnx.state(model), whole))
    optimizer = nnx.Optimizer(model, optax.adam(0.05), wrt=nnx.LoRAParam)

    @nnx.jit
    def step(model, optimizer, tokens):
        def loss_fn(model):
            logits = model(tokens)[:, :-1]
            return models.loss_of(logits, tokens[:, 1:])

        wrt = nnx.DiffState(0, nnx.LoRAParam)
        loss, grads = nnx.value_and_grad(loss_fn, argnums=wrt)(model)
        optimizer.update(model, grads)
        return loss

    _, adapters, rest = nnx.split(model, nnx.LoRAParam, ...)
    adapted = {path[:-1] for path, _ in nnx.to_flat_state(adapters)}
    names = ("down_proj", "gate_proj", "kv_einsum", "q_einsum")
    assert adapted == {("layers", i, name) for i in range(2) for name in names}
    rest = jax.tree.map(jnp.copy, nnx.to_pure_dict(rest))
    batch = jax.device_put(tokens, NamedSharding(mesh, PartitionSpec("data")))
    losses = [float(step(model, optimizer, batch)) for _ in range(4)]
    assert losses[-1] < losses[0] - 0.2
    graphdef, trained, rest_after = nnx.split(model, nnx.LoRAParam, ...)
    models.assert_same(nnx.to_pure_dict(rest_after), rest)
    models.assert_same(nnx.merge(graphdef, trained, rest_after)(tokens), model(tokens))


def test_providers_and_rules_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="rules, or the fields of one"):
        lora.LoraProvider()
    with pytest.raises(ValueError, match="fields of a rule"):
        lora.LoraProvider([lora.LoraRule(rank=1, alpha=1.0)], rank=2)
    with pytest.raises(ValueError, match="None of the rules is a LoraRule"):
        lora.LoraProvider([qwix_train.QuantizationRule(weight_qtype="int8")])
    provider = lora.LoraProvider(module_path="nowhere", rank=1, alpha=1.0)
    with pytest.raises(ValueError, match="(?s)matches no op that reads a weight.*'l1'"):
        qwix_train.apply_lora_to_model(NnxModel(nnx.Rngs(0)), provider, X)


def test_the_plan_names_the_adapters():
    provider = lora.LoraProvider(rank=2, alpha=1.0, weight_qtype="int8")
    text = str(qwix_train.plan(models.Mlp(), provider, X))
    assert "adapter of rank 2 on Dense_0/kernel" in text


class Positions(nn.Module):
    @nn.compact
    def __call__(self, tokens, positions=None):
        if positions is None:
            positions = jnp.arange(tokens.shape[-1])
        x = nn.Embed(11, 8, name="tokens")(tokens)
        return nn.Dense(3)(x + nn.Embed(6, 8, name="positions")(positions))


@pytest.mark.slow
def test_adapters_are_the_same_however_the_model_is_called():
    model, tokens = Positions(), jnp.asarray([[1, 2, 3]])
    positions = jnp.asarray([0, 1, 2])
    provider = lora.LoraProvider(
        rank=2, alpha=1.0, op_names=("gather", "dot_general"), weight_qtype="int8"
    )
    model = qwix_train.apply_lora_to_model(model, provider)
    init = jax.jit(model.init)
    given = init(jax.random.key(0), tokens, positions)["params"]
    default = init(jax.random.key(0), tokens)["params"]
    assert "embedding_lora_a" in default["positions"]
    jax.tree.map(np.testing.assert_array_equal, given, default)
    b = jnp.asarray(np.arange(16.0).reshape(2, 8), jnp.float32)
    given["positions"]["embedding_lora_b"] = b
    apply = jax.jit(model.apply)
    out = apply({"params": given}, tokens)
    np.testing.assert_array_equal(out, apply({"params": given}, tokens, positions))
    assert np.abs(out - apply({"params": default}, tokens)).max() > 0.1
