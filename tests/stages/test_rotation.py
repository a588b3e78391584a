"""Hadamard rotations in every mode, against float64, and on inputs with outliers."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import linen as nn
from jax import numpy as jnp
from jax.sharding import AxisType
from scipy.linalg import hadamard

import qwix_train
from qwix_train import (
    LoraProvider,
    LoraRule,
    PtqProvider,
    QtProvider,
    QtRule,
    QuantizationRule,
    calib,
    odml,
    optim,
    ptq,
    quantize_fn,
    quantize_model,
)
from qwix_train.core import records
from qwix_train.core.hadamard import Hadamard
from qwix_train.core.how import HowToQuantize
from qwix_train.planning.provider import changed
from qwix_train.qat.blending import blended
from qwix_train.qat.phases import Amounts
from qwix_train.values import stored
from tests.compare import assert_close, assert_same

RNG = np.random.default_rng(0)
X = RNG.normal(size=(6, 24)).astype(np.float32)
MODEL = nn.Dense(4, use_bias=False)
W = RNG.normal(size=(24, 4)).astype(np.float32)
PARAMS = {"kernel": jax.device_put(W)}
# Wider than the data, so that no element is on a tie.
WIDE = "absmax,1.01"
INT8 = dict(
    weight_qtype="int8",
    act_qtype="int8",
    weight_calibration_method=WIDE,
    act_calibration_method=WIDE,
)
INT4 = [QuantizationRule(module_path="other", weight_qtype="int4")]
LITERT = {f"{x}_calibration_method": "absmax" for x in ("weight", "act")}
rule = functools.partial(QuantizationRule, **INT8, rotation="hadamard")


def rotated(x, axis, block=8, seed=None):
    """An array times a Hadamard matrix in blocks along an axis, in float64."""
    x = np.moveaxis(np.asarray(x, np.float64), axis, -1)
    if seed is not None:
        x = x * Hadamard(0, block, seed)._signs(jnp.ones(x.shape[-1]))
    blocks = x.reshape(*x.shape[:-1], -1, block) @ hadamard(block) / np.sqrt(block)
    return np.moveaxis(blocks.reshape(x.shape), -1, axis)


def rounded(x, shared, bits=8, absmax=None):
    """An array rounded to codes that share scales along axes, in float64."""
    bound = 2 ** (bits - 1) - 0.5
    absmax = np.abs(x).max(shared, keepdims=True) if absmax is None else absmax
    scale = 1.01 * absmax / bound
    return np.clip(np.round(x / scale), -(2 ** (bits - 1)), bound - 0.5) * scale


def product(x, w, absmax=None):
    """The quantized product in the rotated basis."""
    return rounded(rotated(x, -1), -1, absmax=absmax) @ rounded(rotated(w, 0), 0)


def qat_of(rules, **kwargs):
    return quantize_model(MODEL, QtProvider(rules, **kwargs))


SIGNS_OF_3 = "0000100010010100"


@pytest.mark.parametrize("block", [2, 8, 64, 1024])
def test_a_rotation_is_that_of_the_matrix_and_is_undone(block):
    x = RNG.normal(size=(3, 2 * block, 2)).astype(np.float32)
    for seed in (None, 7):
        rotation = Hadamard(1, block, seed)
        got = rotation.apply(jax.device_put(x))
        assert_close(got, rotated(x, 1, block, seed), atol=2e-5)
        assert_close(rotation.undo(got), x, atol=2e-5)


def test_signs_are_those_of_their_seed_for_good():
    signs = Hadamard(0, 8, 3)._signs(jnp.ones(16))
    assert signs is not None
    assert signs.tolist() == [1 if b == "0" else -1 for b in SIGNS_OF_3]


@pytest.mark.parametrize("rotation", ["hadamard", "hadamard,4", "hadamard,0,5"])
def test_qat_and_ptq_quantize_in_the_rotated_basis(rotation):
    rules = [rule(rotation=rotation)]
    block = 4 if rotation == "hadamard,4" else 8
    seed = 5 if rotation == "hadamard,0,5" else None
    x, w = rotated(X, 1, block, seed), rotated(W, 0, block, seed)
    want = rounded(x, 1) @ rounded(w, 0)
    assert_close(qat_of(rules).apply({"params": PARAMS}, X), want, atol=1e-4)
    model, params = ptq.quantize(MODEL, PARAMS, rules, X)
    codes = params["kernel"].array
    assert_close(codes.qvalue * codes.scale, rounded(w, 0), atol=1e-5)
    assert_close(jax.jit(model.apply)({"params": params}, X), want, atol=1e-4)


def test_only_the_weight_is_quantized():
    only = rule(act_qtype=None, act_calibration_method=None)
    model, params = ptq.quantize(MODEL, PARAMS, [only], X)
    want = rotated(X, 1) @ rounded(rotated(W, 0), 0)
    for out in (
        qat_of([only]).apply({"params": PARAMS}, X),
        model.apply({"params": params}, X),
    ):
        assert_close(out, want, atol=1e-4)


def test_what_else_reads_a_weight_finds_it_in_its_own_basis():
    def tied(params, x):
        table = params["table"]
        rows = table[jnp.array([1, 3])]
        return x @ table.T, rows, table.sum(0)

    params, rules = {"table": jax.device_put(W.T)}, [rule()]
    table = rotated(rounded(rotated(W.T, 1), 1), 1)
    want = (product(X, W), table[[1, 3]], table.sum(0))
    out = quantize_fn(tied, QtProvider(rules))(params, X)
    assert_close(out, want, atol=1e-4)
    served = quantize_fn(tied, PtqProvider(rules))
    stored = ptq.quantize_params(params, ptq.abstract_params(tied, params, rules, X))
    assert_close(served(stored, X), want, atol=1e-4)


def test_a_product_along_another_axis_than_that_of_the_basis_is_named():
    def both(params, x):
        return x @ params["w"] + x @ params["w"].T

    w = RNG.normal(size=(24, 24)).astype(np.float32)
    plan = qwix_train.plan(both, PtqProvider([rule()]), {"w": w}, X)
    assert plan.dequantized == {"w": ("dot_general",)}


@pytest.mark.parametrize("shape", [(0, 24), (2, 0, 24)])
def test_an_empty_batch(shape):
    x = np.ones(shape, np.float32)
    model, params = ptq.quantize(MODEL, PARAMS, [rule()], x)
    for out in (
        qat_of([rule()]).apply({"params": PARAMS}, x),
        model.apply({"params": params}, x),
    ):
        assert out.shape == (*shape[:-1], 4)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_an_axis_that_is_sharded(kind):
    def forward(params, x):
        return jnp.tanh(x @ params["w"]), params["w"][:2]

    # A block of 8 reaches over two shards, of 12 rows each.
    mesh = jax.make_mesh((2,), ("rows",), axis_types=(kind,))
    rows = jax.NamedSharding(mesh, jax.P("rows"))
    rules, whole = [rule()], {"w": jax.device_put(W)}
    params = {"w": jax.device_put(W, rows)}
    abstract = ptq.abstract_params(forward, whole, rules, X)
    codes = ptq.quantize_params(params, abstract)["w"].array.qvalue
    assert codes.sharding.is_equivalent_to(rows, codes.ndim)
    assert_same(codes, ptq.quantize_params(whole, abstract)["w"].array.qvalue)
    trained = quantize_fn(forward, QtProvider(rules))
    with jax.set_mesh(mesh):
        out = jax.jit(trained)(params, X)
    assert_close(out, trained(whole, X), atol=1e-5)


def test_layers_of_a_scan():
    def layers(params, x):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, params["w"])[0]

    w = RNG.normal(size=(2, 24, 24)).astype(np.float32)
    want = product(product(X, w[0]).astype(np.float32), w[1])
    rules, params = [rule()], {"w": jax.device_put(w)}
    out = quantize_fn(layers, QtProvider(rules))(params, X)
    assert_close(out, want, atol=2e-2)
    served = quantize_fn(layers, PtqProvider(rules))
    stored = ptq.quantize_params(params, ptq.abstract_params(layers, params, rules, X))
    assert_close(served(stored, X), out, atol=1e-4)


@pytest.mark.slow
def test_a_convolution_is_rotated_along_its_features():
    model = nn.Conv(3, (2, 2), use_bias=False)
    x = RNG.normal(size=(2, 5, 5, 8)).astype(np.float32)
    kernel = RNG.normal(size=(2, 2, 8, 3)).astype(np.float32)
    params = {"kernel": jax.device_put(kernel)}
    fake = rounded(rotated(x, 3), (1, 2, 3)), rounded(rotated(kernel, 2), (0, 1, 2))
    want = model.apply(
        {"params": {"kernel": jnp.float32(fake[1])}}, jnp.float32(fake[0])
    )
    quantized = quantize_model(model, QtProvider([rule()]))
    assert_close(quantized.apply({"params": params}, x), want, atol=1e-3)
    served, stored = ptq.quantize(model, params, [rule()], x)
    assert_close(served.apply({"params": stored}, x), want, atol=1e-3)


def test_experts():
    def experts(params, x):
        return jax.lax.ragged_dot(x, params["w"], jnp.array([2, 4]))

    w = RNG.normal(size=(2, 24, 4)).astype(np.float32)
    want = np.concatenate([product(X[:2], w[0]), product(X[2:], w[1])])
    out = quantize_fn(experts, QtProvider([rule()]))({"w": jax.device_put(w)}, X)
    assert_close(out, want, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("bwd_qtype", [None, "int8"])
def test_gradients_are_those_of_the_rotated_product(bwd_qtype):
    rules = [QtRule(**INT8, rotation="hadamard", bwd_qtype=bwd_qtype)]
    model = qat_of(rules)

    def loss(params, x):
        return jnp.sum(jnp.sin(model.apply({"params": params}, x)))

    value, (of_w, of_x) = jax.value_and_grad(loss, (0, 1))(PARAMS, X)
    out = product(X, W)
    assert_close(value, np.sin(out).sum(), atol=1e-3)
    g = np.cos(out)
    want_w = rotated(rounded(rotated(X, 1), 1).T @ g, 0)
    want_x = rotated(g @ rounded(rotated(W, 0), 0).T, 1)
    # Codes of 8 bits of the gradient, or float.
    atol = 0.2 if bwd_qtype else 1e-3
    assert_close(of_w["kernel"], want_w, atol=atol)
    assert_close(of_x, want_x, atol=atol)


@pytest.mark.slow
def test_static_ranges_are_those_of_the_rotated_input():
    rules = [rule(act_static_scale=True)]
    observed = calib.observe(MODEL.apply, rules)
    stats, out = observed({}, {"params": PARAMS}, X)
    assert_close(out, X @ W)
    absmax = np.abs(rotated(X, 1)).max()
    found = observed.quant_stats(stats)
    assert_close(
        found["dot_general0_lhs"]["sum_of_absmax"].ravel(),
        np.array([1.01 * absmax]),
        atol=1e-5,
    )
    want = product(X, W, absmax)
    variables = {"params": PARAMS}
    out = qat_of(rules, quant_stats=found).apply(variables, X)
    assert_close(out, want, atol=1e-4)
    model, params = ptq.quantize(MODEL, PARAMS, rules, X, quant_stats=found)
    assert_close(model.apply({"params": params}, X), want, atol=1e-4)
    running = qat_of(rules)
    begun = jax.jit(running.init)(jax.random.key(0), X)
    assert_close(
        running.apply({**begun, **variables}, X, mutable="quant_stats")[0],
        want,
        atol=1e-4,
    )


@pytest.mark.parametrize("in_float", [False, True])
def test_adapters_meet_the_input_in_its_own_basis(in_float):
    a = RNG.normal(size=(24, 2)).astype(np.float32)
    b = RNG.normal(size=(2, 4)).astype(np.float32)
    settings = {**INT8, "act_qtype": None, "act_calibration_method": None}
    if in_float:
        settings |= {"qat": True}
    rules = [LoraRule(**settings, rotation="hadamard", rank=2, alpha=2.0)]
    model = quantize_model(MODEL, LoraProvider(rules))
    params = jax.jit(model.init)(jax.random.key(0), X)["params"]
    base = W if in_float else ptq.quantize_params({"kernel": W}, params)["kernel"]
    params = {"kernel": base, "kernel_lora_a": a, "kernel_lora_b": b}
    if in_float:
        want = rotated(X, 1) @ rounded(rotated(W + a @ b, 0), 0)
    else:
        want = rotated(X, 1) @ rounded(rotated(W, 0), 0) + X @ a @ b
    assert_close(model.apply({"params": params}, X), want, atol=1e-4)


def test_packed_codes_are_those_of_the_rotated_weight():
    fours = dict(weight_qtype="nf4", tile_size=8, double_quant=True)
    rules = [LoraRule(**fours, rotation="hadamard", rank=2, alpha=2.0)]
    model = quantize_model(MODEL, LoraProvider(rules))
    params = jax.jit(model.init)(jax.random.key(0), X)["params"]
    base = params["kernel"]
    own = stored.dequantized(base)
    assert base.how.rotation == Hadamard(0, 8) and own.shape == W.shape
    assert_close(model.apply({"params": params}, X), X @ np.float64(own), atol=1e-4)


def test_a_checkpoint_holds_a_rotated_param(tmp_path):
    model, params = ptq.quantize(MODEL, PARAMS, [rule(rotation="hadamard,4,3")], X)
    ptq.save(tmp_path / "model", params)
    restored = ptq.restore(tmp_path / "model")
    assert restored["kernel"].how == params["kernel"].how
    outs = [model.apply({"params": x}, X) for x in (restored, params)]
    assert_same(*outs)


def test_int4_activations_with_outliers_lose_less():
    x = RNG.normal(size=(64, 256)).astype(np.float32)
    x[:, [3, 200]] *= 60  # as some channels of language models have
    w = RNG.normal(size=(256, 16)).astype(np.float32) / 16
    errors = {}
    for rotation in (None, "hadamard"):
        fours = QuantizationRule(
            weight_qtype="int4", act_qtype="int4", rotation=rotation
        )
        model = quantize_model(nn.Dense(16, use_bias=False), QtProvider([fours]))
        out = model.apply({"params": {"kernel": w}}, x)
        errors[rotation] = np.square(out - x @ w).mean() / np.square(x @ w).mean()
    assert errors["hadamard"] < 0.5 * errors[None]


def test_a_ramp_blends_what_is_quantized_and_not_the_rotation():
    amounts = Amounts((jnp.float32(0.25),), (jnp.float32(0.25),))
    change = functools.partial(blended, amounts=amounts)
    provider = changed(QtProvider([rule()]), change)
    out = quantize_model(MODEL, provider).apply({"params": PARAMS}, X)
    x, w = rotated(X, 1), rotated(W, 0)
    want = (x + 0.25 * (rounded(x, 1) - x)) @ (w + 0.25 * (rounded(w, 0) - w))
    assert_close(out, want, atol=1e-4)


def test_a_record_holds_the_rotation():
    how = HowToQuantize(qtype="int4", rotation=Hadamard(0, 64, 1))
    record = records.to_record(how)
    assert records.how_of_record(record) == how
    before = {k: v for k, v in record.items() if k != "rotation"}
    assert records.how_of_record(before) == dataclasses.replace(how, rotation=None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(rotation="haar"), "Unknown rotation 'haar'; choose from: hadamard"),
        (dict(rotation="hadamard,3"), "a block of 3 is not a power of two"),
        (dict(rotation="hadamard,x"), "Bad rotation 'hadamard,x'"),
        (dict(weight_qtype=None, act_qtype=None), "it needs a weight_qtype"),
        (dict(weight_calibration_method="lsq"), "no scale of a rotated array"),
    ],
)
def test_rules_are_checked(changes, message):
    fields = dict(weight_qtype="int8", rotation="hadamard") | changes
    with pytest.raises(ValueError, match=message):
        QuantizationRule(**fields)


def test_what_cannot_be_rotated_says_so():
    with pytest.raises(ValueError, match="no blocks of 16 divide an axis of length 24"):
        qwix_train.plan(MODEL, [rule(rotation="hadamard,16")], X)
    with pytest.raises(ValueError, match="no blocks of 2 divide an axis of length 0"):
        qwix_train.plan(lambda w, x: x @ w, [rule()], W[:0], X[:, :0])
    plan = qwix_train.plan(MODEL, [rule()], X)
    with pytest.raises(ValueError, match="'kernel' is quantized in a rotated basis"):
        optim.dampen_oscillations(plan, 0.1).init(PARAMS)
    grouped = nn.Conv(8, (2,), feature_group_count=2)
    with pytest.raises(ValueError, match="contracts no axis of an input with a whole"):
        qwix_train.plan(grouped, [rule()], np.ones((1, 5, 8), np.float32))
    params = ptq.quantize(MODEL, PARAMS, [rule()], X)[1]
    for method in (ptq.Gptq, ptq.Awq, ptq.SmoothQuant):
        reason = f"Rule 1 .*{method.title} quantizes weights in their own basis"
        with pytest.raises(ValueError, match=reason):
            method([*INT4, rule()])
    with pytest.raises(ValueError, match="kernel.*no counterpart in qwix.*own"):
        ptq.to_qwix(params)
    with pytest.raises(ValueError, match="LiteRT quantizes tensors in their own basis"):
        odml.OdmlQatProvider([rule(op_names=("dot_general",), **LITERT)])


def test_the_plan_says_it():
    (op,) = qwix_train.plan(MODEL, [rule()], X).records()
    assert "rotated by hadamard" in op["reason"]
