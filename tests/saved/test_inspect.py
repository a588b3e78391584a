"""`python -m qwix_train inspect PATH`, of each format that this package writes."""

import hashlib
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from qwix_train import (
    QuantizationRule,
    __main__,
    as_model,
    calib,
    lora,
    odml,
    plan,
    ptq,
)
from tests import models

RULES = [QuantizationRule(weight_qtype="int4", act_qtype="int8")]
X = models.normal(2, 8)


def forward(params, x):
    return jnp.tanh(x @ params["w"]) @ params["v"] + params["b"]


PARAMS = {
    "w": models.normal(8, 6),
    "v": models.normal(6, 4),
    "b": np.zeros(4, np.float32),
}


def quantized():
    return ptq.quantize(forward, PARAMS, RULES, X)[1]


def printed(capsys, path):
    assert __main__.main(["inspect", str(path)]) == 0
    return capsys.readouterr().out


def row(text, name):
    (line,) = [line for line in text.splitlines() if line.startswith(f"{name} ")]
    return line.split()


def test_a_checkpoint(capsys, tmp_path):
    folder = tmp_path / "export"
    with_plan = plan(forward, RULES, PARAMS, X)
    ptq.save(folder, quantized(), rules=RULES, plan=with_plan, metadata={"step": 3})
    text = printed(capsys, folder)
    assert "metadata: step=3" in text
    assert str(RULES[0]) in text
    assert str(with_plan).split("\n\n")[0] in text
    (stored,) = [p for p in ptq.read_manifest(folder).params if p.name == "w"]
    checksums = [array.checksum for array in stored.arrays.values()]
    # 48 codes of half a byte, and 6 scales.
    expected = ["w", "(8,", "6)", "int4", "channel", "1", str(24 + 6 * 4), *checksums]
    assert row(text, "w") == expected
    assert "3 params, 2 of them quantized" in text


@pytest.fixture(scope="module")
def adapters():
    rules = [lora.LoraRule(rank=2, alpha=4.0)]
    params = {name: {"kernel": PARAMS[name]} for name in ("w", "v")}

    def model(params, x):
        return x @ params["w"]["kernel"] @ params["v"]["kernel"]

    made, _, layouts = lora.init(params, model, rules, jax.random.key(0), X)
    return made, layouts


def test_adapters(capsys, tmp_path, adapters):
    lora.save(tmp_path / "adapters", *adapters)
    text = printed(capsys, tmp_path / "adapters")
    assert text.startswith("a checkpoint of adapters")
    assert row(text, "w/kernel") == "w/kernel (8, 6) 2 4 (8, 2) (2, 6)".split()
    assert row(text, "w/kernel_lora_a")[:4] == [
        "w/kernel_lora_a",
        "(8,",
        "2)",
        "float32",
    ]


def test_a_folder_of_peft(capsys, tmp_path, adapters):
    lora.save_peft(tmp_path, *adapters)
    text = printed(capsys, tmp_path)
    assert "  lora_alpha: 4" in text
    names = ("base_model.model.w.lora_A.weight", "base_model.model.w.lora_B.weight")
    assert [row(text, name)[1:5] for name in names] == [
        ["(2,", "8)", "float32", "64"],
        ["(6,", "2)", "float32", "48"],
    ]


def test_a_folder_of_compressed_tensors(capsys, tmp_path):
    params = {"w": {"kernel": quantized()["w"]}, "b": PARAMS["b"]}
    ptq.save_compressed_tensors(tmp_path, params)
    text = printed(capsys, tmp_path)
    assert row(text, "w") == ["w", "int4", "channel", "float"]
    assert row(text, "w.weight_scale")[1:5] == ["(6,", "1)", "float32", "24"]
    # One file of it has no more to say.
    assert printed(capsys, tmp_path / "model.safetensors") == text


@pytest.mark.parametrize("method", ["mxfp4", "fp8", "gptq"])
def test_a_folder_of_hugging_face_that_is_quantized(capsys, tmp_path, method):
    save_file({"w.scales": np.ones((2, 3), np.uint8)}, tmp_path / "model.safetensors")
    config = {"quantization_config": {"quant_method": method}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    text = printed(capsys, tmp_path)
    assert text.startswith("a checkpoint of safetensors\n")
    assert f"quant_method: {method}\n" in text
    assert row(text, "w.scales")[1:5] == ["(2,", "3)", "uint8", "6"]


def test_a_damaged_file_is_one_line(capsys, tmp_path):
    params = {"w": {"kernel": quantized()["w"]}}
    ptq.save_compressed_tensors(tmp_path, params)
    file = tmp_path / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert __main__.main(["inspect", str(tmp_path)]) == 1
    shown = capsys.readouterr()
    assert not shown.out
    assert "damaged" in shown.err and shown.err.count("\n") == 1


def test_what_is_not_there_is_named(capsys, tmp_path):
    assert __main__.main(["inspect", str(tmp_path / "nothing")]) == 1
    assert "nothing at" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["inspect", "convert"])
@pytest.mark.parametrize("name", ["notes.txt", "empty", "of_others"])
def test_what_has_no_known_format_says_what_was_looked_for(
    capsys, tmp_path, name, command
):
    (tmp_path / "notes.txt").write_text("notes")
    (tmp_path / "empty").mkdir()
    # Orbax's own checkpointer writes such a file, too.
    (tmp_path / "of_others").mkdir()
    (tmp_path / "of_others" / "_CHECKPOINT_METADATA").write_text("{}")
    path, made = tmp_path / name, tmp_path / "made"
    to = [str(made), "--to", "peft"] if command == "convert" else []
    assert __main__.main([command, str(path), *to]) == 1
    message = capsys.readouterr().err
    assert f"{path} has no known format" in message
    for format, file in {
        "litert": "*.tflite",
        "peft": "a folder with adapter_config.json",
        "compressed-tensors": "*.safetensors beside a config.json",
        "hugging-face": "*.safetensors",
        "orbax-adapters": "a folder with manifest/",
        "orbax": "a folder with manifest/",
    }.items():
        assert f"{format} ({file}" in message
    assert not made.exists()


def test_a_checkpoint_without_its_manifest_is_known_and_incomplete(capsys, tmp_path):
    ptq.save(tmp_path / "export", PARAMS)
    shutil.rmtree(tmp_path / "export" / "manifest")
    assert __main__.main(["inspect", str(tmp_path / "export")]) == 1
    assert "not a complete checkpoint of ptq.save" in capsys.readouterr().err


@pytest.mark.slow
def test_a_tflite_file(capsys, tmp_path):
    rules = [QuantizationRule(weight_qtype="int8", act_qtype="int8")]
    provider = odml.OdmlQatProvider(rules, fixed_range_for_inputs=(-4, 4))
    calibrator = calib.Calibrator(provider)
    calibrator.wrap(as_model(forward))(PARAMS, X)
    stats = calibrator.quant_stats
    model = odml.convert(forward, PARAMS, provider, X, quant_stats=stats)
    model.save(tmp_path / "model.tflite")
    text = printed(capsys, tmp_path / "model.tflite")
    assert text.startswith("a LiteRT model, in integers throughout")
    assert str(model.ops()) in text
    assert hashlib.sha256(model.content).hexdigest()[:16] in text
