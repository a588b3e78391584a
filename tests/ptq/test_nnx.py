"""NNX models that run on quantized params: as QAT trained them, and as `qwix` does.

`python -m tests.ptq.test_nnx FILE` writes what `qwix` computes, in a process of its
own, since `qwix` patches JAX.
"""

import copy
import operator
import pathlib
import pickle
import sys

import jax
import numpy as np
import pytest
from flax import nnx
from jax import numpy as jnp

import qwix_train
from qwix_train import (
    PtqProvider,
    QtProvider,
    QuantStat,
    WithAux,
    ptq,
    quantize_model,
)
from tests import compare, models, reference_process
from tests.qat.parity import ACT, MARGIN, NnxMlp

X = models.normal(6, 8, seed=1)
X3 = models.normal(2, 4, 8, seed=2)
TOKENS = jnp.array([[1, 2], [3, 15]])
TYPES = ("int8", "int4", "int3", "int2", "int1", "nf4", "float8_e4m3fn", "float8_e5m2")


def snapshot(model, kind=...):
    """All that a model holds, as NumPy arrays."""
    return jax.tree.map(compare.as_numpy, nnx.state(model, kind))


def variables(model):
    return [v for _, v in nnx.iter_graph(model) if isinstance(v, nnx.Variable)]


@nnx.jit
def call(model, x):
    return model(x)


def check(model, x, rules=models.INT8, tolerance=1e-5, **options):
    """Quantizes a model for PTQ and for QAT, runs both, and gives both."""
    before, graphdef = snapshot(model), nnx.graphdef(model)
    quantized = quantize_model(model, PtqProvider(rules), x, **options)
    trained = quantize_model(model, QtProvider(rules), x, **options)
    models.assert_same(snapshot(model), before)
    assert nnx.graphdef(model) == graphdef

    values = nnx.Not(nnx.RngState)  # drawing random numbers counts them
    state, graphdef = snapshot(quantized, values), nnx.graphdef(quantized)
    held = variables(quantized)
    out = call(quantized, x)
    models.assert_close(out, call(trained, x), tolerance)
    models.assert_same(call(quantized, x), out)
    models.assert_same(snapshot(quantized, values), state)
    assert nnx.graphdef(quantized) == graphdef
    after = variables(quantized)
    assert len(held) == len(after) and all(map(operator.is_, held, after))
    return quantized, trained


def codes(model):
    """The paths of quantized params."""
    leaves = jax.tree.leaves_with_path(
        ptq.to_tree(model), is_leaf=lambda leaf: isinstance(leaf, WithAux)
    )
    return [jax.tree_util.keystr(p) for p, x in leaves if isinstance(x, WithAux)]


def test_what_a_model_holds():
    model = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    quantized, _ = check(model, X)
    kernel = quantized.kernel
    assert type(quantized).__name__ == "Linear" and isinstance(quantized, nnx.Linear)
    assert isinstance(kernel, WithAux)
    assert type(kernel.array.qvalue) is type(kernel.array.scale) is nnx.Param
    state = nnx.to_pure_dict(nnx.state(quantized))
    assert jax.tree.map(jnp.shape, state) == {
        "bias": (4,),
        "kernel": {"array": {"qvalue": (8, 4), "scale": (1, 4)}},
    }
    want = np.asarray(model.kernel[...], np.float64)
    step = models.MARGIN * np.abs(want).max(0, keepdims=True) / 127.5
    np.testing.assert_array_equal(
        state["kernel"]["array"]["qvalue"], np.rint(want / step)
    )


@pytest.mark.thinned(6)
@pytest.mark.parametrize("qtype", TYPES)
def test_types(qtype):
    for act in (None, "int8"):
        check(nnx.Linear(8, 4, rngs=nnx.Rngs(0)), X, [models.rule(qtype, act)])


LAYERS = {
    "general": lambda rngs: nnx.LinearGeneral((4, 8), (2, 4), axis=(-2, -1), rngs=rngs),
    "einsum": lambda rngs: nnx.Einsum("bqd,dhk->bqhk", (8, 2, 4), (2, 4), rngs=rngs),
    "convolution": lambda rngs: nnx.Conv(8, 4, (3,), feature_group_count=2, rngs=rngs),
    "transposed": lambda rngs: nnx.ConvTranspose(8, 4, (3,), rngs=rngs),
    "attention": lambda rngs: nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs),
    "recurrent": lambda rngs: nnx.RNN(nnx.GRUCell(8, 4, rngs=rngs)),
    "lookup": lambda rngs: nnx.Embed(16, 8, rngs=rngs),
}


@pytest.mark.thinned(8)
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name):
    layer, x = LAYERS[name](nnx.Rngs(0)), TOKENS if name == "lookup" else X3
    options = {"op_names": ("gather",)} if name == "lookup" else {}
    lists = [[models.rule("int4", **options)]]
    if name != "lookup":
        lists.append([models.rule("int8", "int8")])
    for rules in lists:
        quantized, _ = check(layer, x, rules)
        assert codes(quantized)


@pytest.mark.slow
def test_tiles():
    rules = [models.rule("int4", "int8", tile_size=4)]
    quantized, _ = check(nnx.Linear(8, 4, rngs=nnx.Rngs(0)), X, rules)
    assert quantized.kernel.array.scale.shape == (2, 4)


class Containers(nnx.Module):
    """Params in every place that a module can hold them, and one in two."""

    def __init__(self, seed=0):
        rngs = nnx.Rngs(seed)

        def weight():
            return nnx.Param(jax.random.normal(rngs(), (8, 8)) / 4)

        self.tied = nnx.Linear(8, 8, rngs=rngs)
        self.first = nnx.Linear(8, 8, rngs=rngs)
        self.first.kernel = self.tied.kernel
        self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(11)])
        self.named = nnx.Dict({"head": nnx.Linear(8, 8, rngs=rngs)})
        self.weights = nnx.List([weight() for _ in range(2)])
        self.plain = nnx.data({"w": weight(), "z": [weight()]})

    def __call__(self, x):
        x = self.tied(self.first(x))
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        x = self.named["head"](x)
        for weight in self.weights:
            x = x @ weight[...]
        return x @ self.plain["w"][...] @ self.plain["z"][0][...]


@pytest.mark.slow
def test_params_in_containers_and_in_two_places():
    model = Containers()
    quantized, _ = check(model, X, tolerance=1e-4)
    assert len(codes(quantized)) == 17  # one stands in two places
    first, tied = quantized.first.kernel.array, quantized.tied.kernel.array
    assert first.qvalue is tied.qvalue and first.scale is tied.scale
    merged = nnx.merge(*nnx.split(quantized))
    assert merged.first.kernel.array.qvalue is merged.tied.kernel.array.qvalue
    models.assert_same(merged(X), quantized(X))
    models.assert_close(call(quantized, X), quantized(X), 1e-4)


@pytest.mark.slow
def test_an_abstract_model_takes_params_layer_by_layer():
    model = Containers()
    provider = PtqProvider(models.INT8)
    want = quantize_model(model, provider, X)
    abstract = quantize_model(nnx.eval_shape(Containers), provider, X)
    assert isinstance(
        abstract.tied.kernel.array.qvalue.get_raw_value(), jax.ShapeDtypeStruct
    )
    for name, params in nnx.to_pure_dict(nnx.state(model, nnx.Param)).items():
        nnx.update(abstract, ptq.quantize_params({name: params}, abstract))
    models.assert_same(snapshot(abstract), snapshot(want))
    models.assert_same(abstract(X), want(X))


def test_copies():
    quantized, _ = check(nnx.Linear(8, 4, rngs=nnx.Rngs(0)), X)
    want = quantized(X)
    other = quantize_model(
        nnx.Linear(8, 4, rngs=nnx.Rngs(1)), PtqProvider(models.INT8), X
    )
    models.assert_differ(other(X), want)
    state = nnx.state(quantized)
    nnx.update(other, state)
    models.assert_same(other(X), want)
    for twin in (nnx.clone(quantized), copy.deepcopy(quantized)):
        nnx.update(twin, jax.tree.map(jnp.zeros_like, state))
        models.assert_differ(twin(X), want)
        nnx.update(twin, nnx.to_pure_dict(state))
        models.assert_same(twin(X), want)
    models.assert_same(quantized(X), want)


TRANSFORMS = {
    "nnx.jit": call,
    "jax.jit": lambda m, x: jax.jit(lambda s, x: nnx.merge(nnx.graphdef(m), s)(x))(
        nnx.state(m), x
    ),
    "remat": lambda m, x: nnx.remat(lambda m, x: m(x))(m, x),
    "vmap": lambda m, x: nnx.vmap(lambda m, x: m(x[None])[0], in_axes=(None, 0))(m, x),
    "scan": lambda m, x: nnx.scan(
        lambda m, x: (m, m(x)), in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0)
    )(m, x[:, None])[1][:, 0],
    "grad": lambda m, x: nnx.grad(lambda x, m: (m(x) ** 2).sum())(x, m),
}


@pytest.mark.thinned(6)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms(name):
    model = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    rules = models.INT4 if name != "grad" else [models.rule("int4")]
    quantized, trained = check(model, X, rules)
    held = snapshot(quantized)
    run = TRANSFORMS[name]
    models.assert_close(run(quantized, X), run(trained, X))
    models.assert_same(snapshot(quantized), held)


class Stacked(nnx.Module):
    """Layers in one stacked param, in a loop."""

    def __init__(self, how):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(rngs):
            return nnx.Linear(8, 8, rngs=rngs)

        self.how = how
        self.layers = make(nnx.Rngs(0))

    def __call__(self, x):
        def layer(x, module):
            return jnp.tanh(module(x))

        if self.how == "vmap":
            return nnx.vmap(lambda m, x: m(x), in_axes=(0, None))(self.layers, x)
        layer = nnx.remat(layer) if self.how == "remat" else layer
        return nnx.scan(layer, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(
            x, self.layers
        )


@pytest.mark.thinned(3)
@pytest.mark.parametrize("how", ["scan", "remat", "vmap"])
def test_stacked_layers(how):
    model = Stacked(how)
    held = snapshot(model)
    quantized, trained = check(model, X)
    # QAT leaves them in float, in spite of what loops write back.
    models.assert_same(snapshot(trained), held)
    assert quantized.layers.kernel.array.scale.shape == (3, 1, 8)
    graphdef, state = nnx.split(quantized)
    run = jax.jit(lambda s, x: nnx.merge(graphdef, s)(x))
    models.assert_close(run(state, X), trained(X))
    if how == "scan":  # a layer's codes at a time
        assert "i8[8,8]" in str(jax.make_jaxpr(run)(state, X))


@pytest.mark.slow
def test_batch_norm_and_dropout():
    model = models.NnxMlp(nnx.Rngs(0))
    x = X[:, :4]
    held = snapshot(model)
    quantized = quantize_model(model, PtqProvider(models.INT8), x)
    trained = quantize_model(model, QtProvider(models.INT8), x)
    models.assert_same(snapshot(model), held)
    stats = snapshot(quantized.bn)
    for run in (lambda m, x: m(x), nnx.jit(lambda m, x: m(x))):
        models.assert_close(run(quantized, x), run(trained, x))
        for kind in (nnx.BatchStat, nnx.RngState):
            models.assert_close(snapshot(quantized, kind), snapshot(trained, kind))
    models.assert_differ(snapshot(quantized.bn), stats)
    quantized.eval()
    trained.eval()
    models.assert_close(quantized(x), trained(x))
    models.assert_same(quantized(x), quantized(x))


class Encoder(nnx.Module):
    def __init__(self):
        self.layer = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
        self.head = nnx.Linear(8, 8, rngs=nnx.Rngs(1))

    def encode(self, x):
        return self.layer(x)

    def __call__(self, x):
        return self.head(self.encode(x))


def test_methods():
    provider, trained = PtqProvider(models.INT8), QtProvider(models.INT8)
    both = [
        quantize_model(Encoder(), p, X, methods=("encode",))
        for p in (provider, trained)
    ]
    models.assert_close(both[0].encode(X), both[1].encode(X))
    assert codes(both[0]) == ["['layer']['kernel']"]


def test_a_model_that_writes_to_its_weights_is_refused():
    class Writer(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.eye(8))

        def __call__(self, x):
            out = x @ self.w[...]
            self.w[...] = self.w[...] * 0.5 + 1.0
            return out

    quantized = quantize_model(Writer(), PtqProvider(models.INT8), X)
    held = snapshot(quantized)
    with pytest.raises(ValueError, match="writes to its param 'w', which is quantized"):
        quantized(X)
    models.assert_same(snapshot(quantized), held)


def test_two_quantized_models_among_the_arguments():
    class Pair(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.eye(8))

        def __call__(self, x, other):
            return x @ self.w[...] + (0 if other is None else other(x))

    linear, _ = check(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), X)
    quantized = quantize_model(Pair(), PtqProvider(models.INT8), X, None)
    models.assert_close(quantized(X, linear), quantized(X, None) + linear(X))


@pytest.mark.slow
def test_metadata_is_kept_for_each_part():
    mesh = jax.make_mesh((2, 4), ("a", "b"), (jax.sharding.AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        init = nnx.with_partitioning(nnx.initializers.normal(1.0), ("a", "b"), tag=7)
        model = nnx.Linear(8, 4, kernel_init=init, rngs=nnx.Rngs(0))
        quantized, _ = check(model, X)
        array = quantized.kernel.array
        assert array.qvalue.get_metadata()["out_sharding"] == ("a", "b")
        assert array.scale.get_metadata()["out_sharding"] == (None, "b")
        assert array.scale.get_metadata()["tag"] == 7
        assert array.qvalue[...].sharding.spec == jax.P("a", "b")
        abstract = nnx.eval_shape(lambda: nnx.clone(model))
        abstract = quantize_model(abstract, PtqProvider(models.INT8), X)
        for part in ("qvalue", "scale"):
            metadata = getattr(abstract.kernel.array, part).get_metadata()
            assert metadata == getattr(array, part).get_metadata()
        specs = nnx.get_partition_spec(nnx.state(quantized))
        assert specs["kernel"]["array"]["scale"].get_raw_value() == jax.P(None, "b")


STATIC = [models.rule("int8", "int8", act_static_scale=True)]


def test_the_ranges_that_a_model_has_collected_are_its_own():
    model = nnx.Sequential(nnx.Linear(8, 8, rngs=nnx.Rngs(0)))
    qwix_train.attach(model, STATIC, X)
    stats = nnx.state(model, QuantStat)
    stats = jax.tree.map(lambda x: jnp.full_like(x, 3 if x.ndim else 1), stats)
    nnx.update(model, stats)
    given = nnx.to_pure_dict(stats)
    _, want = ptq.quantize(model, None, STATIC, X, quant_stats=given)
    _, tree = ptq.quantize(model, None, STATIC, X)
    models.assert_same(tree, want)
    # Rules with dynamic ranges have no use for them.
    ptq.quantize(model, None, models.INT8, X)


def test_static_ranges():
    model = nnx.Sequential(nnx.Linear(8, 8, rngs=nnx.Rngs(0)))
    bound = float(jnp.abs(X).max()) * 1.1
    statistics = {"count": jnp.array(2), "sum_of_absmax": jnp.full((1, 1), 2 * bound)}
    stats = {"layers": {0: {"dot_general0_lhs": statistics}}}
    quantized, tree = ptq.quantize(model, None, STATIC, X, quant_stats=stats)
    scale = quantized.layers[0].dot_general0_lhs_scale
    assert isinstance(scale, WithAux) and type(scale.array) is nnx.Param
    np.testing.assert_allclose(scale.array[...], [[bound / 127.5]], rtol=1e-6)
    assert tree["layers"][0]["dot_general0_lhs_scale"].how.qtype == jnp.int8
    held = snapshot(quantized)
    x = np.asarray(X, np.float64)
    step = bound / 127.5
    kernel = jax.tree.map(
        lambda a: np.asarray(a, np.float64), tree["layers"][0]["kernel"]
    )
    weights = kernel.array.qvalue * kernel.array.scale
    want = np.clip(np.rint(x / step), -128, 127) * step @ weights
    for run in (lambda m, x: m(x), nnx.jit(lambda m, x: m(x))):
        models.assert_close(run(quantized, X), want)
    models.assert_same(snapshot(quantized), held)


CASES = {
    "int8": {"weight_qtype": "int8", **MARGIN, **ACT},
    "weights": {"weight_qtype": "int8", **MARGIN},
    "nf4": {"weight_qtype": "nf4", **MARGIN},
    "static": {"weight_qtype": "int8", **MARGIN, **ACT, "act_static_scale": True},
}


def test_a_method_that_was_not_quantized_says_so():
    class Model(nnx.Module):
        def __init__(self):
            self.layer = nnx.Linear(8, 3, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.layer(x)

    model = quantize_model(Model(), PtqProvider(models.INT8), X)
    with pytest.raises(TypeError, match="methods="):
        model.layer(X)


def run(library, rule):
    """A quantized model, and what it computes."""
    provider = library.PtqProvider([library.QuantizationRule(**rule)])
    model = library.quantize_model(NnxMlp(), provider, X)
    state = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    return model, {"state": jax.tree.map(np.asarray, state), "out": model(X)}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """What `qwix` computes, in a process that its patches cannot leave."""
    path = tmp_path_factory.mktemp("qwix") / "reference.pickle"
    reference_process.run("tests.ptq.test_nnx", path)
    return pickle.loads(path.read_bytes())


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_same_state_and_logits_as_in_qwix(reference, name):
    import qwix_train

    theirs = reference[name]
    provider = PtqProvider([qwix_train.QuantizationRule(**CASES[name])])
    model = quantize_model(NnxMlp(), provider, X)
    state = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert jax.tree.structure(state) == jax.tree.structure(theirs["state"])
    if name == "static":  # the ranges of what they were initialized on
        nnx.update(model, theirs["state"])
    else:
        models.assert_same(state, theirs["state"])
    models.assert_close(model(X), theirs["out"])


def main(path):
    import qwix

    results = {name: run(qwix, rule)[1] for name, rule in CASES.items()}
    pathlib.Path(path).write_bytes(pickle.dumps(jax.tree.map(np.asarray, results)))


if __name__ == "__main__":
    main(sys.argv[1])
