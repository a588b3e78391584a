"""What users of `qwix` do, step by step, under its names."""

import jax
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import numpy as jnp
from jax.experimental import pallas as pl

from qwix_train.like_qwix import flax_util, pallas
from qwix_train.like_qwix import names as qwix
from qwix_train.like_qwix.contrib import (
    awq,
    calibration,
    gptq,
    hadamard_rot,
    padded_ptq,
    smooth_quant,
)
from tests import models
from tests.compare import assert_close, assert_same

INT8 = {"weight_qtype": "int8", "act_qtype": "int8"}


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(8)(nn.gelu(nn.Dense(32)(x)))


class NnxMlp(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.first = nnx.Linear(16, 32, rngs=rngs)
        self.second = nnx.Linear(32, 8, rngs=rngs)

    def __call__(self, x):
        return self.second(nn.gelu(self.first(x)))


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        layer = nn.scan(
            lambda layer, x: (layer(x), None),
            variable_axes={"params": 0, "quant_stats": 0},
            split_rngs={"params": True},
            length=2,
        )
        return layer(nn.Dense(16), x)[0]


def error(a, b):
    return float(jnp.abs(a - b).mean())


METHODS = [pytest.param(x, marks=pytest.mark.slow) for x in ("absmax", "minmax")]


@pytest.mark.parametrize("method", METHODS)
def test_an_nnx_model_collects_its_ranges(method):
    rules = [
        qwix.QuantizationRule(
            **INT8, act_static_scale=True, act_calibration_method=method
        )
    ]
    x, model = models.normal(4, 16), NnxMlp()
    trained = qwix.quantize_model(model, qwix.QtProvider(rules), x)

    @nnx.jit
    def step(model, x):
        return nnx.grad(lambda model: jnp.sum(model(x)))(model)

    def count():
        stats = nnx.state(trained, flax_util.QuantStat)
        return int(stats["first"]["dot_general0_lhs"].get_value()["count"])

    assert count() == 0
    step(trained, x)
    assert count() == 1
    trained.set_attributes(disable_quant_stats_update=True)
    step(trained, 9 * x)
    assert count() == 1
    trained.set_attributes(disable_quant_stats_update=False)
    # Either way to the quantized model has the same ranges.
    direct = qwix.quantize_model(trained, qwix.PtqProvider(rules), x)
    abstract = nnx.eval_shape(
        lambda: qwix.quantize_model(trained, qwix.PtqProvider(rules), x)
    )
    floats = nnx.to_pure_dict(nnx.state(trained, nnx.Param))
    stats = nnx.to_pure_dict(nnx.state(trained, flax_util.QuantStat))
    nnx.update(abstract, qwix.quantize_params(floats, abstract, stats))
    assert_same(nnx.state(abstract), nnx.state(direct))
    call = nnx.jit(lambda model, x: model(x))
    assert_close(call(direct, x), call(trained, x), 0.01, of_largest=True)


@pytest.mark.slow
@pytest.mark.parametrize("scanned", [False, True])
def test_gptq_of_a_linen_model(scanned):
    model, x = (Scanned() if scanned else Mlp()), models.normal(24, 16).cumsum(1)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    rules = [gptq.GptqRule(weight_qtype="int4")]
    collecting = qwix.quantize_model(model, gptq.GptqCalibrationProvider(rules))
    apply = jax.jit(collecting.apply, static_argnames="mutable")
    for number in (1, 2):
        out, new = apply(variables, x, mutable="quant_stats")
        variables = {**variables, **new}
        (module, *_) = new["quant_stats"]
        stats = new["quant_stats"][module]["kernel_gptq"]
        assert np.all(stats["count"] == number)
    assert_close(out, model.apply({"params": variables["params"]}, x))
    quantized = qwix.quantize_model(model, qwix.PtqProvider(rules))
    abstract = jax.eval_shape(quantized.init, jax.random.key(0), x)["params"]
    rounded = qwix.quantize_params(variables["params"], abstract)
    better = gptq.quantize_params(
        variables["params"], abstract, variables["quant_stats"]
    )
    assert jax.tree.structure(better) == jax.tree.structure(rounded)
    apply = quantized.apply
    assert error(out, apply({"params": better}, x)) < error(
        out, apply({"params": rounded}, x)
    )


@pytest.mark.slow
def test_gptq_of_an_nnx_model():
    model, x = NnxMlp(), models.normal(24, 16).cumsum(1)
    rules = [gptq.GptqRule(module_path="first", weight_qtype="int4")]
    collecting = qwix.quantize_model(model, gptq.GptqCalibrationProvider(rules), x)
    out = collecting(x)
    assert collecting.first.kernel_gptq["sum_of_hessian"].shape == (16, 16)
    assert not hasattr(collecting.second, "kernel_gptq")
    quantized = qwix.quantize_model(model, qwix.PtqProvider(rules), x)
    before = error(out, quantized(x))
    floats = nnx.to_pure_dict(nnx.state(collecting, nnx.Param))
    stats = nnx.to_pure_dict(nnx.state(collecting, flax_util.QuantStat))
    nnx.update(quantized, gptq.quantize_params(floats, quantized, stats))
    assert error(out, quantized(x)) < before


@pytest.mark.thinned(2)
@pytest.mark.parametrize("module", [smooth_quant, awq], ids=["smooth_quant", "awq"])
def test_input_scaling(module):
    sizes = np.where(np.arange(16) % 8 == 0, 50, 1)
    model, x = Mlp(), models.normal(24, 16) * sizes
    variables = jax.jit(model.init)(jax.random.key(0), x)
    of = {awq: ("Awq", "_awq", None), smooth_quant: ("Sq", "_sq", "int4")}
    name, suffix, act_qtype = of[module]
    rule = getattr(module, f"{name}Rule")(
        module_path="Dense_0", weight_qtype="int4", act_qtype=act_qtype
    )
    provider = getattr(module, f"{name}CalibrationProvider")([rule])
    collecting = qwix.quantize_model(model, provider)
    out, new = collecting.apply(variables, x, mutable="quant_stats")
    assert set(new["quant_stats"]) == {"Dense_0"}
    assert new["quant_stats"]["Dense_0"]["kernel" + suffix]["count"] == 1
    quantized = qwix.quantize_model(model, qwix.PtqProvider([rule]))
    abstract = jax.eval_shape(quantized.init, jax.random.key(0), x)["params"]
    rounded = qwix.quantize_params(variables["params"], abstract)
    scaled = module.quantize_params(variables["params"], abstract, new["quant_stats"])
    inference = getattr(module, f"{name}InferenceProvider")([rule])
    served = qwix.quantize_model(model, inference).apply({"params": scaled}, x)
    assert error(out, served) < error(out, quantized.apply({"params": rounded}, x))


@pytest.mark.slow
def test_statistics_of_a_users_own():
    class Largest(calibration.SinglePassCalibrationProvider):
        def get_rule_type(self):
            return qwix.QuantizationRule

        def get_stats_suffix(self):
            return "_largest"

        def compute_stats(self, lhs):
            return {"largest": jnp.abs(lhs).max(1)}

    x = models.normal(4, 16)
    provider = Largest([qwix.QuantizationRule(weight_qtype="int8")])
    model = qwix.quantize_model(nn.Dense(3), provider)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    _, new = model.apply(variables, x, mutable="quant_stats")
    found = new["quant_stats"]["kernel_largest"]["sum_of_largest"]
    assert_close(found, np.abs(x).max(0))


@pytest.mark.thinned(2)
@pytest.mark.parametrize("method", ["absmax", "minmax"])
def test_params_that_were_quantized_elsewhere(method):
    rule = qwix.QuantizationRule(weight_qtype="int8", weight_calibration_method=method)
    model, x = NnxMlp(), models.normal(4, 16)
    abstract = nnx.eval_shape(
        lambda: qwix.quantize_model(model, qwix.PtqProvider([rule]), x)
    )
    floats = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    quantized = qwix.quantize_params(floats, abstract)
    checkpoint = jax.tree.map(np.asarray, quantized)
    found = qwix.process_prequantized_params(checkpoint, abstract)
    assert_same(found, quantized)
    # A float model gets what the codes stand for.
    values = qwix.process_prequantized_params(checkpoint, model)
    assert_close(values, floats, 0.01, of_largest=True)
    rules = qwix.restore_quantization_rules(
        checkpoint, qwix.QtRule, tile_size=16, act_qtype=None
    )
    assert [(r.module_path, r.weight_calibration_method) for r in rules] == [
        ("first", method),
        ("second", method),
    ]
    kernel = checkpoint["first"]["kernel"]["array"]
    for wrong, message in (
        ({"qvalue": kernel["qvalue"]}, "has qvalue; a quantized param has"),
        ({**kernel, "qvalue": kernel["qvalue"][:-1]}, "shape"),
        ({**kernel, "qvalue": kernel["qvalue"].astype("int4")}, "codes"),
    ):
        with pytest.raises(ValueError, match=message):
            qwix.process_prequantized_params(
                {"first": {"kernel": {"array": wrong}}}, abstract
            )
    for extra, message in (
        ({"third": np.ones(2)}, "no param 'third'"),
        ({"first": {"kernel": np.ones((16, 32))}}, "is quantized in the model"),
    ):
        with pytest.raises(ValueError, match=message):
            qwix.process_prequantized_params(extra, abstract)
    allowed = qwix.process_prequantized_params(
        {"third": np.ones(2)}, abstract, allow_extra_params=True
    )
    assert allowed == {}
    with pytest.raises(TypeError, match="takes NNX models"):
        qwix.process_prequantized_params(checkpoint, floats)


@pytest.mark.slow
def test_a_kernel_on_quantized_blocks():
    x, w = models.normal(32, 32), models.normal(32, 16, seed=1)
    x = pallas.quantize(x, "int8", channelwise_axes=(0,), tiled_axes={1: 16})
    w = pallas.quantize(w, "int8", channelwise_axes=(1,), tiled_axes={0: 16})

    def kernel(x, w, out):
        @pl.when(pl.program_id(2) == 0)
        def _():
            out[...] = jnp.zeros_like(out)

        x, w = jax.tree.map(lambda ref: ref[...], (x, w))
        out[...] += pallas.dot(x, w)

    matmul = pallas.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((32, 16), jnp.float32),
        grid=(2, 2, 2),
        in_specs=[
            pl.BlockSpec((16, 16), lambda i, j, k: (i, k)),
            pl.BlockSpec((16, 8), lambda i, j, k: (k, j)),
        ],
        out_specs=pl.BlockSpec((16, 8), lambda i, j, k: (i, j)),
        interpret=True,
    )
    assert_close(matmul(x, w), pallas.dot(x, w), 1e-4, of_largest=True)


@pytest.mark.slow
def test_a_rotation_keeps_the_product():
    act, weight = models.normal(4, 16), models.normal(16, 8, seed=1)
    options = {"row_sign_flip": True, "col_sign_flip": True}
    axes = {"lhs_reduction_dim": 1, "rhs_reduction_dim": 0}
    rotated = hadamard_rot.hadamard_rotate_inputs(
        act, weight, jax.random.key(0), **options, **axes
    )
    assert_close(rotated[0] @ rotated[1], act @ weight, 1e-3, of_largest=True)
    with pytest.raises(ValueError, match="not a power of two"):
        hadamard_rot.hadamard_rotate_inputs(
            act[:, :12], weight[:12], None, **options, **axes
        )


def test_tiles_that_do_not_fit():
    rule = qwix.QuantizationRule(weight_qtype="int8", tile_size=5)
    model = qwix.quantize_model(nn.Dense(3), padded_ptq.PaddedPtqProvider([rule]))
    params = jax.jit(model.init)(jax.random.key(0), models.normal(2, 12))["params"]
    assert params["kernel"].array.scale.shape == (3, 3)


def test_what_ours_refuses_is_warned_of():
    x = models.normal(4, 16)
    with pytest.warns(UserWarning, match="act_qtype='int8'.*It has no effect") as said:
        rule = qwix.QuantizationRule(act_qtype="int8")
    assert said[0].filename == __file__
    with pytest.warns(UserWarning, match="No rule quantizes an op"):
        model = qwix.quantize_model(nn.Dense(3), qwix.QtProvider([rule]))
        variables = jax.jit(model.init)(jax.random.key(0), x)
        out = model.apply(variables, x)
    assert_same(out, nn.Dense(3).apply(variables, x))
    with pytest.warns(UserWarning, match="'sparsity' has no counterpart"):
        qwix.QtRule(**INT8, bwd_qtype="int8", additional_qt_config={"sparsity": 1})
    with pytest.warns(UserWarning, match="LoraRule.*matches no op"):
        provider = qwix.LoraProvider(module_path="nope", rank=2, alpha=1.0)
        qwix.apply_lora_to_model(nn.Dense(3), provider).init(jax.random.key(0), x)


@pytest.mark.slow
def test_an_adapter_that_drops_all_of_its_input():
    x = models.normal(4, 16)
    with pytest.warns(UserWarning, match=r"dropout=1\.0"):
        rule = qwix.LoraRule(
            rank=2, alpha=1.0, dropout=1.0, lora_b_initializer=nnx.initializers.ones
        )
    model = nnx.Linear(16, 3, rngs=nnx.Rngs(0))
    with pytest.warns(UserWarning, match="seed 10003"):
        adapted = qwix.apply_lora_to_model(model, qwix.LoraProvider([rule]), x)
    adapted.set_attributes(qwix_rngs=nnx.Rngs(dropout=0))
    assert_close(adapted(x), model(x))
    gradients = nnx.grad(lambda model: jnp.sum(model(x)))(adapted)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def test_unused_rules_and_other_options():
    first = qwix.QuantizationRule(module_path="Dense_0", weight_qtype="int8")
    second = qwix.QuantizationRule(module_path="nope", weight_qtype="int8")
    provider = qwix.PtqProvider([first, second], disable_jit=True)
    with pytest.raises(ValueError, match="No model was called"):
        provider.get_unused_rules()
    model = qwix.quantize_model(Mlp(), provider)
    with pytest.warns(UserWarning, match="Rule . .*matches no op"):
        model.init(jax.random.key(0), models.normal(4, 16))
    assert provider.get_unused_rules() == [second]


def test_a_model_that_holds_what_it_needs():
    x, provider = (
        models.normal(4, 16),
        qwix.PtqProvider([qwix.QuantizationRule(**INT8)]),
    )
    quantized = qwix.quantize_model(NnxMlp(), provider, x)
    again = qwix.quantize_model(quantized, provider, x, skip_nnx_init=True)
    assert_same(again(x), quantized(x))


def test_rules_of_a_qt_provider_are_qt_rules():
    provider = qwix.QtProvider([qwix.QuantizationRule(**INT8)])
    (rule,) = provider.rules
    assert isinstance(rule, qwix.QtRule) and rule.act_batch_axes == (0,)
