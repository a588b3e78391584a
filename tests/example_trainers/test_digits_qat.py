"""The digits example, end to end and across interruptions."""

import dataclasses
import itertools
import json
import math
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest

from example_trainers.digits_qat import config as config_lib
from example_trainers.digits_qat import data, export, report, train

ROOT = pathlib.Path(__file__).parents[2]


def _tiny_config(framework="linen"):
    config = config_lib.get_config()
    config.framework = framework
    config.seeds = (0,)
    config.features = (8, 16)
    config.weight_qtypes = ("int2",)
    config.float_steps = 40
    config.float_learning_rate = 2e-2
    config.qat_steps = 20
    config.eval_every = 10
    return config


class _InterruptError(Exception):
    pass


def _interrupt_before(monkeypatch, step):
    """Makes a run fail before the training step of this number, over all phases."""
    numbers = itertools.count(1)
    make_phase = train.make_phase

    def make_interrupted_phase(*args, **kwargs):
        phase = make_phase(*args, **kwargs)

        def train_step(state, batch):
            if next(numbers) == step:
                raise _InterruptError
            return phase.train_step(state, batch)

        return dataclasses.replace(phase, train_step=train_step)

    monkeypatch.setattr(train, "make_phase", make_interrupted_phase)


# Fails between two checkpoints: while fine-tuning, and in the float phase.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("framework", "failing_step", "checkpoint"),
    [("linen", 56, "int2/10"), ("nnx", 16, "float/10")],
)
def test_run_and_resume(
    framework, failing_step, checkpoint, tmp_path, capsys, monkeypatch
):
    config = _tiny_config(framework)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    # The three runs below share their compiled steps, which take most of the time.
    phases = {}
    make_phase = train.make_phase

    def make_phase_once(framework, name, **kwargs):
        if name not in phases:
            phases[name] = make_phase(framework, name, **kwargs)
        return phases[name]

    monkeypatch.setattr(train, "make_phase", make_phase_once)

    results = train.train_and_evaluate(config, whole)

    printed = capsys.readouterr().out
    assert report.format_table(results) in printed
    assert f"{whole / 'results.json'}\n{whole / 'results.png'}" in printed
    assert json.loads((whole / "results.json").read_text()) == results
    assert (whole / "results.png").read_bytes().startswith(b"\x89PNG")

    assert results["config"]["framework"] == framework
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

    with monkeypatch.context() as patch:
        _interrupt_before(patch, failing_step)
        with pytest.raises(_InterruptError):
            train.train_and_evaluate(config, broken)
    assert (broken / "checkpoints" / "seed_0" / checkpoint).is_dir()
    assert train.train_and_evaluate(config, broken) == results
    assert "resuming" in capsys.readouterr().out


# The checkpoint of a step is written in the background while its line is printed, so
# that the kill hits an unfinished one.
@pytest.mark.slow
def test_resumes_after_sigkill(tmp_path):
    command = [
        *(sys.executable, "-m", "example_trainers.digits_qat", "--quick"),
        "--weight_qtypes=int3",
    ]

    def start(workdir):
        return subprocess.Popen(
            [*command, f"--workdir={workdir}"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    with start(whole) as process:
        output, _ = process.communicate()
    assert process.returncode == 0, output

    with start(broken) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if "float | step   40/60" in line:
                process.send_signal(signal.SIGKILL)
                break
        process.stdout.read()
    assert process.returncode == -signal.SIGKILL, "".join(lines)
    assert not (broken / "results.json").exists()
    with start(broken) as process:
        output, _ = process.communicate()
    assert process.returncode == 0, output
    assert "resuming" in output or "done before" in output

    for name in ("config.json", "results.json"):
        assert (broken / name).read_bytes() == (whole / name).read_bytes()


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
    config = _tiny_config()
    train.claim_workdir(config, tmp_path)
    train.claim_workdir(config, tmp_path)
    config.batch_size = 7
    with pytest.raises(train.SettingsError, match="batch_size: 64 there, 7 here"):
        train.claim_workdir(config, tmp_path)


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
