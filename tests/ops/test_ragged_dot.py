"""Ragged products, in every mode, against NumPy in float64."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import export, lax
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P

import qwix_train
from qwix_train import (
    LoraProvider,
    LoraRule,
    QtProvider,
    QtRule,
    QuantizationRule,
    as_model,
    calib,
    ptq,
    qat,
    quantize_model,
)
from qwix_train.calib.observe import Observed
from qwix_train.core.packed_array import unpack
from qwix_train.ptq.input_statistics import InputTagging
from tests.compare import assert_close, assert_same
from tests.ptq.gptq_reference import reference as gptq_reference

RNG = np.random.default_rng(0)
SIZES = np.array([2, 0, 4])
X = RNG.normal(size=(7, 8)).astype(np.float32)
W = RNG.normal(size=(3, 8, 5)).astype(np.float32)
# Wider than the data, so that no element is on a tie.
WIDE = "absmax,1.01"
rule = functools.partial(
    QuantizationRule,
    op_names=("ragged_dot",),
    weight_qtype="int8",
    weight_calibration_method=WIDE,
)


def product(x, w, sizes=SIZES):
    """The ragged product in float64: row by row."""
    out = np.zeros((len(x), w.shape[-1]))
    groups = np.repeat(np.arange(len(sizes)), sizes)
    for row, group in enumerate(groups):
        out[row] = np.asarray(x[row], np.float64) @ np.asarray(w[group], np.float64)
    return out


def rounded(x, bits, shared, factor=1.01):
    """An array rounded to codes that share scales along axes, in float64."""
    x, bound = np.asarray(x, np.float64), 2 ** (bits - 1) - 0.5
    scale = factor * np.abs(x).max(shared, keepdims=True) / bound
    scale = np.where(scale == 0, 1, scale)
    return np.clip(np.round(x / scale), -(2 ** (bits - 1)), bound - 0.5) * scale


def values(x):
    return qwix_train.dequantize(x) if isinstance(x, qwix_train.QArray) else x


def quantized(x, qtype, channelwise, tiled=None):
    if qtype is None:
        return x
    return qwix_train.quantize(
        x, qtype, channelwise_axes=channelwise, tiled_axes=tiled or {}
    )


@pytest.mark.thinned(4)
@pytest.mark.parametrize("lhs", [None, "int8", "int8 whole", "float8_e4m3fn", "tiles"])
@pytest.mark.parametrize("rhs", [None, "int8", "int4 tiles", "int8 shared", "nf4"])
def test_the_product_of_arrays_and_quantized_arrays(lhs, rhs):
    kinds = {
        None: (None, ()),
        "int8": ("int8", (0,)),
        "int8 whole": ("int8", ()),
        "float8_e4m3fn": ("float8_e4m3fn", (0,)),
        "tiles": ("int8", (0,), {1: 4}),
    }
    matrices = {
        None: (None, ()),
        "int8": ("int8", (0, 2)),
        "int4 tiles": ("int4", (0, 2), {1: 4}),
        "int8 shared": ("int8", (2,)),
        "nf4": ("nf4", (0, 2), {1: 4}),
    }
    a, b = quantized(X, *kinds[lhs]), quantized(W, *matrices[rhs])
    got = qwix_train.ragged_dot(a, b, SIZES)
    assert got.dtype == jnp.float32
    assert_close(got, product(values(a), values(b)), 1e-6)
    assert_close(jax.jit(qwix_train.ragged_dot)(a, b, SIZES), got, 1e-6)


def test_codes_are_multiplied_as_integers():
    a, b = quantized(X, "int8", (0,)), quantized(W, "int4", (0, 2), {1: 4})
    text = str(jax.make_jaxpr(qwix_train.ragged_dot)(a, b, SIZES))
    assert "preferred_element_type=int32" in text
    assert "preferred_element_type=float32" not in text


@pytest.mark.parametrize("rows", [0, 1])
def test_no_row_and_rows_of_no_group(rows):
    a, b = quantized(X, "int8", (0,)), quantized(W, "int4", (0, 2), {1: 4})
    a = dataclasses.replace(a, qvalue=a.qvalue[:rows], scale=a.scale[:rows])
    assert_same(qwix_train.ragged_dot(a, b, 0 * SIZES), np.zeros((rows, 5), np.float32))


def test_the_gradient_of_the_matrices_is_a_product_of_codes():
    g = RNG.normal(size=(7, 5)).astype(np.float32)
    numbers = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
    a, b = quantized(X, "int8", (1,)), quantized(g, "int8", (1,))
    got = qwix_train.ragged_dot_general(a, b, SIZES, numbers)
    x, g = (np.asarray(values(v), np.float64) for v in (a, b))
    want = [x[:2].T @ g[:2], np.zeros((8, 5)), x[2:6].T @ g[2:6]]
    assert_close(got, np.stack(want), 1e-6)


@pytest.mark.parametrize("rows", ["int8", "int8 tiles"])
def test_what_stands_in_rows_of_no_group_does_not_matter(rows):
    """`jnp.take` fills rows for tokens that do not exist with NaN."""
    x = np.where(np.arange(7)[:, None] < 6, X, np.nan)
    tiles = {1: 4} if rows.endswith("tiles") else None
    b = quantized(W, "int8", (0, 2), tiles)
    got, want = (
        qwix_train.ragged_dot(quantized(x, "int8", (0,), tiles), b, SIZES)
        for x in (x, X)
    )
    assert_same(got, want)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [SIZES, np.stack([SIZES, [1, 1, 5]])])
def test_a_batch_of_ragged_products(sizes):
    numbers = lax.RaggedDotDimensionNumbers((((2,), (2,)), ((0,), (1,))), [1], [0])
    x, w = np.stack([X, 2 * X]), np.stack([W, -W], 1)
    a = quantized(x, "int8", (0, 1))
    b = quantized(w, "int4", (0, 1, 3), {2: 4})
    got = qwix_train.ragged_dot_general(a, b, sizes, numbers)
    each = sizes if sizes.ndim == 2 else [sizes, sizes]
    want = [product(values(a)[i], values(b)[:, i], each[i]) for i in range(2)]
    assert_close(got, np.stack(want), 1e-6)


# A model: its params, as other projects stack those of experts.
PARAMS = {"up": W, "down": RNG.normal(size=(3, 5, 8)).astype(np.float32)}


@as_model
def experts(params, x):
    hidden = jax.nn.relu(lax.ragged_dot(x, params["up"], SIZES))
    return lax.ragged_dot(hidden, params["down"], SIZES)


class LinenExperts(nn.Module):
    @nn.compact
    def __call__(self, x):
        shapes = {name: w.shape for name, w in PARAMS.items()}
        up, down = (
            self.param(name, nn.initializers.normal(), shape)
            for name, shape in shapes.items()
        )
        return lax.ragged_dot(nn.relu(lax.ragged_dot(x, up, SIZES)), down, SIZES)


class NnxExperts(nnx.Module):
    def __init__(self):
        self.up, self.down = (nnx.Param(jax.device_put(w)) for w in PARAMS.values())

    def __call__(self, x):
        hidden = nnx.relu(lax.ragged_dot(x, self.up[...], SIZES))
        return lax.ragged_dot(hidden, self.down[...], SIZES)


def forward(params, x, act=lambda x: x):
    hidden = np.maximum(product(act(x), params["up"]), 0)
    return product(act(hidden), params["down"])


@pytest.mark.parametrize("framework", ["function", "linen", "nnx"])
def test_qat_rounds_each_experts_channels_and_each_row(framework):
    rules = [rule(act_qtype="int8", act_calibration_method=WIDE)]
    weights = {name: rounded(w, 8, 1) for name, w in PARAMS.items()}
    want = forward(weights, X, lambda x: rounded(x, 8, 1))
    if framework == "function":
        got = qwix_train.quantize_fn(experts, QtProvider(rules))(PARAMS, X)
    elif framework == "linen":
        model = quantize_model(LinenExperts(), QtProvider(rules))
        got = model.apply({"params": PARAMS}, X)
    else:
        got = quantize_model(NnxExperts(), QtProvider(rules), X)(X)
    assert_close(got, want, 1e-5)


def test_a_plan_names_the_op_and_the_scales_of_experts():
    rules = [rule(op_names=("ragged_dot0",), tile_size=4), rule()]
    plan = qwix_train.plan(experts, rules, PARAMS, X)
    assert [op.op.id for op in plan.ops] == ["ragged_dot0", "ragged_dot1"]
    how = plan.params["up",].how
    assert how.channelwise_axes == (0, 2) and dict(how.tiled_axes) == {1: 4}
    unnamed = [QuantizationRule(weight_qtype="int8")]
    assert qwix_train.plan(experts, unnamed, PARAMS, X).ops[0].quantized


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"act_qtype": "int8"},
        {"act_qtype": "int8", "tile_size": 4, "pad_tiles": True},
        {"weight_qtype": "nf4"},
        {"act_qtype": "float8_e4m3fn", "weight_qtype": "float8_e4m3fn"},
    ],
    ids=str,
)
def test_ptq_computes_what_qat_has_trained(options):
    rules = [rule(**options)]
    qat_model = quantize_model(LinenExperts(), QtProvider(rules))
    model, params = ptq.quantize(LinenExperts(), PARAMS, rules, X)
    assert params["up"].array.scale.shape[0] == 3
    want = qat_model.apply({"params": PARAMS}, X)
    assert_close(model.apply({"params": params}, X), want, 1e-5)
    found = str(jax.make_jaxpr(model.apply)({"params": params}, X))
    if options.get("act_qtype") == "int8" and "tile_size" not in options:
        assert found.count("preferred_element_type=int32") == 2


@pytest.mark.slow
def test_both_backward_products_are_of_codes():
    rules = [
        QtRule(
            op_names=("ragged_dot",),
            weight_qtype="int8",
            act_qtype="int8",
            bwd_qtype="int8",
            weight_calibration_method=WIDE,
            act_calibration_method=WIDE,
            bwd_calibration_method=WIDE,
        )
    ]

    @as_model
    def model(params, x):
        return lax.ragged_dot(x, params["w"], SIZES)

    g = RNG.normal(size=(7, 5)).astype(np.float32)

    def step(params, x):
        return jax.vjp(model, params, x)[1](jax.device_put(g))

    wrapped = qwix_train.wrap_train_step(step, rules)
    args = ({"w": jax.device_put(W)}, jax.device_put(X))
    dw, dx = wrapped(*args)
    x, w = rounded(X, 8, 1), rounded(W, 8, 1)
    # Towards the input each row of the gradient, with the scales of the weight's
    # outputs in it, has a scale; towards the weight each output has one, for the rows
    # that belong to a group.
    groups = np.repeat(np.arange(3), SIZES)
    scale = 1.01 * np.abs(W.astype(np.float64)).max(1) / 127.5
    scaled = g[:6] * scale[groups]
    rows = rounded(scaled, 8, 1)
    want = [r @ (w[e] / scale[e]).T for r, e in zip(rows, groups, strict=True)]
    assert_close(dx[:6], np.stack(want), 1e-5)
    x_scale = 1.01 * np.abs(X.astype(np.float64)).max(1, keepdims=True) / 127.5
    outputs = rounded((g * x_scale)[:6], 8, 0)
    want = [(x / x_scale)[:2].T @ outputs[:2], (x / x_scale)[2:6].T @ outputs[2:6]]
    assert_close(np.asarray(dw["w"])[[0, 2]], np.stack(want), 1e-5, of_largest=True)
    assert not np.any(np.asarray(dw["w"])[1])
    text = str(jax.make_jaxpr(wrapped)(*args))
    assert text.count("preferred_element_type=int32") == 3


@pytest.mark.slow
@pytest.mark.parametrize("qtype", [None, "nf4"])
def test_each_expert_has_an_adapter(qtype):
    rules = [
        LoraRule(
            op_names=("ragged_dot",), rank=2, alpha=4, weight_qtype=qtype, dora=True
        )
    ]
    model = quantize_model(LinenExperts(), LoraProvider(rules))
    params = dict(model.init(jax.random.key(0), X)["params"])
    assert params["up_lora_a"].shape == (3, 8, 2)
    assert params["up_lora_b"].shape == (3, 2, 5)
    params["up_lora_b"] = RNG.normal(size=(3, 2, 5)).astype(np.float32)
    text = str(jax.make_jaxpr(model.apply)({"params": params}, X))
    # The base, and two small products for each adapter.
    assert text.count("ragged_dot_general[") == 6
    base = {
        n: np.asarray(values(getattr(params[n], "array", params[n]))) for n in PARAMS
    }
    want = {}
    for name, w in base.items():
        a, b = (np.asarray(params[f"{name}_lora_{p}"], np.float64) for p in "ab")
        whole = w + 2 * np.einsum("eir,ero->eio", a, b)
        norm = np.linalg.norm(whole, axis=1)
        gain = np.asarray(params[f"{name}_lora_magnitude"]).reshape(norm.shape) / norm
        want[name] = whole * gain[:, None]
    assert_close(model.apply({"params": params}, X), forward(want, X), 2e-5)


@pytest.mark.slow
def test_experts_with_adapters_can_be_exported_for_any_number_of_rows():
    rules = [LoraRule(op_names=("ragged_dot",), rank=2, alpha=4, weight_qtype="int8")]
    model = quantize_model(LinenExperts(), LoraProvider(rules))
    params = dict(model.init(jax.random.key(0), X)["params"])
    params["up_lora_b"] = RNG.normal(size=(3, 2, 5)).astype(np.float32)

    def function(params, x):
        return model.apply({"params": params}, x)

    shapes = jax.eval_shape(lambda: params)
    rows = jax.ShapeDtypeStruct(export.symbolic_shape("rows, 8"), X.dtype)
    exported = export.export(jax.jit(function))(shapes, rows)
    x = np.concatenate([X, X])
    assert_close(exported.call(params, x), function(params, x), 1e-5)


def test_static_ranges_are_collected_and_used():
    rules = [rule(act_qtype="int8", act_static_scale=True)]
    calibrator = calib.Calibrator(rules)
    calibrator.wrap(lambda p, x: LinenExperts().apply({"params": p}, x))(PARAMS, X)
    stats = calibrator.quant_stats
    largest = np.abs(np.maximum(product(X, W), 0)).max()
    found = stats["ragged_dot1_lhs"]["sum_of_absmax"]
    assert_close(found, np.full((1, 1), largest), 1e-5)
    model, params = ptq.quantize(LinenExperts(), PARAMS, rules, X, quant_stats=stats)
    trained = quantize_model(LinenExperts(), QtProvider(rules, quant_stats=stats))
    want = trained.apply({"params": PARAMS}, X)
    assert_close(model.apply({"params": params}, X), want, 1e-5)


@pytest.mark.slow
def test_gptq_has_a_hessian_for_each_expert_and_names_those_without_tokens():
    rules = [rule(weight_qtype="int4", weight_calibration_method="absmax,1.1")]
    sizes = np.array([40, 0, 24])
    x = RNG.normal(size=(64, 8)) @ (0.5 * np.eye(8) + RNG.normal(size=(8, 8)) / 3)
    x = x.astype(np.float32)

    @as_model
    def model(params, x):
        return lax.ragged_dot(x, params["w"], sizes)

    method = ptq.Gptq(rules)
    method.wrap(lambda p, x: model(p, x))({"w": jax.device_put(W)}, x)
    _, rounded_params = ptq.quantize(model, {"w": jax.device_put(W)}, rules, x)
    params = method.quantize_params({"w": jax.device_put(W)}, rounded_params)
    codes = np.asarray(params["w"].array.qvalue, int)
    for expert, rows in ((0, x[:40]), (2, x[40:])):
        hessian = 2 * rows.astype(np.float64).T @ rows / len(x)
        want, _ = gptq_reference(W[expert].T, hessian, "int4")
        assert np.mean(codes[expert] != want.T) < 0.05
    assert_same(codes[1], np.asarray(rounded_params["w"].array.qvalue, int)[1])
    assert "no input reached 1 of its 3 matrices (1)" in str(method.report)


def test_the_rows_of_experts_are_not_copied_for_each_expert():
    groups, rows, channels = 32, 64, 8
    tagging = InputTagging([rule(weight_qtype="int4")], second_moment=True, rows=4)
    model = as_model(lambda p, x, sizes: lax.ragged_dot(x, p["w"], sizes))
    observed = Observed(lambda *args: model(*args), tagging)
    w, x = np.ones((groups, channels, 2)), np.ones((rows, channels))
    observed.init({"w": w}, x, np.full(groups, 2))
    (found,) = tagging.ranges.values()
    update = jax.jit(found.statistics.update)
    state = found.statistics.init(found.shape, found.dtype)
    seen = jax.ShapeDtypeStruct(found.shape, found.dtype)
    memory = update.lower(state, seen).compile().memory_analysis()
    needed = memory.temp_size_in_bytes + memory.argument_size_in_bytes
    assert needed < 4 * groups * rows * channels


def test_gptq_says_why_it_leaves_all_weights_as_they_are():
    rules = [rule(weight_qtype="int4")]
    weights = {"w": np.stack([W, -W])}
    x, sizes = np.stack([X, X]), np.stack([SIZES, SIZES])

    @as_model
    def model(params, x):
        return jax.vmap(lax.ragged_dot)(x, params["w"], sizes)

    method = ptq.Gptq(rules)
    method.wrap(lambda p, x: model(p, x))(weights, x)
    _, rounded_params = ptq.quantize(model, weights, rules, x)
    params = method.quantize_params(weights, rounded_params)
    assert_same(params, rounded_params)
    assert "not the matrices that rows are multiplied by" in str(method.report)


@pytest.mark.slow
def test_awq_says_that_the_channels_of_experts_have_no_scale():
    rules = [rule(weight_qtype="int4")]
    method = ptq.Awq(rules)
    method.wrap(lambda p, x: LinenExperts().apply({"params": p}, x))(PARAMS, X)
    _, params = ptq.quantize(LinenExperts(), PARAMS, rules, X)
    method.quantize_params(PARAMS, params)
    assert "all of its groups have one input" in str(method.report)


def test_the_sensitivity_of_experts():
    found = qat.sensitivity(
        lambda p, batch: jnp.mean(experts(p, batch) ** 2),
        PARAMS,
        [rule()],
        [X],
        qtypes=["int2", "int8"],
    )
    exact = np.mean(forward(PARAMS, X) ** 2)
    for row in found.rows:
        name = {"ragged_dot0": "up", "ragged_dot1": "down"}[row.ops[0]]
        bits = int(row.qtype[3:])
        changed = {**PARAMS, name: rounded(PARAMS[name], bits, 1)}
        want = np.mean(forward(changed, X) ** 2) - exact
        np.testing.assert_allclose(row.loss_increase, want, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("around", ["scan", "vmap", "shard_map", "map"])
def test_experts_within_transformations(around):
    """The same as the layers, examples, shards or experts one by one."""
    rules = [rule(act_qtype="int8")]
    square = {"w": RNG.normal(size=(2, 3, 8, 8)).astype(np.float32)}
    quantize = functools.partial(qwix_train.quantize_fn, provider=QtProvider(rules))

    def layer(w, x, sizes=SIZES):
        return jnp.tanh(lax.ragged_dot(x, w, sizes))

    each = qwix_train.quantize_fn(
        as_model(lambda p, x: layer(p["w"], x)), QtProvider(rules)
    )
    if around == "scan":
        model = as_model(
            lambda p, x: lax.scan(lambda x, w: (layer(w, x), None), x, p["w"])[0]
        )
        want = each({"w": square["w"][1]}, each({"w": square["w"][0]}, X))
        assert_close(quantize(model)(square, X), want, 1e-5)
    elif around == "vmap":
        # JAX maps over the sizes, too, or not at all.
        sizes = np.stack([SIZES, SIZES])
        model = as_model(lambda p, x: jax.vmap(layer)(p["w"], x, sizes))
        x = np.stack([X, 2 * X])
        want = [each({"w": w}, v) for w, v in zip(square["w"], x, strict=True)]
        assert_close(quantize(model)(square, x), np.stack(want), 1e-5)
    elif around == "shard_map":
        auto = (jax.sharding.AxisType.Auto,)
        mesh = jax.make_mesh((2,), ("expert",), axis_types=auto)

        def sharded(p, x):
            sums = jax.shard_map(
                lambda w, x: layer(w[0], x[0])[None],
                mesh=mesh,
                in_specs=(P("expert"), P("expert")),
                out_specs=P("expert"),
            )(p["w"], x)
            return sums

        x = np.stack([X, 2 * X])
        want = [each({"w": w}, v) for w, v in zip(square["w"], x, strict=True)]
        assert_close(quantize(as_model(sharded))(square, x), np.stack(want), 1e-5)
    else:
        rules = [QuantizationRule(weight_qtype="int8", act_qtype="int8")]
        model = as_model(lambda p, x: lax.map(lambda w: x @ w, p["w"]))
        got = qwix_train.quantize_fn(model, QtProvider(rules))({"w": W}, X)
        dense = qwix_train.quantize_fn(
            as_model(lambda p, x: x @ p["w"]), QtProvider(rules)
        )
        assert_close(got, np.stack([dense({"w": w}, X) for w in W]), 1e-5)


@pytest.mark.slow
def test_packed_experts_of_scanned_layers_with_sizes_of_their_own():
    """The sizes are values that the step computes, as those of a router are."""
    square = 0.4 * RNG.normal(size=(2, 3, 8, 8)).astype(np.float32)
    sizes = jnp.stack([jax.device_put(SIZES), jnp.array([1, 3, 3])])

    def layers(weights, x, sizes):
        def layer(x, layer):
            return jnp.tanh(lax.ragged_dot(x, *layer)), None

        return lax.scan(layer, x, (weights, sizes))[0]

    class Layers(nn.Module):
        @nn.compact
        def __call__(self, x, sizes):
            w = self.param("w", lambda _: jax.device_put(square))
            return layers(w, x, sizes)

    rules = [
        LoraRule(
            op_names=("ragged_dot",),
            rank=2,
            alpha=4,
            weight_qtype="nf4",
            tile_size=4,
            double_quant=True,
        )
    ]
    model = quantize_model(Layers(), LoraProvider(rules))
    params = jax.jit(model.init)(jax.random.key(0), X, sizes)["params"]
    held = qwix_train.dequantize(unpack(params["w"].array))

    def gradient(function):
        return jax.jit(jax.grad(lambda x, sizes: jnp.sum(function(x, sizes) ** 2)))

    got = gradient(lambda x, sizes: model.apply({"params": params}, x, sizes))
    want = gradient(lambda x, sizes: layers(held, x, sizes))
    assert_close(got(X, sizes), want(X, sizes), 1e-5)


@pytest.mark.slow
def test_quantized_training_of_experts_on_each_device():
    """The same as that of the experts of each device alone."""
    rules = [
        QtRule(
            op_names=("ragged_dot",),
            weight_qtype="int8",
            act_qtype="int8",
            bwd_qtype="int8",
        )
    ]
    mesh = jax.make_mesh((2,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
    weights = jax.device_put(np.concatenate([W, -W]))
    x = jax.device_put(np.concatenate([X, 2 * X]))
    sizes = jnp.concatenate([jax.device_put(SIZES), jnp.array([1, 3, 3])])

    @as_model
    def one(params, x, sizes):
        return lax.ragged_dot(x, params["w"], sizes)

    @as_model
    def sharded(params, x, sizes):
        return jax.shard_map(
            lambda w, x, sizes: lax.ragged_dot(x, w, sizes),
            mesh=mesh,
            in_specs=P("expert"),
            out_specs=P("expert"),
        )(params["w"], x, sizes)

    def gradients(model):
        def step(w, x, sizes):
            def loss(w, x):
                return jnp.sum(model({"w": w}, x, sizes) ** 2)

            return jax.grad(loss, (0, 1))(w, x)

        return jax.jit(qwix_train.wrap_train_step(step, rules))

    halves = [
        gradients(one)(weights[i : i + 3], x[j : j + 7], sizes[i : i + 3])
        for i, j in ((0, 0), (3, 7))
    ]
    of_weights, of_x = gradients(sharded)(weights, x, sizes)
    want, of_rows = map(np.concatenate, zip(*halves, strict=True))
    assert_close(of_weights, want, 1e-5, of_largest=True)
    # A device has values of its weights, so that the codes of the gradient have no
    # part in the scale of these.
    assert_close(of_x, of_rows, 0.02, of_largest=True)
