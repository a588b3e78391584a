"""The digits example, end to end and across interruptions."""

import json
import math

import numpy as np
import pytest

from example_trainers import workdirs
from example_trainers.digits_qat import config as config_lib
from example_trainers.digits_qat import data, export, report, train
from tests.example_trainers.killed import run_and_kill


def _tiny_config(framework="linen"):
    """A run of seconds, as settings and as flags."""
    config = config_lib.get_quick_config()
    config.framework = framework
    config.weight_qtypes = ("int2",)
    config.float_steps = 40
    config.float_learning_rate = 2e-2
    config.qat_steps = 20
    config.eval_every = 10
    changed = {"weight_qtypes": "int2"} | {
        name: config[name]
        for name in (
            *("framework", "float_steps", "float_learning_rate"),
            *("qat_steps", "eval_every"),
        )
    }
    return config, ["--quick", *(f"--{k}={v}" for k, v in changed.items())]


def _run(config, whole, capsys):
    """Runs the example, and looks at all that it leaves."""
    results = train.train_and_evaluate(config, whole)

    printed = capsys.readouterr().out
    assert report.format_table(results) in printed
    assert f"{whole / 'results.json'}\n{whole / 'results.png'}" in printed
    assert json.loads((whole / "results.json").read_text()) == results
    assert (whole / "results.png").read_bytes().startswith(b"\x89PNG")

    assert results["config"]["framework"] == config.framework
    floating = results["float"]
    assert len(floating["per_seed"]) == 1
    # Ten classes: the network has learned something, and int2 costs something.
    assert floating["mean"] > 0.5
    assert [r["step"] for r in floating["history"][0]] == [10, 20, 30, 40]
    assert floating["history"][0][-1]["test_accuracy"] == floating["mean"]
    (row,) = results["rows"]
    assert (row["weight_qtype"], row["act_qtype"]) == ("int2", "int8")
    assert row["ptq"]["mean"] < floating["mean"]
    assert row["qat"]["mean"] > row["ptq"]["mean"]
    assert row["lost"] == pytest.approx(floating["mean"] - row["ptq"]["mean"])

    # What a fresh process restored predicts what was trained, image by image.
    served = json.loads((whole / "serving.json").read_text())
    assert [record["weights"] for record in served] == ["float", "int2"]
    for record, accuracy in zip(served, (floating, row["qat"]), strict=True):
        assert record["same_predictions"] == record["images"] == 450
        assert record["accuracy"] == record["trained_accuracy"]
        assert record["accuracy"] == pytest.approx(accuracy["mean"], abs=1e-6)
    assert served[1]["param_bytes"] < served[0]["param_bytes"] / 6
    assert export.format_table(served) in printed
    return results


@pytest.mark.slow
def test_a_run_of_nnx_and_the_same_again(tmp_path, capsys, monkeypatch):
    config, _ = _tiny_config("nnx")
    monkeypatch.setattr(train, "make_phase", _phases_made_once(train.make_phase))
    results = _run(config, tmp_path, capsys)
    # What was trained is restored.
    monkeypatch.setattr(export, "export_and_serve", lambda *args: None)
    assert train.train_and_evaluate(config, tmp_path) == results
    assert "done before" in capsys.readouterr().out


# Killed between two checkpoints, while it fine-tunes.
@pytest.mark.slow
def test_a_run_and_one_that_was_killed(tmp_path, capsys, monkeypatch):
    config, flags = _tiny_config()
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    # The two runs in this process share their compiled steps.
    monkeypatch.setattr(train, "make_phase", _phases_made_once(train.make_phase))
    results = _run(config, whole, capsys)

    run_and_kill(
        "example_trainers.digits_qat",
        *flags,
        f"--workdir={broken}",
        after="int2 | step   10/20",
    )
    assert (broken / "checkpoints" / "seed_0" / "int2").is_dir()
    assert not (broken / "results.json").exists()
    # The models are the same, so they are not served again.
    monkeypatch.setattr(export, "export_and_serve", lambda *args: None)
    assert train.train_and_evaluate(config, broken) == results
    printed = capsys.readouterr().out
    assert "resuming" in printed or "done before" in printed
    for name in ("config.json", "results.json"):
        assert (broken / name).read_bytes() == (whole / name).read_bytes()


def _phases_made_once(make_phase):
    phases = {}

    def make(framework, name, **kwargs):
        if name not in phases:
            phases[name] = make_phase(framework, name, **kwargs)
        return phases[name]

    return make


def test_split_is_fixed():
    train_split, test_split = data.load_split()
    assert train_split["image"].shape == (1347, 8, 8, 1)
    assert test_split["image"].shape == (450, 8, 8, 1)
    assert 0 <= train_split["image"].min() < train_split["image"].max() == 1
    # Stratified: each digit has its tenth of the test images.
    assert np.bincount(test_split["label"]).min() >= 43
    again, _ = data.load_split()
    np.testing.assert_array_equal(again["image"], train_split["image"])


def test_iterator_continues_where_it_was():
    split, _ = data.load_split()
    batches = data.train_iterator(split, batch_size=32, seed=3)
    for _ in range(50):
        next(batches)
    state = batches.get_state()
    expected = [next(batches) for _ in range(3)]

    resumed = data.train_iterator(split, batch_size=32, seed=3)
    resumed.set_state(state)
    for batch in expected:
        other = next(resumed)
        np.testing.assert_array_equal(batch["image"], other["image"])
        np.testing.assert_array_equal(batch["label"], other["label"])


def test_refuses_a_workdir_with_other_settings(tmp_path):
    config, _ = _tiny_config()
    workdirs.claim_workdir(config, tmp_path)
    workdirs.claim_workdir(config, tmp_path)
    config.batch_size = 7
    with pytest.raises(workdirs.SettingsError, match="batch_size: 64 there, 7 here"):
        workdirs.claim_workdir(config, tmp_path)


def test_summary_and_table():
    config = config_lib.get_config()
    config.seeds = (0, 1)
    config.weight_qtypes = ("int8", "int2")

    def measured(seed, weights, method, accuracy):
        return {
            "seed": seed,
            "weights": weights,
            "method": method,
            "test_accuracy": accuracy,
            "history": [],
        }

    results = report.summarize(
        config,
        [
            measured(0, "float", "float", 0.98),
            measured(0, "int8", "ptq", 0.98),
            measured(0, "int8", "qat", 0.99),
            measured(0, "int2", "ptq", 0.40),
            measured(0, "int2", "qat", 0.94),
            measured(1, "float", "float", 1.00),
            measured(1, "int8", "ptq", 0.99),
            measured(1, "int8", "qat", 0.99),
            measured(1, "int2", "ptq", 0.58),
            measured(1, "int2", "qat", 0.94),
            measured(0, "float_longer", "float", 0.99),
            measured(1, "float_longer", "float", 0.97),
        ],
    )
    assert results["float"]["mean"] == pytest.approx(0.99)
    assert results["float"]["std"] == pytest.approx(0.02 / math.sqrt(2))
    assert results["float_longer"]["mean"] == pytest.approx(0.98)
    int8, int2 = results["rows"]
    # Half a point is within the noise: a share of it would say nothing.
    assert int8["recovery"] is None
    assert int2["recovery"] == pytest.approx((0.94 - 0.49) / (0.99 - 0.49))

    table = report.format_table(results)
    assert "over 2 seeds" in table
    (line,) = [line for line in table.splitlines() if line.startswith("int2")]
    assert line.split() == "int2 int8 49.0 ± 12.7 94.0 ± 0.0 90%".split()
    (line,) = [line for line in table.splitlines() if line.startswith("int8")]
    assert line.endswith(" -")
