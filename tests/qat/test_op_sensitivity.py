"""What quantizing one op alone does, against NumPy in float64."""

import jax
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training import train_state
from jax import numpy as jnp

from qwix_train import QuantizationRule, as_model, calib, plan, qat, wrap_eval_step
from tests import models

RNG = np.random.default_rng(0)
BATCHES = [RNG.normal(size=(6, 4)).astype(np.float32) for _ in range(2)]
W8A8 = [models.rule("int8", "int8")]
TYPES = ["int2", "int4"]


def fq(x, bits, shared=0):
    """The rules of `models`, in float64."""
    x = np.asarray(x, np.float64)
    scale = np.abs(x).max(shared, keepdims=True) / (2 ** (bits - 1) - 0.5)
    scale = models.MARGIN * scale
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return np.clip(np.round(x / scale), low, high) * scale


def decibels(pairs):
    """The ratio of signal to noise of all pairs of outputs, exact and quantized."""
    signal = sum((y**2).sum() for y, _ in pairs)
    return 10 * np.log10(signal / sum(((y - q) ** 2).sum() for y, q in pairs))


def mlp(kernels, x, quantized=None, bits=8):
    """The loss, and the output of one layer; that layer may be quantized."""
    outputs, before = [], 0
    for i, (kernel, bias) in enumerate(kernels):
        kernel, bias = np.asarray(kernel, np.float64), np.asarray(bias, np.float64)
        inputs = x if not i else np.maximum(outputs[-1] + before, 0)
        if i == quantized:
            inputs, kernel = fq(inputs, 8, -1), fq(kernel, bits)
        outputs.append(inputs @ kernel)
        before = bias
    return ((outputs[-1] + before) ** 2).mean(), outputs


class NnxMlp(nnx.Module):
    def __init__(self, rngs):
        self.l1 = nnx.Linear(4, 16, rngs=rngs)
        self.l2 = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x):
        return self.l2(nnx.relu(self.l1(x)))


def normal(inputs, outputs):
    """A kernel, and a bias."""
    rng = np.random.default_rng(inputs)
    kernel = rng.normal(size=(inputs, outputs)) / np.sqrt(inputs)
    return jnp.asarray(kernel, jnp.float32), jnp.zeros(outputs)


def squares(out):
    return jnp.mean(out**2)


def make(kind):
    """A loss function, its state, the layers, and the names of their modules."""
    if kind == "nnx":
        model = NnxMlp(nnx.Rngs(0))
        layers = [(m.kernel[...], m.bias[...]) for m in (model.l1, model.l2)]
        return lambda model, x: squares(model(x)), model, layers, ["l1", "l2"]
    model, names = models.Mlp(), ["Dense_0", "Dense_1"]
    layers = [normal(4, 16), normal(16, 3)]
    params = {
        name: {"kernel": kernel, "bias": bias}
        for name, (kernel, bias) in zip(names, layers, strict=True)
    }
    if kind == "params":

        def loss(params, x):
            return squares(model.apply({"params": params}, x))

        return loss, params, layers, names
    if kind == "state":
        state = train_state.TrainState.create(
            apply_fn=model.apply, params=params, tx=optax.adam(0.1)
        )

        @jax.jit
        def loss(state, x):
            return squares(state.apply_fn({"params": state.params}, x))

        return loss, state, layers, names

    @as_model
    def forward(params, x):
        (a, b), (c, d) = params
        return jnp.maximum(x @ a + b, 0) @ c + d

    return lambda p, x: squares(forward(p, x)), layers, layers, ["", ""]


@pytest.mark.thinned(2)
@pytest.mark.parametrize("kind", ["params", "state", "nnx", "function"])
def test_each_op_alone(kind):
    loss, state, layers, names = make(kind)
    found = qat.sensitivity(loss, state, W8A8, iter(BATCHES), qtypes=TYPES)
    assert [(row.ops, row.qtype) for row in found.rows] == [
        ((f"{name}/dot_general{at}".lstrip("/"),), qtype)
        for name, at in zip(names, [0, 0] if names[0] else [0, 1], strict=True)
        for qtype in TYPES
    ]
    exact = [mlp(layers, x) for x in BATCHES]
    np.testing.assert_allclose(found.loss, np.mean([e[0] for e in exact]), rtol=1e-5)
    for index, row in enumerate(found.rows):
        layer, bits = index // 2, int(row.qtype[3:])
        outs = [mlp(layers, x, layer, bits) for x in BATCHES]
        increase = np.mean([o[0] - e[0] for o, e in zip(outs, exact, strict=True)])
        np.testing.assert_allclose(row.loss_increase, increase, rtol=1e-3, atol=1e-6)
        pairs = [(e[1][layer], o[1][layer]) for e, o in zip(exact, outs, strict=True)]
        np.testing.assert_allclose(row.sqnr_db, decibels(pairs), rtol=1e-4)
        kernel = np.asarray(layers[layer][0], np.float64)
        error = ((kernel - fq(kernel, bits)) ** 2).sum()
        np.testing.assert_allclose(row.weight_error, error, rtol=1e-4)
        assert (row.size, row.bits, row.trace, row.omega) == (
            kernel.size,
            bits,
            None,
            None,
        )
        assert row.bytes == kernel.size * bits // 8 + 4 * kernel.shape[1]


@pytest.mark.thinned(2)
@pytest.mark.parametrize("remat", [False, True])
def test_stacked_layers_are_one_op(remat):
    model, x = models.Layers(remat), np.tile(BATCHES[0], 2)[:, :6]
    kernels = np.stack([normal(6, 6)[0] for _ in range(3)]) * [[[1]], [[2]], [[3]]]
    params = {"layers": {"Dense_0": {"kernel": jnp.asarray(kernels, jnp.float32)}}}

    def run(x, quantize):
        outputs, ins = [], []
        for kernel in kernels:
            ins.append(x)
            outputs.append(x @ (fq(kernel, 3) if quantize else kernel))
            x = np.tanh(3 * outputs[-1])
        return (x**2).mean(), outputs, ins

    found = qat.sensitivity(
        lambda p, x: squares(model.apply({"params": p}, x)),
        params,
        [models.rule("int8")],
        [x],
        qtypes=["int3"],
    )
    (row,) = found.rows
    (loss, outputs, ins), (quantized, _, _) = run(x, False), run(x, True)
    assert row.loss_increase == pytest.approx(quantized - loss, rel=1e-3)
    # The inputs of each layer are those of the float model.
    pairs = [
        (y, i @ fq(kernel, 3))
        for y, i, kernel in zip(outputs, ins, kernels, strict=True)
    ]
    assert row.sqnr_db == pytest.approx(decibels(pairs), rel=1e-4)
    assert row.size == kernels.size


class Tied(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(7, 4)
        x = nn.Dense(4)(embed(tokens))
        return embed.attend(x)


def test_ops_that_share_a_param_are_one():
    model, tokens = Tied(), jnp.arange(5)
    params = {
        "Embed_0": {"embedding": normal(7, 4)[0]},
        "Dense_0": dict(zip(["kernel", "bias"], normal(4, 4), strict=True)),
    }
    rules = [
        QuantizationRule(op_names=("gather",), weight_qtype="int8"),
        QuantizationRule(weight_qtype="int8"),
    ]

    def loss(params, tokens):
        return squares(model.apply({"params": params}, tokens))

    found = qat.sensitivity(loss, params, rules, [tokens], qtypes=["int2"])
    table, dense = found.rows
    assert table.ops == ("Embed_0/gather0", "Embed_0/dot_general0")
    assert table.params == ("Embed_0/embedding",)
    assert dense.params == ("Dense_0/kernel",)
    for row in found.rows:
        quantized = jax.jit(wrap_eval_step(loss, row.rules))(params, tokens)
        assert row.loss_increase == pytest.approx(float(quantized) - found.loss)
        # The rules are for these ops, and no others.
        planned = plan(model, row.rules, tokens)
        assert [f"{op.op.module_path}/{op.op.id}" for op in planned.quantized_ops] == [
            *row.ops
        ]


def test_calls_that_leave_a_param_in_float():
    first = as_model(lambda params, x: x @ params["w"])

    @as_model
    def second(params, x):
        x = jnp.einsum("ij,jk->ik", x, params["w"])
        return jnp.einsum("ij,jk->ik", x, params["v"])

    def loss(params, x):
        return squares(first(params, x)) + squares(second(params, x))

    params = {"w": normal(4, 4)[0], "v": normal(4, 3)[0]}
    rules = [models.rule("int8", op_names=("dot_general0", "einsum1"))]
    found = qat.sensitivity(loss, params, rules, BATCHES, qtypes=["int2"])
    assert [row.params for row in found.rows] == [("w",), ("v",)]
    for row, in_first, in_second in zip(found.rows, (1, 0), (0, 1), strict=True):
        w, v = (np.asarray(params[key], np.float64) for key in "wv")
        increases = []
        for x in BATCHES:
            exact = ((x @ w) ** 2).mean() + ((x @ w @ v) ** 2).mean()
            one = ((x @ (fq(w, 2) if in_first else w)) ** 2).mean()
            other = ((x @ w @ (fq(v, 2) if in_second else v)) ** 2).mean()
            increases.append(one + other - exact)
        assert row.loss_increase == pytest.approx(np.mean(increases), rel=1e-4)


def test_one_program_for_all():
    loss, state, *_ = make("params")
    calls = []

    def counted(params, x):
        calls.append(x.shape)
        return loss(params, x)

    rules = [models.rule("int8", module_path="Dense_1")]
    types = ["int2", "nf4", "int8"]
    found = qat.sensitivity(counted, state, rules, BATCHES, qtypes=types)
    assert [row.qtype for row in found.rows] == types
    # To find the ops, for the errors of the outputs, and for the losses.
    assert len(calls) == 3


@pytest.mark.slow
def test_static_ranges():
    loss, params, *_ = make("params")
    rules = [models.rule("int8", "int8", "Dense_0", act_static_scale=True)]
    calibrator = calib.Calibrator(rules)
    calibrator.wrap(jax.jit(loss))(params, BATCHES[0])
    ranges = {"quant_stats": calibrator.quant_stats}
    x = BATCHES[1]
    found = qat.sensitivity(loss, params, rules, [x], qtypes=["int4"], **ranges)
    for row in found.rows:
        quantized = jax.jit(wrap_eval_step(loss, row.rules, **ranges))(params, x)
        assert row.loss_increase == pytest.approx(float(quantized) - found.loss, 1e-3)
    with pytest.raises(ValueError, match="no quant_stats for 'Dense_0/dot_g"):
        qat.sensitivity(loss, params, rules, [x])


@pytest.mark.slow
def test_examples_under_vmap():
    loss, params, *_ = make("params")

    def each(params, x):
        return jax.vmap(lambda x: loss(params, x[None]))(x).mean()

    by_batch = qat.sensitivity(loss, params, W8A8, BATCHES[:1], qtypes=["int4"])
    by_example = qat.sensitivity(each, params, W8A8, BATCHES[:1], qtypes=["int4"])
    for one, other in zip(by_batch.rows, by_example.rows, strict=True):
        assert one.sqnr_db == pytest.approx(other.sqnr_db, rel=1e-4)
        assert one.loss_increase == pytest.approx(other.loss_increase, rel=1e-3)


class Noisy(nnx.Module):
    """A layer with statistics and random keys, which each call changes."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(4, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(self.norm(self.linear(x)))


@pytest.mark.slow
def test_a_model_does_not_change():
    model, weight_only = Noisy(nnx.Rngs(0)), [models.rule("int8")]
    before = nnx.split(nnx.clone(model))[1]

    def loss(model, x):
        return squares(model(x))

    found = qat.sensitivity(loss, model, weight_only, BATCHES, qtypes=["int2"])
    models.assert_same(before, nnx.split(model)[1])
    assert type(model) is Noisy
    # Each evaluation starts from the same statistics and keys.
    (row,) = found.rows
    quantized = nnx.jit(wrap_eval_step(loss, row.rules))
    losses = [float(quantized(nnx.clone(model), x)) for x in BATCHES]
    assert row.loss_increase == pytest.approx(np.mean(losses) - found.loss, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["params", "nnx"])
def test_curvature_against_the_hessian(kind):
    loss, state, layers, _ = make(kind)
    found = qat.sensitivity(
        loss, state, W8A8, BATCHES, qtypes=["int3"], method="hutchinson", probes=200
    )
    (w1, b1), (w2, b2) = layers

    def mean_loss(kernels):
        a, c = kernels
        outs = [nn.relu(x @ a + b1) @ c + b2 for x in BATCHES]
        return sum(map(squares, outs)) / len(outs)

    hessian = jax.jit(jax.hessian(mean_loss))((w1, w2))
    for i, row in enumerate(found.rows):
        size = row.size
        exact = np.trace(np.asarray(hessian[i][i]).reshape(size, size))
        assert abs(row.trace - exact) < 4 * row.trace_error
        assert row.trace_error < 0.1 * exact
        kernel = np.asarray((w1, w2)[i], np.float64)
        error = ((kernel - fq(kernel, 3)) ** 2).sum()
        np.testing.assert_allclose(row.omega, row.trace / size * error, rtol=1e-4)
        assert row.loss_increase is None and row.cost == abs(row.omega)


def test_a_diagonal_hessian_needs_one_probe():
    w = {"w": jax.device_put(BATCHES[0])}
    forward = as_model(lambda params, x: x @ params["w"])
    # With x = 1 the loss is the sum of (w - 1)**2 y, for y in the batch.
    found = qat.sensitivity(
        lambda params, x, y: jnp.sum((forward(params, x) - 1) ** 2 * y),
        w,
        [QuantizationRule(weight_qtype="int8")],
        [(jnp.eye(6), jnp.full((6, 4), y)) for y in (1.0, 3.0)],
        qtypes=["int4"],
        method="hutchinson",
        probes=1,
    )
    assert found.rows[0].trace == 2 * 24 * (1 + 3) / 2
    # Half of the trace over the size, times the error, is the increase but for the
    # gradient, whose part is known here.
    scale = np.abs(BATCHES[0]).max(0) / 7.5
    q = np.clip(np.round(BATCHES[0] / scale), -8, 7) * scale
    assert found.rows[0].omega == pytest.approx(
        4 * ((q - BATCHES[0]) ** 2).sum(), rel=1e-4
    )


def test_refuses_arguments_that_cannot_be():
    loss, params, *_ = make("params")

    weight_only = [models.rule("int8", module_path="(Dense_0)?")]

    def measure(loss=loss, rules=weight_only, batches=BATCHES, **kwargs):
        kwargs = {"qtypes": ["int8"], **kwargs}
        return qat.sensitivity(loss, params, rules, batches, **kwargs)

    with pytest.raises(ValueError, match="choose from loss, hutchinson"):
        measure(method="hessian")
    with pytest.raises(ValueError, match="probes=0"):
        measure(probes=0)
    with pytest.raises(ValueError, match="list of weight types"):
        measure(qtypes="int4")
    with pytest.raises(ValueError, match="listed twice"):
        measure(qtypes=["int4", jnp.int4])
    with pytest.raises(ValueError, match="no batch"):
        measure(batches=[])
    for batch in {"x": jnp.ones((6, 4))}, jnp.ones((6, 4)):
        with pytest.raises(TypeError, match="looks like one batch"):
            measure(batches=batch)
    with pytest.raises(ValueError, match="quantizes an op"):
        measure(rules=models.NOTHING)
    with pytest.raises(TypeError, match=r"returned an array of shape \(6, 3\)"):
        measure(lambda p, x: models.Mlp().apply({"params": p}, x))
    with pytest.raises(TypeError, match="returned a tuple.*auxiliary"):
        measure(lambda p, x: (loss(p, x), {}))
    with pytest.raises(ValueError, match="loss of the float model is nan"):
        measure(batches=[np.full((6, 4), np.nan, np.float32)])
    attention = as_model(lambda params, x: (x @ x.T) * params["Dense_0"]["bias"][0])
    rules = [QuantizationRule(weight_qtype="int8", act_qtype="int8")]
    with pytest.raises(ValueError, match="quantize no weight"):
        measure(lambda p, x: attention(p, x).mean(), rules)
    forward = as_model(lambda params, x: x @ params["Dense_0"]["kernel"])

    def some(params, x, deep):
        return (loss(params, x) if deep else 0) + forward(params, x).mean()

    with pytest.raises(ValueError, match="Dense_0/dot_general0 runs in this batch"):
        measure(some, batches=[(BATCHES[0], False), (BATCHES[0], True)])
