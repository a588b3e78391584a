"""A quantized weight behaves as the array that it stands for.

Each function runs with quantized params, and with `dequantize`d ones as they are. What
is not a product must be the same bit for bit.
"""

import jax
import numpy as np
import pytest
from jax import lax
from jax import numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from qwix_train import (
    PtqProvider,
    QtProvider,
    QuantizationRule,
    WithAux,
    dequantize,
    plan,
    ptq,
    quantize_fn,
)
from qwix_train.core.qarray import QArray
from qwix_train.values.stored_weight import StoredWeight
from tests.spellings import data

RULES = [QuantizationRule(weight_qtype="int8")]
STEPS = jnp.arange(3)
INDICES = jnp.array([0, -1, 9, 3, -20])


def signed(*shape, seed):
    return jax.device_put(data(*shape, seed=seed) * np.where(data(*shape) > 0.4, 1, -1))


PARAMS = {"w": signed(8, 6, seed=1), "g": signed(6, seed=2)}
STACKED = {"w": signed(3, 8, 6, seed=3), "g": PARAMS["g"]}
X = signed(4, 8, seed=4)


@jax.custom_vjp
def doubled(w):
    return 2 * w


doubled.defvjp(lambda w: (2 * w, None), lambda _, g: (g,))


@jax.custom_jvp
def sine(w):
    return jnp.sin(w)


sine.defjvp(lambda primals, tangents: (jnp.sin(*primals), *tangents))

# For each function of a weight, all of whose results are compared: what the plan says
# that it is dequantized for. `w` is also multiplied with, so that it is quantized.
READ = {
    "times a vector": (lambda w, x: w * PARAMS["g"], "mul"),
    "reductions": (lambda w, x: (w.max(), w.min(0)), "reduce_max reduce_min"),
    "comparisons": (
        lambda w, x: (w > 0.3, jnp.where(w > 0.3, w, 0)),
        "gt select_n",
    ),
    "itself twice": (lambda w, x: (w * w, w + w), "mul add"),
    "updated": (lambda w, x: w.at[0].set(1.0), "scatter"),
    "to integers": (lambda w, x: w.astype(jnp.int32), "convert_element_type"),
    "narrow and back": (
        lambda w, x: w.astype(jnp.bfloat16).astype(jnp.float32),
        "convert_element_type",
    ),
    "views": (
        lambda w, x: (w.T, -w, w[2], w[:3, 1::2], jnp.flip(w), w[None]),
        "return",
    ),
    "joined": (
        lambda w, x: (jnp.concatenate([w, w[:, ::-1]], 1), jnp.stack([w, -w])),
        "return",
    ),
    "split": (lambda w, x: jnp.split(w, 3, axis=1), "return"),
    "looked up": (
        lambda w, x: (w[INDICES], jnp.take(w, INDICES, axis=1), w[x.argmax()]),
        "return",
    ),
    "elements": (
        lambda w, x: (w[STEPS, STEPS], jnp.take_along_axis(w, w.argsort(1), 1)),
        "sort return",
    ),
    "dynamically sliced": (
        lambda w, x: lax.dynamic_slice(w, (x.argmax() % 3, 2), (4, 3)),
        "return",
    ),
    "padded": (lambda w, x: jnp.pad(w, ((0, 1), (2, 0))), "pad"),
    "custom derivatives": (
        lambda w, x: (doubled(w), sine(w)),
        "custom_vjp_call custom_jvp_call",
    ),
    "barrier": (lambda w, x: lax.optimization_barrier((w, x)), "optimization_barrier"),
    "named": (lambda w, x: checkpoint_name(w, "w"), "name"),
    "jit": (lambda w, x: jax.jit(lambda w: (w.T, w.max()))(w), "reduce_max return"),
    "remat": (
        lambda w, x: jax.checkpoint(lambda w: (w.T, w.max()))(w),
        "reduce_max checkpoint",
    ),
    "a view from a branch": (
        lambda w, x: lax.cond(x[0, 0] > 0, lambda w: w, lambda w: w[::-1], w),
        "cond",
    ),
    "changed by a while loop": (
        lambda w, x: lax.while_loop(
            lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1][::-1]), (0, w)
        ),
        "while",
    ),
    "changed by a scan": (
        lambda w, x: lax.scan(lambda c, i: (c[::-1], c[i]), w, STEPS),
        "scan",
    ),
    # An array made inside of a loop must not be used outside, or in another loop.
    "in a loop, then after it": (
        lambda w, x: (
            lax.scan(lambda c, i: (c + w.max() * i, w.min()), 0.0, STEPS * 1.0),
            lax.while_loop(lambda c: c < w.max(), lambda c: c + w.max(), 0.0),
            w.max() + w.min(),
        ),
        "reduce_max reduce_min",
    ),
    "in branches": (
        lambda w, x: (
            lax.cond(x[0, 0] > 0, lambda: w.max(), lambda: w.min()),
            jax.checkpoint(lambda x: x * w.max())(x),
            w.max(),
        ),
        "reduce_max reduce_min",
    ),
    "mapped": (lambda w, x: jax.vmap(lambda row: w[0] * row)(w), "mul"),
}


def values_of(tree):
    return jax.tree.map(
        lambda leaf: dequantize(leaf.array) if isinstance(leaf, WithAux) else leaf,
        tree,
        is_leaf=lambda leaf: isinstance(leaf, WithAux),
    )


def dequantized_for(function, params):
    found = plan(function, PtqProvider(RULES), params, X).dequantized
    return set(found.get("w", ())) | {x for k in found if k != "w" for x in found[k]}


@pytest.mark.thinned(24)
@pytest.mark.parametrize("name", READ)
def test_what_reads_its_elements(name):
    read, primitives = READ[name]

    def function(params, x):
        return x @ params["w"], read(params["w"], x)

    quantized, params = ptq.quantize(function, PARAMS, RULES, X)
    assert params["w"].array.qvalue.dtype == jnp.int8
    values = values_of(params)
    expected = read(values["w"], X)
    for run in (quantized, jax.jit(quantized)):
        product, got = run(params, X)
        np.testing.assert_allclose(product, X @ values["w"], 2e-6, 2e-6)
        jax.tree.map(np.testing.assert_array_equal, values_of(got), expected)
    assert dequantized_for(function, PARAMS) == set(primitives.split())


def _layers(w, x):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w @ w.T), None), x, w)[0]


def _remat_layers(w, x):
    layer = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w @ w.T), None))
    return lax.scan(layer, x, w)[0]


# Products of a weight on which all stays quantized.
PRODUCTS = {
    "two ops": lambda w, x: (x @ w) @ w.T + (w.T @ x[0])[0],
    "scaled": lambda w, x: x @ (0.3 * w) + x @ (w / x[0, 0]) - x @ -w,
    "einsum": lambda w, x: jnp.einsum("bi,io,o->b", x, w, PARAMS["g"]),
    "cast": lambda w, x: x @ w.astype(jnp.float16).astype(jnp.float16).T.T,
    "reshaped": lambda w, x: jnp.einsum("bi,ihd->bhd", x, w.reshape(8, 2, 3)),
    "joined": lambda w, x: x @ jnp.concatenate([w, w[:, ::2]], 1),
    "stacked": lambda w, x: jnp.einsum("bi,eio->beo", x, jnp.stack([w, -w])),
    "repeated": lambda w, x: x @ jnp.repeat(jnp.roll(w, 2, axis=1), 3, axis=1),
    "split": lambda w, x: [x @ part for part in jnp.split(w, [2], axis=1)],
    "rows": lambda w, x: x[:, :3] @ w[jnp.array([5, 1, 1])] + x[:, 2:5] @ w[2:5],
    "no gradient": lambda w, x: x @ lax.stop_gradient(w),
    "jit": lambda w, x: jax.jit(lambda w, x: x @ w)(w, x),
    "vmap": lambda w, x: jax.vmap(lambda row: row @ w)(x),
    "remat": lambda w, x: jax.checkpoint(lambda w, x: (x @ w, w))(w, x)[0],
    "cond": lambda w, x: lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x @ w[::-1]),
    "switch": lambda w, x: lax.switch(
        1, [lambda w: (x @ w, w), lambda w: (x @ (2 * w), w)], w
    ),
    "fori_loop": lambda w, x: lax.fori_loop(0, 3, lambda i, y: y + x @ w, X @ w),
    "carried by a while loop": lambda w, x: lax.while_loop(
        lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] @ c[2] @ c[2].T, c[2]), (0, x, w)
    ),
    "carried by a scan": lambda w, x: lax.scan(
        lambda c, _: ((c[0], c[1] @ c[0] @ c[0].T), None), (w, x), STEPS
    ),
}
STACKS = {
    "scan": _layers,
    "scan and remat": _remat_layers,
    "vmap": lambda w, x: jax.vmap(lambda w: x @ w)(w),
    "unpacked": lambda w, x: [x @ layer for layer in w],
    "indexed": lambda w, x: x @ w[1] + x @ w[x.argmax() % 3],
    "fori_loop": lambda w, x: lax.fori_loop(0, 3, lambda i, y: y + x @ w[i], X @ w[0]),
}


@pytest.mark.thinned(15)
@pytest.mark.parametrize("name", [*PRODUCTS, *(f"stacked {name}" for name in STACKS)])
def test_products_of_codes(name):
    stacked = name.startswith("stacked ")
    function = STACKS[name.removeprefix("stacked ")] if stacked else PRODUCTS[name]
    params = STACKED if stacked else PARAMS

    def of_tree(params, x):
        return function(params["w"], x)

    quantized, params = ptq.quantize(of_tree, params, RULES, X)
    expected = function(values_of(params)["w"], X)
    got = jax.jit(quantized)(params, X)
    tolerance = 2e-3 if name == "cast" else 1e-5
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, tolerance, tolerance),
        values_of(got),
        expected,
    )
    assert not dequantized_for(of_tree, STACKED if stacked else PARAMS)


@pytest.mark.parametrize("layers", [_layers, _remat_layers])
def test_a_loop_over_layers_slices_codes(layers):
    def function(params, x):
        return layers(params["w"], x)

    quantized, params = ptq.quantize(function, STACKED, RULES, X)
    jaxpr = jax.make_jaxpr(quantized)(params, X).jaxpr
    (scan,) = (eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan")
    read = {(var.aval.dtype.name, var.aval.shape) for var in scan.invars}
    assert ("int8", (3, 8, 6)) in read and ("float32", (3, 1, 6)) in read
    assert ("float32", (3, 8, 6)) not in {
        (var.aval.dtype.name, var.aval.shape) for e in jaxpr.eqns for var in e.outvars
    }


def test_a_loop_carries_no_weight_along():
    def function(params, x):
        return PRODUCTS["carried by a scan"](params["w"], x)

    quantized, params = ptq.quantize(function, PARAMS, RULES, X)
    (w, _), _ = quantized(params, X)
    assert w.array.qvalue is params["w"].array.qvalue
    jaxpr = jax.make_jaxpr(quantized)(params, X).jaxpr
    (scan,) = (eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan")
    assert [var.aval.shape for var in scan.outvars] == [X.shape]


def test_a_model_returns_its_params_quantized():
    def function(params, x):
        return {"out": x @ params["w"], "params": params}

    quantized, params = ptq.quantize(function, PARAMS, RULES, X)
    out = quantized(params, X)
    for a, b in zip(*map(jax.tree.leaves, (out["params"], params)), strict=True):
        assert a is b
    jitted = jax.jit(quantized)(params, X)["params"]
    jax.tree.map(np.testing.assert_array_equal, jitted, params)
    assert jax.tree.structure(jitted) == jax.tree.structure(params)


@pytest.mark.slow
def test_weight_normalization_and_shards_of_it():
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    halves = jax.P(None, "d")

    def function(params, x):
        w = params["w"]
        normalized = params["g"] * w / jnp.linalg.norm(w, axis=0)
        local = jax.shard_map(
            lambda w, x: x @ w + w.sum(),
            mesh=mesh,
            in_specs=(halves, jax.P()),
            out_specs=halves,
        )
        return x @ w, x @ normalized, local(w, x)

    quantized, params = ptq.quantize(function, PARAMS, RULES, X)
    got = jax.jit(quantized)(params, X)
    for a, b in zip(got, function(values_of(params), X), strict=True):
        np.testing.assert_allclose(a, b, 1e-5, 1e-5)
    assert dequantized_for(function, PARAMS) >= {"shard_map", "mul"}


@pytest.mark.thinned(8)
@pytest.mark.parametrize("qtype", ["nf4", "int4", "int1", "float8_e5m2"])
@pytest.mark.parametrize("tile", [None, 4])
def test_other_types_and_tiles(qtype, tile):
    rules = [QuantizationRule(weight_qtype=qtype, tile_size=tile)]

    def function(params, x):
        w = params["w"]
        views = (w[4:], w[:, 1], w.T, w[INDICES], -w[::-1], w * PARAMS["g"])
        return x @ w, jnp.concatenate([x, x], 1) @ jnp.concatenate([w, w]), views

    quantized, params = ptq.quantize(function, PARAMS, rules, X)
    *products, views = jax.jit(quantized)(params, X)
    *expected, exact = function(values_of(params), X)
    jax.tree.map(np.testing.assert_array_equal, views, exact)
    for a, b in zip(products, expected, strict=True):
        np.testing.assert_allclose(a, b, 1e-5, 1e-5)


def test_a_weight_tells_who_dequantized_it():
    heard = []
    array = QArray(jnp.ones((2, 2), jnp.int8), jnp.full((1, 2), 0.5))
    weight = StoredWeight(array, array.dtype, "w", None, lambda *a: heard.append(a))
    assert weight.apply("neg", {}, [weight], None)[0].path == "w"
    assert weight.apply("exp", {}, [weight], None) is None
    np.testing.assert_array_equal(weight.returned, np.full((2, 2), 0.5))
    assert heard == [("w", "return")]


@pytest.mark.slow
@pytest.mark.parametrize("qtype", ["int8", "nf4"])
def test_narrow_products_of_wide_params(qtype):
    """Scales are float32, the model computes in bfloat16."""
    rules = [QuantizationRule(weight_qtype=qtype, act_qtype="int8")]
    images = signed(2, 6, 6, 4, seed=5).astype(jnp.bfloat16)
    params = {"w": signed(3, 8, 6, seed=3), "k": signed(3, 3, 4, 2, seed=6)}

    def function(params, x):
        w, k = (params[name].astype(jnp.bfloat16) for name in "wk")
        x = x.astype(jnp.bfloat16)
        image = lax.conv_general_dilated(
            images, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.einsum("ebi,eio->ebo", jnp.stack([x] * 3), w), x @ w[0], image

    quantized, stored = ptq.quantize(function, params, rules, X)
    expected = jax.jit(quantize_fn(function, QtProvider(rules)))(params, X)
    for got, value in zip(jax.jit(quantized)(stored, X), expected, strict=True):
        assert got.dtype == jnp.bfloat16
        got, value = (np.asarray(a, np.float32) for a in (got, value))
        np.testing.assert_allclose(got, value, 2e-2, 2e-2 * np.abs(value).max())
