"""Static ranges in a collection of a Linen model: against `qwix`, and by hand."""

import sys
from typing import Any

import jax
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
        act_calibration_method=method, act_batch_axes=(0,), **STATIC
    )
    floats = Mlp().init(KEY, BATCHES[0])["params"]
    model = library.quantize_model(Mlp(), library.QtProvider([rule]))
    quant_stats = model.init(KEY, BATCHES[0])["quant_stats"]
    results = {}
    for i, x in enumerate(BATCHES[:3]):
        variables = {"params": floats, "quant_stats": quant_stats}
        out, updates = model.apply(variables, x, mutable="quant_stats")
        quant_stats = updates["quant_stats"]
        results[f"train{i}"] = out
    for path, leaf in jax.tree_util.tree_leaves_with_path(quant_stats):
        results[f"stats{jax.tree_util.keystr(path)}"] = leaf
    variables = {"params": floats, "quant_stats": quant_stats}
    results["eval"] = model.apply(variables, BATCHES[3])
    ptq_model = library.quantize_model(Mlp(), library.PtqProvider([rule]))
    abstract = jax.eval_shape(ptq_model.init, KEY, BATCHES[0])["params"]
    params = library.quantize_params(floats, abstract, quant_stats)
    results["export"] = ptq_model.apply({"params": params}, BATCHES[3])
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
    variables: Any = model.init(KEY, BATCHES[0])
    params, stats = variables["params"], variables["quant_stats"]

    @jax.jit
    def step(params, stats, x):
        def loss_fn(params):
            variables = {"params": params, "quant_stats": stats}
            out, updates = model.apply(variables, x, mutable=["quant_stats"])
            return jnp.mean(out**2), updates

        (loss, updates), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        params = jax.tree.map(lambda p, g: p - RATE * g, params, grads)
        return params, updates["quant_stats"], loss

    expected = test_step_ranges.Threaded()
    for x in BATCHES:
        params, stats, loss = step(params, stats, x)
        np.testing.assert_allclose(loss, expected.step(x), 1e-5)
    expected.check(params, stats)
    # Where the collection is not mutable, it is used, and stays.
    out = model.apply({"params": params, "quant_stats": stats}, BATCHES[0])
    np.testing.assert_allclose(
        jnp.mean(out**2), expected.forward(expected.params, BATCHES[0], False), 1e-5
    )


@pytest.mark.thinned(2)
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
        variables: Any = model.init(KEY, BATCHES[0])

        def call(variables, model=model):
            return model.apply(variables, BATCHES[0], mutable=["quant_stats"])[0]

        text = str(jax.make_jaxpr(call)(variables))
        primitives.append(text.count("prevent_cse="))
    assert primitives[0] == primitives[1] > 0


def test_a_model_without_its_collection_says_so():
    model: Any = qwix_train.quantize_model(Mlp(), QtProvider(RULES))
    params = model.init(KEY, BATCHES[0])["params"]
    with pytest.raises(
        ValueError, match="have no range for 'Dense_0/dot_general0_lhs'"
    ):
        model.apply({"params": params}, BATCHES[0])


def test_submodules_keep_the_collection_at_their_paths():
    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            inner = qwix_train.quantize_model(Mlp(name="inner"), QtProvider(RULES))
            return inner(x)

    variables = Outer().init(KEY, BATCHES[0])
    updates: Any
    _, updates = Outer().apply(variables, BATCHES[0], mutable="quant_stats")
    stats = updates["quant_stats"]["inner"]["Dense_0"]["dot_general0_lhs"]
    expected = models.MARGIN * np.abs(BATCHES[0]).max()
    np.testing.assert_allclose(stats["sum_of_absmax"], [[expected]], 1e-6)
    assert stats["count"] == 1


if __name__ == "__main__":
    import qwix

    found = {}
    for method in METHODS:
        found |= train(qwix, method)
    np.savez(sys.argv[1], **found)
