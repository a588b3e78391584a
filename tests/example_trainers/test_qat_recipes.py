"""The example that compares recipes of QAT, end to end."""

import json
import statistics

import jax
import numpy as np
import optax
import pytest

import qwix_train
from example_trainers import loop
from example_trainers.qat_recipes import config as config_lib
from example_trainers.qat_recipes import experiment, methods, report, tasks
from example_trainers.workdirs import SettingsError


def _row(weights, method, *accuracies):
    seeds = [{"test": {"accuracy": x, "loss": 1 - x}} for x in accuracies]
    return {"weights": weights, "method": method, "seeds": seeds}


def _measured(metric, *rows):
    return {
        "task": "digits",
        "label": "digits",
        "metric": metric,
        "rows": [
            _row("float", "float", 0.9, 0.9),
            _row("float", report.FLOAT, 0.94, 0.96),
            _row("int2", report.PTQ, 0.4, 0.5),
            *rows,
        ],
    }


@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_recovery_is_the_share_of_what_ptq_loses(metric):
    measured = _measured(metric, _row("int2", report.PLAIN, 0.6, 0.7))
    summary = report.summarize(measured)
    _, _, ptq, plain = summary["rows"]
    assert ptq["recovery"] == 0
    # Of 0.95 - 0.45, the float model that was trained on, 0.65 - 0.45.
    assert plain["recovery"] == pytest.approx(0.4)
    assert plain["recovery_std"] == pytest.approx(statistics.stdev([0.6, 0.7]) / 0.5)


def test_no_share_of_next_to_nothing():
    measured = _measured("accuracy")
    measured["rows"] += [
        _row("int4", report.PTQ, 0.946, 0.946),
        _row("int4", report.PLAIN, 0.95, 0.95),
    ]
    assert report.summarize(measured)["rows"][-1]["recovery"] is None


@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_a_gain_within_the_spread_is_reported(metric):
    plain = _row("int2", report.PLAIN, 0.6, 0.7)

    def broken(*accuracies):
        measured = _measured(metric, plain, _row("int2", "proximal", *accuracies))
        return report.check({"tasks": [report.summarize(measured)]})

    assert broken(0.8, 0.8) == []
    (message,) = broken(0.7, 0.7)
    assert "proximal" in message and report.PLAIN in message
    (message,) = broken(0.5, 0.5)
    assert f"{report.PLAIN} has" in message


@pytest.mark.slow
def test_train_batches_are_those_of_the_iterator():
    task = tasks.make_task("digits", config_lib.get_quick_config())
    batches = task.train_batches(seed=3, steps=4)
    iterator = task.train_iterator(3)
    for _ in range(2):
        found = list(iter(batches))
        assert len(found) == 4
    for batch in found:
        jax.tree.map(np.testing.assert_array_equal, batch, next(iterator))


def test_unknown_tasks_are_refused():
    with pytest.raises(ValueError, match="digits, text"):
        tasks.make_task("faces", config_lib.get_quick_config())


@pytest.mark.slow
def test_what_is_measured_is_what_qat_computed():
    config = config_lib.get_quick_config()
    task = tasks.make_task("digits", config)
    setting = methods.Setting(
        task, "int3", "int8", 1, optax.adam(1e-3), None, task.validation
    )
    recipe = methods.plain(setting)
    state = task.create_state(0, recipe.tx)
    exported = experiment.Exporter(task).eval_step(recipe)
    found = loop.evaluate(exported, state, task.test)
    trained = jax.jit(qwix_train.wrap_eval_step(task.eval_step, recipe.rules))
    assert found == pytest.approx(loop.evaluate(trained, state, task.test), rel=1e-4)
    floating = methods.Recipe((), task.train_step, recipe.tx)
    exported = experiment.Exporter(task).eval_step(floating)
    assert found != pytest.approx(loop.evaluate(exported, state, task.test), rel=1e-4)


@pytest.mark.slow
def test_quick_run(tmp_path, capsys):
    config = config_lib.get_quick_config()
    config.methods = names = tuple(methods.METHODS)

    results = experiment.train_and_evaluate(config, tmp_path)

    printed = capsys.readouterr().out
    assert report.format_tables(results) in printed
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    (task,) = results["tasks"]
    rows = {(row["weights"], row["method"]): row for row in task["rows"]}
    assert rows.keys() == {
        ("float", "float"),
        ("float", report.FLOAT),
        ("int3", report.PTQ),
        *(("int3", method) for method in names),
    }
    # Ten classes.
    assert all(row["mean"] > 0.2 for row in rows.values())


def test_refuses_unknown_methods(tmp_path):
    config = config_lib.get_quick_config()
    config.methods = ("QAT", "LSQ")
    with pytest.raises(SettingsError, match="no method 'LSQ'.*QAT: LSQ, QAT: fr"):
        experiment.train_and_evaluate(config, tmp_path)
    assert not list(tmp_path.iterdir())


def test_methods_can_be_flags():
    assert not any("," in name for name in methods.METHODS)


@pytest.mark.slow
def test_quick_run_of_the_language_model(tmp_path, capsys):
    config = config_lib.get_quick_config()
    config.tasks = ("text",)
    config.weight_qtypes = ("int2",)
    config.methods = ("QAT: LSQ",)

    results = experiment.train_and_evaluate(config, tmp_path)

    (task,) = results["tasks"]
    assert len(task["rows"]) == 2 + 1 + 1
    assert all(0 < row["mean"] < np.log(256) for row in task["rows"])

    # Nothing is trained anew, and another run's folder is refused.
    capsys.readouterr()
    again = experiment.train_and_evaluate(config, tmp_path)
    assert capsys.readouterr().out.count("done before") == 2 + 1
    for row, before in zip(again["tasks"][0]["rows"], task["rows"], strict=True):
        assert row["mean"] == before["mean"]
    config.seeds = (1,)
    with pytest.raises(SettingsError, match="seeds"):
        experiment.train_and_evaluate(config, tmp_path)
