"""Every type in every mode: QAT is PTQ is what is restored, and the rest composes."""

import collections
import functools
import itertools

import jax
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax import numpy as jnp

import qwix_train
from qwix_train import QtRule, QuantizationRule, ptq, qat
from qwix_train.core import formats, numerics
from qwix_train.core.packed_array import PackedQArray
from qwix_train.core.qarray import dequantize
from qwix_train.lora import LoraRule
from qwix_train.values import stored
from tests import models

TYPES = [entry.name for entry in formats.entries()]
CODED = [entry.name for entry in formats.entries() if entry.coded_scales]
SCHEMAS = ["weights", "weights and activations", "activations in int8"]


def each_with(names, *others):
    """Each name with one of the others, which take turns."""
    return list(zip(names, itertools.cycle(others), strict=False))


class Dense(nn.Module):
    """Two layers, of which one has a kernel with three axes."""

    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(nn.DenseGeneral((2, 32), use_bias=False)(x))
        return nn.DenseGeneral(8, axis=(-2, -1))(x)


class Layers(nn.Module):
    """Layers that are stacked and scanned over."""

    @nn.compact
    def __call__(self, x):
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return jnp.tanh(nn.Dense(64, use_bias=False)(x)), None

        stack = nn.scan(
            Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2
        )
        return stack()(x, None)[0]


class NnxDense(nnx.Module):
    def __init__(self):
        self.first = nnx.Linear(64, 32, rngs=nnx.Rngs(0))
        self.second = nnx.Linear(32, 8, use_bias=False, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.second(jnp.tanh(self.first(x)))


def function(params, x):
    return jnp.tanh(jnp.einsum("bi,hij->bhj", x, params["w"])).sum(1)


class OfEachType(nn.Module):
    """A part for each type, by its name."""

    part: type[nn.Module]
    qtypes: tuple[str, ...]

    @nn.compact
    def __call__(self, x):
        return {qtype: self.part(name=qtype)(x) for qtype in self.qtypes}


class NnxOfEachType(nnx.Module):
    def __init__(self, part, qtypes):
        self.parts = nnx.Dict({qtype: part() for qtype in qtypes})

    def __call__(self, x):
        return {qtype: part(x) for qtype, part in self.parts.items()}


def rule_of(qtype, schema, cls=QuantizationRule, **kwargs):
    acts = {"weights": None, "weights and activations": qtype}
    return cls(weight_qtype=qtype, act_qtype=acts.get(schema, "int8"), **kwargs)


def inputs(dtype="float32"):
    return models.normal(6, 64, seed=1, dtype=dtype)


def placed(params):
    """Params where restored ones are: both run the same compiled programs."""
    return jax.device_put(params, jax.devices()[0])


def of_functions(schema, qtypes, x, folder):
    """The outputs of QAT, of the quantized function, and with restored params."""
    params = placed({"w": models.normal(2, 64, 8)})
    qat, served, trees = {}, {}, {}
    for qtype in qtypes:
        rules = [rule_of(qtype, schema)]
        qat[qtype] = qwix_train.quantize_fn(function, qwix_train.QtProvider(rules))
        served[qtype], trees[qtype] = ptq.quantize(function, params, rules, x)
    ptq.save(folder, trees)
    every = jax.jit(lambda trees, x: {t: served[t](trees[t], x) for t in qtypes})
    return [
        jax.jit(lambda params, x: {t: qat[t](params, x) for t in qtypes})(params, x),
        *(every(tree, x) for tree in (trees, ptq.restore(folder, trees))),
    ]


def of_models(part, schema, qtypes, x, folder):
    """The same of one model that has a part for each type."""
    rules = [rule_of(t, schema, module_path=f"(parts/)?{t}/.*") for t in qtypes]
    provider = qwix_train.QtProvider(rules)
    if issubclass(part, nnx.Module):
        model = NnxOfEachType(part, qtypes)
        nnx.update(model, placed(nnx.state(model)))
        qat = qwix_train.quantize_model(model, provider, x)
        quantized, _ = ptq.quantize(model, None, rules, x)
        ptq.save(folder, quantized, rules=rules)
        again = ptq.restore(folder, quantized)
        call = nnx.jit(lambda model, x: model(x))
        return [call(model, x) for model in (qat, quantized, again)]
    model = OfEachType(part, qtypes)
    params = placed(models.params_of(model, x))
    qat = qwix_train.quantize_model(model, provider)
    out = jax.jit(qat.apply)({"params": params}, x)
    quantized, tree = ptq.quantize(model, params, rules, x)
    ptq.save(folder, tree, rules=rules)
    apply = jax.jit(lambda params, x: quantized.apply({"params": params}, x))
    return [out, apply(tree, x), apply(ptq.restore(folder, tree), x)]


FRAMEWORKS = {
    "function": of_functions,
    "linen": functools.partial(of_models, Dense),
    "linen layers": functools.partial(of_models, Layers),
    "nnx": functools.partial(of_models, NnxDense),
}


def frameworks_and_schemas():
    """Each framework with each schema, and some types: each type has each of either."""
    types = collections.defaultdict(list)
    for (i, qtype), (j, framework) in itertools.product(
        enumerate(TYPES), enumerate(FRAMEWORKS)
    ):
        schema = SCHEMAS[(i + j) % len(SCHEMAS)]
        # Of an activation near 0, the sign depends on its last bits.
        if (schema, qtype) != (SCHEMAS[1], "int1"):
            types[framework, schema].append(qtype)
    return [
        pytest.param(framework, schema, tuple(qtypes), id=f"{framework}-{schema}")
        for (framework, schema), qtypes in types.items()
    ]


@pytest.mark.thinned(12)
@pytest.mark.parametrize(("framework", "schema", "qtypes"), frameworks_and_schemas())
def test_qat_is_ptq_is_what_is_restored(framework, schema, qtypes, tmp_path):
    run = FRAMEWORKS[framework]
    results = run(schema, qtypes, inputs(), tmp_path / "params")
    assert [*results[0]] == sorted(qtypes)
    for qtype in qtypes:
        qat, served, restored = (result[qtype] for result in results)
        models.assert_same(served, restored)
        size = np.abs(qat).max()
        assert size > 0
        if qtype == "int1" or schema != "weights":
            # What lies on the edge of two codes may take either, by its last bits.
            assert np.abs(served - qat).mean() < 0.01 * size, qtype
        else:
            np.testing.assert_allclose(
                served, qat, rtol=0, atol=2e-5 * size, err_msg=qtype
            )


@pytest.mark.thinned(7)
@pytest.mark.parametrize(("qtype", "dtype"), each_with(CODED, "bfloat16", "float16"))
def test_weights_that_are_small_and_narrow(qtype, dtype):
    """Scales do not have the dtype of the weight, and lose nothing by it."""
    w = 1e-3 * models.normal(64, 8)
    rules = [QuantizationRule(weight_qtype=qtype)]

    def layer(params, x):
        return x @ params["w"]

    x = inputs(dtype)
    params = {"w": w.astype(dtype)}
    quantized, tree = ptq.quantize(layer, params, rules, x)
    assert tree["w"].dtype == dtype
    values = stored.dequantized(tree["w"])
    assert values.dtype == dtype
    error = jnp.linalg.norm((values - params["w"]).astype(jnp.float32))
    largest = 2.0 ** -(1 + len(numerics.format_of(qtype).levels).bit_length() / 3)
    assert error < largest * jnp.linalg.norm(w)
    qat = qwix_train.quantize_fn(layer, qwix_train.QtProvider(rules))
    assert quantized(tree, x).dtype == dtype
    np.testing.assert_allclose(
        quantized(tree, x).astype(jnp.float32),
        qat(params, x).astype(jnp.float32),
        rtol=0.02,
        atol=1e-4,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("weight_qtype", "bwd_qtype"), each_with(CODED, "mxfp8_e5m2", "mxfp4", "nvfp4")
)
def test_quantized_gradients(weight_qtype, bwd_qtype):
    """The backward products are of what the gradient is rounded to, in blocks."""
    rule = QtRule(weight_qtype=weight_qtype, act_qtype="mxfp8", bwd_qtype=bwd_qtype)
    x, w = models.normal(32, 64, seed=1), models.normal(64, 32, seed=2)
    g = models.normal(32, 32, seed=3)

    def layer(params, x):
        return x @ params["w"]

    quantized = qwix_train.quantize_fn(layer, qwix_train.QtProvider([rule]))
    float_rule = QtRule(weight_qtype=weight_qtype, act_qtype="mxfp8")
    fake = qwix_train.quantize_fn(layer, qwix_train.QtProvider([float_rule]))

    @functools.partial(jax.jit, static_argnums=0)
    def back(layer, g):
        return jax.vjp(lambda w, x: layer({"w": w}, x), w, x)[1](g)

    block = formats.find(bwd_qtype).block
    # Along what each of the two products contracts: rows, and columns.
    for side, axes in ((0, (0, 1)), (1, (1, 0))):
        rounded = dequantize(
            qwix_train.quantize(
                g, bwd_qtype, tiled_axes={axes[0]: block}, channelwise_axes=(axes[1],)
            )
        )
        np.testing.assert_allclose(
            back(quantized, g)[side], back(fake, rounded)[side], rtol=0, atol=1e-4
        )


def test_tiles_of_weights_and_activations():
    """fp8 as DeepSeek-V3 trains it (arXiv 2412.19437, section 3.3.2)."""
    rule = QuantizationRule(
        weight_qtype="float8_e4m3fn",
        act_qtype="float8_e4m3fn",
        tile_size={0: 128, 1: 128},
        act_tile_size=128,
    )
    assert isinstance(hash(rule), int)
    x, w = models.normal(4, 256), models.normal(256, 384, seed=1)

    def layer(params, x):
        return x @ params["w"]

    quantized, tree = ptq.quantize(layer, {"w": w}, [rule], x)
    assert tree["w"].array.scale.shape == (2, 3)
    (op,) = qwix_train.plan(layer, [rule], {"w": w}, x).quantized_ops
    assert op.activations[0].scale_shape(x.shape) == (4, 2)
    largest = np.abs(np.asarray(w).reshape(2, 128, 3, 128)).max((1, 3))
    np.testing.assert_allclose(tree["w"].array.scale, largest / 448, rtol=1e-6)
    qat = qwix_train.quantize_fn(layer, qwix_train.QtProvider([rule]))
    np.testing.assert_allclose(quantized(tree, x), qat({"w": w}, x), atol=1e-3)
    error = np.abs(quantized(tree, x) - x @ w).mean() / np.abs(x @ w).mean()
    assert error < 0.05


def test_a_rule_with_tiles_by_axis_is_saved(tmp_path):
    rule = QuantizationRule(weight_qtype="int8", tile_size={-1: 4, 0: 0.5})
    _, tree = ptq.quantize(
        lambda params, x: x @ params["w"],
        {"w": jnp.ones((8, 8))},
        [rule],
        inputs()[:, :8],
    )
    assert tree["w"].array.scale.shape == (2, 2)
    ptq.save(tmp_path / "params", tree, rules=[rule])
    assert ptq.read_manifest(tmp_path / "params").rules == (rule,)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        (dict(weight_qtype="mxfp8", tile_size=16), "one scale for 32 elements"),
        (
            dict(weight_qtype="int8", act_qtype="nvfp4", act_tile_size=32),
            "nvfp4 has one scale for 16 elements",
        ),
        (
            dict(weight_qtype="int8", act_qtype="mxfp8", act_static_scale=True),
            "those of blocks of one array",
        ),
        (
            dict(weight_qtype="mxint8", weight_calibration_method="lsq"),
            "a scale is trained for int1 to int8",
        ),
        (dict(weight_qtype="int8", tile_size={0: 0}), "must be a positive int"),
        (dict(weight_qtype="int8", tile_size={}), "must map axes"),
        (dict(weight_qtype="mxfp4", weight_calibration_method="minmax"), "zero points"),
    ],
)
def test_rules_that_cannot_be(fields, error):
    with pytest.raises(ValueError, match=error):
        QuantizationRule(**fields)


def test_layers_without_blocks():
    conv = nn.Conv(4, (3, 3))
    x = models.normal(2, 8, 8, 32)
    with pytest.raises(ValueError, match="convolutions have no such tiles"):
        qwix_train.plan(conv, [QuantizationRule(weight_qtype="mxfp8")], x)
    rule = QuantizationRule(weight_qtype="mxfp8", disable_channelwise_axes=True)
    with pytest.raises(ValueError, match="mxfp8 has one scale for 32 elements"):
        qwix_train.plan(nn.Dense(8), [rule], inputs())
    short = QuantizationRule(weight_qtype="mxfp8")
    with pytest.raises(ValueError, match="a tile of 32 does not divide"):
        qwix_train.plan(nn.Dense(8), [short], inputs()[:, :40])
    padded = QuantizationRule(weight_qtype="mxfp8", pad_tiles=True)
    assert qwix_train.plan(nn.Dense(8), [padded], inputs()[:, :40]).quantized_ops
    far = QuantizationRule(weight_qtype="int8", tile_size={2: 4})
    with pytest.raises(ValueError, match="Axis 2 is out of range"):
        qwix_train.plan(nn.Dense(8), [far], inputs())


@pytest.mark.thinned(5)
@pytest.mark.parametrize("qtype", ["mxfp4", "nvfp4", "float4_e2m1fn", "ternary"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_qlora(qtype, double_quant):
    if double_quant and qtype == "ternary":
        with pytest.raises(ValueError, match="a weight_qtype of 4 bits"):
            LoraRule(rank=2, alpha=2.0, weight_qtype=qtype, double_quant=True)
        return
    rule = LoraRule(rank=2, alpha=2.0, weight_qtype=qtype, double_quant=double_quant)
    model, x, y = Layers(), inputs(), inputs()[:, ::-1]
    params = models.params_of(model, x)
    tx, key = optax.adam(1e-2), jax.random.key(1)
    state = models.lora_state(model.apply, params, tx, [rule], key, x)
    bases = jax.tree.leaves(state.frozen, is_leaf=stored.is_quantized)
    (base,) = [leaf for leaf in bases if stored.is_quantized(leaf)]
    assert isinstance(base.array, PackedQArray) == double_quant
    # B is zero at first: it is the quantized model.
    quantized, tree = ptq.quantize(
        model, params, [QuantizationRule(weight_qtype=qtype)], x
    )
    served = quantized.apply({"params": tree}, x)
    first = state.apply_fn({"params": state.params}, x)
    coded = numerics.format_of(qtype).coded_scales
    tolerance = 1e-5 if coded or not double_quant else 0.02
    np.testing.assert_allclose(first, served, rtol=0, atol=tolerance)

    @jax.jit
    def step(state):
        def loss(params):
            return jnp.mean((state.apply_fn({"params": params}, x) - y) ** 2)

        value, grads = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=grads), value

    losses = []
    for _ in range(5):
        state, value = step(state)
        losses.append(float(value))
    assert losses[-1] < losses[0]


@pytest.mark.thinned(9)
@pytest.mark.parametrize("method", [ptq.Gptq, ptq.Awq, ptq.SmoothQuant])
@pytest.mark.parametrize(
    "qtype", ["mxfp4", "nvfp4", "mxint8", "mxfp6_floor", "ternary"]
)
def test_methods_that_look_at_inputs(method, qtype):
    rule = QuantizationRule(weight_qtype=qtype, act_qtype="mxfp8")
    mixed = models.normal(64, 64, seed=5)
    x = models.normal(256, 64, seed=1) @ mixed
    model = nn.Dense(32)
    params = models.params_of(model, x)
    found = method([rule])
    found.wrap(jax.jit(model.apply))({"params": params}, x)
    quantized = qwix_train.quantize_model(model, found.provider)
    abstract = jax.eval_shape(quantized.init, jax.random.key(0), x)["params"]
    tree = found.quantize_params(params, abstract)
    array = tree["kernel"].array
    assert array.qtype == qtype
    assert array.scale.dtype == abstract["kernel"].array.scale.dtype
    (record,) = found.report.weights
    if record.applied:
        assert record.error <= record.rounding_error * 1.001
    if method is ptq.Gptq:
        assert record.error < 0.9 * record.rounding_error
    out = quantized.apply({"params": tree}, x)
    exact = model.apply({"params": params}, x)
    assert np.linalg.norm(out - exact) < 0.6 * np.linalg.norm(exact)


def test_sensitivity_and_bits():
    """Types of one width of code are told apart by what they lose."""
    model, x = nn.Dense(16), models.normal(32, 64, seed=1)
    params = models.params_of(model, x)
    y = model.apply({"params": params}, x)

    def loss(params, batch):
        return jnp.mean((model.apply({"params": params}, batch) - y) ** 2)

    rules = [QuantizationRule(weight_qtype="mxfp4")]
    types = ["mxfp4", "nvfp4", "mxint8", "ternary"]
    found = qat.sensitivity(loss, params, rules, [x], qtypes=types)
    lost = {record.qtype: record.loss_increase for record in found.rows}
    assert lost["mxint8"] < lost["nvfp4"] < lost["mxfp4"] < lost["ternary"]


@pytest.mark.slow
def test_training_on_mxfp8():
    """A step of training with quantized gradients lowers the loss as in float."""
    rule = QtRule(weight_qtype="mxfp8", act_qtype="mxfp8", bwd_qtype="mxfp8_e5m2")
    model, x = Layers(), models.normal(32, 64, seed=1)
    params, target = models.params_of(model, x), models.normal(32, 64, seed=2)

    def losses(model):
        def loss(params):
            return jnp.mean((model.apply({"params": params}, x) - target) ** 2)

        tx = optax.adam(1e-2)
        now, state, found = params, tx.init(params), []
        step = jax.jit(jax.value_and_grad(loss))
        for _ in range(10):
            value, grads = step(now)
            updates, state = tx.update(grads, state)
            now, found = optax.apply_updates(now, updates), [*found, float(value)]
        return found

    quantized = qwix_train.quantize_model(model, qwix_train.QtProvider([rule]))
    ours, exact = losses(quantized), losses(model)
    np.testing.assert_allclose(ours, exact, rtol=0.05)
    assert ours[-1] < 0.9 * ours[0]
