"""Folders of PEFT's adapters that are there already, or damaged."""

import json
import os

import jax
import numpy as np
import pytest

from qwix_train import lora
from qwix_train.files import writing

FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
LAYOUT = lora.AdapterLayout(
    path=("proj", "kernel"),
    shape=(4, 3),
    op="dot_general",
    rank=2,
    alpha=4.0,
    scaling=2.0,
    dora=False,
    layers=(),
    a_axes=(0,),
    b_axes=(1,),
    contracted=(0,),
    flat=True,
)
LAYOUTS = {LAYOUT.path: LAYOUT}


def adapters(seed=0):
    random = np.random.default_rng(seed)
    a, b = (random.normal(size=s).astype(np.float32) for s in ((4, 2), (2, 3)))
    return {"proj": {"kernel_lora_a": a, "kernel_lora_b": b}}


def assert_holds(folder, seed):
    jax.tree.map(
        np.testing.assert_array_equal, lora.load_peft(folder, LAYOUTS), adapters(seed)
    )


def test_adapters_that_are_there_are_replaced_only_on_request(tmp_path):
    (tmp_path / "README.md").write_text("theirs")
    lora.save_peft(tmp_path, adapters(0), LAYOUTS)
    with pytest.raises(FileExistsError, match="adapter_model.* exists. Pass over"):
        lora.save_peft(tmp_path, adapters(1), LAYOUTS)
    assert_holds(tmp_path, 0)
    lora.save_peft(tmp_path, adapters(1), LAYOUTS, overwrite=True)
    assert_holds(tmp_path, 1)
    assert sorted(os.listdir(tmp_path)) == ["README.md", CONFIG, FILE]


def test_files_of_another_kind_are_not_overwritten(tmp_path):
    (tmp_path / CONFIG).write_text('{"model_type": "llama"}')
    with pytest.raises(FileExistsError, match="adapter_config.json is not of adapters"):
        lora.save_peft(tmp_path, adapters(), LAYOUTS, overwrite=True)
    (tmp_path / CONFIG).unlink()
    (tmp_path / "adapter_model.bin").write_text("of another library")
    with pytest.raises(FileExistsError, match=r"holds adapters in adapter_model.bin"):
        lora.save_peft(tmp_path, adapters(), LAYOUTS, overwrite=True)
    assert os.listdir(tmp_path) == ["adapter_model.bin"]
    with pytest.raises(FileExistsError, match="is a file, and a folder"):
        lora.save_peft(tmp_path / "adapter_model.bin", adapters(), LAYOUTS)


def test_a_full_disk_leaves_the_old_adapters(tmp_path, monkeypatch):
    lora.save_peft(tmp_path, adapters(0), LAYOUTS)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        lora.save_peft(tmp_path, adapters(1), LAYOUTS, overwrite=True)
    assert_holds(tmp_path, 0)


def test_what_a_kill_left_undone_is_done_by_the_next_load(tmp_path, monkeypatch):
    lora.save_peft(tmp_path, adapters(0), LAYOUTS)
    with monkeypatch.context() as patched:
        patched.setattr(writing, "finish", lambda folder: None)
        lora.save_peft(tmp_path, adapters(1), LAYOUTS, overwrite=True)
    assert_holds(tmp_path, 1)


def test_every_flipped_bit_is_noticed_or_harmless(tmp_path):
    lora.save_peft(tmp_path, adapters(), LAYOUTS)
    for name in (FILE, CONFIG):
        content = (tmp_path / name).read_bytes()
        for bit in np.random.default_rng(0).integers(8 * len(content), size=80):
            damaged = bytearray(content)
            damaged[bit // 8] ^= 1 << (bit % 8)
            (tmp_path / name).write_bytes(damaged)
            try:
                assert_holds(tmp_path, 0)
            except ValueError as error:
                assert str(tmp_path) in str(error), error
        (tmp_path / name).write_bytes(content)


@pytest.mark.parametrize(
    "entry, message",
    [
        ({"lora_alpha": None}, "the alpha of 'lora_alpha' is None"),
        ({"lora_alpha": float("nan")}, "the alpha of 'lora_alpha' is nan"),
        ({"lora_alpha": "8"}, "the alpha of 'lora_alpha' is '8'"),
        ({"alpha_pattern": [1]}, r"alpha_pattern=\[1\] is not an object"),
        ({"alpha_pattern": {"proj": True}}, "the alpha of 'proj' is True"),
        (
            {"alpha_pattern": {"(": 8}},
            r"'\(', which is not a regular",
        ),
    ],
)
def test_a_config_of_another_form(tmp_path, entry, message):
    lora.save_peft(tmp_path, adapters(), LAYOUTS, config=entry)
    with pytest.raises(ValueError, match=f"{CONFIG}: .*{message}"):
        lora.load_peft(tmp_path, LAYOUTS)


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 200_000, '{"r": 1, "r": 2}'])
def test_a_config_that_is_no_json(tmp_path, text):
    lora.save_peft(tmp_path, adapters(), LAYOUTS)
    (tmp_path / CONFIG).write_text(text)
    with pytest.raises(ValueError, match=CONFIG):
        lora.load_peft(tmp_path, LAYOUTS)


def test_an_alpha_that_was_changed_is_named(tmp_path):
    lora.save_peft(tmp_path, adapters(), LAYOUTS)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | {"task_type": "CAUSAL_LM"}))
    assert_holds(tmp_path, 0)
    (tmp_path / CONFIG).write_text(json.dumps(config | {"lora_alpha": 8}))
    with pytest.raises(ValueError, match="'lora_alpha' is 8, and was 4 when these"):
        lora.load_peft(tmp_path, LAYOUTS)


def test_a_config_entry_that_json_cannot_hold(tmp_path):
    deep = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(ValueError, match="JSON cannot hold config"):
        lora.save_peft(tmp_path, adapters(), LAYOUTS, config={"revision": deep})
    with pytest.raises(TypeError, match="JSON cannot hold config"):
        lora.save_peft(tmp_path, adapters(), LAYOUTS, config={"revision": {1, 2}})
    assert not os.listdir(tmp_path)
