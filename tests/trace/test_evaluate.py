"""The rewritten function runs what was traced: structure, effects, placement."""

import functools
import re

import jax
import jax.ad_checkpoint
import numpy as np
import pytest
from jax import lax
from jax import numpy as jnp
from jax.experimental import io_callback
from jax.experimental import pallas as pl
from jax.extend import core as jex
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from qwix_train.frontends.model import quantize_fn
from qwix_train.frontends.plan_of import plan
from qwix_train.planning.rules import QuantizationRule
from qwix_train.qat import QtProvider
from tests import models

INT8 = QuantizationRule(weight_qtype="int8", act_qtype="int8")
WEIGHTS = QuantizationRule(weight_qtype="int8")


def data(*shape, seed=0):
    return models.normal(*shape, seed=seed)


def quantize(fn, *rules, **kwargs):
    return quantize_fn(fn, QtProvider(rules or [WEIGHTS], **kwargs))


def weight_fq(w, channel=(1,)):
    """int8 fake quantization, channelwise, in the arithmetic of the library."""
    shared = tuple(a for a in range(w.ndim) if a not in channel)
    absmax = jnp.abs(w).max(shared, keepdims=True)
    scale = absmax / 127.5
    codes = jnp.clip(jnp.round(w * (1 / scale)), -128, 127)
    # Half a code below the lowest is the lowest.
    return jnp.where(w == -absmax, -128, codes) * scale


def check(fn, params, *args, reference=None, rule=WEIGHTS):
    """A function with int8 weights is the function of the int8 weights."""
    reference = reference or jax.jit(fn)
    expected = reference(jax.tree.map(weight_fq, params), *args)
    actual = jax.jit(quantize(fn, rule))(params, *args)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5),
        actual,
        expected,
    )
    return actual


def equations(fn, *args):
    """All equations of a function, in bodies, too."""

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            yield eqn
            for inner in jex.jaxprs_in_params(eqn.params):
                yield from walk(inner)

    return list(walk(jax.make_jaxpr(fn)(*args).jaxpr))


def named(fn, name, *args):
    return [eqn for eqn in equations(fn, *args) if eqn.primitive.name == name]


W = {"w": data(4, 4)}
X = data(3, 4, seed=1)


# Bodies.


def test_nested_jit():
    inner = jax.jit(lambda w, x: jnp.tanh(x @ w))
    outer = jax.jit(lambda w, x: inner(w, inner(w, x)))
    check(lambda p, x: outer(p["w"], x) + 1, W, X)


def test_jit_with_static_and_donated_arguments():
    @functools.partial(jax.jit, static_argnums=2, donate_argnums=1)
    def layer(w, x, power):
        return (x @ w) ** power

    check(lambda p, x: layer(p["w"], x * 2, 3), W, X)


def test_jit_with_shardings():
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, columns = NamedSharding(mesh, P("d")), NamedSharding(mesh, P(None, "d"))
    layer = jax.jit(
        lambda w, x: x @ w, in_shardings=(columns, rows), out_shardings=rows
    )
    x = data(2, 4)
    check(lambda p, x: layer(p["w"], x), W, x)
    found = named(quantize(lambda p, x: layer(p["w"], x)), "sharding_constraint", W, x)
    assert [eqn.params["sharding"] for eqn in found] == [columns, rows, rows]


def test_sharding_constraints_survive():
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, P(None, "d"))

    def fn(p, x):
        return lax.with_sharding_constraint(
            x @ lax.with_sharding_constraint(p["w"], sharding), sharding
        )

    check(fn, W, X)
    found = named(quantize(fn), "sharding_constraint", W, X)
    assert [eqn.params["sharding"] for eqn in found] == [sharding, sharding]
    assert jax.jit(quantize(fn))(W, X).sharding.is_equivalent_to(sharding, 2)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("prevent_cse", [True, False])
def test_remat_keeps_its_policy_and_quantizes_inside(prevent_cse):
    policy = jax.checkpoint_policies.dots_saveable
    layer = jax.checkpoint(
        lambda w, x: jnp.tanh(x @ w), policy=policy, prevent_cse=prevent_cse
    )

    def fn(p, x):
        return layer(p["w"], layer(p["w"], x)).sum()

    check(fn, W, X)
    for name in ("remat2", "checkpoint"):
        for eqn in named(quantize(fn), name, W, X):
            assert eqn.params["policy"] is policy
            assert eqn.params["prevent_cse"] == prevent_cse
            inner = eqn.params["jaxpr"]
            # The params go in as they are stored; the quantized are recomputed.
            assert any(e.primitive.name == "custom_jvp_call" for e in inner.eqns)
    np.testing.assert_allclose(
        jax.grad(quantize(fn))(W, X)["w"],
        jax.grad(fn)(jax.tree.map(weight_fq, W), X)["w"],
        rtol=1e-5,
    )


def test_remat_saves_no_quantized_weight(capsys):
    layer = jax.checkpoint(lambda w, x: jnp.sin(x @ w))

    def fn(p, x):
        return layer(p["w"], layer(p["w"], x)).sum()

    jax.ad_checkpoint.print_saved_residuals(quantize(fn), W, X)
    saved = capsys.readouterr().out
    # The param itself, the input, and the input of the second layer.
    assert len(saved.splitlines()) <= 4
    assert "fake_quant" not in saved and "round" not in saved


def test_scan_with_weights_as_constants():
    def fn(p, x):
        def body(carry, _):
            carry = jnp.tanh(carry @ p["w"])
            return carry, carry.sum()

        return lax.scan(body, x, length=3)

    check(fn, W, X)
    # Outside of the loop: every iteration reads the whole of it.
    (scan,) = named(quantize(fn), "scan", W, X)
    assert not any("custom_jvp" in e.primitive.name for e in scan.params["jaxpr"].eqns)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("options", [{}, {"reverse": True}, {"unroll": 2}])
def test_scan_over_stacked_weights(options):
    params = {"w": data(4, 4, 4)}

    def fn(p, x):
        def body(carry, w):
            carry = jnp.tanh(carry @ w)
            return carry, carry.sum(0)

        return lax.scan(body, x, p["w"], **options)

    def reference(p, x):
        ws = jnp.stack([weight_fq(w) for w in params["w"]])
        return fn({"w": ws}, x)

    check(fn, params, X, reference=reference)
    (scan,) = named(quantize(fn), "scan", params, X)
    for name, value in options.items():
        assert scan.params[name] == value
    # One layer at a time: inside of the loop.
    assert any("custom_jvp" in e.primitive.name for e in scan.params["jaxpr"].eqns)


@pytest.mark.slow
def test_scan_over_one_layer_and_integers():
    def fn(p, x):
        def body(carry, wi):
            w, i, key = wi
            noise = jax.random.normal(key, carry.shape)
            return carry @ w * (i + 1) + noise, (i, key)

        keys = jax.random.split(jax.random.key(0), 1)
        carry, (i, keys) = lax.scan(body, x, (p["w"][None], jnp.arange(1), keys))
        return carry, i, jax.random.key_data(keys)

    check(fn, W, X)


def test_scan_that_carries_a_weight():
    def fn(p, x):
        def body(carry, _):
            x, w = carry
            return (jnp.tanh(x @ w), w), None

        (x, w), _ = lax.scan(body, (x, p["w"]), length=2)
        return x @ w

    check(fn, W, X)
    (scanned, after) = plan(fn, [WEIGHTS], W, X).records()
    assert scanned["weights"] == after["weights"] == ("w",)


@pytest.mark.slow
def test_nested_scans():
    params = {"w": data(2, 3, 4, 4)}

    def fn(p, x):
        def layer(x, w):
            return jnp.tanh(x @ w), None

        def group(x, ws):
            return lax.scan(layer, x, ws)

        return lax.scan(group, x, p["w"])[0]

    def reference(_, x):
        for w in params["w"].reshape(6, 4, 4):
            x = jnp.tanh(x @ weight_fq(w))
        return x

    check(fn, params, X, reference=reference)


def test_while_loop():
    def fn(p, x):
        def keep_on(carry):
            i, x = carry
            return (i < 3) & ((x @ p["gate"]).sum() < 1e9)

        return lax.while_loop(
            keep_on, lambda c: (c[0] + 1, jnp.tanh(c[1] @ p["w"])), (0, x)
        )

    params = {**W, "gate": data(4, 4, seed=5)}
    check(fn, params, X)
    assert [r["weights"] for r in plan(fn, [WEIGHTS], params, X).records()] == [
        ("w",),
        ("gate",),
    ]


@pytest.mark.parametrize("which", [0, 1, 2])
def test_switch_with_ops_in_some_branches(which):
    def fn(p, x, i):
        branches = [
            lambda x: x @ p["w"],
            lambda x: x * 2,
            lambda x: jnp.sin(x @ p["v"]),
        ]
        return lax.switch(i, branches, x)

    check(fn, {**W, "v": data(4, 4, seed=7)}, X, jnp.int32(which))


@pytest.mark.parametrize("flag", [True, False])
def test_cond_with_ops_in_one_branch(flag):
    def fn(p, x, flag):
        return lax.cond(flag, lambda x: x @ p["w"], jnp.sin, x)

    check(fn, W, X, flag)


def test_vmap_around_and_inside():
    def fn(p, x):
        return jax.vmap(lambda row: row @ p["w"])(x)

    check(fn, W, X)
    batch = data(2, 3, 4, seed=3)
    one = jax.jit(quantize(fn, INT8))
    np.testing.assert_allclose(
        jax.jit(jax.vmap(quantize(fn, INT8), (None, 0)))(W, batch),
        jnp.stack([one(W, x) for x in batch]),
        rtol=1e-6,
    )
    stacked = {"w": data(2, 4, 4)}
    np.testing.assert_allclose(
        jax.jit(jax.vmap(quantize(fn, INT8)))(stacked, batch),
        jnp.stack([one({"w": stacked["w"][i]}, batch[i]) for i in (0, 1)]),
        rtol=1e-6,
    )


@pytest.mark.thinned(2)
@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(check_vma):
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))

    def fn(p, x):
        @functools.partial(
            jax.shard_map,
            mesh=mesh,
            in_specs=(P("d"), P(None, "d"), P()),
            out_specs=P(),
            check_vma=check_vma,
        )
        def layer(w, x, v):
            return lax.psum(x @ w, "d") @ v

        return layer(p["w"], x, p["v"])

    params = {"w": data(16, 4), "v": data(4, 2)}
    x = data(3, 16)
    check(fn, params, x)
    assert [r["weight_granularity"] for r in plan(fn, [INT8], params, x).records()] == [
        "channel 1",
        "channel 1",
    ]
    grad = jax.jit(jax.grad(lambda p: quantize(fn)(p, x).sum()))(params)
    rounded = jax.tree.map(weight_fq, params)
    expected = jax.jit(jax.grad(lambda p: fn(p, x).sum()))(rounded)
    np.testing.assert_allclose(grad["w"], expected["w"], rtol=1e-4, atol=1e-5)


def test_shard_map_that_gathers_its_weight():
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))

    def fn(p, x):
        def layer(w, x):
            return x @ lax.all_gather(w, "d", tiled=True)

        return jax.shard_map(
            layer, mesh=mesh, in_specs=(P("d"), P("d")), out_specs=P("d")
        )(p["w"], x)

    check(fn, {"w": data(16, 4)}, data(8, 16))


# What cannot be rewritten.


@jax.custom_jvp
def own_jvp(w, x):
    return x @ w


own_jvp.defjvp(lambda primals, tangents: (own_jvp(*primals), tangents[1] @ primals[0]))


@jax.custom_vjp
def own_vjp(w, x):
    return x @ w


own_vjp.defvjp(
    lambda w, x: (x @ w, (w, x)), lambda saved, g: (saved[1].T @ g, g @ saved[0].T)
)


def kernel(w, x):
    def body(w_ref, x_ref, out_ref):
        out_ref[...] = x_ref[...] @ w_ref[...]

    return pl.pallas_call(
        body, out_shape=jax.ShapeDtypeStruct((3, 4), x.dtype), interpret=True
    )(w, x)


@pytest.mark.parametrize(
    "function, where",
    [
        (own_jvp, "custom_jvp_call"),
        (own_vjp, "custom_vjp_call"),
        (kernel, "pallas_call"),
    ],
)
def test_opaque_ops_are_reported_and_left_as_they_are(function, where):
    def fn(p, x):
        return function(p["w"], x)

    found = plan(fn, [WEIGHTS], W, X)
    (op,) = found.unsupported
    assert op.op.opaque == where and where in op.reason and not op.quantized
    with pytest.warns(UserWarning, match=where):
        actual = quantize(fn, allow_unmatched=True)(W, X)
    np.testing.assert_array_equal(actual, fn(W, X))


def test_a_weight_through_a_custom_derivative_stays_a_weight():
    @jax.custom_vjp
    def clip_gradient(w):
        return w

    clip_gradient.defvjp(lambda w: (w, None), lambda _, g: (jnp.clip(g, -0.1, 0.1),))

    def fn(p, x):
        return x @ clip_gradient(jax.nn.relu(p["w"]))

    check(fn, W, X)
    grads = jax.grad(lambda p: quantize(fn)(p, X).sum())(W)["w"]
    assert np.abs(grads).max() <= 0.1


# Effects, names, source lines.


def test_effects_survive_in_order(capfd):
    seen = []

    def fn(p, x):
        jax.debug.print("before", ordered=True)

        def body(x, w):
            jax.debug.print("inside {}", x.shape[0], ordered=True)
            x = x @ w
            return io_callback(
                lambda x: (seen.append(1), x)[1], x, x, ordered=True
            ), None

        y = lax.scan(body, x, p["w"])[0]
        jax.debug.print("after", ordered=True)
        return y

    params = {"w": data(2, 4, 4)}
    for run in (quantize(fn), jax.jit(quantize(fn))):
        seen.clear()
        run(params, X).block_until_ready()
        jax.effects_barrier()
        assert seen == [1, 1]
        assert capfd.readouterr().out.split("\n")[:-1] == [
            "before",
            "inside 3",
            "inside 3",
            "after",
        ]


def test_named_scopes_survive():
    @jax.jit
    def block(w, x):
        with jax.named_scope("inner"):
            return jnp.sin(x @ w)

    def fn(p, x):
        with jax.named_scope("outer"):
            y = block(p["w"], x)
            with jax.named_scope("body"):
                return lax.scan(lambda c, _: (jnp.cos(c @ p["w"]), None), y, length=2)

    def names(function):
        text = jax.jit(function).lower(W, X).compile().as_text()
        found = re.findall(r'op_name="([^"]*)"', text)
        return {n for n in found if n.endswith(("sin", "cos", "dot_general"))}

    assert names(quantize(fn)) == names(fn)
    assert "jit(fn)/outer/jit(block)/inner/dot_general" in names(fn)


def test_the_work_of_a_handler_has_the_scope_of_its_op():
    def fn(p, x):
        with jax.named_scope("outer"):
            return x @ p["w"]

    rounds = named(quantize(fn, INT8), "custom_jvp_call", W, X)
    assert [str(e.source_info.name_stack) for e in rounds] == ["outer", "outer"]
    (dot,) = named(quantize(fn, INT8), "dot_general", W, X)
    assert str(dot.source_info.name_stack) == "outer"


def test_source_lines_survive():
    def fn(p, x):
        return jnp.sin(x @ p["w"])

    def line(function, name):
        (eqn,) = named(function, name, W, X)
        frames = [
            frame
            for frame in eqn.source_info.traceback.frames
            if frame.function_name.endswith("fn") and frame.file_name == __file__
        ]
        return [frame.line_num for frame in frames]

    for name in ("sin", "dot_general"):
        assert line(quantize(fn), name) == line(fn, name) != []


# Inputs and outputs.


def test_inputs_and_outputs_of_every_kind():
    key = jax.random.key(3)

    def fn(p, x, tokens, key, unused):
        y = x @ p["w"]
        mask = jax.random.bernoulli(key, 0.5, y.shape)
        return {
            "y": jnp.where(mask, y, 0),
            "x": x,
            "tokens": tokens,
            "literal": 3.0,
            "array": jnp.float32(2),
            "flag": True,
            "none": None,
            "key": jax.random.key_data(key),
        }

    args = (X, jnp.arange(3), key, jnp.ones(5))
    params = {**W, "never_used": data(2)}
    actual = quantize(fn)(params, *args)
    assert actual["literal"] == 3.0 and actual["flag"] is True
    assert actual["none"] is None
    np.testing.assert_array_equal(actual["x"], X)
    check(
        lambda *args: jax.tree.leaves(fn(*args)),
        {**W, "never_used": data(2, 2)},
        *args,
    )


def test_a_param_that_is_returned_is_the_stored_one():
    def fn(p, x):
        def body(x, w):
            return x @ w, w

        def step(carry):
            i, x, w = carry
            return i + 1, x @ w, w

        y, stacked = lax.scan(body, x, p["stacked"])
        remat = jax.checkpoint(lambda w, x: (x @ w, w))
        z, remat_w = remat(p["w"], y)
        z, cond_w = lax.cond(
            z[0, 0] > 0, lambda w: (z @ w, w), lambda w: (z, w), remat_w
        )
        _, z, while_w = lax.while_loop(lambda c: c[0] < 2, step, (0, z, cond_w))
        z, jit_w = jax.jit(lambda w: (z @ w, w))(while_w)
        return z, {"w": jit_w, "stacked": stacked}

    params = {**W, "stacked": data(2, 4, 4)}
    _, returned = jax.jit(quantize(fn))(params, X)
    for name, value in params.items():
        np.testing.assert_array_equal(returned[name], value)


def test_a_function_without_ops_is_untouched():
    def fn(p, x):
        return p["w"].sum() + x

    np.testing.assert_array_equal(quantize(fn, allow_unmatched=True)(W, X), fn(W, X))
    with pytest.raises(ValueError, match="no matrix product and no convolution"):
        quantize(fn)(W, X)


def test_literals_as_operands():
    def fn(p, x):
        return lax.dot(x @ p["w"], jnp.ones((4, 4))) + lax.mul(2.0, 3.0)

    check(fn, W, X)


@pytest.mark.optimized
@pytest.mark.thinned(2)
@pytest.mark.parametrize("transform", [jax.jit, lambda f: f])
def test_what_no_rule_matches_is_bit_identical(transform):
    def fn(p, x, key):
        def body(x, w):
            x = jax.nn.gelu(x @ w)
            return x / jnp.linalg.norm(x), x.mean()

        y, means = lax.scan(jax.checkpoint(body), x, p["stack"])
        y = jax.random.bernoulli(key, 0.5, y.shape) * y
        with jax.named_scope("@head@"):
            return y @ p["w"], (y, means)

    params = {**W, "stack": data(3, 4, 4)}
    key = jax.random.key(0)
    rule = QuantizationRule(module_path="head", weight_qtype="int8")

    def loss(function, p):
        head, rest = function(p, X, key)
        return head.sum() + rest[0].sum(), rest

    def run(function):
        grad = jax.value_and_grad(functools.partial(loss, function), has_aux=True)
        return transform(grad)(params)

    (_, rest), _ = run(fn)
    (_, ours), _ = run(quantize(fn, rule))
    jax.tree.map(np.testing.assert_array_equal, ours, rest)


def test_no_rule_leaves_the_same_program():
    def fn(p, x):
        return jnp.tanh(x @ p["w"])

    rule = QuantizationRule(module_path="nowhere", weight_qtype="int8")
    rewritten = jax.make_jaxpr(quantize(fn, rule, allow_unmatched=True))(W, X)
    assert str(rewritten) == str(jax.make_jaxpr(fn)(W, X))


# Derivatives.


@pytest.mark.slow
def test_derivatives_are_those_at_the_quantized_weights():
    def fn(p, x):
        def layer(x, w):
            return jnp.tanh(x @ w), None

        return lax.scan(jax.checkpoint(layer), x, p["w"])[0].sum()

    params = {"w": data(2, 4, 4)}
    at = {"w": jnp.stack([weight_fq(w) for w in params["w"]])}
    for derivative in (jax.grad, jax.jacfwd):
        np.testing.assert_allclose(
            derivative(quantize(fn))(params, X)["w"],
            derivative(fn)(at, X)["w"],
            rtol=1e-4,
            atol=1e-6,
        )
    hessian = jax.jit(jax.hessian(lambda x: quantize(fn)(params, x)))(X)
    np.testing.assert_allclose(
        hessian, jax.hessian(lambda x: fn(at, x))(X), rtol=1e-3, atol=1e-5
    )
