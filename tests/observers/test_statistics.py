import dataclasses
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from qwix._src import averaging as qwix_averaging
from qwix._src.core import qarray as qwix_qarray

from qwix_train.core.how import HowToQuantize
from qwix_train.observers.statistics import make_statistics
from tests.compare import assert_close, assert_same
from tests.core.reference import reference_range
from tests.pairwise import pairwise

LAYOUTS = [
    {},
    dict(channelwise_axes=(0,)),
    dict(channelwise_axes=(-1,), tiled_axes={0: 3}),
    dict(tiled_axes={0: 5}, pad_tiles=True),
]
RANGES = ["absmax", "absmax,0.7", "minmax", "minmax,0.5", "rms,2", "fixed,-1,2"]
# The first stands for all where only the histogram counts, which they share.
STREAMS = ["percentile,99", "percentile,99,asymmetric", "mse", "entropy"]


def data(batches=5, shape=(12, 10), seed=0):
    x = np.random.default_rng(seed).normal(size=(batches, *shape)).astype(np.float32)
    return x * np.exp(np.arange(batches, dtype=np.float32))[:, None, None] / 10


def make(observer, averaging="mean", **how):
    return make_statistics(observer, averaging, how=HowToQuantize(qtype="int8", **how))


@functools.cache
def jitted(statistics):
    return jax.jit(statistics.update)


def collect(statistics, batches):
    state = statistics.init(batches[0].shape, batches[0].dtype)
    for x in batches:
        state = jitted(statistics)(state, jax.device_put(x))
    return state


@pytest.mark.thinned(3)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("observer", RANGES)
def test_mean_range_against_a_reference(layout, observer):
    statistics, batches = make(observer, **layout), data()
    got = statistics.calibration(collect(statistics, batches))
    how = dataclasses.replace(statistics.how, calibration_method=observer)
    ranges = [reference_range(x, how) for x in batches]
    assert got.keys() == ranges[0].keys()
    for key, value in got.items():
        assert value.dtype == jnp.float32
        want = np.mean([r[key] for r in ranges], 0)
        np.testing.assert_allclose(value, want, rtol=2e-6)


@pytest.mark.thinned(6)
@pytest.mark.parametrize(
    ("observer", "layout", "dtype"),
    pairwise(RANGES[:-1], LAYOUTS[:3], ["float32", "bfloat16"]),
    ids=str,
)
def test_mean_has_the_states_of_qwix(layout, observer, dtype):
    statistics, average = make(observer, **layout), qwix_averaging.SimpleMovingAverage()
    layout = {"channelwise_axes": (), "tiled_axes": {}, **layout}
    layout["channelwise_axes"] = tuple(a % 2 for a in layout["channelwise_axes"])
    how = qwix_qarray.HowToQuantize(qtype="int8", calibration_method=observer, **layout)
    batches = jnp.asarray(data(3), dtype)
    state = statistics.init(batches[0].shape, batches[0].dtype)
    want = average.init(qwix_qarray.calibrate(batches[0], how))
    for x in batches:
        state = statistics.update(state, x)
        want = average.update(want, qwix_qarray.calibrate(x, how))
    assert not state["skipped"]
    assert_same(statistics.quant_stats(state), want)
    assert_same(statistics.calibration(state), average.get_calibration(want))


@pytest.mark.thinned(5)
@pytest.mark.parametrize(
    ("averaging", "bad", "observer"),
    pairwise(
        ["mean", "ema,0.5"],
        [np.nan, np.inf, -np.inf, "empty"],
        ["absmax", "minmax", "rms,2", *STREAMS[:1]],
        allowed=lambda averaging, _, observer: (
            averaging == "mean" or observer not in STREAMS
        ),
    ),
)
def test_bad_batches_are_skipped_and_counted(observer, bad, averaging):
    statistics, batches = make(observer, averaging, channelwise_axes=(1,)), data(2)
    if observer in STREAMS:
        statistics = make(observer)
    spoiled = batches[0] * 100
    if bad == "empty":
        spoiled = spoiled[:0]
    else:
        spoiled[3, 4] = bad
    state = collect(statistics, [batches[0], spoiled, batches[1], spoiled])
    want = collect(statistics, batches)
    assert state["skipped"] == 2 and state["count"] == 2
    assert_same({**state, "skipped": want["skipped"]}, want)
    only = collect(statistics, [spoiled])
    assert only["count"] == 0 and only["skipped"] == 1
    assert all(np.isnan(v).all() for v in statistics.calibration(only).values())
    sums = statistics.quant_stats(only)
    assert all(not np.any(value) for value in sums.values())


@pytest.mark.thinned(2)
@pytest.mark.parametrize("observer", ["absmax", "minmax", "mse"])
def test_a_batch_of_enormous_values_is_skipped(observer):
    statistics, batches = make(observer), data(2)
    spoiled = batches[0].copy()
    spoiled[3, 4] = 1e38
    state = collect(statistics, [batches[0], spoiled, spoiled, spoiled, batches[1]])
    assert state["skipped"] == 3 and state["count"] == 2
    assert_same({**state, "skipped": jnp.int32(0)}, collect(statistics, batches))


@pytest.mark.thinned(2)
@pytest.mark.parametrize("layout", LAYOUTS[:2], ids=str)
def test_a_mean_weighs_batches_by_what_they_hold(layout):
    statistics = make("minmax", **layout)
    x = data(1, (16, 10))[0] if layout == {} else data(1, (12, 10))[0]
    parts = [x[:12], 3 * x[:12, :2], 2 * x[:12, :5]]
    found = statistics.calibration(collect(statistics, parts))
    # In float64, with the number of values of each.
    weights = [part.size for part in parts]
    axes = (0, 1) if layout == {} else 1
    for key, end in {"min": np.min, "max": np.max}.items():
        ends = [
            end(part.astype(float), axis=axes, keepdims=True, initial=0)
            for part in parts
        ]
        want = np.average(ends, axis=0, weights=weights)
        np.testing.assert_allclose(found[key], want, 1e-5)
    merged = statistics.merge(
        collect(statistics, parts[:1]), collect(statistics, parts[1:])
    )
    for key, value in statistics.calibration(merged).items():
        np.testing.assert_allclose(value, found[key], 1e-6)
    sums = statistics.quant_stats(merged)
    np.testing.assert_allclose(sums["sum_of_min"] / sums["count"], found["min"], 1e-6)


def test_a_mean_of_equal_batches_is_the_plain_sum():
    statistics, batches = make("absmax"), data(4)
    total = np.float32(0)
    for x in batches:
        total += np.abs(x).max()
    assert collect(statistics, batches)["sum_of_absmax"] == total


@pytest.mark.thinned(6)
@pytest.mark.parametrize("axes", [None, (0,)])
@pytest.mark.parametrize("observer", [*RANGES[:5], *STREAMS[:3]])
def test_what_is_not_finite_is_left_out(observer, axes):
    if axes and observer in STREAMS:
        return
    how = HowToQuantize(qtype="int8")
    make_one = functools.partial(make_statistics, observer, how=how, batch_axes=axes)
    batches = data(2)
    padded = np.concatenate([batches, np.full((2, 3, 10), np.nan, np.float32)], 1)
    padded[0, 12] = np.inf
    found = collect(make_one(finite_only=True), padded)
    want = collect(make_one(), batches)
    assert (found["count"], found["skipped"]) == (2, 0)
    found, want = (make_one().calibration(state) for state in (found, want))
    for key in want:
        np.testing.assert_allclose(found[key], want[key], 1e-5)
    nothing = collect(
        make_one(finite_only=True), np.full((1, 4, 10), np.nan, np.float32)
    )
    assert (nothing["count"], nothing["skipped"]) == (0, 1)


def test_a_range_beyond_float32_is_skipped():
    statistics = make("rms,2")
    state = statistics.update(statistics.init((2,), jnp.float32), jnp.full(2, 3e38))
    assert state["count"] == 0 and state["skipped"] == 1


@pytest.mark.thinned(3)
@pytest.mark.parametrize("observer", ["absmax", "minmax", *STREAMS[:1]])
@hypothesis.settings(max_examples=5)
@hypothesis.given(order=st.permutations(range(4)), cut=st.integers(0, 4))
def test_merging_equals_one_pass(observer, order, cut):
    averaging = "minmax" if observer in ("absmax", "minmax") else "mean"
    statistics, batches = make(observer, averaging), data(4)
    batches[2, 0, 0] = np.nan
    parts = batches[list(order)]
    empty = statistics.init(batches[0].shape, jnp.float32)
    a, b = (
        collect(statistics, p) if len(p) else empty for p in (parts[:cut], parts[cut:])
    )
    assert_same(statistics.merge(a, b), collect(statistics, batches))


@pytest.mark.thinned(3)
@pytest.mark.parametrize("observer", ["absmax", "minmax", *STREAMS[:1]])
def test_merged_shards_are_one_big_batch(observer):
    averaging = "minmax" if observer in ("absmax", "minmax") else "mean"
    statistics, batches = make(observer, averaging), data(4)
    a, b = collect(statistics, batches[:2]), collect(statistics, batches[2:])
    merged = statistics.calibration(statistics.merge(a, b))
    whole = collect(statistics, [batches.reshape(48, 10)])
    assert_same(merged, statistics.calibration(whole))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("observer", "layout", "kind", "spec"),
    pairwise(
        [*RANGES, *STREAMS[:1]],
        [{}, dict(channelwise_axes=(1,)), dict(tiled_axes={0: 4})],
        [AxisType.Auto, AxisType.Explicit],
        [PartitionSpec("data", "model"), PartitionSpec(None, "data")],
        allowed=lambda observer, layout, *_: (
            observer not in STREAMS or "tiled_axes" not in layout
        ),
    ),
    ids=str,
)
def test_sharded_batches_have_the_same_state(observer, layout, kind, spec):
    mesh = jax.make_mesh((4, 2), ("data", "model"), (kind,) * 2)
    x = data(1, (16, 8))[0]
    statistics = make(observer, **layout)
    sharded = jax.device_put(x, NamedSharding(mesh, spec))
    state = statistics.init(x.shape, x.dtype)
    step = jax.jit(lambda s, x: (statistics.update(s, x), x.sum()))
    state, _ = step(state, sharded)
    # The order in which a root mean square adds differs.
    rtol = 1e-6 if observer.startswith("rms") else 0
    assert_close(state, collect(statistics, [x]), rtol, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("observer", ["absmax", "minmax", "rms,2", *STREAMS[:1]])
def test_jit_vmap_scan_and_cond(observer):
    statistics, batches = make(observer), jax.device_put(data(3))
    want = collect(statistics, batches)
    init = statistics.init(batches[0].shape, batches.dtype)
    rtol = 1e-6 if observer.startswith("rms") else 0

    def body(state, x):
        updated = jax.lax.cond(
            jnp.isfinite(x[0, 0]), statistics.update, lambda state, _: state, state, x
        )
        return updated, None

    state, _ = jax.lax.scan(body, init, batches)
    assert_close(state, want, rtol, atol=0)

    # Layers: one more axis in front.
    layers = jnp.stack([batches, batches * 3], 1)
    state = jax.tree.map(lambda v: jnp.stack([v, v]), init)
    for x in layers:
        state = jax.vmap(statistics.update)(state, x)
    assert_close({k: v[0] for k, v in state.items()}, want, rtol, atol=0)
    assert state["count"].tolist() == [3, 3]
    ranges = jax.vmap(statistics.calibration)(state)
    alone = statistics.calibration(collect(statistics, layers[:, 1]))
    assert_close({k: v[1] for k, v in ranges.items()}, alone, atol=0)


@pytest.mark.slow
def test_bfloat16_is_observed_as_it_is():
    x = jnp.asarray(data(1)[0], jnp.bfloat16)
    for observer in "absmax", "minmax", *STREAMS:
        statistics = make(observer)
        state = collect(statistics, [x])
        assert_same(state, collect(statistics, [x.astype(jnp.float32)]))


def test_gradients_do_not_flow():
    statistics = make("absmax")
    init = statistics.init((3,), jnp.float32)

    def loss(x):
        return statistics.update(init, x)["sum_of_absmax"].sum()

    assert not jax.grad(loss)(jnp.ones(3)).any()


@pytest.mark.thinned(2)
@pytest.mark.parametrize("averaging", ["ema,0.9", "minmax", "last"])
def test_quant_stats_of_other_averagings(averaging):
    statistics = make("minmax", averaging)
    state = collect(statistics, data())
    got, want = statistics.quant_stats(state), statistics.calibration(state)
    assert got["count"] == 1
    np.testing.assert_array_equal(got["sum_of_min"], want["min"])
    np.testing.assert_array_equal(got["sum_of_max"], want["max"])


@pytest.mark.slow
def test_other_batch_sizes_share_a_range():
    for observer in "absmax", "percentile,100":
        statistics = make(observer, channelwise_axes=(1,))
        state = collect(statistics, [np.ones((2, 3), np.float32)])
        state = statistics.update(state, 3 * jnp.ones((5, 3)))
        assert state["count"] == 2
        with pytest.raises(ValueError, match="size of a channelwise"):
            statistics.update(state, jnp.ones((5, 4)))


@dataclasses.dataclass(frozen=True)
class Largest:
    """A range observer of a user."""

    def observe(self, x, how):
        return {"absmax": jnp.max(jnp.abs(x)).reshape((1,) * x.ndim) * 2}


@dataclasses.dataclass(frozen=True)
class MeanMagnitude:
    """A stream observer of a user."""

    def init(self, shape, how):
        return {"sum": jnp.zeros(()), "size": jnp.zeros((), jnp.int32)}

    def update(self, state, x, how):
        return {"sum": state["sum"] + jnp.abs(x).sum(), "size": state["size"] + x.size}

    def merge(self, a, b):
        return {"sum": a["sum"] + b["sum"], "size": a["size"] + b["size"]}

    def calibration(self, state, how):
        return {"absmax": (state["sum"] / state["size"]).reshape(1, 1)}


@dataclasses.dataclass(frozen=True)
class First:
    """An averaging of a user."""

    def init(self, calibration):
        return {"count": jnp.zeros((), jnp.int32), "first": jnp.zeros((1, 1))}

    def update(self, state, calibration):
        first = jnp.where(state["count"], state["first"], calibration["absmax"])
        return {"count": state["count"] + 1, "first": first}

    def merge(self, a, b):
        first = jnp.where(a["count"], a["first"], b["first"])
        return {"count": a["count"] + b["count"], "first": first}

    def calibration(self, state):
        return {"absmax": state["first"]}


def test_observers_and_averagings_of_users():
    batches = data(4)
    batches[1, 0, 0] = np.inf
    valid = np.abs(batches[[0, 2, 3]].astype(np.float64))
    for statistics, want in (
        (make(Largest()), 2 * valid.max((1, 2)).mean()),
        (make(Largest(), First()), 2 * valid[0].max()),
        (make(MeanMagnitude()), valid.mean()),
    ):
        state = collect(statistics, batches)
        assert state["count"] == 3 and state["skipped"] == 1
        got = statistics.calibration(state)["absmax"]
        np.testing.assert_allclose(got, np.full((1, 1), want), rtol=1e-6)
        merged = statistics.merge(
            collect(statistics, batches[:2]), collect(statistics, batches[2:])
        )
        assert_close(merged, state, 1e-6, atol=0)


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    "make_it, message",
    [
        (lambda: make("median"), "choose from: absmax"),
        (lambda: make("absmax", "median"), "choose from: mean"),
        (lambda: make(3), "neither the method of a RangeObserver"),
        (lambda: make("mse", "ema,0.9"), "nothing for the averaging 'ema,0.9'"),
        (lambda: make("absmax").init((3,), jnp.int32), "int32"),
        (lambda: make("mse").init((3,), jnp.int32), "int32"),
        (lambda: make("mse", tiled_axes={0: 2}).init((4,), jnp.float32), "per tile"),
        (lambda: make("absmax", tiled_axes={0: 3}).init((4,), jnp.float32), "divide"),
    ],
)
def test_what_does_not_go_together(make_it, message):
    with pytest.raises(ValueError, match=message):
        make_it()


def test_statistics_are_hashable():
    assert make("mse") == make("mse") and hash(make("mse")) == hash(make("mse"))
    assert make("absmax", "ema,0.9") != make("absmax", "ema,0.8")
