"""Activations with collected ranges, given as `quant_stats`."""

import dataclasses
import sys

import flax.linen as nn
import jax
import numpy as np
import pytest
from jax import numpy as jnp

import qwix_train
from qwix_train import PtqProvider, QtProvider, QuantizationRule, WithAux
from tests import models, reference_process
from tests.qat.parity import Attention, Mlp
from tests.spellings import data

KEY = jax.random.key(0)
X = jax.device_put(data(6, 8, seed=1) - 0.3)
STATIC = {"weight_qtype": "int8", "act_qtype": "int8", "act_static_scale": True}
# The largest weight is no tie between two codes, where `qwix` may take the other.
WIDE = "absmax,1.1"
SYMMETRIC = QuantizationRule(**STATIC)
ASYMMETRIC = QuantizationRule(**STATIC, act_calibration_method="minmax")


def absmax(value, count=2):
    total = jnp.full((1, 1), count * value)
    return {"count": jnp.int32(count), "sum_of_absmax": total}


def minmax(low, high, count=4):
    sums = {"sum_of_min": low, "sum_of_max": high}
    sums = {name: jnp.full((1, 1), count * value) for name, value in sums.items()}
    return {"count": jnp.int32(count), **sums}


def stats(first, second):
    return {
        "Dense_0": {"dot_general0_lhs": first},
        "Dense_1": {"dot_general0_lhs": second},
    }


# For `qwix` too: the rule, and the statistics.
CASES = {
    "absmax": (SYMMETRIC, stats(absmax(0.75), absmax(1.0))),
    "minmax": (ASYMMETRIC, stats(minmax(-0.3, 0.75), minmax(-0.9, 1.0))),
}


def quantized(rule, quant_stats):
    model = qwix_train.quantize_model(Mlp(), PtqProvider([rule]))
    floats = models.params_of(Mlp(), X)
    abstract = jax.eval_shape(model.init, KEY, X)["params"]
    return model, floats, qwix_train.quantize_params(floats, abstract, quant_stats)


def test_scales_stand_next_to_the_params_of_their_module():
    model, _, params = quantized(*CASES["minmax"])
    ours = jax.eval_shape(model.init, KEY, X)["params"]
    assert jax.tree.structure(ours) == jax.tree.structure(params)
    dense = params["Dense_0"]
    assert set(dense) == {
        "kernel", "bias", "dot_general0_lhs_scale", "dot_general0_lhs_zero_point"
    }  # fmt: skip
    scale = dense["dot_general0_lhs_scale"]
    assert isinstance(scale, WithAux) and scale.how.calibration_method == "minmax"
    np.testing.assert_allclose(scale.array, [[1.05 / 255]], 1e-6)
    # -0.3 is code -128.
    assert dense["dot_general0_lhs_zero_point"].tolist() == [[-128 + 73]]


@pytest.mark.thinned(2)
@pytest.mark.parametrize("name", CASES)
def test_ranges_are_used_whatever_the_batch_holds(name):
    model, floats, params = quantized(*CASES[name])
    x = 3 * X  # much of it outside of the ranges
    got = model.apply({"params": params}, x)
    np.testing.assert_allclose(
        jax.jit(model.apply)({"params": params}, x), got, 1e-6, 1e-6
    )
    fixed = {"absmax": ["-0.75,0.75", "-1,1"], "minmax": ["-0.3,0.75", "-0.9,1"]}[name]
    rules = [
        QuantizationRule(
            module_path=f"Dense_{i}",
            weight_qtype="int8",
            act_qtype="int8",
            act_calibration_method=f"fixed,{bounds}",
        )
        for i, bounds in enumerate(fixed)
    ]
    qat = qwix_train.quantize_model(Mlp(), QtProvider(rules))

    def pull(model, params):
        def loss(x):
            out = model.apply({"params": params}, x)
            return out.sum(), out

        return jax.jit(jax.grad(loss, has_aux=True))(x)

    (gradient, _), (of_qat, expected) = pull(model, params), pull(qat, floats)
    np.testing.assert_allclose(got, expected, 1e-5, 1e-5)
    np.testing.assert_allclose(gradient, of_qat, 1e-5, 1e-5)
    run = jax.jit(model.apply)
    one = np.concatenate([run({"params": params}, row[None]) for row in x])
    np.testing.assert_allclose(one, got, 1e-6, 1e-6)


@pytest.mark.slow
def test_products_of_two_activations_have_two_ranges():
    model = qwix_train.quantize_model(Attention(), PtqProvider([SYMMETRIC]))
    x = X.reshape(1, 6, 8)
    abstract = jax.eval_shape(model.init, KEY, x)["params"]
    names = {name for name in abstract if name.endswith("_scale")}
    assert names == {
        f"einsum{i}_{side}_scale"
        for i, sides in enumerate([("lhs", "rhs"), ("lhs", "rhs"), ("lhs",)])
        for side in sides
    }
    floats = jax.jit(Attention().init)(KEY, x)["params"]
    quant_stats = {
        name.removesuffix("_scale"): {
            "count": jnp.int32(1),
            "sum_of_absmax": jnp.full(abstract[name].shape, 2.0),
        }
        for name in names
    }
    for i in range(2):
        quant_stats[f"DenseGeneral_{i}"] = {
            "dot_general0_lhs": {
                "count": jnp.int32(1),
                "sum_of_absmax": jnp.full((1, 1, 1), 2.0),
            }
        }
    params = qwix_train.quantize_params(floats, abstract, quant_stats)
    rule = QuantizationRule(
        weight_qtype="int8", act_qtype="int8", act_calibration_method="fixed,-2,2"
    )
    qat = qwix_train.quantize_model(Attention(), QtProvider([rule]))
    got = jax.jit(model.apply)({"params": params}, x)
    expected = jax.jit(qat.apply)({"params": floats}, x)
    np.testing.assert_allclose(got, expected, 1e-4, 1e-5)


def test_a_model_without_ranges_does_not_run():
    with pytest.raises(ValueError, match="2 activations have a static range that is"):
        quantized(SYMMETRIC, None)
    model, _, params = quantized(*CASES["absmax"])
    del params["Dense_1"]["dot_general0_lhs_scale"]
    with pytest.raises(ValueError, match="no static range for 'Dense_1/dot_general0_"):
        model.apply({"params": params}, X)
    out, variables = model.init_with_output(KEY, X)
    assert np.isnan(out).all()
    with pytest.raises(ValueError, match="'Dense_[01]/dot_general0_lhs' is not known"):
        model.apply(variables, X)
    # A compiled model cannot complain of values; its output does.
    assert np.isnan(jax.jit(model.apply)(variables, X)).all()


def test_statistics_that_are_empty_are_refused():
    with pytest.raises(ValueError, match="'Dense_1/dot_general0_lhs' are empty"):
        quantized(SYMMETRIC, stats(absmax(1.0), absmax(0.0, count=0)))
    with pytest.raises(ValueError, match="have no 'count'"):
        quantized(SYMMETRIC, stats(absmax(1.0), {"sum_of_absmax": jnp.ones((1, 1))}))


@pytest.mark.slow
def test_ranges_known_at_compile_time():
    """Statistics that a compiled function closes over are still looked at."""
    model = qwix_train.quantize_model(Mlp(), PtqProvider([SYMMETRIC]))
    floats = models.params_of(Mlp(), X)
    abstract = jax.eval_shape(model.init, KEY, X)["params"]
    quant_stats = CASES["absmax"][1]

    @jax.jit
    def run(floats, x):
        params = qwix_train.quantize_params(floats, abstract, quant_stats)
        return jax.lax.map(lambda x: model.apply({"params": params}, x), x[:, None])

    _, _, params = quantized(*CASES["absmax"])
    expected = model.apply({"params": params}, X)
    np.testing.assert_allclose(run(floats, X)[:, 0], expected, 1e-6, 1e-6)
    scan = jax.lax.map(lambda x: model.apply({"params": params}, x), X[:, None])
    np.testing.assert_allclose(scan[:, 0], expected, 1e-6, 1e-6)


def test_qat_needs_the_ranges_of_such_rules():
    model = qwix_train.quantize_model(nn.Dense(4), QtProvider([SYMMETRIC]))
    with pytest.raises(ValueError, match="quant_stats have no range for 'dot_general0"):
        model.apply(nn.Dense(4).init(KEY, X), X)
    layer = qwix_train.quantize_fn(lambda w, x: x @ w, QtProvider([SYMMETRIC]))
    with pytest.raises(ValueError, match="Collect them with calib.Calibrator"):
        layer(jnp.ones((8, 4)), X)


@pytest.mark.slow
def test_a_range_for_each_tile_and_for_each_head():
    """Such as the rules ask for, in calibration, QAT and PTQ."""
    tiled = QuantizationRule(**STATIC, tile_size=2)
    # The axes of q and of k are (batch, length, heads, features).
    heads = QuantizationRule(**STATIC, op_names=("einsum0",), act_channelwise_axes=(2,))
    rules = [heads, QuantizationRule(**STATIC, module_path=""), tiled]
    x = X.reshape(1, 6, 8)
    floats = models.params_of(Attention(), x)
    calibrator = qwix_train.calib.Calibrator(rules)
    step = jax.jit(lambda params: Attention().apply({"params": params}, x))
    calibrator.wrap(step)(floats)
    stats = calibrator.quant_stats
    tiles = np.abs(np.asarray(x)).reshape(6, 4, 2).max((0, 2))
    found = stats["DenseGeneral_0"]["dot_general0_lhs"]["sum_of_absmax"]
    np.testing.assert_allclose(found, tiles.reshape(1, 1, 4))
    dense = floats["DenseGeneral_0"]
    q = np.einsum("bqf,fhd->bqhd", x, dense["kernel"]) + dense["bias"]
    found = stats["einsum0_lhs"]["sum_of_absmax"]
    np.testing.assert_allclose(
        found, np.abs(q).max((0, 1, 3), keepdims=True), rtol=1e-5
    )
    model, params = qwix_train.ptq.quantize(
        Attention(), floats, rules, x, quant_stats=stats
    )
    scale = params["DenseGeneral_0"]["dot_general0_lhs_scale"].array
    np.testing.assert_allclose(scale, tiles.reshape(1, 1, 4) / 127.5, rtol=1e-6)
    assert params["einsum0_lhs_scale"].shape == (1, 1, 2, 1)
    qat = qwix_train.quantize_model(Attention(), QtProvider(rules, quant_stats=stats))
    got = jax.jit(model.apply)({"params": params}, x)
    expected = jax.jit(qat.apply)({"params": floats}, x)
    np.testing.assert_allclose(got, expected, 1e-4, 1e-5)
    # One token gets the same ranges as all of them.
    jax.eval_shape(model.apply, {"params": params}, x[:, :1])


def test_a_contracted_axis_cannot_keep_ranges():
    rule = QuantizationRule(**STATIC, act_channelwise_axes=(1,))
    with pytest.raises(ValueError, match=r"/dot_general0: act_channelwise_axes"):
        qwix_train.plan(Mlp(), [rule], X)
    for field in ("act_channelwise_axes", "act_batch_axes"):
        with pytest.raises(ValueError, match="it needs act_static_scale=True"):
            QuantizationRule(weight_qtype="int8", act_qtype="int8", **{field: (0,)})


@pytest.mark.slow
def test_logits_are_those_of_qwix(tmp_path):
    path = tmp_path / "logits.npz"
    reference_process.run("tests.test_static_range", path)
    with np.load(path) as theirs:
        for name, (rule, quant_stats) in CASES.items():
            rule = dataclasses.replace(rule, weight_calibration_method=WIDE)
            model, _, params = quantized(rule, quant_stats)
            got = jax.jit(model.apply)({"params": params}, X)
            np.testing.assert_allclose(got, theirs[name], 1e-5, 1e-5)


def main(path):
    """The logits of `qwix`, which patches JAX, so in a process of its own."""
    import qwix

    logits = {}
    for name, (rule, quant_stats) in CASES.items():
        rule = qwix.QuantizationRule(
            **STATIC,
            weight_calibration_method=WIDE,
            act_calibration_method=rule.act_calibration_method,
        )
        model = qwix.quantize_model(Mlp(), qwix.PtqProvider([rule]))
        floats = models.params_of(Mlp(), X)
        abstract = jax.eval_shape(model.init, KEY, X)["params"]
        params = qwix.quantize_params(floats, abstract, quant_stats)
        logits[name] = jax.jit(model.apply)({"params": params}, X)
    np.savez(path, **logits)


if __name__ == "__main__":
    main(sys.argv[1])


@pytest.mark.parametrize("name", CASES)
def test_qat_with_the_same_ranges_computes_the_same(name):
    rule, quant_stats = CASES[name]
    model, floats, params = quantized(rule, quant_stats)
    qat = qwix_train.quantize_model(Mlp(), QtProvider([rule], quant_stats=quant_stats))
    x = 1.5 * X  # some of it outside of the ranges
    expected = qat.apply({"params": floats}, x)
    np.testing.assert_allclose(
        model.apply({"params": params}, x), expected, rtol=1e-5, atol=1e-5
    )
    step = qwix_train.wrap_eval_step(
        lambda params, x: Mlp().apply({"params": params}, x),
        [rule],
        quant_stats=quant_stats,
    )
    np.testing.assert_array_equal(
        jax.jit(step)(floats, x), jax.jit(qat.apply)({"params": floats}, x)
    )
    missing = QtProvider([rule], quant_stats={"Dense_0": quant_stats["Dense_0"]})
    with pytest.raises(ValueError, match="no quant_stats for 'Dense_1/dot_general0"):
        qwix_train.quantize_model(Mlp(), missing).apply({"params": floats}, x)


def test_stacked_layers_have_a_range_each():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return jnp.tanh(3 * nn.Dense(8, use_bias=False)(x)), None

    scan = nn.scan(
        Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
    )

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return scan(name="layers")(x, None)[0]

    floats = jax.jit(Model().init)(KEY, X)["params"]
    ranges, x = [], np.asarray(X, np.float64)
    for kernel in np.asarray(floats["layers"]["Dense_0"]["kernel"], np.float64):
        ranges.append(0.9 * np.abs(x).max())
        # By hand: a range and a scale for each layer.
        scale = ranges[-1] / 127.5
        x = np.clip(np.round(x / scale), -128, 127) * scale
        scales = 1.1 * np.abs(kernel).max(0) / 127.5
        kernel = np.clip(np.round(kernel / scales), -128, 127) * scales
        x = np.tanh(3 * (x @ kernel))
    sums = jnp.asarray(ranges, jnp.float32).reshape(3, 1, 1)
    statistics = {"count": jnp.ones(3, jnp.int32), "sum_of_absmax": sums}
    quant_stats = {"layers": {"Dense_0": {"dot_general0_lhs": statistics}}}
    # Wider than the weights, of which the largest would be a tie between two codes.
    rules = [QuantizationRule(**STATIC, weight_calibration_method="absmax,1.1")]
    model, params = qwix_train.ptq.quantize(
        Model(), floats, rules, X, quant_stats=quant_stats
    )
    assert params["layers"]["Dense_0"]["dot_general0_lhs_scale"].shape == (3, 1, 1)
    np.testing.assert_allclose(model.apply({"params": params}, X), x, atol=2e-5)
    qat = QtProvider(rules, quant_stats=quant_stats)
    qat = qwix_train.quantize_model(Model(), qat)
    np.testing.assert_allclose(qat.apply({"params": floats}, X), x, atol=2e-5)
