"""How adapters start, against NumPy in float64."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp

import qwix_train
from qwix_train import lora
from qwix_train.core.qarray import dequantize
from tests import models
from tests.spellings import data

W = data(24, 16)
X = jax.device_put(data(4, 24, seed=1))
STACK = np.stack([data(24, 16, seed=i) for i in range(3)])


def apply(params, x):
    return x @ params["w"]


def apply_stack(params, x):
    w = params["w"]
    return jax.lax.scan(lambda x, w: (x @ w @ w.T, None), x, w)[0]


def started(w=W, function=apply, **kwargs):
    rule = lora.LoraRule(**{"rank": 3, "alpha": 6.0, **kwargs})
    params = {"w": jax.device_put(w)}
    adapters, frozen, layouts = lora.init(
        params, function, [rule], jax.random.key(0), X
    )
    (layout,) = layouts.values()
    a, b = np.float64(adapters["w_lora_a"]), np.float64(adapters["w_lora_b"])
    base = frozen["w"]
    if isinstance(base, qwix_train.core.qarray.WithAux):
        base = dequantize(base.array)
    return a, b, np.float64(base), layout


def best(matrix, rank):
    """The best approximation of a rank (Eckart and Young)."""
    u, s, v = np.linalg.svd(np.float64(matrix), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def rounded(matrix, bits=4, margin=1.0):
    bound = 2 ** (bits - 1) - 0.5
    scale = margin * np.abs(matrix).max(0, keepdims=True) / bound
    codes = np.clip(np.round(matrix / scale), -(bound + 0.5), bound - 0.5)
    return codes * scale


def test_adapters_add_nothing_at_first():
    a, b, base, layout = started()
    np.testing.assert_array_equal(b, 0)
    np.testing.assert_array_equal(base, W)
    assert layout.scaling == 2.0
    # He's uniform initializer has the variance 2 / fan_in.
    assert np.abs(a).max() <= np.sqrt(6 / 24)
    assert np.abs(a).max() > 0.9 * np.sqrt(6 / 24)


def test_pissa_splits_off_the_principal_part():
    a, b, base, layout = started(init="pissa")
    part = layout.scaling * a @ b
    np.testing.assert_allclose(part, best(W, 3), atol=1e-5)
    np.testing.assert_allclose(base + part, W, atol=1e-5)
    # Both factors have the roots of the singular values.
    s = np.linalg.svd(np.float64(W), compute_uv=False)[:3]
    for gram in (a.T @ a, b @ b.T):
        np.testing.assert_allclose(gram, np.diag(s) / layout.scaling, atol=1e-4)


@pytest.mark.slow
def test_pissa_of_each_layer_of_a_stack():
    a, b, base, layout = started(STACK, apply_stack, init="pissa")
    assert a.shape == (3, 24, 3) and b.shape == (3, 3, 16)
    for i in range(3):
        part = layout.scaling * a[i] @ b[i]
        np.testing.assert_allclose(part, best(STACK[i], 3), atol=1e-5)


@pytest.mark.parametrize("steps", [1, 4])
def test_loftq_is_algorithm_1(steps):
    a, b, base, layout = started(init=f"loftq,{steps}", weight_qtype="int4")
    part = np.zeros_like(W, np.float64)
    for _ in range(steps):
        quantized = rounded(np.float64(W) - part)
        part = best(np.float64(W) - quantized, 3)
    # A value on the border of two codes may take the other one, in a few places.
    assert np.mean(np.abs(base - quantized) > 1e-4) < 0.02
    error = np.linalg.norm(W - base - layout.scaling * a @ b)
    want = np.linalg.norm(W - quantized - part)
    assert error == pytest.approx(want, rel=0.03)
    assert error < np.linalg.norm(W - rounded(np.float64(W)))


def test_rank_stabilized_scaling():
    *_, layout = started(rank_stabilized=True, rank=4, alpha=6.0)
    assert layout.scaling == pytest.approx(6.0 / np.sqrt(4))


@pytest.mark.slow
def test_dora_starts_as_the_model_and_follows_equation_5():
    rule = lora.LoraRule(rank=3, alpha=6.0, dora=True)
    params = {"w": jax.device_put(W)}
    adapters, frozen, layouts = lora.init(params, apply, [rule], jax.random.key(0), X)
    m = np.float64(adapters["w_lora_magnitude"])
    np.testing.assert_allclose(m, np.linalg.norm(np.float64(W), axis=0), rtol=1e-6)
    provider = lora.LoraProvider([rule])
    run = qwix_train.quantize_fn(apply, provider)
    everything = {**frozen, **adapters}
    np.testing.assert_allclose(run(everything, X), X @ W, rtol=1e-5, atol=1e-5)

    # The gradient takes the norm as a constant (section 4.3).
    values = {
        "a": np.float64(adapters["w_lora_a"]),
        "b": np.float64(data(3, 16, seed=3)),
        "m": m * 1.1,
    }
    everything |= {
        f"w_lora_{name}": jnp.float32(values[key])
        for name, key in [("a", "a"), ("b", "b"), ("magnitude", "m")]
    }
    got = jax.grad(lambda p: (run(p, X) ** 2).sum() / 2)(everything)
    x = np.float64(X)
    v = W + 2.0 * values["a"] @ values["b"]
    norm = np.linalg.norm(v, axis=0)
    out = x @ (v * values["m"] / norm)
    d_weight = x.T @ out
    d_v = d_weight * values["m"] / norm
    want = {
        "w_lora_magnitude": (d_weight * v / norm).sum(0),
        "w_lora_a": 2.0 * d_v @ values["b"].T,
        "w_lora_b": 2.0 * values["a"].T @ d_v,
    }
    np.testing.assert_allclose(run(everything, X), out, rtol=1e-4, atol=1e-4)
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_qat_computes_what_the_merged_weight_will_quantized():
    # With a margin no largest element is a tie, which may be broken either way.
    how = {"weight_qtype": "int4", "weight_calibration_method": "absmax,1.1"}
    rule = lora.LoraRule(rank=3, alpha=6.0, qat=True, **how)
    params = {"w": jax.device_put(W)}
    adapters, frozen, layouts = lora.init(params, apply, [rule], jax.random.key(0), X)
    assert frozen["w"].dtype == jnp.float32
    adapters["w_lora_b"] = jax.device_put(data(3, 16, seed=3))
    run = qwix_train.quantize_fn(apply, lora.LoraProvider([rule]))
    everything = {**frozen, **adapters}
    a, b = np.float64(adapters["w_lora_a"]), np.float64(adapters["w_lora_b"])
    want = np.float64(X) @ rounded(W + 2.0 * a @ b, margin=1.1)
    np.testing.assert_allclose(run(everything, X), want, rtol=1e-4, atol=1e-4)
    # And so does the merged and exported model.
    merged = lora.merge(frozen, adapters, layouts)
    plain = [qwix_train.QuantizationRule(**how)]
    served, quantized = qwix_train.ptq.quantize(apply, merged, plain, X)
    np.testing.assert_allclose(
        served(quantized, X), run(everything, X), rtol=1e-5, atol=1e-5
    )
    grads = jax.grad(lambda p: run(p, X).sum())(everything)
    ones = np.float64(X).T @ np.ones((4, 16))
    np.testing.assert_allclose(
        grads["w_lora_b"], 2.0 * a.T @ ones, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"rank": 0}, r"LoraRule?.*rank=0|rank=0"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"init": "svd"}, "init='svd'.*pissa"),
        ({"init": "loftq"}, "needs a weight_qtype"),
        ({"double_quant": True}, "weight_qtype of 4 bits"),
        ({"double_quant": True, "weight_qtype": "int8"}, "weight_qtype of 4 bits"),
        ({"qat": True}, "qat=True"),
        ({"alpha": float("nan")}, "alpha=nan"),
    ],
)
def test_rules_say_what_is_wrong(fields, message):
    with pytest.raises(ValueError, match=message):
        lora.LoraRule(**{"rank": 2, "alpha": 2.0, **fields})


@pytest.mark.parametrize("init", ["pissa", "loftq"])
def test_groups_that_share_one_b_have_no_principal_part(init):
    def of_experts(params, x):
        return jnp.einsum("ebd,edf->ebf", x, params["w"])

    rule = lora.LoraRule(rank=2, alpha=2.0, weight_qtype="int4", init=init)
    params, x = {"w": data(3, 8, 6)}, data(3, 4, 8)
    message = r"'w' of shape \(3, 8, 6\) is multiplied in groups along the axes \(0,\)"
    with pytest.raises(ValueError, match=message):
        lora.init(params, of_experts, [rule], jax.random.key(0), x)


@pytest.mark.slow
@pytest.mark.parametrize("init", [None, "pissa"])
def test_a_rank_above_that_of_a_small_head_is_kept_and_named(init):
    rules = [lora.LoraRule(rank=4, alpha=6.0, init=init)]
    head = W[:, :2]
    message = (
        r"adapter of 'head/w' has rank 4, and the 24 x 2 matrix has at most 2.*"
        r"LoraRule\(module_path='head', rank=2"
    )
    with pytest.warns(UserWarning, match=message):
        adapters, frozen, _ = lora.init(
            {"head": {"w": jax.device_put(head)}},
            lambda params, x: apply(params["head"], x),
            rules,
            jax.random.key(0),
            X,
        )
    # As `qwix` and PEFT have it.
    a, b = (np.float64(adapters["head"][f"w_lora_{part}"]) for part in "ab")
    assert a.shape == (24, 4) and b.shape == (4, 2)
    whole = frozen["head"]["w"] + 1.5 * a @ b
    np.testing.assert_allclose(whole, head, atol=1e-6)


BFLOAT16 = {
    "lora": {},
    "dora": {"dora": True},
    "pissa": {"init": "pissa"},
    "loftq": {"init": "loftq,1", "weight_qtype": "int4"},
    "packed": {"weight_qtype": "nf4", "double_quant": True},
}


@pytest.mark.thinned(3)
@pytest.mark.parametrize("kwargs", BFLOAT16.values(), ids=BFLOAT16)
def test_adapters_of_a_bfloat16_weight_are_float32(kwargs):
    w, x = jnp.asarray(W, jnp.bfloat16), X.astype(jnp.bfloat16)
    rules = [lora.LoraRule(rank=3, alpha=6.0, **kwargs)]
    state = models.lora_state(
        apply, {"w": w}, optax.sgd(1e-3), rules, jax.random.key(0), x
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("f4")}
    out = state.apply_fn(state.params, x)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.float32(out),
        np.float32(apply({"w": w}, x)),
        atol=1.5 if len(kwargs) == 2 else 0.1,
    )
    narrow = dataclasses.replace(rules[0], param_dtype=jnp.bfloat16)
    adapters, *_ = lora.init({"w": w}, apply, [narrow], jax.random.key(0), x)
    assert adapters["w_lora_a"].dtype == jnp.bfloat16


def test_small_steps_move_the_adapter_of_a_bfloat16_weight():
    w, x = jnp.asarray(W, jnp.bfloat16), X.astype(jnp.bfloat16)
    rules = [lora.LoraRule(rank=3, alpha=6.0)]
    state = models.lora_state(
        apply, {"w": w}, optax.adam(1e-4), rules, jax.random.key(0), x
    )

    @jax.jit
    def step(state):
        def loss(params):
            return (state.apply_fn(params, x).astype(jnp.float32) ** 2).mean()

        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    before, state = state.params["w_lora_a"], step(step(state))
    assert np.mean(before != state.params["w_lora_a"]) > 0.99
