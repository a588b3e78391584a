"""Plain functions as the models of steps, against the same arithmetic by hand."""

import gc
import itertools

import jax
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax import numpy as jnp

import qwix_train
from qwix_train import (
    QuantTrainState,
    as_model,
    calib,
    ptq,
    wrap_eval_step,
    wrap_train_step,
)
from qwix_train.planning import current_rule
from tests import models

RULES = [models.rule("int8", "int8", act_static_scale=True)]
BATCHES = [
    np.random.default_rng(i).normal(size=(8, 6)).astype(np.float32) * (i + 1)
    for i in range(3)
]
PARAMS = {
    name: models.normal(*shape, seed=i)
    for i, (name, shape) in enumerate({"first": (6, 7), "second": (7, 3)}.items())
}


def forward(params, x):
    return jnp.tanh(x @ params["first"]) @ params["second"]


MODEL = as_model(forward)


def eval_step(params, x):
    # A product after the model, which is none of its ops.
    out = MODEL(params, x)
    return {"mean": out.mean(), "gram": out.T @ out}


def expected_ranges():
    hidden = [np.tanh(x @ PARAMS["first"]) for x in BATCHES]
    return [
        models.MARGIN * np.mean([np.abs(x).max() for x in xs])
        for xs in (BATCHES, hidden)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("jitted", [True, False])
def test_ranges_are_collected_and_quantize_the_function(jitted):
    step = jax.jit(eval_step) if jitted else eval_step
    calibrator = calib.Calibrator(RULES)
    calibrated = calibrator.wrap(step)
    for x in BATCHES:
        check = models.assert_same if jitted else models.assert_close
        check(calibrated(PARAMS, x), step(PARAMS, x))
    stats = calibrator.quant_stats
    assert sorted(stats) == ["dot_general0_lhs", "dot_general1_lhs"]
    for found, expected in zip(stats.values(), expected_ranges(), strict=True):
        np.testing.assert_allclose(found["sum_of_absmax"] / 3, [[expected]], 1e-6)
    quantized, params = ptq.quantize(
        forward, PARAMS, RULES, BATCHES[0], quant_stats=stats
    )
    scale = params["dot_general0_lhs_scale"].array
    np.testing.assert_allclose(scale, [[expected_ranges()[0] / 127.5]], 1e-6)
    out, exact = quantized(params, BATCHES[0]), forward(PARAMS, BATCHES[0])
    assert 0 < np.abs(out - exact).max() < 0.05 * np.abs(exact).max()


@pytest.mark.slow
def test_qat_with_ranges_in_the_state():
    def step(state, x):
        def loss(params):
            return jnp.mean(MODEL(params, x) ** 2)

        value, grads = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=grads), value

    state = QuantTrainState.create(apply_fn=None, params=PARAMS, tx=optax.sgd(0.1))
    state = qwix_train.attach(state, RULES, BATCHES[0], step=step)
    state, loss = jax.jit(wrap_train_step(step, RULES))(state, BATCHES[0])

    def fake(x, weight):
        # The first batch: its range is that of the statistics.
        x = models.fake_quant(x, 8, (0, 1))
        return x @ models.fake_quant(weight, 8, 0)

    hidden = np.tanh(fake(BATCHES[0], PARAMS["first"]))
    expected = np.mean(fake(hidden, PARAMS["second"]) ** 2)
    np.testing.assert_allclose(loss, expected, 1e-4)
    assert state.quant_stats["dot_general1_lhs"]["count"] == 1


def test_elsewhere_it_is_the_function():
    models.assert_same(MODEL(PARAMS, BATCHES[0]), forward(PARAMS, BATCHES[0]))
    assert MODEL.__name__ == "forward"
    with pytest.raises(TypeError, match="Expected a function"):
        as_model(PARAMS)  # type: ignore[arg-type]


def test_a_function_that_is_not_marked_is_named():
    step = calib.Calibrator(RULES).wrap(lambda params, x: forward(params, x).mean())
    with pytest.raises(ValueError, match=r"qwix_train.as_model\(forward\)"):
        step(PARAMS, BATCHES[0])


LAYER = nn.Dense(3)
LAYER_PARAMS = {
    "params": {"kernel": np.ones((6, 3), np.float32), "bias": np.zeros(3, np.float32)}
}
WEIGHTS_ONLY = [models.rule("int4")]


def kept_by(make, *args):
    """The objects that stay of a step that was made, called and dropped."""
    # What other tests left is not searched again and again.
    gc.freeze()
    counts = []
    for _ in range(5):
        make()(*args)
        gc.collect()
        counts.append(len(gc.get_objects()))
    # What else runs in the process may leave objects in one call. A leak does in each.
    return min(after - before for before, after in itertools.pairwise(counts[1:]))


class Asking(nn.Dense):
    def __call__(self, x):
        qwix_train.current_rule("gmm")
        return super().__call__(x)


def gradient(params, x, layer=LAYER):
    def loss(params):
        return jnp.mean(jnp.square(layer.apply(params, x + 1)))

    return jax.grad(loss)(params)


@pytest.fixture
def no_kernel_asked(monkeypatch):
    # Once a kernel has asked for its rule, JAX keeps its traces for each set of rules.
    monkeypatch.setattr(current_rule, "_asked", set())


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["same rules", "other rules", "rules of a kernel", "nnx", "nnx held"]
)
def test_nothing_stays_of_a_step_that_was_dropped(kind, no_kernel_asked):
    x = BATCHES[0]
    model = nnx.Linear(6, 3, rngs=nnx.Rngs(0))
    counter = itertools.count()

    def make():
        def linen(params, x):
            layer = Asking(3) if kind == "rules of a kernel" else LAYER
            return gradient(params, x, layer)

        def of_nnx(model, x):
            return jnp.mean(jnp.square(model(x + 1)))

        def holding(x):
            return of_nnx(model, x)

        if kind.startswith("nnx"):
            step = holding if kind == "nnx held" else of_nnx
            return nnx.jit(wrap_eval_step(step, WEIGHTS_ONLY))
        number = next(counter) if kind == "other rules" else 0
        rules = [models.rule("int4", module_path=".*|no" + "o" * number)]
        return jax.jit(wrap_train_step(linen, rules))

    # 176 to 349 before: the traces of `jnp.mean` and the like, for each step.
    args = {"nnx": (model, x), "nnx held": (x,)}.get(kind, (LAYER_PARAMS, x))
    assert kept_by(make, *args) < 10
    assert bool(current_rule._asked) == (kind == "rules of a kernel")


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [True, False])
def test_nothing_stays_of_a_step_with_static_ranges(compiled):
    def step(state, x):
        grads = gradient({"params": state.params}, x)["params"]
        return state.apply_gradients(grads=grads)

    def make():
        wrapped = wrap_train_step(step, rules)
        return jax.jit(wrapped) if compiled else wrapped

    rules = [models.rule("int4", "int8", act_static_scale=True)]
    state = QuantTrainState.create(
        apply_fn=LAYER.apply, params=LAYER_PARAMS["params"], tx=optax.sgd(0.1)
    )
    state = qwix_train.attach(state, rules, BATCHES[0])
    # 542 before if it was compiled, and 505 for each call if not.
    assert kept_by(make, state, BATCHES[0]) < 10


def test_steps_that_share_a_compiled_model():
    compiled = jax.jit(LAYER.apply)

    def step(params, x):
        return compiled(params, x)

    def teaching(params, teacher, x):
        return compiled(params, x), compiled(teacher, x)

    x = BATCHES[0]
    params = jax.tree.map(lambda p: p + 0.3 * p.sum(), LAYER_PARAMS)

    def run(step, *args, rules=WEIGHTS_ONLY):
        return jax.jit(wrap_eval_step(step, rules))(*args)

    first = run(step, params, x)
    models.assert_same(run(step, params, x), first)
    wider = run(step, params, x, rules=[models.rule("int8")])
    models.assert_same(jax.jit(step)(params, x), LAYER.apply(params, x))
    models.assert_differ(first, wider)
    with pytest.raises(ValueError, match="reached no call"):
        run(lambda params, x: x, params, x)
    with pytest.warns(UserWarning, match="2 different trees"):
        run(teaching, params, LAYER_PARAMS, x)


def test_a_step_that_cannot_be_traced_runs():
    def step(params, teacher, x):
        return float(LAYER.apply(params, x).sum() - LAYER.apply(teacher, x).sum())

    other = jax.tree.map(lambda p: 2 * p, LAYER_PARAMS)
    got = wrap_eval_step(step, WEIGHTS_ONLY)(LAYER_PARAMS, other, BATCHES[0])
    assert isinstance(got, float)


@pytest.mark.parametrize("model", [LAYER, nnx.Linear(6, 3, rngs=nnx.Rngs(0))])
def test_a_model_is_no_step(model):
    call = r"model\.apply" if model is LAYER else r"model\(x\)"
    for wrap in (
        lambda: wrap_train_step(model, WEIGHTS_ONLY),
        lambda: wrap_eval_step(model, WEIGHTS_ONLY),
        lambda: calib.Calibrator(RULES).wrap(model),
    ):
        with pytest.raises(TypeError, match=f"is a model, not a step.*{call}"):
            wrap()


@pytest.mark.parametrize("kind", ["linen", "nnx"])
@pytest.mark.parametrize("wrapper", ["step", "calibrator"])
def test_a_model_that_is_quantized_keeps_its_rules_or_says_so(kind, wrapper):
    x, int4 = jnp.ones((2, 6)), [models.rule("int4")]
    provider = qwix_train.QtProvider(int4)
    if kind == "linen":
        model = qwix_train.quantize_model(nn.Dense(3), provider)
        given = nn.Dense(3).init(jax.random.key(0), x)
    else:
        model = None
        given = qwix_train.quantize_model(nnx.Linear(6, 3, rngs=nnx.Rngs(0)), provider)

    def step(given, x):
        return given(x) if model is None else model.apply(given, x)

    step = (
        wrap_eval_step(step, RULES, quant_stats={})
        if wrapper == "step"
        else calib.Calibrator(RULES).wrap(step)
    )
    with pytest.raises(ValueError, match="quantized already, by .* a QtProvider"):
        step(given, x)


def test_a_step_that_is_wrapped_already_is_one_reason_among_those_named():
    step = wrap_eval_step(lambda p, x: MODEL(p, x), [models.rule("int8")])
    with pytest.raises(ValueError, match="If it is wrapped already"):
        wrap_eval_step(step, [models.rule("int4")])(PARAMS, BATCHES[0])


@pytest.mark.parametrize("rules", [None, RULES[0]])
def test_a_calibrator_of_no_list_of_rules(rules):
    with pytest.raises(TypeError, match="Expected a list of rules"):
        calib.Calibrator(rules)
