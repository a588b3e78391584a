import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from qwix._src import averaging as qwix_averaging

from qwix_train.observers.averaging import (
    AmaxHistory,
    Ema,
    Last,
    Mean,
    MinMax,
    parse_averaging,
)

NAMES = ["mean", "ema,0.9", "ema,0", "ema,0.9999", "minmax", "last", "amax_history,3"]


def reference(name: str, ranges: np.ndarray, end: str) -> np.ndarray:
    """All ranges at once, in float64."""
    ranges = ranges.astype(np.float64)
    if name == "mean":
        return ranges.mean(0)
    if name == "last":
        return ranges[-1]
    if name.startswith("amax_history"):
        name, ranges = "minmax", ranges[-3:]
    if name == "minmax":
        return ranges.min(0) if end == "min" else ranges.max(0)
    decay = float(name.split(",")[1])
    weights = (1 - decay) * decay ** np.arange(len(ranges))[::-1]
    return np.einsum("b,b...", weights / weights.sum(), ranges)


def batches(count, seed=0):
    rng = np.random.default_rng(seed)
    low, high = -rng.gamma(2, size=(count, 3, 1)), rng.gamma(2, size=(count, 3, 1))
    return {"min": low.astype(np.float32), "max": high.astype(np.float32)}


def collect(averaging, ranges, start, stop):
    state = averaging.init({key: v[0] for key, v in ranges.items()})
    for i in range(start, stop):
        state = averaging.update(state, {key: v[i] for key, v in ranges.items()})
    return state


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("count", [1, 2, 9])
def test_average_of_all_ranges_at_once(name, count):
    averaging, ranges = parse_averaging(name), batches(count)
    state = collect(averaging, ranges, 0, count)
    assert state["count"].item() == count and state["count"].dtype == jnp.int32
    got = averaging.calibration(state)
    assert set(got) == {"min", "max"}
    for end, value in got.items():
        assert value.dtype == jnp.float32
        want = reference(name, ranges[end], end)
        np.testing.assert_allclose(value, want, rtol=3e-6)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", NAMES)
@hypothesis.settings(max_examples=10)
@hypothesis.given(cuts=st.lists(st.integers(0, 6), max_size=3), right=st.booleans())
def test_merged_states_are_those_of_all_batches(name, cuts, right):
    averaging, ranges = parse_averaging(name), batches(6)
    cuts = [0, *sorted(cuts), 6]
    spans = zip(cuts[:-1], cuts[1:], strict=True)
    parts = [collect(averaging, ranges, *span) for span in spans]
    while len(parts) > 1:  # From the one side or the other.
        at = len(parts) - 2 if right else 0
        parts[at : at + 2] = [averaging.merge(*parts[at : at + 2])]
    want = collect(averaging, ranges, 0, 6)
    assert parts[0].keys() == want.keys()
    for key in want:
        assert parts[0][key].dtype == want[key].dtype
        np.testing.assert_allclose(parts[0][key], want[key], rtol=2e-6)


@pytest.mark.parametrize("name", ["mean", "minmax"])
def test_merging_in_any_order(name):
    averaging, ranges = parse_averaging(name), batches(4)
    a, b = collect(averaging, ranges, 0, 1), collect(averaging, ranges, 1, 4)
    ab, ba = averaging.merge(a, b), averaging.merge(b, a)
    assert all(np.array_equal(ab[key], ba[key]) for key in ab)


def test_mean_has_the_states_of_qwix():
    reference, mean = qwix_averaging.SimpleMovingAverage(), Mean()
    ranges = {"absmax": jnp.asarray(batches(5)["max"], jnp.bfloat16)}
    state = mean.init({"absmax": ranges["absmax"][0]})
    want = reference.init({"absmax": ranges["absmax"][0]})
    for i in range(5):
        state = mean.update(state, {"absmax": ranges["absmax"][i]})
        want = reference.update(want, {"absmax": ranges["absmax"][i]})
    assert state.keys() == {*want, "mean_size"}
    for key in want:
        assert state[key].dtype == want[key].dtype
        np.testing.assert_array_equal(state[key], want[key])
    np.testing.assert_array_equal(
        mean.calibration(state)["absmax"], reference.get_calibration(want)["absmax"]
    )


def test_mean_of_many_bfloat16_ranges_does_not_stall():
    one = jnp.ones((1,), jnp.bfloat16)

    def body(state, _):
        return Mean().update(state, {"absmax": one}), None

    state, _ = jax.lax.scan(body, Mean().init({"absmax": one}), length=5000)
    assert Mean().calibration(state)["absmax"].tolist() == [1]


def test_ranges_of_another_shape_are_refused():
    for averaging in Mean(), Ema(0.5), MinMax(), Last():
        state = averaging.init({"absmax": jnp.zeros((1, 3))})
        with pytest.raises(ValueError, match=r"shape \(1, 1\).*\(1, 3\)"):
            averaging.update(state, {"absmax": jnp.zeros((1, 1))})


@pytest.mark.parametrize(
    "text, message",
    [
        ("median", "choose from: mean; ema,decay; minmax; last"),
        ("", "choose from"),
        ("ema", "ema,decay"),
        ("ema,x", "ema,decay"),
        ("ema,0.9,0.9", "ema,decay"),
        ("ema,1", "below 1"),
        ("ema,-0.1", "at least 0"),
        ("ema,nan", "at least 0"),
        ("mean,3", "takes no arguments"),
        ("amax_history", "Write amax_history,length"),
        ("amax_history,1.5", "it takes one integer"),
        ("amax_history,0", "an integer of at least 1"),
    ],
)
def test_text_that_names_no_averaging(text, message):
    with pytest.raises(ValueError, match=message):
        parse_averaging(text)


def test_the_length_of_a_history_is_an_integer():
    with pytest.raises(ValueError, match="is 1.5, but must be an integer"):
        AmaxHistory(1.5)


def test_text_in_any_case():
    assert parse_averaging(" EMA , 0.5") == Ema(0.5)
    assert hash(parse_averaging("MinMax")) == hash(MinMax())
