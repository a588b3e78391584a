"""Ranges collected in unmodified loops, against NumPy on all batches at once."""

import functools

import jax
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.training import train_state
from jax import P
from jax import numpy as jnp
from jax.sharding import AxisType, NamedSharding

from qwix_train import QuantizationRule, calib, ptq
from tests import models


def rule(**kwargs):
    return QuantizationRule(
        **{
            "weight_qtype": "int8",
            "act_qtype": "int8",
            "act_static_scale": True,
            **kwargs,
        }
    )


RULES = [rule()]
BATCHES = [
    np.random.default_rng(i).normal(size=(8, 6)).astype(np.float32) * (i + 1)
    for i in range(4)
]


class Linear:
    """The same two layers in each dialect, and what enters them."""

    def __init__(self, framework):
        self.framework = framework
        if framework == "nnx":
            self.model = NnxMlp(nnx.Rngs(0))
            self.params = None
            first = self.model.first
            self.kernel, self.bias = first.kernel[...], first.bias[...]
            self.names = ("first", "second")
        else:
            self.model = models.Mlp()
            self.params = self.model.init(jax.random.key(0), BATCHES[0])["params"]
            self.kernel = self.params["Dense_0"]["kernel"]
            self.bias = self.params["Dense_0"]["bias"]
            self.names = ("Dense_0", "Dense_1")

    def eval_step(self):
        if self.framework == "nnx":
            return nnx.jit(lambda model, x: {"mean": model(x).mean()})
        if self.framework == "linen":
            model = self.model
            return jax.jit(
                lambda params, x: {"mean": model.apply({"params": params}, x).mean()}
            )
        return jax.jit(
            lambda state, x: {
                "mean": state.apply_fn({"params": state.params}, x).mean()
            }
        )

    def args(self, x):
        if self.framework == "nnx":
            return self.model, x
        if self.framework == "linen":
            return self.params, x
        state = train_state.TrainState(
            step=0,
            apply_fn=self.model.apply,
            params=self.params,
            tx=None,  # type: ignore[arg-type]
            opt_state=None,  # type: ignore[arg-type]
        )
        return state, x

    def inputs(self, x):
        """What enters the first layer and the second."""
        hidden = np.maximum(x @ np.asarray(self.kernel) + np.asarray(self.bias), 0)
        return x, hidden


class NnxMlp(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(6, 16, rngs=rngs)
        self.second = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.relu(self.first(x)))


@pytest.mark.thinned(2)
@pytest.mark.parametrize("framework", ["linen", "state", "nnx"])
@pytest.mark.parametrize("jitted", [True, False])
def test_ranges_of_an_eval_loop(framework, jitted):
    case = Linear(framework)
    step = case.eval_step()
    if not jitted:
        step = step.__wrapped__
    calibrator = calib.Calibrator(RULES)
    calibrated = calibrator.wrap(step)
    for x in BATCHES:
        found, expected = (f(*case.args(x))["mean"] for f in (calibrated, step))
        if jitted:
            assert found == expected  # bit-identical metrics
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    for side, name in enumerate(case.names):
        stats = calibrator.quant_stats[name]["dot_general0_lhs"]
        expected = np.mean([np.abs(case.inputs(x)[side]).max() for x in BATCHES])
        found = stats["sum_of_absmax"] / stats["count"]
        np.testing.assert_allclose(found, [[expected]], rtol=1e-6)


def test_a_step_that_calls_another_one_of_the_calibrator():
    case = Linear("linen")
    calibrator = calib.Calibrator(RULES)
    inner = calibrator.wrap(case.eval_step())
    x = BATCHES[0]
    for step in (
        lambda x: inner(case.params, x),
        jax.jit(lambda x: inner(case.params, x)),
        lambda x: x.sum() + inner(case.params, BATCHES[0])["mean"],
    ):
        calibrator.state = {}
        calibrator.wrap(step)(x)
        for side, name in enumerate(case.names):
            stats = calibrator.quant_stats[name]["dot_general0_lhs"]
            expected = np.abs(case.inputs(x)[side]).max()
            np.testing.assert_allclose(stats["sum_of_absmax"], [[expected]], 1e-6)
            assert stats["count"] == 1
    # And the step that is called is one of its own again.
    inner(case.params, x)
    assert calibrator.quant_stats["Dense_0"]["dot_general0_lhs"]["count"] == 2


def test_a_number_is_an_input_unless_the_step_takes_it_as_static():
    model, traces = nn.Dense(2), []
    params = jax.jit(model.init)(jax.random.key(0), BATCHES[0])

    def eval_step(params, x, factor, *, repeat, options):
        traces.append(repeat)
        assert isinstance(repeat, int) and not isinstance(factor, float)
        return repeat * options["offset"] + model.apply(params, factor * x).sum()

    step = jax.jit(eval_step, static_argnames="repeat")
    calibrator = calib.Calibrator(RULES)
    calibrated = calibrator.wrap(step)
    for factor in (1.0, 2.0, np.float32(3.0)):
        given = (params, BATCHES[0], factor)
        more = {"repeat": 2, "options": {"offset": int(factor)}}
        assert calibrated(*given, **more) == step(*given, **more)
        before = len(traces) if factor == 2.0 else None
    calibrated(params, BATCHES[0], 4.0, repeat=2, options={"offset": 4})
    assert len(traces) == before or before is None
    stats = calibrator.quant_stats["dot_general0_lhs"]
    expected = np.abs(BATCHES[0]).max() * (1 + 2 + 3 + 4)
    np.testing.assert_allclose(stats["sum_of_absmax"], [[expected]], 1e-6)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_step_keeps_the_shardings_of_its_arguments(kind):
    mesh = jax.make_mesh((8,), ("data",), (kind,))
    per_device, everywhere = (NamedSharding(mesh, spec) for spec in (P("data"), P()))
    model = nn.Dense(2)
    params = jax.jit(model.init)(jax.random.key(0), BATCHES[0])
    step = jax.jit(
        lambda params, x: model.apply(params, x), in_shardings=(everywhere, per_device)
    )
    expected = step(params, BATCHES[0])
    found = calib.Calibrator(RULES).wrap(step)(params, BATCHES[0])
    models.assert_same(found, expected)
    assert found.sharding.is_equivalent_to(expected.sharding, 2)
    assert expected.sharding.spec[0] == "data"


def test_the_ranges_quantize_a_model():
    case = Linear("linen")
    calibrator = calib.Calibrator(RULES)
    step = calibrator.wrap(case.eval_step())
    for x in BATCHES:
        step(*case.args(x))
    model, params = ptq.quantize(
        case.model, case.params, RULES, BATCHES[0], quant_stats=calibrator.quant_stats
    )
    x = BATCHES[1]
    expected = np.mean([np.abs(case.inputs(x)[0]).max() for x in BATCHES]) / 127.5
    scale = params["Dense_0"]["dot_general0_lhs_scale"].array
    np.testing.assert_allclose(scale, [[expected]], rtol=1e-6)
    out = model.apply({"params": params}, x)
    float_out = case.model.apply({"params": case.params}, x)
    assert 0 < np.abs(out - float_out).max() < 0.1 * np.abs(float_out).max()
    # A scale of the whole activation does not depend on the size of the batch.
    np.testing.assert_allclose(model.apply({"params": params}, x[:1]), out[:1], 1e-6)


@pytest.mark.parametrize(
    ("observer", "averaging", "reference"),
    [
        ("absmax", "mean", lambda xs: np.mean([np.abs(x).max() for x in xs])),
        ("absmax", "minmax", lambda xs: np.max([np.abs(x).max() for x in xs])),
        ("absmax", "last", lambda xs: np.abs(xs[-1]).max()),
        ("absmax,0.5", "mean", lambda xs: np.mean([np.abs(x).max() for x in xs]) / 2),
        ("rms,3", "mean", lambda xs: 3 * np.mean([np.sqrt((x**2).mean()) for x in xs])),
    ],
)
def test_observers_and_averaging_by_name(observer, averaging, reference):
    case = Linear("linen")
    calibrator = calib.Calibrator(
        [rule(act_observer=observer, act_averaging=averaging)]
    )
    step = calibrator.wrap(case.eval_step())
    for x in BATCHES:
        step(*case.args(x))
    stats = calibrator.quant_stats["Dense_0"]["dot_general0_lhs"]
    found = stats["sum_of_absmax"] / stats["count"]
    np.testing.assert_allclose(found, [[reference(BATCHES)]], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("remat", [False, True])
def test_scan_remat_grad_and_micro_batches_at_once(remat):
    """A range for each layer, each counted once for each micro-batch."""
    model = models.Layers(remat)
    params = jax.jit(model.init)(jax.random.key(0), BATCHES[0])["params"]

    def train_step(params, batches):
        def loss(params, x):
            return jnp.mean(model.apply({"params": params}, x) ** 2)

        def body(total, x):
            value, grads = jax.value_and_grad(loss)(params, x)
            return jax.tree.map(jnp.add, total, grads), value

        zeros = jax.tree.map(jnp.zeros_like, params)
        return jax.lax.scan(body, zeros, batches)

    observed = calib.observe(train_step, RULES)
    batches = jnp.stack(BATCHES)
    stats = observed.init(params, batches)
    stats, out = jax.jit(observed)(stats, params, batches)
    models.assert_close(out, train_step(params, batches))
    (state,) = stats.values()
    np.testing.assert_array_equal(state["count"], [4, 4, 4])

    kernels = np.asarray(params["layers"]["Dense_0"]["kernel"])
    ranges = []
    for x in BATCHES:
        ranges.append([])
        for kernel in kernels:
            ranges[-1].append(np.abs(x).max())
            x = np.tanh(3 * (x @ kernel))
    found = observed.quant_stats(stats)["layers"]["Dense_0"]["dot_general0_lhs"]
    np.testing.assert_allclose(
        np.ravel(found["sum_of_absmax"]) / found["count"],
        np.mean(ranges, 0),
        rtol=1e-5,
    )


def test_the_pure_form_in_a_scan_over_batches():
    case = Linear("linen")
    observed = calib.observe(case.eval_step(), RULES)
    stats = observed.init(*case.args(BATCHES[0]))
    stats, out = jax.lax.scan(
        lambda stats, x: observed(stats, *case.args(x)), stats, jnp.stack(BATCHES)
    )
    assert out["mean"].shape == (4,)
    found = observed.quant_stats(stats)["Dense_0"]["dot_general0_lhs"]
    expected = np.mean([np.abs(x).max() for x in BATCHES])
    np.testing.assert_allclose(
        found["sum_of_absmax"] / found["count"], [[expected]], rtol=1e-6
    )


def test_a_batch_that_is_not_finite_does_not_count():
    case = Linear("linen")
    calibrator = calib.Calibrator(RULES)
    step = calibrator.wrap(case.eval_step())
    step(*case.args(np.full_like(BATCHES[0], np.nan)))
    with pytest.raises(ValueError, match="No range was collected for 'Dense_"):
        _ = calibrator.quant_stats
    step(*case.args(BATCHES[0]))
    stats = calibrator.quant_stats["Dense_0"]["dot_general0_lhs"]
    expected = np.abs(BATCHES[0]).max()
    np.testing.assert_allclose(stats["sum_of_absmax"], [[expected]])


@pytest.mark.optimized
def test_sharded_batches_give_the_same_ranges():
    case = Linear("linen")
    mesh = jax.make_mesh((8,), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.P("data"))
    both = []
    for place in (lambda x: x, functools.partial(jax.device_put, device=sharding)):
        calibrator = calib.Calibrator(RULES)
        step = calibrator.wrap(case.eval_step())
        for x in BATCHES:
            step(*case.args(place(x)))
        both.append(calibrator.quant_stats)
    models.assert_same(*both)


def test_several_steps_share_the_statistics():
    case = Linear("linen")
    calibrator = calib.Calibrator(RULES)
    whole = calibrator.wrap(case.eval_step())
    first = calibrator.wrap(
        jax.jit(lambda params, x: nn.Dense(6, name="head").apply({"params": params}, x))
    )
    whole(*case.args(BATCHES[0]))
    first({"kernel": jnp.ones((6, 6)), "bias": jnp.zeros(6)}, BATCHES[1])
    whole(*case.args(BATCHES[2]))
    stats = calibrator.quant_stats
    assert stats["Dense_0"]["dot_general0_lhs"]["count"] == 2
    assert stats["dot_general0_lhs"]["count"] == 1


def test_errors():
    case = Linear("linen")
    with pytest.raises(ValueError, match="No rule sets act_static_scale=True"):
        calib.Calibrator([QuantizationRule(weight_qtype="int8", act_qtype="int8")])
    calibrator = calib.Calibrator(RULES)
    with pytest.raises(ValueError, match="run the wrapped step first"):
        _ = calibrator.quant_stats
    step = calibrator.wrap(case.eval_step())
    with pytest.raises(ValueError, match="calib.observe"):
        jax.jit(step)(*case.args(BATCHES[0]))


@pytest.mark.parametrize("jitted", [True, False])
def test_a_step_traced_without_traced_arguments_is_refused(jitted):
    """What the step closes over does not say that it runs inside of a `jit`."""
    case = Linear("linen")
    step, args = case.eval_step(), case.args(BATCHES[0])
    calibrator = calib.Calibrator(RULES)
    calibrated = calibrator.wrap(step if jitted else step.__wrapped__)
    with pytest.raises(ValueError, match="calib.observe"):
        jax.jit(lambda scale: scale * calibrated(*args)["mean"])(2.0)
    assert not calibrator.state
    calibrated(*args)
    with pytest.raises(ValueError, match="calib.observe"):
        jax.jit(lambda scale: scale * calibrated(*args)["mean"])(2.0)
    assert calibrator.quant_stats["Dense_0"]["dot_general0_lhs"]["count"] == 1
