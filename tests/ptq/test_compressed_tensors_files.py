"""Folders of compressed-tensors that are there already, damaged, or inconsistent."""

import json
import os

import numpy as np
import pytest

from qwix_train import ptq
from qwix_train.core.how import HowToQuantize
from qwix_train.core.qarray import QArray, WithAux, dequantize
from qwix_train.files import writing

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
CODES = np.arange(-8, 8, dtype=np.int8).reshape(4, 4)
SCALE = np.full((4, 1), 0.5, np.float32)


def tree(scale=0.5, codes=CODES, qtype="int8", **parts):
    how = HowToQuantize(qtype=qtype, channelwise_axes=(1,))
    scales = np.full((1, 4), scale, np.float32)
    array = QArray(codes, scales, qtype=qtype, **parts)
    return {"Dense_0": {"kernel": WithAux(array, how)}}


def values(folder):
    kernel = ptq.load_compressed_tensors(folder)["Dense_0"]["kernel"]
    return np.asarray(dequantize(kernel.array))


def write_shard(folder, name, **tensors):
    numpy = pytest.importorskip("safetensors.numpy")
    tensors = {key.replace("__", "."): x for key, x in tensors.items()}
    numpy.save_file(tensors, folder / name)


def write_index(folder, text):
    text = text if isinstance(text, str) else json.dumps({"weight_map": text})
    (folder / INDEX).write_text(text)


@pytest.fixture
def shards(tmp_path):
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    write_shard(tmp_path, names[0], a__weight=CODES, a__weight_scale=SCALE)
    write_shard(tmp_path, names[1], b__weight=CODES, b__weight_scale=SCALE)
    where = {
        f"{layer}.{part}": name
        for layer, name in zip("ab", names, strict=True)
        for part in ("weight", "weight_scale")
    }
    write_index(tmp_path, where)
    return where


def test_a_checkpoint_that_is_there_is_replaced_only_on_request(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer.json").write_text("{}")
    ptq.save_compressed_tensors(tmp_path, tree(0.5))
    with pytest.raises(FileExistsError, match=r"model.safetensors exists. Pass over"):
        ptq.save_compressed_tensors(tmp_path, tree(2.0))
    np.testing.assert_array_equal(values(tmp_path), CODES * 0.5)
    ptq.save_compressed_tensors(tmp_path, tree(2.0), overwrite=True)
    np.testing.assert_array_equal(values(tmp_path), CODES * 2.0)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama"
    names = sorted(os.listdir(tmp_path))
    assert names == ["config.json", FILE, "tokenizer.json"]


@pytest.mark.parametrize("other", [INDEX, "model-00001-of-00002.safetensors"])
def test_new_files_are_not_written_beside_shards(tmp_path, other):
    (tmp_path / other).write_text("{}")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match=f"holds {other}"):
            ptq.save_compressed_tensors(tmp_path, tree(), overwrite=overwrite)
    assert os.listdir(tmp_path) == [other]


def test_the_float_checkpoint_of_a_model_is_not_overwritten(tmp_path):
    write_shard(tmp_path, FILE, Dense_0__weight=np.ones((4, 4), np.float32))
    old = (tmp_path / FILE).read_bytes()
    with pytest.raises(FileExistsError, match="is not of a compressed-tensors check"):
        ptq.save_compressed_tensors(tmp_path, tree(), overwrite=True)
    assert (tmp_path / FILE).read_bytes() == old


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    ptq.save_compressed_tensors(tmp_path, tree(0.5))

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        ptq.save_compressed_tensors(tmp_path, tree(2.0), overwrite=True)
    np.testing.assert_array_equal(values(tmp_path), CODES * 0.5)
    assert sorted(os.listdir(tmp_path)) == ["config.json", FILE]


def test_what_a_kill_left_undone_is_done_by_the_next_load(tmp_path, monkeypatch):
    ptq.save_compressed_tensors(tmp_path, tree(0.5))
    with monkeypatch.context() as patched:
        # All is written, and nothing moved into place.
        patched.setattr(writing, "finish", lambda folder: None)
        ptq.save_compressed_tensors(tmp_path, tree(2.0), overwrite=True)
    np.testing.assert_array_equal(values(tmp_path), CODES * 2.0)
    assert sorted(os.listdir(tmp_path)) == ["config.json", FILE]


def test_every_flipped_bit_is_noticed_or_harmless(tmp_path):
    """In the tensors, the metadata, and the config; 80 of each file."""
    ptq.save_compressed_tensors(tmp_path, tree())
    for name in (FILE, "config.json"):
        content = (tmp_path / name).read_bytes()
        for bit in np.random.default_rng(0).integers(8 * len(content), size=80):
            damaged = bytearray(content)
            damaged[bit // 8] ^= 1 << (bit % 8)
            (tmp_path / name).write_bytes(damaged)
            try:
                found = values(tmp_path)
            except ValueError as error:
                assert str(tmp_path) in str(error), error
            else:
                np.testing.assert_array_equal(found, CODES * 0.5, str(bit))
        (tmp_path / name).write_bytes(content)


def test_the_config_of_other_tensors_is_refused(tmp_path):
    ptq.save_compressed_tensors(tmp_path / "a", tree())
    ptq.save_compressed_tensors(tmp_path / "b", tree(), act_qtype="int8")
    (tmp_path / "a" / "config.json").replace(tmp_path / "b" / "config.json")
    with pytest.raises(ValueError, match="config.json is damaged, or of other"):
        ptq.load_compressed_tensors(tmp_path / "b")


def test_shards_and_their_index_have_to_agree(tmp_path, shards):
    assert ptq.load_compressed_tensors(tmp_path).keys() == {"a", "b"}
    first, second = sorted(set(shards.values()))

    write_index(tmp_path, {k: v for k, v in shards.items() if v == first})
    with pytest.raises(ValueError, match="has tensors in 1 of 2 shards"):
        ptq.load_compressed_tensors(tmp_path)

    write_index(tmp_path, {k: v for k, v in shards.items() if k != "b.weight"})
    with pytest.raises(ValueError, match=f"b.weight is in .*{second}.* in no file"):
        ptq.load_compressed_tensors(tmp_path)

    write_index(tmp_path, shards | {"c.weight": second})
    with pytest.raises(ValueError, match="tensors that no shard holds: c.weight"):
        ptq.load_compressed_tensors(tmp_path)

    write_shard(tmp_path, second, a__weight=CODES + 1, b__weight_scale=SCALE)
    write_index(tmp_path, shards)
    with pytest.raises(ValueError, match=f"a.weight is in .*{second}, .* in {first}"):
        ptq.load_compressed_tensors(tmp_path)

    write_shard(tmp_path, FILE, a__weight=CODES, a__weight_scale=SCALE)
    with pytest.raises(ValueError, match="holds two checkpoints"):
        ptq.load_compressed_tensors(tmp_path)


@pytest.mark.parametrize("name", ["../x", "/x", "a/b", "", "..", 3])
def test_an_index_names_files_of_its_folder(tmp_path, name):
    write_index(tmp_path, {"a.weight": name})
    with pytest.raises(ValueError, match="'a.weight' .* not the name of a file"):
        ptq.load_compressed_tensors(tmp_path)


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"weight_map": {"a": "1", "a": "2"}}', "the key 'a' is there twice"),
        ('{"weight_map": []}', "has no 'weight_map'"),
        ("[]", "no JSON object"),
        ("{", "cannot be read as JSON"),
        ("[" * 200_000, "nested too deeply"),
    ],
)
def test_an_index_that_cannot_be_read(tmp_path, text, message):
    write_index(tmp_path, text)
    with pytest.raises(ValueError, match=f"{INDEX}.*{message}"):
        ptq.load_compressed_tensors(tmp_path)


GROUP = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int"}}


def with_weights(**entries):
    return {"config_groups": {"g": {**GROUP, "weights": entries}}}


@pytest.mark.parametrize(
    "config, message",
    [
        ([], r"\[\] is not of the type dict"),
        ({"config_groups": []}, r"config_groups: \[\] is not of the type dict"),
        ({"config_groups": {"g": {}}}, "g, targets: None is not of the type list"),
        ({"config_groups": {"g": {"targets": [3]}}}, "g, targets: 3 is not of"),
        ({"config_groups": {"g": {"targets": ["re:*"]}}}, "'re:.' is not a regular"),
        (with_weights(num_bits="4"), "g, weights, num_bits: '4' is not of the type"),
        (with_weights(num_bits=0), "num_bits: 0 is not from 1 to 8"),
        (with_weights(strategy="group", group_size=0), "group_size: 0 is not a size"),
        (with_weights(strategy="group"), "group_size: None is not a size"),
        (with_weights(block_structure=[0, 4]), r"block_structure: \[0, 4\] is not a n"),
        (with_weights(block_structure="ax4"), "block_structure: 'ax4' is not a number"),
        ({"quant_method": "fp8", "weight_block_size": 4}, "weight_block_size: 4 is no"),
        ({"sparsity_config": "24"}, "sparsity_config: '24' is not of the type"),
    ],
)
def test_a_config_of_another_form(tmp_path, config, message):
    write_shard(tmp_path, FILE, a__weight=CODES, a__weight_scale=SCALE)
    text = json.dumps({"quantization_config": config})
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(
        ValueError, match=rf"config.json, quantization_config: .*{message}"
    ):
        ptq.load_compressed_tensors(tmp_path)


@pytest.mark.parametrize("scale", [np.nan, np.inf, -0.5])
def test_scales_are_finite_and_not_negative(tmp_path, scale):
    with pytest.raises(ValueError, match=f"Dense_0/kernel.* has a scale of {scale:g}"):
        ptq.save_compressed_tensors(tmp_path, tree(scale))
    scales = np.array([[1], [scale], [1], [1]], np.float32)
    write_shard(tmp_path, FILE, a__weight=CODES, a__weight_scale=scales)
    with pytest.raises(ValueError, match=f"a.weight .* has a scale of {scale:g}"):
        ptq.load_compressed_tensors(tmp_path)


def test_codes_are_those_of_their_type(tmp_path):
    with pytest.raises(ValueError, match="has the code 100, and 4 bits hold -8 to 7"):
        ptq.save_compressed_tensors(tmp_path, tree(codes=CODES + 108, qtype="int4"))
    zero = {"zero_point": np.full((1, 4), 9, np.int8)}
    with pytest.raises(ValueError, match="the zero point 9, and 4 bits hold"):
        ptq.save_compressed_tensors(tmp_path, tree(qtype="int4", **zero))
    write_shard(tmp_path, FILE, a__weight=CODES, a__weight_scale=SCALE)
    text = json.dumps({"quantization_config": with_weights(num_bits=3, type="int")})
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="a.weight .* the code -8, and 3 bits hold"):
        ptq.load_compressed_tensors(tmp_path)


def test_scales_of_a_square_matrix_are_as_the_strategy_says(tmp_path):
    """Those of rows are a column: as a row they would scale the columns."""
    scale = np.arange(1.0, 5.0, dtype=np.float32)
    for strategy, wrong in (("channel", scale[None]), ("tensor", scale[:, None])):
        config = with_weights(num_bits=8, strategy=strategy)
        text = json.dumps({"quantization_config": config})
        (tmp_path / "config.json").write_text(text)
        write_shard(tmp_path, FILE, a__weight=CODES, a__weight_scale=wrong)
        with pytest.raises(ValueError, match="do not fit a matrix of shape"):
            ptq.load_compressed_tensors(tmp_path)


def test_a_param_and_params_within_it(tmp_path):
    write_shard(tmp_path, FILE, a=CODES, a__b=CODES)
    with pytest.raises(ValueError, match="a would become the param a, and a.b a param"):
        ptq.load_compressed_tensors(tmp_path)


def test_half_a_file(tmp_path):
    ptq.save_compressed_tensors(tmp_path, tree())
    content = (tmp_path / FILE).read_bytes()
    for size in (0, 4, len(content) // 2, len(content) - 1):
        (tmp_path / FILE).write_bytes(content[:size])
        with pytest.raises(ValueError, match="is not a whole safetensors file"):
            ptq.load_compressed_tensors(tmp_path)
