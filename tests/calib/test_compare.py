"""Comparisons of observers, against NumPy on all batches at once."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
from flax import nnx

import qwix_train
from qwix_train import QuantizationRule, calib, ptq
from qwix_train.observers import named
from tests import models
from tests.calib.test_calibrator import BATCHES, Linear

INT8 = QuantizationRule(weight_qtype="int8", act_qtype="int8")
OBSERVERS = ["absmax", "rms,3"]


def reference(xs, absmax, bits=8):
    """The ratio in dB and the share outside, for a range."""
    x = np.concatenate([np.ravel(x) for x in xs]).astype(np.float64)
    scale = absmax / (2 ** (bits - 1) - 0.5)
    codes = np.clip(np.round(x / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    error = np.sum((codes * scale - x) ** 2)
    return 10 * np.log10(np.sum(x**2) / error), np.mean(np.abs(x) > absmax)


def by_method(comparison, op):
    return {r["method"]: r for r in comparison.records if r["op"] == op}


@pytest.mark.thinned(8)
@pytest.mark.parametrize("framework", ["linen", "state", "nnx"])
@pytest.mark.parametrize("jitted", [True, False])
def test_the_numbers_of_an_eval_loop(framework, jitted):
    case = Linear(framework)
    step = case.eval_step() if jitted else case.eval_step().__wrapped__
    compared = calib.compare(
        step, [INT8], (case.args(x) for x in BATCHES), OBSERVERS, averaging="mean"
    )
    for side, name in enumerate(case.names):
        op = f"{name}/dot_general0_lhs"
        records = by_method(compared, op)
        assert list(records) == ["absmax", "rms,3", "dynamic"]
        xs = [case.inputs(x)[side] for x in BATCHES]
        ranges = {
            "absmax": np.mean([np.abs(x).max() for x in xs]),
            "rms,3": np.mean([3 * np.sqrt(np.mean(x**2)) for x in xs]),
        }
        for method, absmax in ranges.items():
            record = records[method]
            np.testing.assert_allclose(record["absmax"], absmax, rtol=1e-5)
            ratio, share = reference(xs, absmax)
            assert abs(record["sqnr_db"] - ratio) < 0.1
            assert abs(record["saturated"] - share) < 2.5 / record["elements"]
            assert record["elements"] == 4 * xs[0].size and record["qtype"] == "int8"
            assert (record["batches"], record["skipped"]) == (4, 0)
        # Each row of a batch has a dynamic range of its own.
        rows = np.concatenate(xs).astype(np.float64)
        scale = np.abs(rows).max(-1, keepdims=True) / 127.5
        error = np.clip(np.round(rows / scale), -128, 127) * scale - rows
        ratio = 10 * np.log10(np.sum(rows**2) / np.sum(error**2))
        assert abs(records["dynamic"]["sqnr_db"] - ratio) < 0.01
        assert records["dynamic"]["saturated"] == 0


@pytest.mark.slow
def test_ranges_are_those_that_a_calibrator_collects():
    case = Linear("linen")
    names = ["absmax", "minmax", "percentile,99.9", "mse", "entropy"]
    compared = calib.compare(
        case.eval_step(), [INT8], [case.args(x) for x in BATCHES], names
    )
    for name in names:
        rule = QuantizationRule(
            weight_qtype="int8",
            act_qtype="int8",
            act_static_scale=True,
            act_observer=name,
            act_calibration_method="minmax" if name == "minmax" else "absmax",
        )
        calibrator = calib.Calibrator([rule])
        step = calibrator.wrap(case.eval_step())
        for x in BATCHES:
            step(*case.args(x))
        for layer in case.names:
            stats = calibrator.quant_stats[layer]["dot_general0_lhs"]
            record = by_method(compared, f"{layer}/dot_general0_lhs")[name]
            for end, total in stats.items():
                if end != "count":
                    want = np.ravel(total / stats["count"])
                    got = record[end.removeprefix("sum_of_")]
                    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.slow
def test_layers_under_scan_have_a_row_each():
    model = models.Layers()
    params = jax.jit(model.init)(jax.random.key(0), BATCHES[0])["params"]
    compared = calib.compare(
        functools.partial(lambda p, x: model.apply({"params": p}, x), params),
        [INT8],
        BATCHES,  # each is one argument
        ["absmax"],
        averaging="minmax",
    )
    kernels = np.asarray(params["layers"]["Dense_0"]["kernel"])
    inputs = [[], [], []]
    for x in BATCHES:
        for layer, kernel in enumerate(kernels):
            inputs[layer].append(x)
            x = np.tanh(3 * (x @ kernel))
    for layer, xs in enumerate(inputs):
        record = by_method(compared, f"layers/Dense_0/dot_general0_lhs[{layer}]")
        absmax = max(np.abs(x).max() for x in xs)
        np.testing.assert_allclose(record["absmax"]["absmax"], absmax, rtol=1e-5)
        assert abs(record["absmax"]["sqnr_db"] - reference(xs, absmax)[0]) < 0.1
    assert list(compared.best()) == [
        f"layers/Dense_0/dot_general0_lhs[{layer}]" for layer in range(3)
    ]
    assert [r.act_observer for r in compared.rules()] == [
        named.CalibrationMethod("absmax"),
        None,
    ]


def outliers(seed):
    x = np.random.default_rng(seed).normal(size=(512, 6)).astype(np.float32)
    x[0, :2] = 8, -8
    return x


@pytest.mark.slow
def test_the_report_and_the_rules_it_gives(tmp_path):
    case = Linear("linen")
    rules = [
        QuantizationRule(
            module_path="Dense_1", weight_qtype="int8", act_qtype="float8_e4m3fn"
        ),
        QuantizationRule(weight_qtype="int4", act_qtype="int4"),
    ]
    batches = [case.args(outliers(i)) for i in range(3)]
    names = ["absmax", "mse", "minmax", named.Entropy()]
    compared = calib.compare(case.eval_step(), rules, batches, names)
    best = compared.best()
    assert best["Dense_0/dot_general0_lhs"] in ("mse", "Entropy()")
    assert compared.worst(1) == ["Dense_0/dot_general0_lhs"]
    assert len(compared.worst()) == 2

    title, _, header, _, *rows, _, worst, first, second = str(compared).split("\n")
    assert header.split() == ["activation", "type", "dynamic", *map(str, names)]
    assert all(len(row) <= len(header) + 1 for row in rows)
    ratio = by_method(compared, "Dense_0/dot_general0_lhs")[
        best["Dense_0/dot_general0_lhs"]
    ]["sqnr_db"]
    assert f"{ratio:.1f}*" in rows[0] and rows[1].split()[-1] == "-"
    assert rows[0].count("*") == rows[1].count("*") == 1
    assert worst.startswith("hurt most: Dense_0/dot_general0_lhs (")
    assert re.match("minmax: float8_e4m3fn .*Dense_1", first)
    assert re.match(r"Entropy\(\): .*int2 to int8.*Dense_1", second)

    suggested = compared.rules()
    assert suggested[2:] == rules
    calibrator = calib.Calibrator(suggested)
    step = calibrator.wrap(case.eval_step())
    for args in batches:
        step(*args)
    _, params = ptq.quantize(
        case.model,
        case.params,
        suggested,
        batches[0][1],
        quant_stats=calibrator.quant_stats,
    )
    absmax = by_method(compared, "Dense_0/dot_general0_lhs")[
        best["Dense_0/dot_general0_lhs"]
    ]["absmax"]
    scale = params["Dense_0"]["dot_general0_lhs_scale"].array
    np.testing.assert_allclose(np.ravel(scale), absmax / 7.5, rtol=1e-6)

    compared.plot(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(FileExistsError, match=r"plot.png exists"):
        compared.plot(tmp_path / "plot.png")


def test_the_plot_says_what_it_needs(tmp_path, monkeypatch):
    compared = calib.Comparison([], {}, {}, [])
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"needs matplotlib.*qwix_train\["):
        compared.plot(tmp_path / "plot.png")


@pytest.mark.slow
def test_static_settings_of_the_rules():
    """Tiles, ranges of channels, and means over the batch, as the rules ask."""
    case = Linear("linen")

    def compared(**kwargs):
        rule = QuantizationRule(
            weight_qtype="int8", act_qtype="int8", act_static_scale=True, **kwargs
        )
        found = calib.compare(
            case.eval_step(), [rule], [case.args(x) for x in BATCHES], ["absmax", "mse"]
        )
        return by_method(found, "Dense_0/dot_general0_lhs")

    x = np.abs(np.stack(BATCHES))
    tiles = compared(tile_size=2)
    want = x.reshape(4, 8, 3, 2).max((1, 3)).mean(0)
    np.testing.assert_allclose(tiles["absmax"]["absmax"], [want], rtol=1e-6)
    assert "per tile" in tiles["mse"]["note"]
    mean = compared(act_batch_axes=(0,))
    want = x.max(2).mean()
    np.testing.assert_allclose(mean["absmax"]["absmax"], want, rtol=1e-6)


@pytest.mark.slow
def test_batches_that_do_not_count():
    case = Linear("linen")
    bad = np.full_like(BATCHES[0], np.nan)
    batches = [case.args(x) for x in (bad, *BATCHES)]
    found = [
        calib.compare(case.eval_step(), [INT8], some, ["absmax"])
        for some in (batches, batches[1:])
    ]
    for record, want in zip(*(f.records for f in found), strict=True):
        assert record == {**want, "skipped": 1}
    assert "skipped: 1 of 5 batches" in str(found[0])
    with pytest.raises(ValueError, match="No batch of 'Dense_0/dot_general0_lhs'"):
        calib.compare(case.eval_step(), [INT8], batches[:1], ["absmax"])


@pytest.mark.slow
def test_other_shapes_of_batches_and_a_signal_of_zeros():
    case = Linear("linen")
    batches = [case.args(x) for x in (BATCHES[0], BATCHES[1][:3], 0 * BATCHES[2])]
    compared = calib.compare(case.eval_step(), [INT8], batches, ["absmax"])
    assert compared.records[0]["elements"] == (8 + 3 + 8) * 6
    zeros = calib.compare(case.eval_step(), [INT8], batches[2:], ["absmax"])
    records = by_method(zeros, "Dense_0/dot_general0_lhs")
    assert np.isnan(records["absmax"]["sqnr_db"])
    assert "- " in str(zeros) and zeros.worst() == []


@pytest.mark.slow
def test_a_step_with_flags_that_closes_over_nothing():
    model = nnx.Linear(6, 3, rngs=nnx.Rngs(0))

    def eval_step(model, x, *, scale="none"):
        return model(x if scale == "none" else 2 * x)

    step = functools.partial(nnx.jit(eval_step, static_argnames="scale"), scale="two")
    compared = calib.compare(step, [INT8], ((model, x) for x in BATCHES), ["absmax"])
    want = 2 * np.mean([np.abs(x).max() for x in BATCHES])
    np.testing.assert_allclose(compared.records[0]["absmax"], want, rtol=1e-6)


def test_errors():
    case = Linear("linen")
    step, batches = case.eval_step(), [case.args(BATCHES[0])]
    with pytest.raises(ValueError, match="No rule sets an act_qtype"):
        calib.compare(step, [QuantizationRule(weight_qtype="int8")], batches)
    with pytest.raises(ValueError, match="Unknown observer 'median'"):
        calib.compare(step, [INT8], batches, ["median"])
    with pytest.raises(ValueError, match=r"write \['absmax'\]"):
        calib.compare(step, [INT8], batches, "absmax")
    with pytest.raises(ValueError, match="no observer"):
        calib.compare(step, [INT8], batches, [])
    with pytest.raises(ValueError, match="no batch"):
        calib.compare(step, [INT8], [])
    with pytest.raises(ValueError, match="No rule quantizes an op"):
        rule = QuantizationRule(
            module_path="nowhere", weight_qtype="int8", act_qtype="int8"
        )
        calib.compare(step, [rule], batches)


@pytest.mark.slow
def test_what_is_not_finite_is_left_out_where_a_rule_says_so():
    """As if the padded rows, of NaN, were not there."""
    rows = np.random.default_rng(0).normal(size=(2, 8, 4)).astype(np.float32)
    padded = np.concatenate([rows, np.full((2, 3, 4), np.nan, np.float32)], 1)
    params = {"w": np.ones((4, 2), np.float32)}
    step = qwix_train.as_model(lambda params, x: x @ params["w"])
    rule = QuantizationRule(weight_qtype="int8", act_qtype="int8")

    def records(rule, batches):
        observers = ["absmax", "rms,3", "percentile,99", "mse"]
        compared = calib.compare(
            step, [rule], [(params, x) for x in batches], observers
        )
        return by_method(compared, "dot_general0_lhs")

    found = records(dataclasses.replace(rule, act_finite_only=True), padded)
    want = records(rule, rows)
    assert list(found) == list(want)
    for method, record in want.items():
        for key in ("sqnr_db", "saturated", "absmax", "elements", "skipped"):
            if key in record:
                assert found[method][key] == pytest.approx(record[key], rel=1e-4)
    assert found["mse"]["elements"] == rows.size
