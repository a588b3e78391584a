"""Checkpoints that replace others, or are not as this release writes them."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from qwix_train import lora, ptq
from qwix_train.core.how import HowToQuantize
from qwix_train.core.qarray import QArray
from qwix_train.files import writing
from qwix_train.lora.manifest import AdapterManifest
from qwix_train.ptq import checkpoint, manifest

PARAMS = {"w": np.zeros(3, np.float32)}
NEW = {"w": np.ones(3, np.float32)}


def test_only_a_checkpoint_is_overwritten(tmp_path):
    (tmp_path / "file").write_text("notes")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_text("")
    for name in ("file", "photos"):
        with pytest.raises(FileExistsError, match="is not a checkpoint of quantized"):
            ptq.save(tmp_path / name, PARAMS, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["file", "photos"]
    assert os.listdir(tmp_path / "photos") == ["a.png"]
    (tmp_path / "photos" / "a.png").unlink()
    ptq.save(tmp_path / "photos", PARAMS, overwrite=True)  # It is empty.
    assert ptq.restore(tmp_path / "photos")["w"].tolist() == [0, 0, 0]


def test_arrays_of_64_bits(tmp_path):
    with jax.enable_x64(True):
        ptq.save(tmp_path / "a", {"ids": np.array([2**40])})
        assert ptq.restore(tmp_path / "a")["ids"].tolist() == [2**40]
    with pytest.raises(ValueError, match=r"if jax_enable_x64 is set: ids \(int64\)"):
        ptq.restore(tmp_path / "a")


def test_adapters_do_not_overwrite_their_base(tmp_path):
    ptq.save(tmp_path / "base", PARAMS)
    with pytest.raises(FileExistsError, match="base is not a checkpoint of adapters"):
        lora.save(tmp_path / "base", {}, {}, overwrite=True)
    with pytest.raises(FileExistsError, match="base exists. Pass overwrite=True"):
        lora.save(tmp_path / "base", {}, {})


def test_a_kill_between_two_renames_is_repaired(tmp_path):
    ptq.save(tmp_path / "a", PARAMS)
    ptq.save(tmp_path / "b", NEW)
    path = epath.Path(tmp_path / "a")
    (tmp_path / "b").rename(writing.beside(path))
    old = tmp_path / writing.beside(path).name.replace("-new-", "-old-")
    (tmp_path / "a").rename(old)
    assert ptq.restore(tmp_path / "a")["w"].tolist() == [1, 1, 1]
    assert os.listdir(tmp_path) == ["a"]


def test_links_are_followed(tmp_path):
    (tmp_path / "disk").mkdir()
    for name in ("new", "old"):
        (tmp_path / name).symlink_to(tmp_path / "disk" / name)
    ptq.save(tmp_path / "disk" / "old", PARAMS)
    ptq.save(tmp_path / "new", NEW)
    ptq.save(tmp_path / "old", NEW, overwrite=True)
    for name in ("new", "old"):
        assert (tmp_path / name).is_symlink()
        assert ptq.restore(tmp_path / "disk" / name)["w"].tolist() == [1, 1, 1]
    assert sorted(os.listdir(tmp_path / "disk")) == ["new", "old"]


@pytest.mark.parametrize("scale", [np.nan, np.inf, -1.0])
def test_scales_are_finite_and_not_negative(tmp_path, scale):
    array = QArray(jnp.ones((4, 2), jnp.int8), jnp.array([[1.0, scale]]))
    with pytest.raises(ValueError, match=r"not finite, or negative, in: a/w \(int8\)"):
        ptq.save(tmp_path / "a", {"a": {"w": array}})
    assert not os.listdir(tmp_path)


def test_metadata_that_are_nested_too_deeply(tmp_path):
    deep = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(ValueError, match="JSON cannot hold the manifest"):
        ptq.save(tmp_path / "a", PARAMS, metadata={"deep": deep})
    with pytest.raises(TypeError, match="JSON cannot hold the manifest"):
        ptq.save(tmp_path / "a", PARAMS, metadata={"set": {1}})
    with pytest.raises(ValueError, match=r"'k+'... has a path of more than 50000"):
        ptq.save(tmp_path / "a", {"k" * 70_000: PARAMS["w"]})
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("text", ["[" * 200_000, "[1]", b"\xff", ""])
def test_a_manifest_that_cannot_be_read(tmp_path, text):
    ptq.save(tmp_path / "a", PARAMS)
    text = text if isinstance(text, bytes) else text.encode()
    (tmp_path / "a" / "manifest" / "metadata").write_bytes(text)
    with pytest.raises(ValueError, match=str(tmp_path / "a")):
        ptq.restore(tmp_path / "a")


def changed(record, change):
    record = json.loads(json.dumps(record))
    change(record)
    record["params"] = [manifest._sealed(_body(x)) for x in record["params"]]
    return manifest._sealed(_body(record))


def _body(record):
    return {key: value for key, value in record.items() if key != "sha256"}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda r: r["params"][0]["how"].update(blocks=2), "blocks"),
        (lambda r: r["params"][0].pop("arrays"), "arrays"),
        (lambda r: r["rules"].append({"rotation": "hadamard"}), "rotation"),
        (lambda r: r["rules"].append({"weight_qtype": "fp4"}), "fp4"),
        (lambda r: r.pop("plan"), "plan"),
        (lambda r: r.update(rules=None), "NoneType"),
    ],
)
def test_a_manifest_of_a_later_release_says_so(change, message):
    how = HowToQuantize(qtype="int8")
    array = manifest.StoredArray((3,), "int8")
    param = manifest.StoredParam(("w",), {"qvalue": array, "scale": array}, "int8", how)
    record = manifest.Manifest((param,)).to_json()
    with pytest.raises(ValueError, match=f"{message}.*; qwix_train .* wrote it"):
        manifest.Manifest.from_json(changed(record, change))
    record["version"] = 2
    with pytest.raises(ValueError, match="format version 2, and this release reads"):
        manifest.Manifest.from_json(record)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda r: r["layouts"].append({"path": ["w"]}), "missing 11"),
        (lambda r: r["rules"].append({"kind": "MoraRule"}), "MoraRule"),
        (lambda r: r.pop("metadata"), "metadata"),
    ],
)
def test_a_manifest_of_adapters_of_a_later_release_says_so(change, message):
    record = AdapterManifest({}, (), {}).to_json()
    change(record)
    with pytest.raises(ValueError, match=f"{message}.*; qwix_train 9.0 wrote it"):
        AdapterManifest.from_json(record, {"qwix_train": "9.0"})


def test_an_overwritten_folder_is_checked_before_params_are_packed(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(FileExistsError):
        checkpoint.save(tmp_path / "a", {"w": "no array"})


def test_params_without_values_leave_no_file(tmp_path):
    shapes = {"a": {"w": jax.ShapeDtypeStruct((3,), jnp.float32)}}
    with pytest.raises(TypeError, match="'a/w' has no values, but is a ShapeDtypeStr"):
        ptq.save(tmp_path / "x", shapes)
    with pytest.raises(TypeError, match="'w' has no values.*outside of jit"):
        jax.jit(lambda params: ptq.save(tmp_path / "x", params))(PARAMS)
    with pytest.raises(ValueError, match="no param to save: the tree is empty"):
        ptq.save(tmp_path / "x", {})
    assert not os.listdir(tmp_path)
