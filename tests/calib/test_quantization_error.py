"""Errors from a histogram, against float64 NumPy on all the data at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwix_train.calib import quantization_error
from qwix_train.core import numerics
from qwix_train.core.how import HowToQuantize
from qwix_train.observers.statistics import make_statistics
from tests.core.reference import levels_of

N = 40_000


def samples():
    rng = np.random.default_rng(0)
    normal = rng.normal(size=N)
    images = rng.integers(0, 256, N) / 255
    digits = np.where(rng.random(N) < 0.8, 0, images)
    return {
        "normal": normal,
        "relu": np.maximum(normal, 0),
        "relu6": np.clip(3 * normal, 0, 6),
        "heavy": rng.standard_t(3, size=N),
        "outlier": np.append(normal[1:], 300.0),
        "off center": normal / 4 + 3,
        "saturated tanh": np.tanh(4 * normal),
        # Values that many elements share are where a histogram may go wrong.
        "images": images,
        "normalized digits": (digits - 0.1307) / 0.3081,
        "bfloat16": np.asarray(jnp.asarray(normal, jnp.bfloat16), np.float64),
        "large": 1e12 * normal,
    }


def how_of(qtype, **kwargs):
    return HowToQuantize(qtype=qtype, **kwargs)


@functools.partial(jax.jit, static_argnames=("statistics", "shape"))
def collect(statistics, shape, batches):
    def body(state, x):
        return statistics.update(state, x), None

    return jax.lax.scan(body, statistics.init(shape, jnp.float32), batches)[0]


def measured(batches, how, observers, dynamic=None):
    """The numbers of each method for stacked batches."""
    methods = tuple((name, make_statistics(name, how=how)) for name in observers)
    observer = quantization_error.ErrorObserver(methods, dynamic or how)
    statistics = make_statistics(observer, how=how)
    batches = jnp.asarray(batches, jnp.float32)
    state = collect(statistics, batches.shape[1:], batches)
    return quantization_error.measure(state, methods, how)


def quantized(x, found, qtype):
    """The nearest level that a range, of each element or of all, has."""
    levels = levels_of(qtype)
    if "absmax" in found:
        scale = found["absmax"] / numerics.symmetric_bound(qtype)
        zero = 0.0
    else:
        scale = (found["max"] - found["min"]) / (levels[-1] - levels[0])
        zero = np.round(levels[0] - found["min"] / scale)
    thresholds = (levels[:-1] + levels[1:]) / 2
    nearest = levels[np.searchsorted(thresholds, x / scale + zero)]
    return (nearest - zero) * scale


def outside(x, found):
    low, high = (
        (-found["absmax"], found["absmax"])
        if "absmax" in found
        else (found["min"], found["max"])
    )
    return (x < low) | (x > high)


def in_float64(found):
    return {end: np.asarray(value, np.float64) for end, value in found.items()}


def decibels(energy, error):
    return 10 * np.log10(np.float64(energy) / np.float64(error))


OBSERVERS = {
    "int8": ("absmax", "minmax", "absmax,0.3", "percentile,99", "mse,asymmetric"),
    "int4": ("absmax", "minmax", "rms,3", "mse", "percentile,99.9,asymmetric"),
    "float8_e4m3fn": ("absmax", "percentile,99.9", "absmax,0.02", "mse"),
    "float8_e5m2": ("absmax", "percentile,99.9"),
    "nf4": ("absmax", "mse"),
    "int1": ("rms,1.6",),
}


@pytest.mark.slow
@pytest.mark.parametrize("qtype", OBSERVERS)
def test_errors_are_those_of_all_data_at_once(qtype):
    for name, x in samples().items():
        batches = x.astype(np.float32).reshape(4, 100, -1)
        elements, energy, methods = measured(batches, how_of(qtype), OBSERVERS[qtype])
        x = batches.astype(np.float64)
        assert elements == x.size
        np.testing.assert_allclose(energy, np.sum(x**2), rtol=1e-3)
        for method in OBSERVERS[qtype]:
            got = methods[method]
            found = in_float64(got.range)
            error = np.sum((quantized(x, found, qtype) - x) ** 2)
            want = decibels(np.sum(x**2), error)
            # Data that are exactly on the levels have next to no error.
            difference = min(decibels(energy, got.error), 70) - min(want, 70)
            assert abs(difference) < 0.1, (name, method, difference)
            # A bin is at most 1/2048 as wide as its values are large.
            many, few = (
                outside(x, {end: v * f for end, v in found.items()}).mean()
                for f in (1 - 1 / 2048, 1 + 1 / 2048)
            )
            assert few - 1e-6 <= got.outside / x.size <= many + 1e-6, (name, method)


@pytest.mark.slow
def test_ranges_are_those_of_the_observers():
    batches = np.random.default_rng(0).standard_t(3, size=(3, 500)).astype(np.float32)
    for name in ("mse", "percentile,99.9", "entropy", "minmax", "absmax"):
        how = how_of("int8")
        statistics = make_statistics(name, how=how)
        state = collect(statistics, (500,), jax.device_put(batches))
        want = statistics.calibration(state)
        got = measured(batches, how, [name])[2][name].range
        for end, value in want.items():
            np.testing.assert_allclose(got[end], value, rtol=1e-6)


DYNAMIC = {
    "a range for each token": dict(channelwise_axes=(0, 1)),
    "a range for each batch": {},
    "both ends": dict(channelwise_axes=(0, 1), calibration_method="minmax"),
    "clipped": dict(channelwise_axes=(0, 1), calibration_method="absmax,0.5"),
    "tiles": dict(channelwise_axes=(0, 1), tiled_axes={2: 25}),
}


@pytest.mark.thinned(12)
@pytest.mark.parametrize("name", DYNAMIC)
@pytest.mark.parametrize("qtype", ["int8", "int4"])
def test_dynamic_ranges(name, qtype):
    batches = samples()["heavy"].astype(np.float32).reshape(4, 10, 10, 100)
    how = how_of(qtype, **DYNAMIC[name])
    elements, energy, methods = measured(batches, how_of(qtype), ["absmax"], how)
    x = batches.astype(np.float64)
    axes = (1, 2, 3) if name == "a range for each batch" else (-1,)
    parts = x.reshape(4, 10, 10, 4, 25) if name == "tiles" else x
    if name == "both ends":
        found = {
            "min": np.minimum(parts.min(axes, keepdims=True), 0),
            "max": np.maximum(parts.max(axes, keepdims=True), 0),
        }
    else:
        factor = 0.5 if name == "clipped" else 1
        found = {"absmax": factor * np.abs(parts).max(axes, keepdims=True)}
    error = np.sum((quantized(parts, found, qtype) - parts) ** 2)
    got = methods["dynamic"]
    difference = decibels(energy, got.error) - decibels(np.sum(x**2), error)
    assert abs(difference) < 0.01
    assert got.outside == outside(parts, found).sum()


@pytest.mark.slow
@pytest.mark.parametrize(
    "kwargs",
    [
        dict(channelwise_axes=(1,)),
        dict(tiled_axes={1: 5}),
        dict(tiled_axes={1: 3}, pad_tiles=True),
    ],
    ids=["channels", "tiles", "padded tiles"],
)
@pytest.mark.parametrize("width", [20, 80])
def test_channels_and_tiles(kwargs, width):
    x = np.random.default_rng(0).normal(size=(3, 2000, width)).astype(np.float32)
    x *= np.exp(np.linspace(-3, 3, width)).astype(np.float32)
    how = how_of("int8", **kwargs)
    _, energy, methods = measured(x, how, ["absmax", "minmax"])
    x = x.astype(np.float64)
    for method in ("absmax", "minmax"):
        found = in_float64(methods[method].range)
        size = -(-width // found["absmax" if method == "absmax" else "max"].shape[1])
        each = {k: np.repeat(v, size, 1)[:, :width] for k, v in found.items()}
        error = np.sum((quantized(x, each, "int8") - x) ** 2)
        want = decibels(np.sum(x**2), error)
        assert abs(decibels(energy, methods[method].error) - want) < 0.1
        share = outside(x, each).mean()
        assert abs(methods[method].outside / x.size - share) <= 0.2 * share + 1e-6


@pytest.mark.slow
def test_a_batch_that_is_not_finite_changes_nothing():
    x = np.random.default_rng(0).normal(size=(2, 300)).astype(np.float32)
    bad = np.stack([x[0], np.where(np.arange(300) == 7, np.inf, x[0]), x[1]])
    both = [measured(b, how_of("int4"), ["absmax", "mse"]) for b in (x, bad)]
    for a, b in zip(*map(jax.tree.leaves, both), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_merged_states_are_those_of_all_batches():
    how = how_of("int8")
    methods = (("absmax", make_statistics("absmax", "minmax", how=how)),)
    statistics = make_statistics(
        quantization_error.ErrorObserver(methods, how), how=how
    )
    x = jax.device_put(
        np.random.default_rng(0).normal(size=(4, 64, 8)).astype(np.float32)
    )
    x *= jnp.exp(jnp.arange(4.0))[:, None, None]
    whole = collect(statistics, (64, 8), x)
    a, b = (collect(statistics, (64, 8), part) for part in (x[:1], x[1:]))
    merged = jax.jit(statistics.merge)(a, b)
    for key, want in whole.items():
        if key in ("bins/positions", "dynamic/error"):
            np.testing.assert_allclose(merged[key], want, rtol=1e-5)
        else:
            np.testing.assert_array_equal(merged[key], want)
