import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

from qwix_train.core import numerics
from qwix_train.observers import clipping, histogram
from tests.core.reference import levels_of

update = jax.jit(histogram.update)


def histogram_of(x):
    return update(histogram.init((1,)), jax.device_put(x))


def distributions(n=20_000):
    rng = np.random.default_rng(0)
    normal = rng.normal(size=n)
    outliers = rng.normal(size=n // 100) + 30
    samples = {
        "normal": normal,
        "laplace": rng.laplace(size=n),
        "relu": np.maximum(normal, 0),
        "heavy": rng.standard_t(2, size=n),
        "outliers": np.concatenate([normal, outliers]),
        "off center": normal + 3,
        "scaled": normal * 1e-20,
    }
    return {name: x.astype(np.float32) for name, x in samples.items()}


def widest_bin_between(x, low, high):
    """The width of the bins at two magnitudes, from their definition."""
    width = 2.0 ** np.floor(np.log2(max(abs(low), abs(high), 1e-45))) / 128
    return max(width, np.abs(x).max() * 2.0**-14)


@pytest.mark.slow
@pytest.mark.parametrize("name", distributions())
@pytest.mark.parametrize("n", [20_000, 700, 1])
def test_percentile_within_one_bin_of_numpy(name, n):
    x = distributions()[name][-n:]
    state = histogram_of(x)
    for percentile in (51, 90, 99.9, 99.99, 100):
        assert_percentile(x, state, percentile)


def assert_percentile(x, state, percentile):
    wide = x.astype(np.float64)
    for symmetric in (True, False):
        found = clipping.percentile_range(state, percentile, symmetric=symmetric)
        # numpy interpolates between two values: one bin of the larger one.
        ends = {
            "absmax": (np.abs(wide), percentile, "higher"),
            "min": (wide, 100 - percentile, "lower"),
            "max": (wide, percentile, "higher"),
        }
        for end, got in found.items():
            of, p, method = ends[end]
            want, next_to = np.percentile(of, p), np.percentile(of, p, method=method)
            # A range that is not symmetric holds 0.
            want = {"absmax": want, "min": min(want, 0), "max": max(want, 0)}[end]
            error = abs(got.item() - want)
            # The largest values are known.
            exact = percentile == 100
            assert error <= (0 if exact else widest_bin_between(x, next_to, want))


@pytest.mark.slow
@hypothesis.settings(max_examples=40)
@hypothesis.given(
    # Whether subnormal numbers are flushed to 0 depends on what ran before.
    x=st.lists(
        st.floats(-1e6, 1e6, width=32, allow_subnormal=False), min_size=1, max_size=40
    ),
    percentile=st.sampled_from([75.0, 99.0]),
)
def test_percentile_of_any_values(x, percentile):
    x = np.float32(x + [0.0] * (40 - len(x)))  # One shape, so that it compiles once.
    got = clipping.percentile_range(histogram_of(x), percentile)["absmax"].item()
    want = np.percentile(np.abs(x), percentile)
    above = np.percentile(np.abs(x), percentile, method="higher")
    assert abs(got - want) <= widest_bin_between(x, above, want)


def squared_error(x, scale, zero, levels):
    thresholds = (levels[:-1] + levels[1:]) / 2
    nearest = levels[np.searchsorted(thresholds, x / scale + zero)] - zero
    return np.mean((nearest * scale - x) ** 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "qtype", ["int8", "int4", "int2", "int1", "nf4", "float8_e5m2"]
)
def test_mse_within_one_percent_of_brute_force(qtype):
    levels, bound = levels_of(qtype), numerics.symmetric_bound(qtype)
    find = jax.jit(lambda state: clipping.mse_range(state, qtype)["absmax"])
    for name, x in distributions().items():
        if name == "scaled":  # A scale below that of the smallest range counts as 1.
            continue
        got, x = find(histogram_of(x)).item(), x.astype(np.float64)
        candidates = np.abs(x).max() * 2.0 ** np.arange(1, -10, -1 / 24)
        best = min(squared_error(x, a / bound, 0, levels) for a in candidates)
        assert squared_error(x, got / bound, 0, levels) <= 1.01 * best, name


@pytest.mark.slow
@pytest.mark.parametrize("qtype", ["int8", "int3"])
def test_mse_of_both_ends_within_one_percent_of_brute_force(qtype):
    levels = levels_of(qtype)
    find = jax.jit(lambda state: clipping.mse_range(state, qtype, symmetric=False))

    def error(x, low, high):
        scale = (high - low) / (levels[-1] - levels[0])
        zero = np.clip(np.round(levels[0] - low / scale), levels[0], levels[-1])
        return squared_error(x, scale, zero, levels)

    for name in "normal", "relu", "off center", "outliers":
        x = distributions(4000)[name]
        got = {end: v.item() for end, v in find(histogram_of(x)).items()}
        x = x.astype(np.float64)
        shares = 2.0 ** np.arange(0.25, -4, -1 / 8)
        best = min(
            error(x, min(x.min(), 0) * i, x.max() * j) for i in shares for j in shares
        )
        assert error(x, got["min"], got["max"]) <= 1.01 * best, name


def test_mse_of_one_value():
    absmax = clipping.mse_range(histogram_of(np.full(10, 3.0, np.float32)), "int8")
    scale = absmax["absmax"].item() / 127.5
    assert abs(np.round(3 / scale) * scale - 3) < 0.003


def reference_divergence(x, t, levels):
    """KL(P || Q) on a histogram of even cells, 16 for each level, of the values."""
    x = np.abs(x)
    cells = np.histogram(x, levels * 16, (0, t))[0].astype(np.float64)
    p = cells.copy()
    p[-1] += (x > t).sum()
    q = np.zeros_like(p)
    for i in range(0, len(p), 16):
        filled = p[i : i + 16] > 0
        if filled.any():
            q[i : i + 16] = filled * cells[i : i + 16].sum() / filled.sum()
    p, q = p / p.sum(), q / q.sum()
    with np.errstate(divide="ignore"):
        return np.sum(p[p > 0] * np.log(p[p > 0] / q[p > 0]))


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", ["normal", "laplace", "student"])
def test_entropy_against_a_reference(name):
    # So many values, evenly spread over the quantiles, that cells have no noise.
    u = (np.arange(400_000) + 0.5) / 400_000
    x = {
        "normal": np.asarray(jax.scipy.stats.norm.ppf(u)),
        "laplace": -np.log1p(-u),
        "student": (2 * u - 1) / np.sqrt(2 * u * (1 - u)),  # 2 degrees of freedom
    }[name].astype(np.float32)
    find = jax.jit(lambda state: clipping.entropy_range(state, "int4")["absmax"])
    got = find(histogram_of(x)).item()
    candidates = np.abs(x).max() * 2.0 ** (-np.arange(0, 8, 1 / 8))
    best = min(reference_divergence(x, t, 8) for t in candidates)
    assert got < np.abs(x).max()
    assert reference_divergence(x, got, 8) <= 1.05 * best


@pytest.mark.parametrize("qtype", ["nf4", "float8_e4m3fn", "int1"])
def test_entropy_needs_even_levels(qtype):
    with pytest.raises(ValueError, match=f"{qtype}.*int2 to int8"):
        clipping.entropy_range(histogram_of(np.ones(3, np.float32)), qtype)


@pytest.mark.slow
@pytest.mark.parametrize(
    "find",
    [
        lambda s: clipping.percentile_range(s, 99),
        lambda s: clipping.percentile_range(s, 99, symmetric=False),
        lambda s: clipping.mse_range(s, "int4", symmetric=False),
        lambda s: clipping.entropy_range(s, "int4"),
        lambda s: clipping.mse_range(s, "int4"),
    ],
)
def test_channels_at_once(find):
    x = np.random.default_rng(0).normal(size=(500, 3)).astype(np.float32)
    x *= np.float32([1, 100, 0])
    state = update(histogram.init((1, 3)), jax.device_put(x))
    find = jax.jit(find)
    together = find(state)
    for i in range(3):
        alone = find(update(histogram.init((1, 1)), jax.device_put(x[:, i : i + 1])))
        for end, value in alone.items():
            assert together[end].shape == (1, 3)
            np.testing.assert_allclose(together[end][:, i], value[0], rtol=1e-6)
    assert not any(value[0, 2] for value in together.values())
