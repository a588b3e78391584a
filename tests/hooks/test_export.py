"""Exports of a model while it trains: what is restored is what was quantized."""

import jax
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax import numpy as jnp

from qwix_train import (
    QuantizationRule,
    attach,
    hooks,
    ptq,
    wrap_train_step,
)
from tests import models

X = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
INT8 = [QuantizationRule(weight_qtype="int8", act_qtype="int8")]
STATIC = [
    QuantizationRule(weight_qtype="int8", act_qtype="int8", act_static_scale=True)
]


@pytest.fixture
def trained():
    """A Linen model, and its params after a number of steps."""
    model = models.Mlp()
    params = jax.jit(model.init)(jax.random.key(0), X)["params"]
    return model, lambda step: jax.tree.map(lambda x: x * step, params)


def test_exports_what_is_quantized(trained, tmp_path):
    model, params_at = trained
    export = hooks.Export(
        tmp_path / "exports", model, INT8, X, every_steps=2, metadata={"run": "a"}
    )
    assert export.steps() == []
    for step in range(1, 6):
        assert export(step, state=params_at(step)) == (step in (2, 4))
    assert export.steps() == [2, 4]
    assert sorted(p.name for p in (tmp_path / "exports").iterdir()) == [
        "step_000002",
        "step_000004",
    ]
    for step in (2, 4):
        _, expected = ptq.quantize(model, params_at(step), INT8, X)
        models.assert_same(ptq.restore(export.folder(step), expected), expected)
        manifest = ptq.read_manifest(export.folder(step))
        assert manifest.metadata == {"run": "a", "step": step}
        assert list(manifest.rules) == INT8


@pytest.mark.parametrize("execute_async", [False, True])
def test_keeps_the_last(trained, tmp_path, execute_async):
    model, params_at = trained
    export = hooks.Export(
        tmp_path, model, INT8, X, state=lambda: params_at(1.0), max_to_keep=2,
        execute_async=execute_async, on_steps=[2, 9, 10, 1_000_000],
    )  # fmt: skip
    (tmp_path / "notes").mkdir()
    # Left by a run that was killed while it deleted, or wrote.
    (tmp_path / "step_000001.qwix_train-deleted").mkdir()
    (tmp_path / "step_000005.orbax-checkpoint-tmp").mkdir()
    for step in (2, 9, 10, 1_000_000):
        assert export(step)
    export.wait_until_finished()
    assert export.steps() == [10, 1_000_000]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "notes",
        "step_000005.orbax-checkpoint-tmp",
        "step_000010",
        "step_1000000",
    ]


def test_an_export_in_the_background_holds_the_state_of_its_step(trained, tmp_path):
    model, params_at = trained
    export = hooks.Export(tmp_path, model, INT8, X, execute_async=True, on_steps=[1])
    params = params_at(1.0)
    _, expected = ptq.quantize(model, params_at(1.0), INT8, X)
    export(1, state=params)
    jax.tree.map(lambda x: x.delete(), params)  # as a step that takes them over does
    export.wait_until_finished()
    models.assert_same(ptq.restore(export.folder(1), expected), expected)


def test_a_step_that_is_repeated_is_replaced(trained, tmp_path):
    model, params_at = trained
    for factor in (1.0, 3.0):
        export = hooks.Export(tmp_path, model, INT8, X, on_steps=[5])
        export(5, state=params_at(factor))
    _, expected = ptq.quantize(model, params_at(3.0), INT8, X)
    models.assert_same(ptq.restore(export.folder(5), expected), expected)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000005"]


@pytest.mark.slow
def test_all_collections_of_a_linen_model(tmp_path):
    model = models.Everything()
    images = np.random.default_rng(0).normal(size=(8, 4, 4)).astype(np.float32)
    variables = model.init(jax.random.key(0), images, train=False)
    state = models.BatchState.create(
        apply_fn=model.apply,
        params=variables["params"],
        batch_stats=jax.tree.map(lambda x: x + 0.5, variables["batch_stats"]),
        tx=optax.sgd(0.1),
    )
    given = {"params": state.params, "batch_stats": state.batch_stats}
    given["perturbations"] = variables["perturbations"]
    export = hooks.Export(
        tmp_path, model, INT8, images, train=False, on_steps=[1, 2, 3]
    )
    export(1, state=given)
    restored = ptq.restore(export.folder(1))
    models.assert_same(restored["batch_stats"], state.batch_stats)
    assert restored["params"]["Dense_0"]["kernel"].array.qvalue.dtype == jnp.int8
    # Of the train state `batch_stats` would be taken, and this is not one of its.
    with pytest.raises(ValueError, match="collection 'perturbations'"):
        export(2, state=state)
    assert export.steps() == [1]


@pytest.mark.slow
def test_random_keys_of_a_model_that_draws_while_it_evaluates(tmp_path):
    """From a stream of its own, which its other collection depends on."""

    class Noisy(nn.Module):
        @nn.compact
        def __call__(self, x):
            noise = jax.random.normal(self.make_rng("noise"), x.shape)
            self.variable("stats", "noise", lambda: noise)
            return nn.Dense(3)(x + noise)

    rngs = {"noise": jax.random.key(1)}
    variables = Noisy().init({"params": jax.random.key(0), **rngs}, X)
    export = hooks.Export(tmp_path, Noisy(), INT8, X, rngs=rngs, on_steps=[1])
    export(1, state=variables)
    restored = ptq.restore(export.folder(1))
    _, expected = ptq.quantize(Noisy(), variables["params"], INT8, X, rngs=rngs)
    models.assert_same(restored, {"params": expected, "stats": variables["stats"]})


@pytest.mark.slow
def test_an_nnx_model_as_it_is(tmp_path):
    model = models.NnxMlp(nnx.Rngs(0))
    model.eval()
    export = hooks.Export(tmp_path, model, INT8, X, on_steps=[1, 2])
    optimizer = nnx.ModelAndOptimizer(model, optax.sgd(0.1))
    for step, state in ((1, None), (2, optimizer)):
        expected, _ = ptq.quantize(model, None, INT8, X)
        export(step, state=state)
        restored = ptq.restore(export.folder(step), expected)
        np.testing.assert_array_equal(restored(X), expected(X))
        model.l1.kernel[...] = model.l1.kernel[...] ** 3


def test_static_ranges(trained, tmp_path):
    model, params_at = trained
    quant_stats = None
    export = hooks.Export(
        tmp_path, model, STATIC, X, quant_stats=lambda: quant_stats, on_steps=[1, 2]
    )
    with pytest.raises(ValueError, match="static range that is not known"):
        export(1, state=params_at(1.0))
    assert export.steps() == []
    stats = {"count": 1, "sum_of_absmax": np.array([[2.55]], np.float32)}
    quant_stats = {f"Dense_{i}": {"dot_general0_lhs": stats} for i in range(2)}
    export(2, state=params_at(1.0))
    scale = ptq.restore(export.folder(2))["Dense_0"]["dot_general0_lhs_scale"]
    np.testing.assert_allclose(scale.array, [[0.02]], rtol=1e-6)  # 2.55 / 127.5


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["linen", "nnx"])
def test_static_ranges_in_the_state_of_qat(trained, tmp_path, framework):
    if framework == "nnx":
        state = model = models.NnxMlp(nnx.Rngs(0), rate=0.0)
        attach(model, STATIC, X)
        wrap_train_step(lambda model, x: model(x).mean(), STATIC)(model, X)
        layer = "l1"
    else:
        model, params_at = trained
        state = models.train_state.TrainState.create(
            apply_fn=model.apply, params=params_at(1.0), tx=optax.sgd(0.1)
        )
        state = attach(state, STATIC, X)

        def train_step(state, x):
            return state.apply_fn({"params": state.params}, x).mean(), state

        _, state = wrap_train_step(train_step, STATIC)(state, X)
        layer = "Dense_0"
    export = hooks.Export(tmp_path, model, STATIC, X, on_steps=[1])
    export(1, state=state)
    scale = ptq.restore(export.folder(1))[layer]["dot_general0_lhs_scale"]
    np.testing.assert_allclose(scale.array, [[np.abs(X).max() / 127.5]], rtol=1e-6)


def test_a_function_of_params(tmp_path):
    export = hooks.Export(
        tmp_path, lambda params, x: x @ params["w"], INT8, jnp.ones((2, 8)),
        on_steps=[1],
    )  # fmt: skip
    export(1, state={"w": jax.device_put(X)})
    assert ptq.restore(export.folder(1))["w"].array.qvalue.shape == (8, 4)


def test_what_fails_in_the_background_is_raised(trained, tmp_path, monkeypatch):
    model, params_at = trained

    class Failed:
        def wait_until_finished(self):
            raise OSError("disk is full")

    export = hooks.Export(tmp_path, model, INT8, X, execute_async=True, on_steps=[1, 2])
    monkeypatch.setattr(ptq, "save_async", lambda *args, **kwargs: Failed())
    export(1, state=params_at(1.0))
    with pytest.raises(OSError, match="disk is full"):
        export(2, state=params_at(1.0))


def test_refuses_arguments_that_cannot_be(trained, tmp_path):
    model, _ = trained
    with pytest.raises(ValueError, match="max_to_keep=0"):
        hooks.Export(tmp_path, model, INT8, X, max_to_keep=0)
    with pytest.raises(TypeError, match="list of rules"):
        hooks.Export(tmp_path, model, INT8[0], X)
    with pytest.raises(ValueError, match="was given no state"):
        hooks.Export(tmp_path, model, INT8, X, on_steps=[1])(1)
    nnx_model = models.NnxMlp(nnx.Rngs(0))
    with pytest.raises(TypeError, match="Expected an NNX module"):
        hooks.Export(tmp_path, nnx_model, INT8, X, on_steps=[1])(1, state={"w": X})
