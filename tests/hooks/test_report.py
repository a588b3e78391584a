"""Scalars about weights and ranges, against the formulas in NumPy, in float64."""

import jax
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training import train_state
from jax import numpy as jnp

from qwix_train import (
    HowToQuantize,
    QuantizationRule,
    attach,
    hooks,
    optim,
    plan,
    ptq,
    wrap_train_step,
)
from tests import models

X = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
INT4 = [QuantizationRule(weight_qtype="int4")]
WEIGHT_SCALARS = ("sqnr_db", "saturated", "at_end_codes", "bits")


def fixed(bounds):
    method = f"fixed,{bounds}"
    return [QuantizationRule(weight_qtype="int4", weight_calibration_method=method)]


class Writer:
    """A metric writer that remembers."""

    def __init__(self):
        self.written = []

    def write_scalars(self, step, scalars):
        self.written.append((step, dict(scalars)))


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(nn.Dense(4)(x)), None


class Stacked(nn.Module):
    """Three layers under `scan`."""

    axis: int = 0

    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            Layer,
            variable_axes={"params": self.axis},
            split_rngs={"params": True},
            length=3,
        )
        return layers(name="layers")(x, None)[0]


def sqnr_db(x, bits=4, absmax=None):
    """The ratio of a weight with a scale per column, in dB."""
    x = np.asarray(x, np.float64)
    absmax = np.abs(x).max(-2, keepdims=True) if absmax is None else absmax
    scale = absmax / (2 ** (bits - 1) - 0.5)
    codes = np.clip(np.round(x / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return 10 * np.log10((x**2).sum() / ((x - codes * scale) ** 2).sum())


def make(kind):
    """A state of some kind; its model, the path and the value of one kernel."""
    if kind in ("nnx", "optimizer"):
        model = models.NnxMlp(nnx.Rngs(0))
        state = model
        if kind == "optimizer":
            state = nnx.ModelAndOptimizer(model, optax.sgd(0.1))
        return state, model, "l1/kernel", model.l1.kernel[...]
    model = models.Mlp()
    variables = jax.jit(model.init)(jax.random.key(0), X)
    params = variables["params"]
    if kind == "train_state":
        state = train_state.TrainState.create(
            apply_fn=model.apply, params=params, tx=optax.sgd(0.1)
        )
    elif kind == "boxed":
        names = ("in", "out")
        state = jax.tree.map(
            lambda x: nn.Partitioned(x, names=names[-x.ndim :]), params
        )
    else:
        state = {"variables": variables, "params": params}[kind]
    return state, model, "Dense_0/kernel", params["Dense_0"]["kernel"]


@pytest.mark.parametrize(
    "kind", ["train_state", "params", "variables", "boxed", "nnx", "optimizer"]
)
def test_ratio_of_weights_in_any_state(kind):
    state, model, name, kernel = make(kind)
    writer = Writer()
    report = hooks.QuantReport(writer, plan(model, INT4, X), every_steps=5)
    assert [report(step, state=state) for step in (4, 5, 6)] == [False, True, False]
    ((step, scalars),) = writer.written
    assert step == 5
    # Two weights; biases stay in float.
    assert len(scalars) == 2 * len(WEIGHT_SCALARS)
    assert scalars[f"quant/{name}/bits"] == 4
    np.testing.assert_allclose(
        scalars[f"quant/{name}/sqnr_db"], sqnr_db(kernel), rtol=1e-4
    )
    assert scalars[f"quant/{name}/saturated"] == 0
    assert all(type(value) is float for value in scalars.values())


def test_a_function_of_params():
    params = {"w": jax.device_put(X)}
    layers = plan(lambda params, x: x @ params["w"], INT4, params, jnp.ones((2, 8)))
    scalars = hooks.QuantReport(Writer(), layers).scalars(params)
    np.testing.assert_allclose(scalars["w/sqnr_db"], sqnr_db(X), rtol=1e-4)


def test_follows_the_state_by_itself():
    writer, model = Writer(), models.NnxMlp(nnx.Rngs(0))
    kernels = []
    report = hooks.QuantReport(
        writer, plan(model, INT4, X), state=model, prefix="", every_steps=1
    )
    for step in (1, 2):
        kernels.append(np.asarray(model.l1.kernel[...]))
        report(step)
        model.l1.kernel[...] = model.l1.kernel[...] ** 3

    found = [scalars["l1/kernel/sqnr_db"] for _, scalars in writer.written]
    np.testing.assert_allclose(found, [sqnr_db(k) for k in kernels], rtol=1e-4)

    params = {"kernel": X, "bias": jnp.zeros(4)}
    dense = plan(nn.Dense(4), INT4, jnp.ones((1, 8)))
    lazy = hooks.QuantReport(writer, dense, state=lambda: params, on_steps=[3])
    assert lazy(3)
    params = {"kernel": X**3, "bias": jnp.zeros(4)}
    np.testing.assert_allclose(
        lazy.scalars()["kernel/sqnr_db"], sqnr_db(X**3), rtol=1e-4
    )


def test_counts_what_is_clipped():
    rules = fixed("-1,1")
    model, params = nn.Dense(4), {"kernel": jax.device_put(X), "bias": jnp.zeros(4)}
    scalars = hooks.QuantReport(Writer(), plan(model, rules, jnp.ones((1, 8)))).scalars(
        params
    )
    assert scalars["kernel/saturated"] == pytest.approx((np.abs(X) > 1).mean())
    np.testing.assert_allclose(
        scalars["kernel/sqnr_db"], sqnr_db(X, absmax=1.0), rtol=1e-4
    )


@pytest.mark.parametrize(
    "kernel",
    [
        # Multiples of the scale, 0.5, from the lowest code to the highest.
        np.array([[-4.0, 3.5], [0.5, -4.0]], np.float32),
        np.zeros((2, 2), np.float32),
    ],
)
def test_no_error_is_infinite(kernel):
    rules = fixed("-4,3.5")
    layers = plan(nn.Dense(2), rules, jnp.ones((1, 2)))
    scalars = hooks.QuantReport(Writer(), layers).scalars({"kernel": kernel})
    assert scalars["kernel/sqnr_db"] == np.inf


@pytest.mark.parametrize("axis", [0, 1])
def test_layers_have_scalars_of_their_own(axis):
    model = Stacked(axis)
    params = jax.jit(model.init)(jax.random.key(0), X)["params"]
    kernel = np.moveaxis(params["layers"]["Dense_0"]["kernel"], axis, 0)
    # So that the layers differ.
    params["layers"]["Dense_0"]["kernel"] **= 3
    kernel = kernel**3
    stacked = plan(model, INT4, X)
    scalars = hooks.QuantReport(Writer(), stacked, per_layer=True).scalars(params)
    name = "layers/Dense_0/kernel"
    # Layers have all but the bits.
    assert len(scalars) == 4 * (1 + 3) - 3
    np.testing.assert_allclose(
        [scalars[f"{name}/layer_{i}/sqnr_db"] for i in range(3)],
        [sqnr_db(kernel[i]) for i in range(3)],
        rtol=1e-4,
    )
    np.testing.assert_allclose(scalars[f"{name}/sqnr_db"], sqnr_db(kernel), rtol=1e-4)
    whole = hooks.QuantReport(Writer(), stacked).scalars(params)
    assert whole == {key: x for key, x in scalars.items() if "layer_" not in key}


def test_ranges_once_they_are_there():
    quant_stats = None
    params = {"kernel": X, "bias": jnp.zeros(4)}
    report = hooks.QuantReport(
        Writer(),
        plan(nn.Dense(4), INT4, jnp.ones((1, 8))),
        quant_stats=lambda: quant_stats,
        per_layer=True,
    )
    assert set(report.scalars(params)) == {f"kernel/{key}" for key in WEIGHT_SCALARS}
    quant_stats = {
        "a": {"dot_general0_lhs": {"count": 4, "sum_of_absmax": np.array([[6.0]])}},
        "layers": {
            "einsum0_rhs": {
                "count": np.array([2, 4]),
                "sum_of_min": np.array([[[-1.0]], [[-8.0]]]),
                "sum_of_max": np.array([[[3.0]], [[2.0]]]),
            }
        },
    }
    scalars = report.scalars(params)
    ranges = {key: x for key, x in scalars.items() if not key.startswith("kernel")}
    assert ranges == {
        "a/dot_general0_lhs/absmax": 1.5,
        "layers/einsum0_rhs/min": -2.0,
        "layers/einsum0_rhs/max": 1.5,
        "layers/einsum0_rhs/layer_0/min": -0.5,
        "layers/einsum0_rhs/layer_0/max": 1.5,
        "layers/einsum0_rhs/layer_1/min": -2.0,
        "layers/einsum0_rhs/layer_1/max": 0.5,
    }


@pytest.mark.slow
@pytest.mark.parametrize("observer", ["absmax", "percentile,100"])
def test_ranges_that_the_state_of_qat_holds(observer):
    rules = [
        QuantizationRule(
            weight_qtype="int4",
            act_qtype="int8",
            act_static_scale=True,
            act_observer=observer,
        )
    ]
    model, x = nn.Dense(3), X[:, :3]
    state = train_state.TrainState.create(
        apply_fn=model.apply,
        params=jax.jit(model.init)(jax.random.key(0), x)["params"],
        tx=optax.sgd(0.1),
    )

    def train_step(state, x):
        def loss(params):
            return state.apply_fn({"params": params}, x).mean()

        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    state = attach(state, rules, x)
    report = hooks.QuantReport(Writer(), plan(model, rules, x))
    with pytest.raises(ValueError, match="No range was collected"):
        report.scalars(state)
    state = jax.jit(wrap_train_step(train_step, rules))(state, x)
    scalars = report.scalars(state)
    np.testing.assert_allclose(
        scalars["dot_general0_lhs/absmax"], np.abs(x).max(), rtol=0.01
    )


@pytest.mark.parametrize(
    "qtype, bits, low, high",
    [
        # What is below the range has the lowest code, half of it.
        ("int3", 3, -3.5, 2.5),
        ("int4", 4, -3.5, 6.5 * 3.5 / 7.5),
        # The next codes are -0.6962 and 0.7230, and plus and minus 416 / 448.
        ("nf4", 4, -3.5 * (1 + 0.6961928) / 2, 3.5 * (1 + 0.72295684) / 2),
        ("float8_e4m3fn", 8, -3.5 * 432 / 448, 3.5 * 432 / 448),
    ],
)
def test_counts_the_codes_at_the_ends(qtype, bits, low, high):
    x = np.random.default_rng(1).uniform(-5, 5, (64, 32)).astype(np.float32)
    rules = [
        QuantizationRule(weight_qtype=qtype, weight_calibration_method="fixed,-3.5,3.5")
    ]
    layers = plan(lambda params, x: x @ params["w"], rules, {"w": x}, jnp.ones((2, 64)))
    scalars = hooks.QuantReport(Writer(), layers).scalars({"w": x})
    assert scalars["w/bits"] == bits
    assert scalars["w/at_end_codes"] == ((x <= low) | (x >= high)).mean()
    assert scalars["w/saturated"] == pytest.approx((np.abs(x) > 3.5).mean())


@pytest.mark.thinned(2)
@pytest.mark.parametrize("axis", [0, 1])
def test_how_far_scales_have_moved(axis):
    model, writer = Stacked(axis), Writer()
    params = jax.jit(model.init)(jax.random.key(0), X)["params"]
    report = hooks.QuantReport(
        writer, plan(model, INT4, X), per_layer=True, prefix="", every_steps=1
    )
    kernels = []
    for step in range(3):
        kernel = params["layers"]["Dense_0"]["kernel"]
        kernels.append(np.moveaxis(np.asarray(kernel, np.float64), axis, 0))
        report(step, state=params)
        report.scalars(params)  # does not count as a report
        params = jax.tree.map(lambda x: x**2 - 0.3, params)

    scales = [np.abs(kernel).max(1) for kernel in kernels]  # of layers and columns
    name = "layers/Dense_0/kernel"
    assert not any("drift" in key for key in writer.written[0][1])
    for step in (1, 2):
        scalars = writer.written[step][1]
        for key, before in (("scale_drift", step - 1), ("scale_drift_total", 0)):
            moved, was = scales[step] - scales[before], scales[before]
            np.testing.assert_allclose(
                scalars[f"{name}/{key}"],
                np.linalg.norm(moved) / np.linalg.norm(was),
                rtol=1e-5,
            )
            np.testing.assert_allclose(
                [scalars[f"{name}/layer_{i}/{key}"] for i in range(3)],
                np.linalg.norm(moved, axis=1) / np.linalg.norm(was, axis=1),
                rtol=1e-5,
            )


@pytest.mark.parametrize("zero_point", [None, -3.0])
def test_a_scale_among_the_params(zero_point):
    method = "absmax" if zero_point is None else "minmax"
    rules = [QuantizationRule(weight_qtype="int4", weight_calibration_method=method)]
    scale, zero = np.linspace(0.1, 0.4, 4, dtype=np.float32)[None], zero_point or 0.0
    params = {"kernel": X, "bias": jnp.zeros(4), "kernel_scale": scale}
    if zero_point is not None:
        params["kernel_zero_point"] = np.full((1, 4), zero_point, np.float32)
    writer = Writer()
    layers = plan(nn.Dense(4), rules, jnp.ones((1, 8)))
    report = hooks.QuantReport(writer, layers, prefix="", every_steps=1)
    report(1, state=params)
    report(2, state={**params, "kernel_scale": 1.5 * scale})

    scalars, x = writer.written[0][1], X.astype(np.float64)
    codes = np.clip(np.round(x / scale) + zero, -8, 7)
    noise = ((x - (codes - zero) * scale) ** 2).sum()
    ratio = 10 * np.log10((x**2).sum() / noise)
    np.testing.assert_allclose(scalars["kernel/sqnr_db"], ratio, rtol=1e-4)
    at_ends = (codes == -8) | (codes == 7)
    assert scalars["kernel/at_end_codes"] == pytest.approx(at_ends.mean())
    low, high = (-7.5, 7.5) if zero_point is None else (-8 - zero, 7 - zero)
    outside = (x < low * scale) | (x > high * scale)
    assert scalars["kernel/saturated"] == pytest.approx(outside.mean())
    assert writer.written[1][1]["kernel/scale_drift"] == pytest.approx(0.5)
    with pytest.raises(ValueError, match=r"'kernel_scale' has shape \(4, 1\)"):
        report.scalars({**params, "kernel_scale": scale.T})


def test_params_that_are_one_array():
    report = hooks.QuantReport(Writer(), plan(lambda w, x: x @ w, INT4, X, X.T))
    found = report.scalars(X)
    np.testing.assert_allclose(found["sqnr_db"], sqnr_db(X), rtol=1e-4)


def oscillated(kind, tx):
    """A state after updates up and down; what the report is given; the path to it."""
    state, model, name, _ = make("nnx" if kind == "separate" else kind)
    given = {}
    if kind == "train_state":
        state = state.replace(tx=tx, opt_state=tx.init(state.params))
    elif kind == "variables":
        held = [tx.init(state)]
        given["opt_state"] = lambda: held[0]
    elif kind == "optimizer":
        state = nnx.ModelAndOptimizer(model, tx, wrt=nnx.Param)
    else:
        given["opt_state"] = nnx.Optimizer(model, tx, wrt=nnx.Param)

    def grads(params, sign):
        return jax.tree.map(lambda x: jnp.full_like(x, 0.1 * sign), params)

    for sign in (1, -1, 1):
        if kind == "train_state":
            state = state.apply_gradients(grads=grads(state.params, sign))
        elif kind == "variables":
            updates, held[0] = tx.update(grads(state, sign), held[0], state)
            state = optax.apply_updates(state, updates)
        elif kind == "optimizer":
            state.update(grads(nnx.state(model, nnx.Param), sign))
        else:
            changes = grads(nnx.state(model, nnx.Param), sign)
            given["opt_state"].update(model, changes)
    holder = held[0] if kind == "variables" else given.get("opt_state", state)
    return state, model, given, name, getattr(holder, "opt_state", holder)


@pytest.mark.thinned(4)
@pytest.mark.parametrize("kind", ["train_state", "variables", "optimizer", "separate"])
def test_counts_oscillations(kind):
    how = HowToQuantize(qtype="int4", calibration_method="fixed,-1,1")
    freeze = optim.freeze_oscillations({".*kernel": how}, 0.6, momentum=0.5)
    tx = optax.chain(optax.sgd(1.0), freeze)
    state, model, given, name, opt_state = oscillated(kind, tx)
    report = hooks.QuantReport(
        Writer(), plan(model, fixed("-1,1"), X), oscillation_threshold=0.3, **given
    )
    scalars = report.scalars(state)
    held = nnx.as_pure(opt_state)[1]
    prefix = ["params"] if kind == "variables" else []
    total = {"oscillating": 0, "frozen": 0}
    for layer in ("Dense_0", "Dense_1") if "Dense" in name else ("l1", "l2"):
        frequency, frozen = held.frequency, held.frozen
        for key in (*prefix, layer, "kernel"):
            frequency, frozen = frequency[key], frozen[key]
        frequency, frozen = np.asarray(frequency), np.asarray(frozen)
        active = (frequency > 0.3) & ~frozen
        assert 0 < active.sum() < active.size or 0 < frozen.sum() < frozen.size
        assert scalars[f"{layer}/kernel/oscillating"] == pytest.approx(active.mean())
        assert scalars[f"{layer}/kernel/frozen"] == pytest.approx(frozen.mean())
        total["oscillating"] += active.sum()
        total["frozen"] += frozen.sum()
    assert {key: scalars[key] for key in total} == total
    assert all(type(value) is float for value in scalars.values())


def test_refuses_what_is_not_the_planned_model():
    dense = plan(nn.Dense(4, use_bias=False), INT4, jnp.ones((1, 8)))
    report = hooks.QuantReport(Writer(), dense)
    with pytest.raises(ValueError, match="'kernel'.*no such param"):
        report.scalars({"w": X})
    with pytest.raises(ValueError, match=r"\(8, 4\).*shape \(4, 8\)"):
        report.scalars({"kernel": X.T})
    with pytest.raises(ValueError, match="was given no state"):
        report.scalars()
    _, quantized = ptq.quantize(
        nn.Dense(4, use_bias=False), {"kernel": X}, INT4, jnp.ones((1, 8))
    )
    with pytest.raises(ValueError, match="'kernel' is quantized already"):
        report.scalars(quantized)


def test_refuses_arguments_that_cannot_be():
    dense = plan(nn.Dense(4), INT4, jnp.ones((1, 8)))
    with pytest.raises(TypeError, match="write_scalars"):
        hooks.QuantReport(print, dense)
    with pytest.raises(TypeError, match="plan of a model"):
        hooks.QuantReport(Writer(), INT4)
    with pytest.raises(TypeError, match="a function that returns it.*not a tuple"):
        hooks.QuantReport(Writer(), dense, opt_state=(optax.EmptyState(),))
    nothing = plan(nn.Dense(4), models.NOTHING, jnp.ones((1, 8)))
    with pytest.raises(ValueError, match="quantizes an op"):
        hooks.QuantReport(Writer(), nothing)
