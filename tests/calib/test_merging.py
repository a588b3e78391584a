"""Statistics are trees of arrays: sharded, saved, and merged."""

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax import numpy as jnp

from qwix_train import calib
from tests import models
from tests.calib.test_calibrator import BATCHES, Linear, rule

OBSERVERS = [
    ("absmax", "mean"),
    ("absmax", "ema,0.9"),
    ("absmax", "minmax"),
    ("minmax", "minmax"),
    ("minmax", "last"),
    ("rms,3", "mean"),
    ("percentile,99.9", "mean"),
    ("mse", "mean"),
    ("entropy", "mean"),
]
# What merging makes of shards is what one batch of all of them gives.
EXACT = [("absmax", "minmax"), ("minmax", "minmax"), *OBSERVERS[6:]]
BIG = [np.concatenate([scale * x for x in BATCHES * 4]) for scale in (1.0, 3.0, 0.1)]


def observe(observer, averaging):
    """The function, and a compiled form of it, of one input."""
    case = Linear("linen")
    method = "minmax" if observer == "minmax" else "absmax"
    rules = [
        rule(
            act_observer=observer,
            act_averaging=averaging,
            act_calibration_method=method,
        )
    ]
    observed = calib.observe(case.eval_step(), rules)
    return observed, jax.jit(lambda stats, x: observed(stats, *case.args(x))[0])


def data(stats):
    """The statistics, but for what the cut into batches makes a difference to."""
    return {
        name: {**state, **dict.fromkeys(("count", "narrowest"), 0)}
        for name, state in stats.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize(("observer", "averaging"), OBSERVERS)
def test_a_sharded_batch_gives_what_it_gives_on_one_device(observer, averaging):
    mesh = jax.make_mesh((8,), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.P("data"))
    observed, collect = observe(observer, averaging)
    found = []
    for place in (jnp.asarray, lambda x: jax.device_put(x, sharding)):
        stats = observed.init(Linear("linen").params, BIG[0])
        for x in BIG:
            stats = collect(stats, place(x))
        found.append(stats)
    for name, state in found[0].items():
        for key, want in state.items():
            # The order of the sum in a root mean square is that of the devices; and
            # what enters the second layer is a product that XLA computes for a shard.
            exact = name.startswith("Dense_0") and "rms" not in observer
            if exact:
                np.testing.assert_array_equal(found[1][name][key], want)
            elif "_of_" in key or key in ("min", "max", "narrowest", "widest"):
                np.testing.assert_allclose(found[1][name][key], want, rtol=1e-6)
            else:  # Counts; an element may be in the bin next to its own.
                assert found[1][name][key].sum() == want.sum()


@pytest.mark.thinned(8)
@pytest.mark.parametrize(("observer", "averaging"), EXACT)
def test_shards_merge_to_what_one_batch_gives(observer, averaging):
    """Each of eight devices collects its shard of a batch."""
    mesh = jax.make_mesh((8,), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.P("data"))
    observed, collect = observe(observer, averaging)
    whole = observed.init(Linear("linen").params, BIG[0])
    parts = [whole] * 8
    for x in BIG:
        whole = collect(whole, x)
        shards = jax.device_put(x, sharding).addressable_shards
        assert len({shard.device for shard in shards}) == 8
        parts = [
            collect(part, np.asarray(shard.data))
            for part, shard in zip(parts, shards, strict=True)
        ]
    first, *others = (part for part in parts)
    for other in others:
        first = calib.merge_stats(observed, first, other)
    name = "Dense_0/dot_general0_lhs"
    assert first[name]["count"] == 24 and whole[name]["count"] == 3
    models.assert_same(data({name: first[name]}), data({name: whole[name]}))


@pytest.mark.thinned(12)
@pytest.mark.parametrize(("observer", "averaging"), OBSERVERS)
def test_two_runs_merge_to_one(observer, averaging):
    observed, collect = observe(observer, averaging)
    empty = observed.init(Linear("linen").params, BATCHES[0])
    whole, parts = empty, [empty, empty]
    for i, x in enumerate(BATCHES):
        whole = collect(whole, x)
        parts[i >= 2] = collect(parts[i >= 2], x)
    merged = calib.merge_stats(observed, *parts)
    assert jax.tree.structure(merged) == jax.tree.structure(whole)
    models.assert_close(merged, whole, 1e-6)
    models.assert_close(observed.quant_stats(merged), observed.quant_stats(whole), 1e-6)
    models.assert_same(calib.merge_stats(observed, parts[0], {}), parts[0])


@pytest.mark.slow
def test_layers_and_batches_that_were_skipped():
    model = models.Layers()
    params = jax.jit(model.init)(jax.random.key(0), BATCHES[0])["params"]
    observed = calib.observe(
        lambda x: model.apply({"params": params}, x), [rule(act_observer="mse")]
    )
    collect = jax.jit(lambda stats, x: observed(stats, x)[0])
    whole = empty = observed.init(BATCHES[0])
    bad = np.full_like(BATCHES[0], np.nan)
    batches = [BATCHES[0], bad, 20 * BATCHES[1]]
    for x in batches:
        whole = collect(whole, x)
    merged = calib.merge_stats(
        observed,
        collect(collect(empty, batches[0]), batches[1]),
        collect(empty, batches[2]),
    )
    models.assert_same(merged, whole)
    (state,) = merged.values()
    assert state["count"].tolist() == [2] * 3 and state["skipped"].tolist() == [1] * 3


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["linen", "nnx"])
@pytest.mark.parametrize("observer", ["absmax", "mse"])
def test_orbax_saves_them_with_a_train_state(tmp_path, framework, observer):
    case = Linear(framework)

    def calibrated():
        calibrator = calib.Calibrator([rule(act_observer=observer)])
        return calibrator, calibrator.wrap(case.eval_step())

    whole, step = calibrated()
    for x in BATCHES:
        step(*case.args(x))
    first, step = calibrated()
    for x in BATCHES[:2]:
        step(*case.args(x))
    saved = {"params": {"kernel": case.kernel}, "step": 2, "ranges": first.state}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", saved)
        checkpointer.wait_until_finished()
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, saved)
        restored = checkpointer.restore(tmp_path / "state", like)
    models.assert_same(restored["ranges"], dict(first.state))

    then, step = calibrated()
    then.state = restored["ranges"]
    for x in BATCHES[2:]:
        step(*case.args(x))
    models.assert_same(dict(then.state), dict(whole.state))
    models.assert_same(then.quant_stats, whole.quant_stats)

    rest, step = calibrated()
    for x in BATCHES[2:]:
        step(*case.args(x))
    merged = calib.merge_stats(rest, restored["ranges"], rest.state)
    models.assert_close(merged, dict(whole.state), 1e-6)


def test_errors():
    observed, collect = observe("absmax", "mean")
    stats = collect({}, BATCHES[0])
    with pytest.raises(ValueError, match="'Dense_7'.*'Dense_0/dot_general0_lhs'"):
        calib.merge_stats(observed, stats, {"Dense_7": {}})
    with pytest.raises(ValueError, match="'Dense_7'.*'Dense_0/dot_general0_lhs'"):
        calib.merge_processes(observed, {**stats, "Dense_7": {}})
    with pytest.raises(ValueError, match="has the step been traced"):
        calib.merge_stats(observe("absmax", "mean")[0], stats, stats)
    _, other = observe("minmax", "mean")
    with pytest.raises(ValueError, match=r"Dense_0/dot_general0_lhs.*same rules"):
        calib.merge_stats(observed, stats, other({}, BATCHES[0]))
