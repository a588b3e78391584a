"""What all weight methods share: what they collect, where, and which weights they take.

GPTQ shows it, since its codes depend on every element of what was collected.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.training import train_state
from jax import numpy as jnp

from qwix_train import QuantizationRule, ptq, quantize_model
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

RULES = [QuantizationRule(weight_qtype="int4", weight_calibration_method=WIDE)]
BATCHES = [correlated(24, 6, seed) for seed in range(3)]


def mlp_params():
    params = models.params_of(models.Mlp(), BATCHES[0])
    params["Dense_0"]["bias"] += 0.3
    return params


def check_mlp(layers, quantized):
    """The codes of two layers are the reference's, on all batches at once."""
    x = np.concatenate(BATCHES)
    for (kernel, bias), array in zip(layers, quantized, strict=True):
        assert errors(array.qvalue, kernel, x, "int4") < 0.03
        x = np.maximum(x @ np.asarray(kernel) + np.asarray(bias), 0)


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["state", "eager", "nnx"])
def test_an_eval_loop(framework):
    method = ptq.Gptq(RULES)
    if framework == "nnx":
        model = NnxMlp(nnx.Rngs(0))
        whole = run_nnx(method, model, *BATCHES)
        layers = [(m.kernel[...], m.bias[...]) for m in (model.first, model.second)]
        kernels = [whole.first.kernel, whole.second.kernel]
        quantized = [ptq.to_tree(kernel.array) for kernel in kernels]
        return check_mlp(layers, quantized)
    model, params = models.Mlp(), mlp_params()
    if framework == "state":
        state = train_state.TrainState(
            step=0,
            apply_fn=lambda params, x: model.apply({"params": params}, x),
            params=params,
            tx=None,  # type: ignore[arg-type]
            opt_state=None,  # type: ignore[arg-type]
        )
        step = method.wrap(jax.jit(lambda state, x: state.apply_fn(state.params, x)))
        outs = [step(state, x) for x in BATCHES]
    else:
        step = lambda params, x: model.apply({"params": params}, x)  # noqa: E731
        step = method.wrap(step if framework == "eager" else jax.jit(step))
        outs = [step(params, x) for x in BATCHES]
    plain = [jax.jit(model.apply)({"params": params}, x) for x in BATCHES]
    models.assert_close(outs, plain, 1e-6)
    quantized = method.quantize_params(params, abstract(method, model, BATCHES[0]))
    names = ("Dense_0", "Dense_1")
    layers = [(params[name]["kernel"], params[name]["bias"]) for name in names]
    check_mlp(layers, [quantized[name]["kernel"].array for name in names])


class NnxLayers(nnx.Module):
    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(rngs):
            return nnx.Linear(6, 6, use_bias=False, rngs=rngs)

        self.layers = make(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def layer(linear, x):
            return jnp.tanh(3 * linear(x))

        return layer(self.layers, x)


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["remat", "nnx"])
def test_stacked_layers_have_a_statistic_each(framework):
    method = ptq.Gptq(RULES)
    if framework == "nnx":
        model = NnxLayers(nnx.Rngs(0))
        kernels = model.layers.kernel[...]
        array = run_nnx(method, model, *BATCHES).layers.kernel.array
        array = ptq.to_tree(array)
    else:
        model = models.Layers(remat=True)
        params = models.params_of(model, BATCHES[0])
        kernels = params["layers"]["Dense_0"]["kernel"]
        quantized = run(method, model, params, *BATCHES)
        array = quantized["layers"]["Dense_0"]["kernel"].array
    x = np.concatenate(BATCHES)
    assert array.scale.shape == (3, 1, 6)
    for kernel, codes in zip(np.asarray(kernels), array.qvalue, strict=True):
        assert errors(codes, kernel, x, "int4") < 0.03
        x = np.tanh(3 * (x @ kernel))


class Product(nn.Module):
    """One weight, and what is done with it."""

    fn: object

    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.normal(1.0), (6, 6))
        return self.fn(x, w) @ jnp.ones((6, 1))


REFUSED = {
    "transposed elsewhere": (
        lambda x, w: (x @ w) @ w.T,
        "its ops contract different axes of it",
    ),
    "looked up": (
        lambda x, w: x @ w + w[jnp.argmax(x, -1)] @ jnp.ones((6, 6)),
        "reads it, too, and does not multiply by its codes",
    ),
    "through a tanh": (lambda x, w: x @ jnp.tanh(w), "it is dequantized for tanh"),
    "in part": (lambda x, w: x[:, :3] @ w[:3], "reads a part of it"),
}


class Refusing(nn.Module):
    """All of these, and a layer that a method applies to."""

    @nn.compact
    def __call__(self, x):
        refused = [
            Product(fn, name=f"refused_{index}")(x)
            for index, (fn, _) in enumerate(REFUSED.values())
        ]
        return nn.Dense(2, name="taken")(jnp.concatenate(refused, -1))


@pytest.mark.slow
@pytest.mark.parametrize("make", [ptq.SmoothQuant, ptq.Awq])
def test_weights_that_a_method_does_not_apply_to(make):
    """They are rounded to nearest, and the report says so."""
    x, method, model = BATCHES[0], make(RULES), Refusing()
    params = models.params_of(model, x)
    quantized = run(method, model, params, x)
    whole = quantize_model(model, ptq.PtqProvider(RULES))
    init = functools.partial(whole.init, jax.random.key(0))
    expected = ptq.quantize_params(params, jax.eval_shape(init, x)["params"])
    # The model has places for the scales of all inputs.
    target = abstract(method, model, x)
    assert jax.tree.structure(quantized) == jax.tree.structure(target)
    records = {record["param"]: record for record in method.report.records()}
    assert records["taken/kernel"]["applied"]
    lines = str(method.report).splitlines()
    for index, (_, reason) in enumerate(REFUSED.values()):
        layer = quantized[f"refused_{index}"]
        models.assert_same(layer["w"], expected[f"refused_{index}"]["w"])
        assert all((x == 1).all() for name, x in layer.items() if name != "w")
        record = records[f"refused_{index}/w"]
        assert not record["applied"] and reason in record["reason"]
        (line,) = [line for line in lines if f"refused_{index}/w" in line]
        assert "rounding" in line and reason in line


def test_batches_count_by_their_vectors_and_bad_ones_not_at_all():
    model, params = nn.Dense(4), {"kernel": jnp.ones((6, 4)), "bias": jnp.ones(4)}
    method = ptq.Awq(RULES)
    batches = [BATCHES[0], 3 * BATCHES[1][:5]]
    bad = [np.full((4, 6), np.nan, np.float32), np.ones((0, 6), np.float32)]
    collect(method, model, params, *batches, *bad)
    (state,) = method.state.values()
    x = np.concatenate(batches)
    assert (state["count"], state["skipped"], state["samples"]) == (2, 2, 29)
    np.testing.assert_allclose(state["absmean"][0], np.abs(x).mean(0), rtol=1e-5)
    np.testing.assert_allclose(state["min"][0], x.min(0))
    np.testing.assert_allclose(state["max"][0], x.max(0))
    moment = x.T @ x / len(x)
    np.testing.assert_allclose(state["second_moment"][0], moment, 1e-4, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("make", [ptq.Gptq, ptq.Awq, ptq.SmoothQuant])
def test_vectors_of_padding_are_left_out(make):
    (rule,) = RULES
    model, params = nn.Dense(4), {"kernel": jnp.ones((6, 4)), "bias": jnp.ones(4)}
    padded = []
    for x in BATCHES[:2]:
        padding = np.full((5, 6), np.nan, np.float32)
        padding[:3, 1:] = 1
        padded.append(np.concatenate([padding, x]))
    method = make([dataclasses.replace(rule, act_finite_only=True)])
    collect(method, model, params, *padded)
    reference = make(RULES)
    collect(reference, model, params, *BATCHES[:2])
    (found,), (want,) = (x.state.values() for x in (method, reference))
    for name in want.keys() - {"rows", "priority"}:
        np.testing.assert_allclose(found[name], want[name], 1e-5, err_msg=name)
    if "rows" in want:
        kept = np.asarray(found["priority"])[0] >= 0
        rows = np.asarray(found["rows"])[0, kept]
        assert {*map(tuple, rows)} == {*map(tuple, np.concatenate(BATCHES[:2]))}


@pytest.mark.slow
def test_states_of_two_hosts_merge():
    model, (a, b, both) = models.Layers(remat=True), (ptq.Awq(RULES) for _ in range(3))
    params = jax.jit(model.init)(jax.random.key(0), BATCHES[0])["params"]
    collect(a, model, params, BATCHES[0])
    collect(b, model, params, BATCHES[1][:7], BATCHES[2])
    collect(both, model, params, BATCHES[0], BATCHES[1][:7], BATCHES[2])
    models.assert_close(a.merge(a.state, b.state), both.state, 1e-4)
    models.assert_close(a.merge({}, b.state), b.state, 0)


@pytest.mark.slow
def test_the_pure_form_in_scan_and_on_a_mesh():
    model, params, method = models.Mlp(), mlp_params(), ptq.Gptq(RULES)
    observed = method.observe(lambda params, x: model.apply({"params": params}, x))
    state = observed.init(params, BATCHES[0])
    scanned, outs = jax.lax.scan(
        lambda state, x: observed(state, params, x), state, jnp.stack(BATCHES)
    )
    assert outs.shape == (3, 24, 3)
    mesh = jax.make_mesh((8,), ("data",))
    place = jax.sharding.NamedSharding(mesh, jax.P("data"))
    for x in BATCHES:
        state, _ = jax.jit(observed)(state, params, jax.device_put(x, place))
    models.assert_close(scanned, state, 1e-5)
    method.state = state
    quantized = method.quantize_params(params, abstract(method, model, BATCHES[0]))
    again = ptq.Gptq(RULES)
    models.assert_close(quantized, run(again, model, params, *BATCHES), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("make", [ptq.Gptq, ptq.SmoothQuant])
def test_parts_of_a_tree_donation_and_shapes(make):
    model, params, method = models.Mlp(), mlp_params(), make(RULES)
    collect(method, model, params, *BATCHES)
    target = abstract(method, model, BATCHES[0])
    whole = method.quantize_params(params, target)
    shapes = jax.eval_shape(lambda p: method.quantize_params(p, target), params)
    assert jax.tree.structure(shapes) == jax.tree.structure(target)
    for found, expected in zip(
        jax.tree.leaves(shapes), jax.tree.leaves(target), strict=True
    ):
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    models.assert_close(
        jax.jit(lambda p: method.quantize_params(p, target))(params), whole, 1e-5
    )
    parts = {}
    for name in params:
        parts |= method.quantize_params({name: params[name]}, target)
    models.assert_same(parts, whole)
    kernel = params["Dense_0"]["kernel"]
    models.assert_same(method.quantize_params(params, target, donate=True), whole)
    assert kernel.is_deleted()


def test_errors():
    model, params, method = models.Mlp(), mlp_params(), ptq.Gptq(RULES)
    target = abstract(method, model, BATCHES[0])
    with pytest.raises(ValueError, match="No inputs were collected: run the wrapped"):
        method.quantize_params(params, target)
    nothing = ptq.Gptq(models.NOTHING)
    with pytest.raises(ValueError, match="No rule quantizes an op"):
        collect(nothing, model, params, BATCHES[0])
    step = method.wrap(jax.jit(lambda p, x: model.apply({"params": p}, x)))
    with pytest.raises(ValueError, match=r"Gptq wraps.*method\.observe\(step\)"):
        jax.jit(step)(params, BATCHES[0])
    step(params, np.full_like(BATCHES[0], np.inf))
    with pytest.raises(ValueError, match="No input was collected for 'Dense_0/dot_ge"):
        method.quantize_params(params, target)
    step(params, BATCHES[0])
    other = models.Mlp(width=8)
    floats = jax.jit(other.init)(jax.random.key(0), BATCHES[0])["params"]
    with pytest.raises(
        ValueError, match=r"'Dense_0/kernel' has shape \(6, 8\), and \(6, 16\)"
    ):
        method.quantize_params(floats, abstract(method, other, BATCHES[0]))
    deep = nn.Sequential([nn.Dense(6)])
    floats = jax.jit(deep.init)(jax.random.key(0), BATCHES[0])["params"]
    with pytest.raises(ValueError, match="'layers_0/kernel' was not reached"):
        method.quantize_params(floats, abstract(method, deep, BATCHES[0]))
    with pytest.raises(TypeError, match="is a shape, and GPTQ looks at values"):
        method.quantize_params(jax.eval_shape(lambda: params), target)


@pytest.mark.slow
def test_two_models_with_the_same_names():
    first, second = nn.Dense(3), nn.Dense(5)
    a = jax.jit(first.init)(jax.random.key(0), BATCHES[0])
    b = jax.jit(second.init)(jax.random.key(0), BATCHES[0])
    step = ptq.Gptq(RULES).wrap(lambda x: (first.apply(a, x), second.apply(b, x)))
    with pytest.raises(ValueError, match="'kernel' in two ways: the step calls two"):
        step(BATCHES[0])


@pytest.mark.slow
def test_a_branch_that_is_never_taken():
    class Branches(nn.Module):
        @nn.compact
        def __call__(self, x):
            first, second = nn.Dense(2, name="first"), nn.Dense(2, name="second")
            both = first(x), second(x)
            return (
                jax.lax.cond(x.sum() > 1e6, lambda x: second(x), lambda x: first(x), x)
                + 0 * both[0]
            )

    model, method = Branches(), ptq.Gptq(RULES)
    params = jax.jit(model.init)(jax.random.key(0), BATCHES[0])["params"]
    collect(method, model, params, BATCHES[0])
    with pytest.raises(ValueError, match="No input was collected for 'second/dot_gen"):
        method.quantize_params(params, abstract(method, model, BATCHES[0]))
