"""The forward in training, against integers computed with NumPy."""

import functools

import jax
import numpy as np
import pytest
from flax import linen as nn
from jax import numpy as jnp

from qwix_train import QuantizationRule, odml, quantize_model
from tests.odml.test_integer_grid import reference

RULES = [QuantizationRule(weight_qtype="int8", act_qtype="int8")]
X = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
IMAGE = np.random.default_rng(1).normal(size=(2, 5, 5, 3)).astype(np.float32)


def ranges(**ends):
    """The statistics of ranges, by name."""
    stats = {}
    for name, (low, high) in ends.items():
        *outer, last = name.split("__")
        inner = stats
        for key in outer:
            inner = inner.setdefault(key, {})
        inner[last] = {
            "count": jnp.ones((), jnp.int32),
            "sum_of_min": jnp.full(1, low),
            "sum_of_max": jnp.full(1, high),
        }
    return stats


def fq(x, low, high):
    """An activation, fake-quantized in float64."""
    scale = np.float32(np.float32(high - low) / 255)
    zero_point = int(np.round(-128 - low / np.float64(scale)))
    return (reference(x, scale, zero_point, -128, 127) - zero_point) * np.float64(scale)


def fq_weight(w, channel):
    """A weight: symmetric, without the lowest code."""
    w = np.asarray(w, np.float64)
    absmax = np.abs(w).max() if not channel else np.abs(w).max(tuple(range(w.ndim - 1)))
    scale = absmax / 127
    return np.round(w / scale) * scale


def conv(x, w):
    """A convolution with padding, in float64."""
    x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    n, height, width, _ = x.shape
    out = np.zeros((n, height - 2, width - 2, w.shape[-1]))
    for i in range(3):
        for j in range(3):
            out += x[:, i : i + height - 2, j : j + width - 2] @ w[i, j]
    return out


class Net(nn.Module):
    """A product, batch normalization if asked for, and ReLU."""

    norm: bool = True
    train: bool = False

    @nn.compact
    def __call__(self, x):
        bias = nn.initializers.normal(0.3)
        if x.ndim == 2:
            x = nn.Dense(4, bias_init=bias, name="layer")(x)
        else:
            x = nn.Conv(4, (3, 3), bias_init=bias, name="layer")(x)
        if self.norm:
            x = nn.BatchNorm(
                use_running_average=not self.train,
                scale_init=nn.initializers.normal(1.0),
                bias_init=bias,
                name="norm",
            )(x)
        return nn.relu(x)


def variables_of(model, x):
    variables = jax.jit(model.init)(jax.random.key(0), x)
    rng = np.random.default_rng(5)
    if "batch_stats" in variables:
        stats = {
            "mean": rng.normal(size=4).astype(np.float32),
            "var": rng.uniform(0.3, 2, 4).astype(np.float32),
        }
        variables = {**variables, "batch_stats": {"norm": stats}}
    return variables


def by_hand(variables, x, stats_ranges, per_channel, batch_statistics=False):
    """What LiteRT computes, and what it would without the folding."""
    (in_low, in_high), (out_low, out_high) = stats_ranges
    kernel = np.asarray(variables["params"]["layer"]["kernel"], np.float64)
    bias = np.asarray(variables["params"]["layer"]["bias"], np.float64)
    product = conv if x.ndim == 4 else np.matmul
    inputs = fq(x, in_low, in_high)
    factor, addend = np.ones(4), bias
    if "batch_stats" in variables:
        norm = variables["params"]["norm"]
        stats = variables["batch_stats"]["norm"]
        mean, var = (np.asarray(stats[k], np.float64) for k in ("mean", "var"))
        if batch_statistics:
            w = fq_weight(kernel, True) if per_channel else kernel
            y = product(inputs, w) + bias
            over = tuple(range(y.ndim - 1))
            mean, var = y.mean(over), y.var(over)
        factor = np.asarray(norm["scale"], np.float64) / np.sqrt(var + 1e-5)
        addend = (bias - mean) * factor + np.asarray(norm["bias"], np.float64)
    y = product(inputs, fq_weight(kernel * factor, per_channel)) + addend
    return fq(np.maximum(y, 0), out_low, out_high)


@pytest.mark.thinned(10)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("x", [X, IMAGE], ids=["dense", "conv"])
def test_a_fused_layer_is_that_of_integers(x, per_channel, norm):
    model = Net(norm)
    variables = variables_of(model, x)
    op = "conv_general_dilated0_lhs" if x.ndim == 4 else "dot_general0_lhs"
    provider = odml.OdmlQatProvider(
        RULES,
        disable_per_channel_weights=not per_channel,
        quant_stats=ranges(**{f"layer__{op}": (-2.1, 2.4), "final_output0": (0, 3.3)}),
    )
    out = jax.jit(quantize_model(model, provider).apply)(variables, x)
    expected = by_hand(variables, x, ((-2.1, 2.4), (0, 3.3)), per_channel)
    # A sum in float32 that is next to a tie may go either way.
    steps = np.abs(out - expected) / (3.3 / 255)
    assert steps.max() <= 1.01
    assert (steps < 0.01).mean() > 0.97
    # The test can tell: the other granularity computes something else.
    other = by_hand(variables, x, ((-2.1, 2.4), (0, 3.3)), not per_channel)
    assert (np.abs(out - other) > 0.5 * 3.3 / 255).mean() > 0.02


@pytest.mark.slow
@pytest.mark.parametrize("per_channel", [True, False])
def test_training_folds_the_statistics_of_the_batch(per_channel):
    x = np.random.default_rng(2).normal(size=(16, 6)).astype(np.float32)
    model = Net(train=True)
    variables = variables_of(model, x)
    provider = odml.OdmlQatProvider(
        RULES,
        disable_per_channel_weights=not per_channel,
        quant_stats=ranges(layer__dot_general0_lhs=(-2.1, 2.4), final_output0=(0, 3.3)),
    )
    out, updated = quantize_model(model, provider).apply(
        variables, jax.device_put(x), mutable=["batch_stats"]
    )
    expected = by_hand(
        variables, x, ((-2.1, 2.4), (0, 3.3)), per_channel, batch_statistics=True
    )
    steps = np.abs(out - expected) / (3.3 / 255)
    assert steps.max() <= 1.01
    assert (steps < 0.01).mean() > 0.95
    # The running averages move towards the batch.
    old = variables["batch_stats"]["norm"]["mean"]
    assert np.abs(updated["batch_stats"]["norm"]["mean"] - old).max() > 1e-3


@pytest.mark.slow
def test_gradients_pass_through_the_folded_layer():
    model = Net(train=True)
    variables = variables_of(model, IMAGE)
    stats = ranges(layer__conv_general_dilated0_lhs=(-3.5, 3.5), final_output0=(0, 4.0))

    def loss(params, quantized):
        out, _ = quantized.apply(
            {**variables, "params": params},
            jax.device_put(IMAGE),
            mutable=["batch_stats"],
        )
        return jnp.mean((out - 1.0) ** 2)

    exact = jax.grad(loss)(variables["params"], model)
    for per_tensor in (False, True):
        provider = odml.OdmlQatProvider(
            RULES, disable_per_channel_weights=per_tensor, quant_stats=stats
        )
        grads = jax.grad(loss)(variables["params"], quantize_model(model, provider))
        for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(exact), strict=True):
            assert np.isfinite(a).all()
            # Those of the float model, but for rounding.
            np.testing.assert_allclose(a, b, 0, 0.15 * np.abs(b).max() + 1e-3)
        assert np.abs(grads["layer"]["kernel"]).max() > 1e-3


class Masked(nn.Module):
    @nn.compact
    def __call__(self, x, mask):
        return nn.softmax(jnp.where(mask, x, jnp.finfo(jnp.float32).min))


@pytest.mark.slow
def test_what_is_masked_is_no_part_of_the_range():
    x, mask = jax.device_put(X), np.arange(6) < 4
    quantized = quantize_model(Masked(), odml.OdmlQatProvider(RULES))
    stats = jax.jit(quantized.init)(jax.random.key(0), x, mask)
    stats = jax.tree.map(jnp.zeros_like, stats)
    apply = jax.jit(functools.partial(quantized.apply, mutable=["quant_stats"]))
    out, updated = apply(stats, x, mask)
    state = updated["quant_stats"]["softmax0"]
    low = min(X.min(), 0) - 8
    np.testing.assert_allclose(state["sum_of_max"], X.max(), 1e-2)
    np.testing.assert_allclose(state["sum_of_min"], low, 1e-2)
    assert not np.any(out[:, 4:])
    scores = np.where(mask, X.astype(np.float64), -np.inf)
    e = np.exp(scores - scores.max(1, keepdims=True))
    np.testing.assert_allclose(out, e / e.sum(1, keepdims=True), atol=0.03)


def test_the_sigmoid_of_a_silu_is_quantized():
    class Silu(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.silu(x)

    provider = odml.OdmlQatProvider(
        RULES, quant_stats=ranges(silu0=(-3.0, 3.0), final_output0=(-0.3, 3.0))
    )
    out = quantize_model(Silu(), provider).apply({}, jax.device_put(X))
    x = fq(X, -3.0, 3.0)
    gate = np.clip(np.round(256 / (1 + np.exp(-x))), 0, 255) / 256
    np.testing.assert_allclose(out, fq(x * gate, -0.3, 3.0), atol=1e-5)
    # The rounded gate makes a difference.
    plain = fq(x / (1 + np.exp(-x)), -0.3, 3.0)
    assert np.abs(out - plain).max() > 1e-3


@pytest.mark.slow
def test_average_pooling_and_clips_stay_on_the_grid_of_their_input():
    class Pool(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jnp.clip(nn.avg_pool(x, (2, 2), (1, 1)), -0.55, 0.69)

    provider = odml.OdmlQatProvider(RULES, quant_stats=ranges(avg_pool0=(-1.0, 2.0)))
    out = quantize_model(Pool(), provider).apply({}, jax.device_put(IMAGE))
    scale, zero_point = np.float32(3 / 255), -43
    codes = reference(IMAGE, scale, zero_point, -128, 127)
    total = sum(codes[:, i : i + 4, j : j + 4] for i in (0, 1) for j in (0, 1))
    # As LiteRT's kernel has it: half away from the code zero, in integers.
    mean = np.where(total > 0, (total + 2) // 4, -((-total + 2) // 4))
    bounds = [int(np.round(b / scale)) + zero_point for b in (-0.55, 0.69)]
    expected = (np.clip(mean, *bounds) - zero_point) * scale
    np.testing.assert_allclose(out, expected, atol=1e-6)
