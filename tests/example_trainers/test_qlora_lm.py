"""The fine-tuning example, end to end and across an interruption."""

import functools
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from example_trainers import byte_text, loop
from example_trainers.qlora_lm import (
    attention,
    data,
    experiment,
    generate,
    methods,
    model_linen,
    model_nnx,
    report,
)
from example_trainers.qlora_lm import config as config_lib
from example_trainers.workdirs import SettingsError
from tests import compare
from tests.example_trainers.killed import run_and_kill


def _tiny_config(framework="linen"):
    config = config_lib.get_quick_config()
    config.framework = framework
    config.features = 32
    config.heads = 2
    config.sequence_length = 16
    config.rank = 2
    config.tile_size = 32
    return config


def test_code_is_split_by_module_and_says_nothing_twice():
    splits = data.load_code()
    texts = {name: text.tobytes().decode() for name, text in splits.items()}
    everything = [
        p for text in texts.values() for p in byte_text.split_paragraphs(text)
    ]
    assert len(everything) == len(set(everything))
    modules = (data.TRAIN_MODULES, data.VALIDATION_MODULES, data.TEST_MODULES)
    names = [name for split in modules for name in split]
    assert len(names) == len(set(names))
    assert "def dedent(text):" in texts["test"]
    assert "class NamedTemporaryFile" not in texts["test"]
    assert "def dedent(text):" not in texts["train"] + texts["validation"]
    # Enough of each for every batch of the defaults.
    config = config_lib.get_config()
    batch = config.eval_batch_size * config.sequence_length
    assert len(texts["validation"]) > config.validation_batches * batch
    assert len(texts["test"]) > config.test_batches * batch
    assert len(texts["train"]) > 10 * len(texts["test"])


def test_rotation_against_complex_numbers():
    x = np.random.default_rng(0).normal(size=(2, 5, 3, 8))
    first, second = np.split(x, 2, -1)
    position, pair = np.arange(5)[:, None, None], np.arange(4)
    turned = (first + 1j * second) * np.exp(1j * position * 10000 ** (-pair / 4))
    expected = np.concatenate([turned.real, turned.imag], -1)
    found = attention.rotate(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.slow
def test_attention_against_numpy_and_blind_to_what_comes():
    heads, features = 2, 8
    x = np.random.default_rng(0).normal(size=(1, 6, 3 * features))
    found = attention.attend(jnp.asarray(x, jnp.float32), heads)
    query, key, value = x.reshape(1, 6, 3, heads, -1).transpose(2, 0, 1, 3, 4)
    turn = functools.partial(jnp.asarray, dtype=jnp.float32)
    query, key = (np.asarray(attention.rotate(turn(y)), float) for y in (query, key))
    scores = np.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(features // heads)
    scores = np.where(np.tril(np.ones((6, 6), bool)), scores, -np.inf)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    expected = np.einsum("bhqk,bkhd->bqhd", weights, value).reshape(1, 6, -1)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.slow
def test_both_dialects_compute_the_same():
    config = _tiny_config()
    tokens = jax.random.randint(jax.random.key(1), (2, 16), 0, 256)
    tx = experiment.make_optimizer(1e-3, 10)
    state = model_linen.create_train_state(config, tx, 0)
    model, _ = model_nnx.create_train_state(config, tx, 0)
    params = dict(state.params)
    tree = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    blocks = {i: params.pop(f"layer_{i}") for i in range(config.layers)}
    params["layers"] = blocks
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, tree)
    held = nnx.state(model, nnx.Param)
    nnx.replace_by_pure_dict(held, params)
    nnx.update(model, held)
    logits = state.apply_fn({"params": state.params}, tokens)
    np.testing.assert_allclose(model(tokens), logits, atol=1e-5)


def test_sample_follows_a_model_that_is_sure():
    def predict(params, tokens):
        # The byte after each byte is the next one.
        return params * jax.nn.one_hot(tokens + 1, 256)

    written = generate.sample(
        predict,
        jnp.float32(1e3),
        np.frombuffer(b"xya", np.uint8).astype(np.int32),
        length=4,
        temperature=1.0,
        seed=0,
    )
    assert written == b"bcde"


def test_unknown_method_is_named():
    with pytest.raises(ValueError, match="no method 'dora'"):
        methods.make_method(_tiny_config(), "dora")


def test_table():
    def row(label, losses, trained, seconds):
        return {
            "label": label,
            "method": label,
            "losses": losses,
            "trained_params": trained,
            "trained_bytes": 4 * trained,
            "frozen_bytes": 2048,
            "optimizer_bytes": 8 * trained,
            "step_seconds": seconds,
            "exported": {"qtype": "nf4", "loss": 1.5, "bytes": 4096},
        }

    config = config_lib.get_config()
    loss = {"loss": 2.0}
    results = {
        "config": json.loads(config.to_json()),
        "base": {"params": 12345, "prose": {"loss": 1.25}, "code": loss},
        "rows": [row("all", [1.4, 1.6], 1024, 0.1), row("few", [1.5, 1.53], 256, 0.05)],
    }
    table = report.format_table(results)
    assert "vs all" in table
    assert "12,345 params on prose to 1.2500" in table
    (line,) = [line for line in table.splitlines() if line.startswith("few")]
    expected = "few 256 3 KiB 2 KiB 50 ms 1.5150 ± 0.0212 +1.00% nf4 1.5000 4 KiB"
    assert line.split() == expected.split()


# The next test runs that of NNX.
@pytest.mark.slow
def test_quick_run(tmp_path, capsys):
    config = config_lib.get_quick_config()

    results = experiment.train_and_evaluate(config, tmp_path)

    printed = capsys.readouterr().out
    assert report.format_table(results) in printed
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    assert len(results["sample"]["text"]) == config.sample_length
    rows = {row["method"]: row for row in results["rows"]}
    assert tuple(rows) == config.methods
    full, adapted = rows["full"], rows["lora"]
    base = results["base"]["code"]["loss"]
    assert base < math.log(256)
    # Adapters add nothing at first, and a quantized base is near its model.
    assert full["loss_before"] == pytest.approx(base, abs=1e-6)
    assert adapted["loss_before"] == pytest.approx(base, abs=1e-6)
    for row in rows.values():
        assert row["loss_before"] == pytest.approx(base, abs=0.1)
        assert row["losses"][0] < base
        assert row["exported"]["loss"] == pytest.approx(row["losses"][0], abs=0.05)
        assert row["exported"]["bytes"] < 0.5 * full["trained_bytes"]
    assert adapted["optimizer_bytes"] < 0.15 * full["optimizer_bytes"]
    assert rows["qlora_nf4"]["frozen_bytes"] < 0.6 * adapted["frozen_bytes"]

    config.rank = 8
    with pytest.raises(SettingsError, match="rank: 4 there, 8 here"):
        experiment.train_and_evaluate(config, tmp_path)


class _InterruptError(Exception):
    pass


def _interrupt(config, folder, monkeypatch):
    """Runs an experiment to the 25th step of fine-tuning."""

    def fail(step, state):
        del state
        if step == 25:
            raise _InterruptError

    with monkeypatch.context() as patch, pytest.raises(_InterruptError):
        run_phase = functools.partial(loop.run_phase, hooks=[fail])
        patch.setattr(loop, "run_phase", run_phase)
        experiment.train_and_evaluate(config, folder)


def _export_once(monkeypatch):
    """Exports one state alone, and has any other be the same in all bits."""
    whole = experiment.Experiment
    export, write_sample, found = whole._export, whole.write_sample, {}

    def export_once(self, state, method):
        arrays = jax.tree.map(compare.as_numpy, self.framework.arrays(state))
        if not found:
            found.update(arrays=arrays, exported=export(self, state, method))
        compare.assert_same(arrays, found["arrays"])
        return found["exported"]

    def write_once(self, *exported):
        if "sample" not in found:
            found["sample"] = write_sample(self, *exported)
        return found["sample"]

    monkeypatch.setattr(whole, "_export", export_once)
    monkeypatch.setattr(whole, "write_sample", write_once)


# Stopped while it fine-tunes: the weights it started from are those of a phase that was
# done before, and its checkpoint has adapters alone.
@pytest.mark.slow
@pytest.mark.parametrize("framework", ["linen", "nnx"])
def test_resumes_as_if_unbroken(framework, tmp_path, capsys, monkeypatch):
    config = config_lib.get_quick_config()
    config.framework = framework
    config.methods = ("qlora_nf4",)
    config.pretrain_steps, config.finetune_steps = 20, 30
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    # The runs in this process share their compiled steps.
    make_phase = functools.cache(experiment.make_phase)
    monkeypatch.setattr(experiment, "make_phase", make_phase)

    _export_once(monkeypatch)

    def measured(workdir):
        results = experiment.train_and_evaluate(config, workdir)
        del results["seconds"]
        for row in results["rows"]:
            del row["step_seconds"]
        return results

    expected = measured(whole)
    (history,) = expected["rows"][0]["histories"]
    assert [record["step"] for record in history] == [10, 20, 30]
    if framework == "linen":
        flags = ["--quick", "--methods=qlora_nf4", f"--workdir={broken}"]
        flags += ["--pretrain_steps=20", "--finetune_steps=30"]
        line = "seed 0 | step   20/30"
        run_and_kill("example_trainers.qlora_lm", *flags, after=line)
    else:
        _interrupt(config, broken, monkeypatch)
    assert not (broken / "results.json").exists()
    capsys.readouterr()
    assert measured(broken) == expected
    printed = capsys.readouterr().out
    assert "pre-training | step   20/20 | done before" in printed
    assert re.search(r"seed 0 \| step   [12]0/30 \| resuming", printed)
    folder = broken / "checkpoints" / "qlora_nf4_seed_0" / "30" / "state"
    # The checkpoint is smaller than the base in float.
    stored = sum(path.stat().st_size for path in folder.rglob("*"))
    assert stored < 4 * 12 * config.features**2
