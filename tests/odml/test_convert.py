"""Conversion of models: precisions, signatures, inputs and outputs, and errors."""

import jax
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax
from jax import numpy as jnp

import qwix_train
from qwix_train import QuantizationRule, odml, qat, quantize_model
from qwix_train.frontends.quant_stat import QuantStat
from qwix_train.odml import annotation, lowering
from tests.odml.small import INT8, Mlp, converted, init, module, normal, stats_of

SHAPE = (3, 8)


@pytest.fixture(scope="module")
def mlp():
    x = normal(*SHAPE)
    variables = init(Mlp(), x)
    provider = odml.OdmlQatProvider(INT8)

    def run(variables, x):
        h = Mlp().apply(variables, x, method="encode")
        decoded = Mlp().apply(variables, h, method="decode")
        return Mlp().apply(variables, x), h, decoded

    return variables, stats_of(provider, run, variables, x)


class NnxMlp(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.first = nnx.Linear(8, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.second = nnx.Linear(16, 4, rngs=rngs)

    def encode(self, x):
        return self.dropout(nnx.relu(self.norm(self.first(x))))

    def decode(self, h):
        return self.second(h)

    def __call__(self, x):
        return self.decode(self.encode(x))


@pytest.fixture(scope="module")
def nnx_mlp():
    model = NnxMlp()
    model.eval()
    x = normal(*SHAPE)

    def run(model, x):
        h = model.encode(x)
        return model(x), h, model.decode(h)

    return model, stats_of(odml.OdmlQatProvider(INT8), run, model, x)


def on_grid(x, scale, zero_point=0.0, low=-128, high=127):
    codes = np.clip(np.round(x / scale) + zero_point, low, high)
    return (codes - zero_point) * scale


def weight_on_grid(w, bits):
    high = 2 ** (bits - 1) - 1
    return on_grid(w, np.abs(w).max(0) / high, low=-high, high=high)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4])
def test_weights_alone(mlp, bits):
    """Float operations on weights that the file holds as integers."""
    variables, _ = mlp
    rules = [QuantizationRule(weight_qtype=f"int{bits}")]
    litert = odml.convert(Mlp(), variables, rules, normal(*SHAPE))
    assert not litert.is_full_integer
    assert [op.name for op in litert.ops()] == ["DEQUANTIZE", "FULLY_CONNECTED"] * 2
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), variables["params"])
    x = np.asarray(normal(*SHAPE, seed=1), np.float64)
    first, second = params["first"], params["second"]
    h = np.maximum(x @ weight_on_grid(first["kernel"], bits) + first["bias"], 0)
    expected = h @ weight_on_grid(second["kernel"], bits) + second["bias"]
    np.testing.assert_allclose(litert(x), expected, rtol=1e-4, atol=1e-5)
    (out,) = litert.report(x)
    assert out.scale is None and out.max_steps < 1e-2


@pytest.mark.slow
def test_learned_ranges_of_activations():
    learned = QuantizationRule(
        weight_qtype="int8", act_qtype="int8", act_calibration_method="lsq"
    )
    x = normal(*SHAPE)
    model = quantize_model(Mlp(), qat.QtProvider([learned]))
    begun = init(model, x)["params"]

    @jax.jit
    def step(params):
        grads = jax.grad(lambda p: (model.apply({"params": p}, x) ** 2).mean())(params)
        return jax.tree.map(lambda p, g: p - 0.2 * g, params, grads)

    variables = {"params": step(step(begun))}
    collected = stats_of(odml.OdmlQatProvider(INT8), Mlp().apply, variables, x)
    ranges = qwix_train.ranges(variables, [learned], collected)
    litert = odml.convert(Mlp(), variables, INT8, x, quant_stats=ranges)
    products = [op for op in litert.ops() if op.name == "FULLY_CONNECTED"]
    want = np.asarray(x, np.float64)
    for op, name in zip(products, ("first", "second"), strict=True):
        layer = jax.tree.map(np.float64, variables["params"][name])
        scale = layer["dot_general0_lhs_scale"].item()
        assert scale != begun[name]["dot_general0_lhs_scale"].item()
        np.testing.assert_allclose(op.inputs[0].scale, [scale], 1e-6)
        assert list(op.inputs[0].zero_point) == [0]
        want = np.maximum(want, 0) if name == "second" else want
        want = on_grid(want, scale) @ weight_on_grid(layer["kernel"], 8) + layer["bias"]
    (out,) = products[-1].outputs
    want = on_grid(want, out.scale[0], out.zero_point[0])
    steps = np.abs(litert(x) - want) / out.scale[0]
    assert steps.max() <= 1.01 and (steps < 0.01).mean() > 0.7


@pytest.mark.thinned(2)
@pytest.mark.parametrize("bits", [8, 4])
def test_integers_throughout(mlp, bits):
    variables, stats = mlp
    rules = [QuantizationRule(weight_qtype=f"int{bits}", act_qtype="int8")]
    litert = odml.convert(Mlp(), variables, rules, normal(*SHAPE), quant_stats=stats)
    assert litert.is_full_integer and litert.float_ops == []
    quantize, first, second, _ = litert.ops()
    assert first.inputs[1].dtype == second.inputs[1].dtype == f"int{bits}"
    # Every tensor on the grid that the file says of it.
    grids = [
        (op.outputs[0].scale[0], op.outputs[0].zero_point[0])
        for op in (quantize, first, second)
    ]
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), variables["params"])
    x = np.asarray(normal(*SHAPE, seed=1), np.float64)
    h = on_grid(x, *grids[0])
    for name, grid in (("first", grids[1]), ("second", grids[2])):
        layer = params[name]
        h = on_grid(h @ weight_on_grid(layer["kernel"], bits) + layer["bias"], *grid)
    steps = np.abs(litert(x) - h) / grids[2][0]
    assert steps.max() <= 1.01 and (steps < 0.01).mean() > 0.9


@pytest.mark.slow
def test_the_file_is_smaller(mlp):
    x = normal(1, 128)
    model = module(lambda self, x: nn.Dense(64)(nn.relu(nn.Dense(128)(x))))
    variables = init(model, x)
    sizes = {
        qtype: len(
            odml.convert(
                model, variables, [QuantizationRule(weight_qtype=qtype)], x
            ).content
        )
        for qtype in ("int8", "int4")
    }
    weights = 128 * 128 + 128 * 64
    assert weights < sizes["int8"] < 1.3 * weights
    assert weights / 2 < sizes["int4"] < 0.8 * weights


@pytest.mark.slow
def test_ranges_found_when_the_model_runs(mlp):
    variables, _ = mlp
    rules = [
        QuantizationRule(weight_qtype="int8", act_qtype="int8", act_static_scale=False)
    ]
    litert = odml.convert(Mlp(), variables, rules, normal(*SHAPE))
    # Hybrid operators read weights in integers, and activations in floats.
    assert [op.name for op in litert.ops()] == ["FULLY_CONNECTED"] * 2
    assert all(op.inputs[0].dtype == "float32" for op in litert.ops())
    assert all(op.inputs[1].dtype == "int8" for op in litert.ops())
    x = normal(*SHAPE, seed=1) * 10
    (out,) = litert.report(x)
    assert out.max_steps < 1
    expected = Mlp().apply(variables, x)
    assert np.abs(litert(x) - expected).max() < 0.02 * np.abs(expected).max()


def test_one_scale_for_a_weight(mlp):
    variables, stats = mlp
    provider = odml.OdmlQatProvider(INT8, disable_per_channel_weights=True)
    litert = odml.convert(Mlp(), variables, provider, normal(*SHAPE), quant_stats=stats)
    kernel = np.asarray(variables["params"]["first"]["kernel"])
    weight = litert.ops()[1].inputs[1]
    np.testing.assert_allclose(weight.scale, [np.abs(kernel).max() / 127], rtol=1e-6)
    (out,) = litert.report(normal(*SHAPE, seed=1))
    assert out.max_steps <= 1.01 and out.equal > 0.9


@pytest.mark.slow
def test_fixed_ranges(mlp):
    variables, stats = mlp
    provider = odml.OdmlQatProvider(
        INT8, fixed_range_for_inputs=(0, 1), fixed_range_for_outputs=(-2, 6)
    )
    litert = odml.convert(Mlp(), variables, provider, normal(*SHAPE), quant_stats=stats)
    first, last = litert.ops()[0].outputs[0], litert.ops()[-1].inputs[0]
    assert (first.scale, first.zero_point) == ((np.float32(1 / 255),), (-128,))
    np.testing.assert_allclose(last.scale, [8 / 255], rtol=1e-6)
    assert last.zero_point == (-128 + round(2 / (8 / 255)),)
    (out,) = litert.report(jnp.abs(normal(*SHAPE)))
    assert out.max_steps <= 1.01 and out.equal > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("dynamic_batch", [False, True])
def test_several_functions(mlp, dynamic_batch, tmp_path):
    variables, stats = mlp
    x = normal(*SHAPE)
    h = normal(3, 16)
    litert = odml.convert(
        Mlp(),
        variables,
        INT8,
        quant_stats=stats,
        signatures={
            "encode": ("encode", (x,)),
            "decode": (Mlp.decode, (h,)),
            "whole": ("__call__", (x,)),
        },
        dynamic_batch=dynamic_batch,
        metadata={"labels": "a,b,c,d"},
    )
    litert.save(tmp_path / "model.tflite")
    loaded = odml.LiteRTModel.load(tmp_path / "model.tflite")
    assert loaded.metadata["labels"] == b"a,b,c,d"
    size = 2 if dynamic_batch else 3
    for name, inputs in (("encode", x), ("decode", jnp.abs(h)), ("whole", x)):
        (out,) = litert.report(inputs[:size], signature=name)
        assert out.max_steps <= 1.01 and out.equal > 0.9, (name, out)
        np.testing.assert_array_equal(
            loaded(inputs[:size], signature=name),
            litert(inputs[:size], signature=name),
        )
    with pytest.raises(ValueError, match="no signature 'serving_default'"):
        litert(x)


@pytest.mark.slow
def test_several_functions_of_nnx(nnx_mlp):
    model, stats = nnx_mlp
    x, h = normal(*SHAPE), jnp.abs(normal(3, 16))
    litert = odml.convert(
        model,
        None,
        INT8,
        quant_stats=stats,
        signatures={"encode": ("encode", (x,)), "decode": ("decode", (h,))},
    )
    assert litert.is_full_integer
    for name, inputs in (("encode", x), ("decode", h)):
        (out,) = litert.report(inputs, signature=name)
        assert out.max_steps <= 1.01 and out.equal > 0.9, (name, out)


def test_ranges_in_the_variables(mlp):
    variables, stats = mlp
    litert = odml.convert(
        Mlp(), {**variables, "quant_stats": stats}, INT8, normal(*SHAPE)
    )
    assert litert.is_full_integer


@pytest.mark.slow
def test_ranges_in_an_nnx_model(nnx_mlp):
    model, stats = nnx_mlp
    kept = nnx.clone(model)
    for layer, name in ((kept.first, "first"), (kept.second, "second")):
        layer.dot_general0_lhs = QuantStat(stats[name]["dot_general0_lhs"])
    kept.final_output0 = QuantStat(stats["final_output0"])
    x = normal(*SHAPE)
    expected = odml.convert(model, None, INT8, x, quant_stats=stats)
    np.testing.assert_array_equal(odml.convert(kept, None, INT8, x)(x), expected(x))


def test_shapes_and_numpy_arrays_as_inputs(mlp):
    variables, stats = mlp
    x = np.asarray(normal(*SHAPE))
    of_array, of_shape = (
        odml.convert(Mlp(), variables, INT8, given, quant_stats=stats)
        for given in (x, jax.ShapeDtypeStruct(SHAPE, jnp.float32))
    )
    assert of_array.content == of_shape.content
    assert of_array.signatures["serving_default"].inputs == ("x",)


@pytest.mark.slow
def test_outputs_of_any_kind():
    """An input, one value twice, indices, a constant, and what is no array."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, unused):
            layer = nn.Dense(4)
            y = layer(x)
            return {
                "x": x,
                "pair": (y, y),
                "best": jnp.argmax(y, -1),
                "bias": layer.variables["params"]["bias"],
                "name": 7,
            }

    x = normal(*SHAPE)
    variables = init(Model(), x, x)
    litert = converted(Model(), variables, x, normal(2))
    assert litert.is_full_integer
    assert litert.signatures["serving_default"].inputs == ("x", "unused")
    out, expected = litert(x, normal(2)), Model().apply(variables, x, None)
    assert out["name"] == 7
    assert jax.tree.map(np.shape, out) == jax.tree.map(np.shape, expected)
    np.testing.assert_array_equal(out["pair"][0], out["pair"][1])
    np.testing.assert_array_equal(out["best"], np.argmax(out["pair"][0], -1))
    np.testing.assert_array_equal(out["bias"], expected["bias"])
    assert np.abs(out["x"] - x).max() < 0.02
    report = {entry.name: entry for entry in litert.report(x, normal(2))}
    assert list(report) == ["best", "bias", "pair_0", "pair_1", "x"]
    assert all(entry.max_steps <= 1.01 for entry in report.values())


def test_no_rule_matches(mlp):
    """A model in floats, if the provider allows it."""
    variables, _ = mlp
    rules = [QuantizationRule(module_path="other", weight_qtype="int8")]
    x = normal(*SHAPE)
    with pytest.raises(ValueError, match="No rule quantizes an op"):
        odml.convert(Mlp(), variables, rules, x)
    provider = odml.OdmlQatProvider(rules, allow_unmatched=True)
    litert = odml.convert(Mlp(), variables, provider, x)
    assert [op.name for op in litert.float_ops] == ["FULLY_CONNECTED"] * 2
    np.testing.assert_allclose(litert(x), Mlp().apply(variables, x), atol=1e-5)


@pytest.mark.slow
def test_an_island_of_floats():
    """Of what LiteRT has no integer form of, unless the provider is strict."""
    x = normal(*SHAPE)
    model = module(lambda self, x: nn.Dense(4)(jnp.sin(nn.Dense(6)(x))))
    variables = init(model, x)
    provider = odml.OdmlQatProvider(INT8, strict=False)
    with pytest.warns(UserWarning, match="sin0 .* cannot be quantized"):
        litert = converted(model, variables, x, provider=provider)
    assert [op.name for op in litert.float_ops] == ["SIN"]
    assert not litert.is_full_integer
    names = [op.name for op in litert.ops()]
    at = names.index("SIN")
    assert names[at - 1 : at + 2] == ["DEQUANTIZE", "SIN", "QUANTIZE"]
    (out,) = litert.report(x)
    assert out.max_steps <= 1.01
    with pytest.raises(ValueError, match=r"sin0 \(sin of \(3, 6\).*strict=False"):
        odml.convert(model, variables, INT8, x, quant_stats={})


def _half(self, x):
    return nn.Dense(4, dtype=jnp.bfloat16)(x)


def _dropout(self, x, train=False):
    return nn.Dropout(0.5, deterministic=not train)(nn.Dense(4)(x))


def test_errors_of_models(mlp, nnx_mlp):
    variables, stats = mlp
    x = normal(*SHAPE)
    half, dropout = module(_half), module(_dropout)
    half_variables = init(half, x)
    unit = {"count": 1, "sum_of_min": jnp.zeros(1), "sum_of_max": jnp.ones(1)}
    training = NnxMlp()
    training.train()
    cases = [
        (
            lambda: odml.convert(
                half, half_variables, INT8, x, quant_stats={"final_output0": unit}
            ),
            "Dense_0.* is in bfloat16, and the converter quantizes float32 alone",
        ),
        (
            lambda: odml.convert(
                Mlp(), variables, INT8, x.astype(jnp.float16), quant_stats=stats
            ),
            "an input of the model is in float16",
        ),
        (
            lambda: odml.convert(Mlp(), variables, INT8, x),
            "There are no quant_stats for 'first/dot_general0_lhs', whose range the",
        ),
        (
            lambda: odml.convert(training, None, INT8, x, quant_stats=nnx_mlp[1]),
            "NnxMlp updates its variables.*model.eval()",
        ),
        (
            lambda: odml.convert(
                dropout,
                init(dropout, x),
                INT8,
                x,
                quant_stats={},
                train=True,
                rngs={"dropout": jax.random.key(0)},
            ),
            "convert takes no rngs=",
        ),
        (
            lambda: jax.jit(
                lambda v: odml.convert(Mlp(), v, INT8, x, quant_stats=stats)(x)
            )(variables),
            r"The variable \['params'\]\['first'\]\['bias'\] has no value",
        ),
        (
            lambda: odml.convert(
                Mlp(),
                jax.eval_shape(Mlp().init, jax.random.key(0), x),
                INT8,
                x,
                quant_stats=stats,
            ),
            "has no value, .* with variables that hold arrays",
        ),
        (
            lambda: odml.convert(
                Mlp(), variables, INT8, x, signatures={"e": ("encode", (x,))}
            ),
            "signatures, or inputs and a method, not both",
        ),
        (
            lambda: odml.convert(Mlp(), variables, INT8, signatures={}),
            "names no function to convert",
        ),
        (
            lambda: odml.convert(Mlp(), variables, INT8, signatures={"e": "encode"}),
            "The signature 'e' is 'encode'; give a method and its inputs",
        ),
        (
            lambda: odml.convert(Mlp(), variables, INT8),
            "convert needs inputs of the model",
        ),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.slow
def test_params_over_several_devices(mlp):
    variables, stats = mlp
    x = normal(*SHAPE)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    sharded = jax.tree.map(lambda p: jax.device_put(p, spec), variables)
    litert, expected = (
        odml.convert(Mlp(), v, INT8, x, quant_stats=stats) for v in (sharded, variables)
    )
    np.testing.assert_array_equal(litert(x), expected(x))
    (out,) = litert.report(x)
    assert out.max_steps <= 1.01


@pytest.mark.thinned(2)
@pytest.mark.parametrize("variables", [None, {"first": {"kernel": np.ones((8, 16))}}])
def test_params_alone_are_no_variables(variables):
    with pytest.raises(ValueError, match=r"collections.*\{\"params\": params\}"):
        odml.convert(Mlp(), variables, INT8, np.ones((1, 8), np.float32))


@pytest.mark.thinned(2)
@pytest.mark.parametrize("rules", [None, 3])
def test_what_is_no_rules(rules):
    with pytest.raises(TypeError, match=f"Expected a list of rules, got {rules}"):
        odml.convert(Mlp(), {}, rules, np.ones((1, 8), np.float32))


def moved_heads(self, x):
    w = self.param("w", nn.initializers.normal(0.5), (4, 2, 6))
    return jnp.einsum("btnh,nhd->btd", x.reshape(2, 5, 4, 2), w)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "shape"),
    [
        (lambda self, x: nn.MultiHeadDotProductAttention(2)(x), (2, 5, 8)),
        (moved_heads, (2, 5, 8)),
        (lambda self, x: nn.ConvTranspose(4, (3, 3), (2, 2))(x), (1, 4, 4, 3)),
        (lambda self, x: nn.Conv(4, (3,), padding="CAUSAL")(x), (2, 5, 3)),
    ],
    ids=["attention", "heads", "transposed", "causal"],
)
def test_dynamic_range_of_products_whose_input_is_moved(call, shape):
    model, x = module(call), normal(*shape)
    variables = init(model, x)
    rule = QuantizationRule(
        weight_qtype="int8", act_qtype="int8", act_static_scale=False
    )
    litert = odml.convert(model, variables, [rule], x)
    assert litert(x).shape == model.apply(variables, x).shape
    (out,) = litert.report(x)
    assert out.max_steps < 0.01


def test_no_product_is_quantized_when_it_runs_with_a_batch_of_weights():
    model = module(
        lambda self, x: jnp.einsum(
            "bnh,nhd->bnd", x, self.param("w", nn.initializers.normal(), (5, 8, 4))
        )
    )
    x = normal(2, 5, 8)
    rule = QuantizationRule(
        weight_qtype="int8", act_qtype="int8", act_static_scale=False
    )
    with pytest.raises(ValueError, match="whose weight has batch axes"):
        odml.convert(model, init(model, x), [rule], x)


def test_the_file_is_checked(monkeypatch):
    """Of what the converter leaves in floats, whatever was planned."""
    monkeypatch.setattr(
        lowering,
        "lowered_pad",
        lambda x, value, config, mark: lax.pad(x, value, config),
    )
    x = normal(*SHAPE)
    model = module(lambda self, x: 2.0 * lax.pad(x, 0.0, ((0, 0, 0), (0, 0, 1))))
    with pytest.raises(ValueError, match="STABLEHLO_PAD of .* computes with floats"):
        converted(model, {}, x)
    provider = odml.OdmlQatProvider(INT8, strict=False)
    with pytest.warns(UserWarning, match="STABLEHLO_PAD"):
        litert = converted(model, {}, x, provider=provider)
    assert not litert.is_full_integer


def test_the_scales_of_outputs_are_checked(monkeypatch):
    monkeypatch.setattr(annotation._Annotated, "apart", lambda self, value, x, grid: x)

    def call(self, x):
        t = jnp.tanh(x)
        return t, jnp.concatenate([t, 30 * x], -1)

    with pytest.raises(ValueError, match="the output 'output_0' has the scale 0.4"):
        converted(module(call), {}, normal(4, 8))


@pytest.mark.slow
@pytest.mark.parametrize(
    "call",
    [
        lambda self, x: nn.Dense(6)(x).reshape(-1),
        lambda self, x: nn.Dense(6)(x)[:, 1:],
        lambda self, x: jnp.clip(nn.Dense(6)(x), -0.5, 0.5),
        lambda self, x: nn.max_pool(nn.Dense(6)(x), (2,), (2,)),
    ],
    ids=["reshape", "slice", "clip", "pool"],
)
def test_the_fixed_range_of_an_output_that_shares_a_range(call):
    x = normal(2, 4, 8)
    model = module(call)
    provider = odml.OdmlQatProvider(INT8, fixed_range_for_outputs=(-9, 9))
    litert = converted(model, init(model, x), x, provider=provider)
    (out,) = litert.report(x)
    assert litert.is_full_integer and out.max_steps < 1.01
    assert out.scale == pytest.approx(18 / 255)


@pytest.mark.slow
def test_the_fixed_range_of_an_output_is_not_that_of_what_else_reads_it():
    def call(self, x):
        y = 8 * nn.Dense(6)(x)
        return y[:, :3], nn.Dense(3)(y)

    x, model = normal(*SHAPE), module(call)
    variables = init(model, x)
    provider = odml.OdmlQatProvider(INT8, fixed_range_for_outputs=(-1, 1))
    litert = converted(model, variables, x, provider=provider)
    assert litert.is_full_integer
    for out, got, wanted in zip(
        litert.report(x), litert(x), model.apply(variables, x), strict=True
    ):
        assert out.scale == pytest.approx(2 / 255) and out.max_steps < 1.01
        # A tensor of a range of about 30 is read.
        assert np.abs(got - np.clip(wanted, -1, 1)).max() < 0.15
