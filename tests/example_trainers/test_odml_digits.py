"""The LiteRT example: what it is held to, and what it reports."""

import json

import numpy as np
import pytest

from example_trainers.digits_qat import data
from example_trainers.odml_digits import config as config_lib
from example_trainers.odml_digits import experiment, report
from qwix_train import odml


def _check_files(results, exported):
    """The numbers of each row are those of its files."""
    _, test = data.load_split()
    for row in results["rows"]:
        for seed, record in zip(results["config"]["seeds"], row["seeds"], strict=True):
            name = "_".join(filter(None, (row["weights"], row["method"].lower())))
            model = odml.LiteRTModel.load(exported / f"{name}_seed_{seed}.tflite")
            # One at a time, where the example ran all images at once.
            predictions = [np.argmax(model(x[None])[0]) for x in test["image"]]
            accuracy = np.mean(np.asarray(predictions) == test["label"])
            assert record["litert_accuracy"] == pytest.approx(accuracy)
            assert record["images"] == 450
            assert record["full_integer"] == (row["weights"] != "float")


@pytest.mark.slow
def test_a_small_run_holds_what_the_example_is_held_to(tmp_path, capsys):
    config = config_lib.get_quick_config()
    config.features = (8,)
    config.float_steps = 100
    config.float_learning_rate = 2e-2

    results = experiment.train_and_evaluate(config, tmp_path)

    assert results["broken"] == []
    printed = capsys.readouterr().out
    for part in (report.format_table(results), report.format_latency(results)):
        assert part in printed
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    assert "CONV_2D" in results["ops"] and "float" in results["ops"].splitlines()[2]
    _check_files(results, tmp_path / "exported")

    rows = {(row["weights"], row["method"]): row["seeds"][0] for row in results["rows"]}
    floating, longer = rows["float", ""], rows["float", "longer"]
    # Ten classes: the network has learned something.
    assert floating["litert_accuracy"] > 0.7
    for record in (floating, longer):
        assert record["max_difference"] < 1e-4
        assert record["same_predictions"] == 450
    for method in ("PTQ", "QAT"):
        record = rows["int8", method]
        assert record["same_predictions"] >= 0.995 * 450
        assert record["max_steps"] <= 2
        assert record["equal_logits"] > 0.9
        assert record["bytes"] < floating["bytes"] / 2
        assert rows["int4", method]["same_predictions"] >= 0.99 * 450
        assert rows["int4", method]["bytes"] < record["bytes"]
    after = rows["int8", "PTQ"]
    assert after["litert_accuracy"] >= floating["litert_accuracy"] - 0.005
    for record in results["latency"]:
        assert set(record["microseconds"]) == {"jax.jit", "float", "int8", "int4"}
        assert min(record["microseconds"].values()) > 0


def _results(int8_accuracy=0.99, **changed):
    def record(accuracy, **values):
        return {
            "jax_accuracy": accuracy,
            "litert_accuracy": accuracy,
            "same_predictions": 450,
            "images": 450,
            "max_steps": None,
            "equal_logits": None,
            "full_integer": False,
            "bytes": 32768,
            **values,
        }

    quantized = {"max_steps": 1.0, "equal_logits": 0.97, "full_integer": True}
    quantized |= {"bytes": 8192, **changed}
    return {
        "config": {"seeds": [0, 1], "qat_steps": 300},
        "rows": [
            {"weights": "float", "method": "", "seeds": [record(0.98), record(0.99)]},
            {
                "weights": "float",
                "method": "longer",
                "seeds": [record(0.99), record(0.99)],
            },
            {
                "weights": "int8",
                "method": "QAT",
                "seeds": [
                    record(0.99, **quantized),
                    record(int8_accuracy, **quantized),
                ],
            },
        ],
        "latency": [
            {"images": 1, "microseconds": {"jax.jit": 60.0, "float": 6.0, "int8": 3.0}},
        ],
    }


def test_check_says_what_does_not_hold():
    assert experiment.check(_results()) == []
    # Half a point less, on the mean over the seeds.
    assert experiment.check(_results(int8_accuracy=0.9801)) == []
    (message,) = experiment.check(_results(int8_accuracy=0.979))
    assert message == "int8 QAT: an accuracy of 98.45%, where float has 99.00%."
    assert experiment.check(_results(same_predictions=448)) == []
    messages = experiment.check(_results(same_predictions=447))
    assert messages == [
        f"int8 QAT, seed {seed}: only 99.33% of predictions are as in JAX."
        for seed in (0, 1)
    ]
    messages = experiment.check(_results(full_integer=False))
    assert messages[0] == "int8 QAT, seed 0: the file computes with floats."


def test_tables():
    results = _results(same_predictions=449, max_steps=2.0)
    lines = report.format_table(results).splitlines()
    assert "over 2 seeds" in lines[0]
    (line,) = [line for line in lines if line.startswith("int8")]
    expected = "int8 QAT 99.0 ± 0.0 99.0 ± 0.0 898 of 900 97.0% 2 all 8.0 KiB (0.25x)"
    assert line.split() == expected.split()
    (line,) = [line for line in lines if "300 steps more" in line]
    assert line.endswith("none   32.0 KiB (1.00x)")
    lines = report.format_latency(results).splitlines()
    (line,) = [line for line in lines if "int8" in line]
    assert line.split() == "LiteRT, int8 3 µs (0.05x)".split()
