"""Models that run with scaled inputs: their arithmetic, ranges, files and exports."""

import jax
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import export
from jax import numpy as jnp

from qwix_train import (
    PtqProvider,
    QuantizationRule,
    calib,
    dequantize,
    ptq,
    quantize_model,
)
from qwix_train.ptq.weight_method import Finding
from tests import models
from tests.calib.test_calibrator import NnxMlp
from tests.ptq.gptq_reference import (
    WIDE,
    abstract,
    collect,
    correlated,
    errors,
    run,
    run_nnx,
)
from tests.ptq.test_weight_method import NnxLayers, mlp_params

WEIGHTS = QuantizationRule(weight_qtype="int8")
BOTH = models.INT8
STATIC = models.rule("int8", "int8", act_static_scale=True)


def outliers(seed=0, rows=24):
    x = correlated(rows, 6, seed)
    x[:, 2] *= 40
    return x


BATCHES = [outliers(seed) for seed in range(3)]


def scaled_dense(params, x, act_bits=8, scale=None):
    """A layer by hand, with the input scaled before it is quantized."""
    x = x * np.asarray(params["dot_general0_lhs_pre_quant_scale"])
    if scale is not None:
        x = np.clip(np.round(x / scale), -128, 127) * scale
    elif act_bits:
        x = models.fake_quant(x, act_bits, -1)
    return x @ dequantize(params["kernel"].array) + params["bias"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "rules"), [(ptq.Awq, [WEIGHTS]), (ptq.SmoothQuant, BOTH)]
)
def test_the_arithmetic(make, rules):
    model, params, method = models.Mlp(), mlp_params(), make(rules)
    quantized = run(method, model, params, *BATCHES)
    whole = quantize_model(model, method.provider)
    bits = 0 if rules == [WEIGHTS] else 8
    for x in BATCHES:
        out = jax.jit(whole.apply)({"params": quantized}, x)
        hidden = nn.relu(scaled_dense(quantized["Dense_0"], x, bits))
        expected = scaled_dense(quantized["Dense_1"], hidden, bits)
        np.testing.assert_allclose(out, expected, rtol=1e-3, atol=2e-3)
        exact = model.apply({"params": params}, x)
        assert np.abs(out - exact).max() < 0.03 * np.abs(exact).max()
    # A provider that makes no place for scales applies those that are there.
    plain = quantize_model(model, PtqProvider(rules))
    models.assert_same(jax.jit(plain.apply)({"params": quantized}, x), out)
    init = jax.eval_shape(plain.init, jax.random.key(0), x)["params"]
    models.assert_same(method.quantize_params(params, init), quantized)


@pytest.mark.slow
def test_static_ranges_are_those_of_the_scaled_inputs():
    model, params, method = models.Mlp(), mlp_params(), ptq.SmoothQuant([STATIC])
    # As after training, the large channel does not drown the others.
    kernel = params["Dense_0"]["kernel"]
    params["Dense_0"]["kernel"] = kernel.at[2].divide(40)
    calibrator = calib.Calibrator([STATIC])
    collect(calibrator, model, params, *BATCHES)
    collect(method, model, params, *BATCHES)
    target = abstract(method, model, BATCHES[0])
    quantized = method.quantize_params(params, target)
    # Ranges of what is not scaled do not count.
    given = method.quantize_params(params, target, calibrator.quant_stats)
    models.assert_same(given, quantized)
    x = np.concatenate(BATCHES)
    for name in ("Dense_0", "Dense_1"):
        layer, dense = quantized[name], params[name]
        scaled = x * np.asarray(layer["dot_general0_lhs_pre_quant_scale"])
        scale = layer["dot_general0_lhs_scale"].array
        # Of the float model, whose inputs are not quantized.
        np.testing.assert_allclose(scale, [[1.1 * np.abs(scaled).max() / 127.5]], 1e-5)
        x = np.maximum(x @ np.asarray(dense["kernel"]) + np.asarray(dense["bias"]), 0)
    whole = quantize_model(model, method.provider)
    out = jax.jit(whole.apply)({"params": quantized}, BATCHES[0])
    first, second = (quantized[name] for name in ("Dense_0", "Dense_1"))
    scales = [x["dot_general0_lhs_scale"].array for x in (first, second)]
    hidden = nn.relu(scaled_dense(first, BATCHES[0], scale=scales[0]))
    expected = scaled_dense(second, hidden, scale=scales[1])
    np.testing.assert_allclose(out, expected, rtol=1e-3, atol=2e-3)
    plain, floats = ptq.quantize(
        model, params, [STATIC], BATCHES[0], quant_stats=calibrator.quant_stats
    )
    exact = model.apply({"params": params}, BATCHES[0])
    without = plain.apply({"params": floats}, BATCHES[0])
    assert np.square(out - exact).sum() < 0.2 * np.square(without - exact).sum()


@pytest.mark.slow
def test_ranges_that_do_not_follow_from_those_of_channels():
    rules = [models.rule("int8", "int8", act_static_scale=True, act_observer="mse")]
    with pytest.raises(ValueError, match="'Dense_0/dot_general0_lhs' is scaled, and"):
        run(ptq.SmoothQuant(rules), models.Mlp(), mlp_params(), BATCHES[0])


@pytest.mark.slow
def test_ranges_with_two_ends():
    rules = [
        models.rule(
            "int8", "int8", act_static_scale=True, act_calibration_method="minmax"
        )
    ]
    params = run(ptq.Awq(rules), models.Mlp(), mlp_params(), *BATCHES)["Dense_0"]
    x = np.concatenate(BATCHES) * np.asarray(params["dot_general0_lhs_pre_quant_scale"])
    scale = params["dot_general0_lhs_scale"].array
    np.testing.assert_allclose(scale, [[(x.max() - x.min()) / 255]], 1e-5)
    zero_point = np.round(-128 - x.min() / np.asarray(scale))
    np.testing.assert_array_equal(params["dot_general0_lhs_zero_point"], zero_point)


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["nnx", "linen"])
def test_stacked_layers(framework):
    rules = [models.rule("int8", "int8", act_static_scale=True)]
    method = ptq.SmoothQuant(rules, alpha=0.5)
    if framework == "nnx":
        model = NnxLayers(nnx.Rngs(0))
        whole = run_nnx(method, model, *BATCHES)
        kernels = np.asarray(model.layers.kernel[...])
        scales = whole.layers.dot_general0_lhs_pre_quant_scale[...]
        ranges = whole.layers.dot_general0_lhs_scale.array[...]
        weights = dequantize(ptq.to_tree(whole.layers.kernel.array))
        out = whole(BATCHES[0])
    else:
        model = models.Layers(remat=True)
        params = jax.jit(model.init)(jax.random.key(0), BATCHES[0])["params"]
        kernels = np.asarray(params["layers"]["Dense_0"]["kernel"])
        quantized = run(method, model, params, *BATCHES)
        layer = quantized["layers"]["Dense_0"]
        scales = layer["dot_general0_lhs_pre_quant_scale"]
        ranges = layer["dot_general0_lhs_scale"].array
        weights = dequantize(layer["kernel"].array)
        whole = quantize_model(model, method.provider)
        out = whole.apply({"params": quantized}, BATCHES[0])
    x, run_on = np.concatenate(BATCHES), BATCHES[0]
    for kernel, weight, scale, bound in zip(
        kernels, weights, scales, ranges, strict=True
    ):
        s = np.sqrt(np.abs(x).max(0) / np.abs(kernel).max(1))
        np.testing.assert_allclose(scale, [1 / s], rtol=1e-4)
        np.testing.assert_allclose(bound, [[1.1 * np.abs(x / s).max() / 127.5]], 1e-4)
        x = np.tanh(3 * (x @ kernel))
        codes = np.clip(np.round(run_on * scale / bound), -128, 127)
        run_on = np.tanh(3 * (codes * bound) @ weight)
    np.testing.assert_allclose(out, run_on, atol=1e-3)


@pytest.mark.slow
def test_an_nnx_model_in_a_checkpoint(tmp_path):
    model, method = NnxMlp(nnx.Rngs(0)), ptq.Awq(BOTH)
    whole = run_nnx(method, model, *BATCHES)
    out = whole(BATCHES[0])
    assert np.abs(out - model(BATCHES[0])).max() < 0.03 * np.abs(out).max()
    scale = whole.first.dot_general0_lhs_pre_quant_scale[...]
    assert scale.shape == (1, 6) and np.ptp(scale) > 0
    ptq.save(tmp_path / "nnx", whole, rules=BOTH)
    empty = nnx.eval_shape(
        lambda: quantize_model(NnxMlp(nnx.Rngs(1)), method.provider, BATCHES[0])
    )
    restored = ptq.restore(tmp_path / "nnx", empty)
    models.assert_same(restored(BATCHES[0]), out)
    plain = quantize_model(model, PtqProvider(BOTH), BATCHES[0])
    floats = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    with pytest.raises(ValueError, match="no place for .*first/dot_general0_lhs_pre"):
        method.quantize_params(floats, plain)


@pytest.mark.slow
def test_files_exports_and_donation(tmp_path):
    model, params, method = models.Mlp(), mlp_params(), ptq.SmoothQuant(BOTH)
    quantized = run(method, model, params, *BATCHES)
    whole, x = quantize_model(model, method.provider), jax.device_put(BATCHES[0])
    variables = jax.jit(whole.init)(jax.random.key(0), x)["params"]
    assert jax.tree.structure(variables) == jax.tree.structure(quantized)
    assert (variables["Dense_0"]["dot_general0_lhs_pre_quant_scale"] == 1).all()
    ptq.save(tmp_path / "linen", quantized, rules=BOTH)
    restored = ptq.restore(tmp_path / "linen", abstract(method, model, x))
    models.assert_same(restored, quantized)

    def apply(params, x):
        return whole.apply({"params": params}, x)

    out = jax.jit(apply)(quantized, x)
    leaves, structure = jax.tree.flatten(quantized)
    exported = export.export(
        jax.jit(lambda leaves, x: apply(jax.tree.unflatten(structure, leaves), x))
    )(leaves, x)
    again = export.deserialize(exported.serialize())
    models.assert_close(again.call(leaves, x), out, 1e-6)
    kept = jax.tree.map(jnp.copy, quantized)
    both = jax.jit(lambda p, x: (p, apply(p, x)), donate_argnums=0)(quantized, x)
    models.assert_same(both[0], kept)
    models.assert_close(both[1], out, 1e-6)


@pytest.mark.slow
def test_a_scale_of_another_model():
    model, params, method = models.Mlp(), mlp_params(), ptq.Awq([WEIGHTS])
    quantized = run(method, model, params, *BATCHES)
    quantized["Dense_0"]["dot_general0_lhs_pre_quant_scale"] = jnp.ones((1, 7))
    whole = quantize_model(model, method.provider)
    with pytest.raises(ValueError, match=r"has shape \(1, 7\), and .* shape \(1, 6\)"):
        whole.apply({"params": quantized}, BATCHES[0])


def test_a_checkpoint_with_scales_of_inputs_says_which_model_has_them(tmp_path):
    model, params, method = models.Mlp(), mlp_params(), ptq.Awq([WEIGHTS])
    ptq.save(tmp_path / "awq", run(method, model, params, *BATCHES))

    def shapes(provider):
        whole = quantize_model(model, provider)
        return jax.eval_shape(whole.init, jax.random.key(0), BATCHES[0])["params"]

    with pytest.raises(ValueError, match=r"PtqProvider\(rules, pre_quant_scale=True\)"):
        ptq.restore(tmp_path / "awq", shapes(PtqProvider([WEIGHTS])))
    fresh = shapes(PtqProvider([WEIGHTS], pre_quant_scale=True))
    ptq.restore(tmp_path / "awq", fresh)


@pytest.mark.parametrize("make", [ptq.Awq, ptq.SmoothQuant])
def test_gptq_chooses_the_codes_of_scaled_weights(make):
    x = correlated(256, 32)
    x[:, [1, 5, 20]] *= 8
    rules = [
        QuantizationRule(
            weight_qtype="int4", tile_size=8, weight_calibration_method=WIDE
        )
    ]
    model, params = nn.Dense(16, use_bias=False), {"kernel": models.normal(32, 16)}
    options = {"clip": False} if make is ptq.Awq else {}
    nearest = make(rules, **options)
    method = make(rules, rounding=ptq.Gptq(rules), **options)
    scales, found = (run(each, model, params, x) for each in (nearest, method))
    models.assert_same(scales["kernel"].array.scale, found["kernel"].array.scale)
    scale = np.asarray(found["dot_general0_lhs_pre_quant_scale"])
    models.assert_same(scale, scales["dot_general0_lhs_pre_quant_scale"])
    assert len(np.unique(scale)) > 1
    array, w = found["kernel"].array, np.asarray(params["kernel"])
    wrong = errors(array.qvalue, w / scale.T, x * scale, "int4", tile=8, static=True)
    assert wrong < 0.01
    (record,) = method.report.weights
    out = (x * scale) @ np.asarray(dequantize(array)) - x @ w
    np.testing.assert_allclose(
        record.error, np.sum(out**2) / np.sum((x @ w) ** 2), 1e-3
    )
    (before,) = nearest.report.weights
    assert record.error < 0.7 * before.error
    with pytest.raises(ValueError, match="GPTQ: rounding has other rules"):
        make(rules, rounding=ptq.Gptq([models.rule("int4")]))
    with pytest.raises(TypeError, match="is not a ptq.Gptq"):
        make(rules, rounding=ptq.Gptq)


@pytest.mark.slow
def test_gptq_takes_the_narrowed_ranges_of_awq():
    x, rules = correlated(256, 32), [models.rule("nvfp4")]
    model, params = nn.Dense(16, use_bias=False), {"kernel": models.normal(32, 16)}
    narrowed, method = ptq.Awq(rules), ptq.Awq(rules, rounding=ptq.Gptq(rules))
    before, found = (
        run(each, model, params, x)["kernel"].array for each in (narrowed, method)
    )
    models.assert_same(before.scale, found.scale)
    models.assert_differ(before.qvalue, found.qvalue)
    assert method.report.weights[0].error < 0.9 * narrowed.report.weights[0].error


def test_a_range_that_is_given_counts_where_gptq_rounds_what_is_not_smoothed():
    x, rules = correlated(64, 8), [STATIC]
    model, params = nn.Dense(4, use_bias=False), {"kernel": models.normal(8, 4)}
    given = {"dot_general0_lhs": {"count": 1, "sum_of_absmax": np.full((1, 1), 1000.0)}}
    method = ptq.SmoothQuant(rules, alpha=0.5, rounding=ptq.Gptq(rules))
    method.channel_scale = lambda weight: (jnp.ones((1, 8)), Finding(reason="why"))
    collect(method, model, params, x)
    found = method.quantize_params(params, abstract(method, model, x), given)
    models.assert_same(found["dot_general0_lhs_pre_quant_scale"], np.ones((1, 8), "f"))
    scale = found["dot_general0_lhs_scale"].array
    np.testing.assert_allclose(scale, [[1000 / 127.5]], 1e-5)
    assert method.report.weights[0].note == "before GPTQ: why"
