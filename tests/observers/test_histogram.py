import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis.extra import numpy as hnp
from jax.sharding import NamedSharding, PartitionSpec

from qwix_train.observers import histogram
from tests.compare import assert_same

update = jax.jit(histogram.update)
merge = jax.jit(histogram.merge)


def histogram_of(x, groups=None):
    x = jax.device_put(x)
    return update(histogram.init(groups or (1,) * x.ndim), x)


def reference_counts(x: np.ndarray) -> dict[tuple[int, bool, int], int]:
    """Counts by exponent, sign and 128th of the octave, in float64."""
    mantissa, exponent = np.frexp(np.abs(x.astype(np.float64)))
    part = np.floor((mantissa * 2 - 1) * 128).astype(int)
    keys = zip((exponent - 1).tolist(), (x < 0).tolist(), part.tolist(), strict=True)
    counts: dict = {}
    for key in keys:
        counts[key] = counts.get(key, 0) + 1
    return counts


@pytest.mark.slow
def test_bins_against_numpy():
    x = np.random.default_rng(0).normal(size=5000).astype(np.float32)
    bins = histogram.signed_bins(histogram_of(x))
    assert bins.masses.shape == (1, 2 * histogram.BINS)
    masses, lower, upper = (np.asarray(part[0], np.float64) for part in bins)
    filled = masses > 0
    got = {}
    for mass, low, high in zip(
        masses[filled], lower[filled], upper[filled], strict=True
    ):
        end = low if low >= 0 else high  # The end next to 0 belongs to the bin.
        mantissa, exponent = np.frexp(abs(end))
        got[exponent - 1, low < 0, int(np.floor((mantissa * 2 - 1) * 128))] = mass
    want = reference_counts(x)
    # None of these values is below the lowest octave.
    assert np.abs(x).min() > np.abs(x).max() * 2.0**-15
    assert got == want
    assert lower[0] == x.min() and upper[-1] == x.max()
    assert np.all(np.diff(lower) >= 0) and np.all(upper >= lower)


@pytest.mark.slow
def test_a_bin_is_narrow_relative_to_its_values():
    state = histogram_of(np.float32([1.99, -1.99]))
    _, lower, upper = (np.asarray(part[0]) for part in histogram.magnitude_bins(state))
    assert lower[0] == 0 and upper[0] == 2.0**-15 * (1 + 1 / 128)
    inside = slice(1, None)
    assert np.all((upper - lower)[inside] <= lower[inside] / 128)


@pytest.mark.slow
@hypothesis.settings(max_examples=30)
@hypothesis.given(
    x=hnp.arrays(
        np.float32,
        24,
        elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
    ),
    order=st.permutations(range(4)),
    pairs=st.booleans(),
)
def test_merging_in_any_order_is_one_pass(x, order, pairs):
    whole = histogram_of(x)
    parts = [histogram_of(x.reshape(4, 6)[i]) for i in order]
    if pairs:
        merged = merge(merge(parts[0], parts[1]), merge(parts[2], parts[3]))
    else:
        merged = merge(parts[0], merge(parts[1], merge(parts[2], parts[3])))
    assert_same(merged, whole)
    stream = histogram.init((1,))
    for i in order:
        stream = update(stream, jax.device_put(x.reshape(4, 6)[i]))
    assert_same(stream, whole)
    assert histogram.signed_bins(whole).masses.sum() == 24


def test_growth_by_any_factor_keeps_all_elements():
    state = histogram.init((1,))
    for exponent in range(-120, 128, 9):
        state = update(state, jnp.full((3,), -(2.0**exponent)))
    masses = histogram.magnitude_bins(state).masses[0]
    assert masses.sum() == 3 * len(range(-120, 128, 9))
    assert histogram.absmax(state).item() == 2.0**123
    assert masses[0] == 3 * (len(range(-120, 128, 9)) - 2)


@pytest.mark.slow
def test_special_magnitudes():
    largest, tiny = np.finfo(np.float32).max, np.finfo(np.float32).tiny
    x = np.float32([0, -0.0, tiny / 4, -tiny, largest, -largest])
    masses, lower, upper = histogram.signed_bins(histogram_of(x))
    assert masses.sum() == 6 and np.isfinite(lower).all() and np.isfinite(upper).all()
    zeros = histogram_of(np.zeros((4,), np.float32))
    masses, lower, upper = histogram.magnitude_bins(zeros)
    assert masses.sum() == 4 and not lower.any() and not upper.any()


def test_counts_beyond_32_bits():
    x = np.float32([1, 1, 3, -1000])
    one, state = histogram_of(x), histogram_of(x)
    for _ in range(40):
        state = merge(state, state)
    np.testing.assert_array_equal(
        histogram.signed_bins(state).masses,
        histogram.signed_bins(one).masses * 2.0**40,
    )
    # What falls out at the lower end is added up with its carries.
    grown = merge(state, histogram_of(np.float32([2.0**101 - 2.0**77])))
    masses = histogram.signed_bins(grown).masses[0]
    middle = histogram.BINS
    assert masses[middle] == 3 * 2.0**40 and masses[middle - 1] == 2.0**40
    assert masses[-1] == 1
    exact = (
        np.asarray(grown["counts"], np.uint64)
        + np.asarray(grown["carries"], np.uint64) * 2**31
    )
    assert int(exact.sum()) == 4 * 2**40 + 1


@pytest.mark.slow
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_channels_are_histograms_of_their_own(axis):
    x = np.random.default_rng(1).normal(size=(3, 4, 5)).astype(np.float32)
    x *= np.exp(np.arange(3.0))[:, None, None].astype(np.float32)
    groups = tuple(n if a == axis else 1 for a, n in enumerate(x.shape))
    state = update(histogram_of(x[::-1], groups), jax.device_put(x))
    for i in range(x.shape[axis]):
        where = tuple(slice(i, i + 1) if a == axis else slice(None) for a in range(3))
        want = histogram_of(np.concatenate([x[::-1][where], x[where]]))
        assert_same({key: value[where] for key, value in state.items()}, want)


def test_bfloat16_is_widened():
    x = jax.device_put(np.random.default_rng(2).normal(size=100).astype(jnp.bfloat16))
    assert_same(histogram_of(x), histogram_of(x.astype(np.float32)))


@pytest.mark.slow
def test_sharded_arrays_are_one():
    x = np.random.default_rng(3).normal(size=(16, 8)).astype(np.float32)
    mesh = jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,))
    for spec in PartitionSpec("data"), PartitionSpec(None, "data"):
        sharded = jax.device_put(x, NamedSharding(mesh, spec))
        for groups in (1, 1), (1, 8):
            want = histogram_of(x, groups)
            assert_same(update(histogram.init(groups), sharded), want)


@pytest.mark.slow
def test_vmap_and_scan():
    x = jax.device_put(np.random.default_rng(4).normal(size=(8, 6)).astype(np.float32))
    one = jax.vmap(lambda x: histogram.update(histogram.init((1,)), x))
    stacked = jax.jit(one)(x)
    for i in range(8):
        part = {key: value[i] for key, value in stacked.items()}
        assert_same(part, histogram_of(x[i]))

    def body(state, x):
        return histogram.update(state, x), None

    state, _ = jax.lax.scan(body, histogram.init((1,)), x)
    assert_same(state, histogram_of(x.reshape(-1)))


def test_an_array_of_other_channels_is_refused():
    with pytest.raises(ValueError, match=r"\(1, 3\).*\(2, 4\)"):
        histogram.update(histogram.init((1, 3)), jnp.zeros((2, 4)))
    with pytest.raises(ValueError, match=r"\(1, 1\).*\(2,\)"):
        histogram.update(histogram.init((1, 1)), jnp.zeros((2,)))
