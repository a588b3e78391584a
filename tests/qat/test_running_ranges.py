"""Static ranges in a collection of a Linen model: against `qwix`, and by hand."""

import functools
import sys
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import linen as nn
from jax import numpy as jnp

import qwix_train
from qwix_train import QtProvider, QuantizationRule
from tests import models, reference_process, test_step_ranges
from tests.test_step_ranges import BATCHES, KEY, RATE, RULES, STATIC, Mlp

METHODS = ["minmax", "absmax,0.8"]


def train(library, method):
    """Three batches through a quantized model, and then an export."""
    rule = library.QuantizationRule(
        act_calibration_method=method,
        act_batch_axes=(0,),
        # The largest magnitude is no tie between two codes.
        weight_calibration_method="absmax,1.1",
        **STATIC,
    )
    floats = models.params_of(Mlp(), BATCHES[0])
    model = library.quantize_model(Mlp(), library.QtProvider([rule]))
    quant_stats = jax.jit(model.init)(KEY, BATCHES[0])["quant_stats"]
    apply = jax.jit(model.apply, static_argnames="mutable")
    results = {}
    for i, x in enumerate(BATCHES[:3]):
        variables = {"params": floats, "quant_stats": quant_stats}
        out, updates = apply(variables, x, mutable="quant_stats")
        quant_stats = updates["quant_stats"]
        results[f"train{i}"] = out
    for path, leaf in jax.tree_util.tree_leaves_with_path(quant_stats):
        results[f"stats{jax.tree_util.keystr(path)}"] = leaf
    variables = {"params": floats, "quant_stats": quant_stats}
    results["eval"] = apply(variables, BATCHES[3])
    ptq_model = library.quantize_model(Mlp(), library.PtqProvider([rule]))
    abstract = jax.eval_shape(ptq_model.init, KEY, BATCHES[0])["params"]
    params = library.quantize_params(floats, abstract, quant_stats)
    results["export"] = jax.jit(ptq_model.apply)({"params": params}, BATCHES[3])
    return {f"{method}|{key}": np.asarray(x) for key, x in results.items()}


@pytest.mark.slow
def test_statistics_and_logits_are_those_of_qwix(tmp_path):
    path = tmp_path / "reference.npz"
    reference_process.run("tests.qat.test_running_ranges", path)
    with np.load(path) as expected:
        ours = {}
        for method in METHODS:
            ours |= train(qwix_train, method)
        assert set(ours) == set(expected)  # the very same layout
        for key, value in expected.items():
            np.testing.assert_allclose(ours[key], value, 1e-5, 1e-5, err_msg=key)


@pytest.mark.slow
def test_a_training_loop_that_threads_the_collection():
    model: Any = qwix_train.quantize_model(Mlp(), QtProvider(RULES))
    stats = jax.jit(model.init)(KEY, BATCHES[0])["quant_stats"]
    expected = test_step_ranges.Threaded()
    params = expected.params

    @jax.jit
    def step(params, stats, x):
        def loss_fn(params):
            variables = {"params": params, "quant_stats": stats}
            out, updates = model.apply(variables, x, mutable=["quant_stats"])
            return jnp.mean(out**2), updates

        (loss, updates), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        params = jax.tree.map(lambda p, g: p - RATE * g, params, grads)
        return params, updates["quant_stats"], loss

    for x in BATCHES:
        params, stats, loss = step(params, stats, x)
        np.testing.assert_allclose(loss, expected.step(x), 1e-5)
    expected.check(params, stats)
    # Where the collection is not mutable, it is used, and stays.
    out = model.apply({"params": params, "quant_stats": stats}, BATCHES[0])
    np.testing.assert_allclose(
        jnp.mean(out**2), expected.forward(expected.params, BATCHES[0], False), 1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize("remat", [False, True])
def test_gradients_through_scanned_layers(remat):
    """Those of ranges that are fixed to what the statistics come to."""
    model: Any = qwix_train.quantize_model(models.Layers(remat), QtProvider(RULES))
    variables: Any = model.init(KEY, BATCHES[0])
    stats = variables["quant_stats"]["layers"]["Dense_0"]["dot_general0_lhs"]
    assert stats["count"].shape == (3,) and stats["sum_of_absmax"].shape == (3, 1, 1)

    def loss_fn(params, x):
        out, updates = model.apply(
            {**variables, "params": params}, x, mutable="quant_stats"
        )
        return jnp.mean(out**2), updates["quant_stats"]

    grads = jax.jit(jax.grad(loss_fn, has_aux=True))
    grads, stats = grads(variables["params"], BATCHES[0])
    np.testing.assert_array_equal(
        stats["layers"]["Dense_0"]["dot_general0_lhs"]["count"], [1, 1, 1]
    )
    fixed: Any = qwix_train.quantize_model(
        models.Layers(remat), QtProvider(RULES, quant_stats=stats)
    )

    def of_fixed(params):
        return jnp.mean(fixed.apply({"params": params}, BATCHES[0]) ** 2)

    models.assert_close(grads, jax.grad(of_fixed)(variables["params"]))


def test_remat_stays_in_force():
    """What was saved for the backward pass is what was without statistics."""
    rule = QuantizationRule(weight_qtype="int8", act_qtype="int8")
    primitives = []
    for rules in ([rule], RULES):
        model: Any = qwix_train.quantize_model(models.Layers(True), QtProvider(rules))
        variables: Any = jax.jit(model.init)(KEY, BATCHES[0])

        def call(variables, model=model):
            return model.apply(variables, BATCHES[0], mutable=["quant_stats"])[0]

        text = str(jax.make_jaxpr(call)(variables))
        primitives.append(text.count("prevent_cse="))
    assert primitives[0] == primitives[1] > 0


def test_a_model_without_its_collection_says_so():
    model: Any = qwix_train.quantize_model(Mlp(), QtProvider(RULES))
    params = jax.jit(model.init)(KEY, BATCHES[0])["params"]
    with pytest.raises(
        ValueError, match="have no range for 'Dense_0/dot_general0_lhs'"
    ):
        model.apply({"params": params}, BATCHES[0])


@pytest.mark.slow
def test_submodules_keep_the_collection_at_their_paths():
    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            inner = qwix_train.quantize_model(Mlp(name="inner"), QtProvider(RULES))
            return inner(x)

    variables = jax.jit(Outer().init)(KEY, BATCHES[0])
    updates: Any
    _, updates = Outer().apply(variables, BATCHES[0], mutable="quant_stats")
    stats = updates["quant_stats"]["inner"]["Dense_0"]["dot_general0_lhs"]
    expected = models.MARGIN * np.abs(BATCHES[0]).max()
    np.testing.assert_allclose(stats["sum_of_absmax"], [[expected]], 1e-6)
    assert stats["count"] == 1


def test_delayed_scaling_quantizes_by_the_batches_before():
    rule = QuantizationRule(
        weight_qtype="float8_e4m3fn",
        act_qtype="float8_e4m3fn",
        act_static_scale=True,
        act_averaging="amax_history,2",
    )
    dense: Any = nn.Dense(3, use_bias=False)
    model: Any = qwix_train.quantize_model(dense, QtProvider([rule]))
    rng = np.random.default_rng(0)
    largest = [2.0, 8.0, 1.0, 4.0, 1.0]
    batches = [a * rng.uniform(-1, 1, (4, 6)).astype(np.float32) for a in largest]
    for x, a in zip(batches, largest, strict=True):
        x[0, 0] = a
    variables: Any = jax.jit(model.init)(KEY, batches[0])
    params, stats = variables["params"], variables["quant_stats"]
    kernel = np.asarray(params["kernel"], np.float64)

    def of_float8(x, bound):
        scale = bound / 448
        codes = np.clip(x / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn)
        return codes.astype(np.float64) * scale

    weight = of_float8(kernel, np.abs(kernel).max(0))
    apply = jax.jit(functools.partial(model.apply, mutable="quant_stats"))
    # The first batch has its own range; the others the wider of the two before.
    for x, bound in zip(batches, [2.0, 2.0, 8.0, 8.0, 4.0], strict=True):
        out, updates = apply({"params": params, "quant_stats": stats}, x)
        stats = updates["quant_stats"]
        np.testing.assert_allclose(out, of_float8(x, bound) @ weight, 1e-4, 1e-4)
    kept = stats["dot_general0_lhs"]
    assert kept["window_of_absmax"].item() == 4 and kept["count"] == 5
    np.testing.assert_array_equal(np.ravel(kept["history_absmax"]), [1, 4])
    # Evaluation and serving use the same range as the next step.
    out = model.apply({"params": params, "quant_stats": stats}, batches[1])
    np.testing.assert_allclose(out, of_float8(batches[1], 4.0) @ weight, 1e-4, 1e-4)
    served, codes = qwix_train.ptq.quantize(
        dense, params, [rule], batches[0], quant_stats=stats
    )
    got = served.apply({"params": codes}, batches[1])
    np.testing.assert_allclose(got, out, 1e-4, 1e-4)


if __name__ == "__main__":
    import qwix

    found = {}
    for method in METHODS:
        found |= train(qwix, method)
    np.savez(sys.argv[1], **found)
