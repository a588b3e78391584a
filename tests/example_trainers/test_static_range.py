"""The language model example, end to end and across an interruption."""

import json
import math
from pydoc_data import topics

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from example_trainers import byte_text
from example_trainers.static_range import config as config_lib
from example_trainers.static_range import data, experiment, report, train
from example_trainers.static_range import model as model_lib


def test_no_paragraph_is_in_two_splits():
    splits = data.load_splits()
    texts = {name: text.tobytes().decode() for name, text in splits.items()}
    everything = [
        p for text in texts.values() for p in byte_text.split_paragraphs(text)
    ]
    assert len(everything) == len(set(everything))
    lines = {line for text in texts.values() for line in text.split("\n")}
    assert lines == {x for text in topics.topics.values() for x in text.split("\n")}
    total = sum(map(len, topics.topics.values()))
    for name in ("test", "validation"):
        assert 0.05 * total < len(texts[name]) <= 0.1 * total


def test_batches_are_bytes_and_the_bytes_after():
    text = data.load_splits()["train"]
    options = {"length": 16, "batch_size": 4}
    batches = byte_text.train_iterator(text, seed=0, **options)
    for _ in range(3):
        batch = next(batches)
        assert batch["input"].shape == batch["target"].shape == (4, 16)
        np.testing.assert_array_equal(batch["input"][:, 1:], batch["target"][:, :-1])
        for line in batch["input"]:
            assert line.astype(np.uint8).tobytes() in text.tobytes()
    first, second = (
        list(byte_text.eval_batches(text, batches=2, **options)) for _ in "ab"
    )
    assert len(first) == 2
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a["input"], b["input"])


@pytest.mark.slow
def test_the_model_cannot_look_ahead():
    config = config_lib.get_quick_config()
    model, params = model_lib.create_model(config), model_lib.create_params(config)
    tokens = jax.random.randint(jax.random.key(1), (2, 32), 0, 256)
    changed = tokens.at[:, 20].add(1)
    apply = jax.jit(model.apply)
    before, after = (apply({"params": params}, x) for x in (tokens, changed))
    np.testing.assert_array_equal(before[:, :20], after[:, :20])
    assert not np.allclose(before[:, 20:], after[:, 20:])


@pytest.mark.slow
def test_metrics_against_numpy():
    logits = np.random.default_rng(0).normal(size=(3, 5, 7))
    targets = np.random.default_rng(1).integers(0, 7, (3, 5), np.int32)
    state = model_lib.train_state.TrainState.create(
        apply_fn=lambda variables, x: jnp.asarray(logits, jnp.float32),
        params={},
        tx=optax.sgd(0.1),
    )
    batch = {"input": targets, "target": targets}
    found = train.evaluate(model_lib.eval_step, state, [batch, batch])
    chosen = np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    loss = np.mean(np.log(np.exp(logits).sum(-1)) - chosen)
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    assert found["accuracy"] == pytest.approx((logits.argmax(-1) == targets).mean())


class _InterruptError(Exception):
    pass


@pytest.mark.slow
def test_resumes_as_if_unbroken(tmp_path, monkeypatch):
    config = config_lib.get_quick_config()
    config.eval_every = 2
    text = data.load_splits()["train"]

    def validation():
        return byte_text.eval_batches(text, length=32, batch_size=8, batches=1)

    phase = train.make_phase("float", steps=6, learning_rate=1e-2)

    def run(name, hooks=()):
        return train.run_phase(
            phase,
            model_lib.create_train_state(
                config, model_lib.create_params(config), phase.tx
            ),
            config=config,
            text=text,
            validation=validation,
            checkpoint_dir=tmp_path / name,
            hooks=hooks,
        )

    def fail(step, state):
        del state
        if step == 5:
            raise _InterruptError

    whole, history = run("whole")
    assert [record["step"] for record in history] == [2, 4, 6]
    assert history[-1]["validation_loss"] < math.log(256)
    with pytest.raises(_InterruptError):
        run("broken", [fail])
    resumed, same_history = run("broken")
    assert same_history == history
    jax.tree.map(np.testing.assert_array_equal, whole.params, resumed.params)


@pytest.mark.slow
def test_quick_run(tmp_path, capsys):
    config = config_lib.get_quick_config()

    results = experiment.train_and_evaluate(config, tmp_path)

    printed = capsys.readouterr().out
    assert report.format_table(results) in printed
    assert json.loads((tmp_path / "results.json").read_text()) == results
    for name in ("results.png", "comparison.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    lines = (tmp_path / "quant_report.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [20, 40]
    assert "quant/layers/up/kernel/sqnr_db" in json.loads(lines[0])

    rows = {
        (row["weights"], row["activations"], row["method"]): row
        for row in results["rows"]
    }
    assert len(rows) == len(results["rows"])
    floating = rows["float", "float", ""]
    assert math.isfinite(floating["loss"]) and floating["loss"] < math.log(256)
    for (weights, _, _), row in rows.items():
        # int8 is close to float, and int4 not far from it, however it is done.
        tolerance = {"float": 0.05, "int8": 0.02, "int4": 0.2}[weights]
        assert row["loss"] == pytest.approx(floating["loss"], abs=tolerance)
        ratio = {"float": 1, "int8": 0.5, "int4": 0.4}[weights]
        assert row["bytes"] <= ratio * floating["bytes"]
    exported = {path.name for path in (tmp_path / "exported").iterdir()}
    quantized = [row for row in results["rows"] if row["weights"] != "float"]
    assert len(exported) == len(quantized)
