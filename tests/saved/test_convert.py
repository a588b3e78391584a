"""`python -m qwix_train convert`: from each format to those that hold the same."""

import json
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file, save_file

from qwix_train import HowToQuantize, QuantizationRule, __main__, lora, ptq, saved
from qwix_train.ptq import safetensors_files
from qwix_train.ptq.hugging_face import Place
from qwix_train.values import stored
from tests import models, other_python
from tests.compare import assert_same
from tests.core.reference import expand, reference_scale
from tests.ptq import compressed_tensors_reference as library


def normal(*shape, seed=0):
    return np.asarray(models.normal(*shape, seed=seed))


TILES = HowToQuantize(qtype="int4", channelwise_axes=(1,), tiled_axes={0: 16})
INT4 = ["--weights", "int4", "--tile", "16"]
LLAMA = {
    "model.embed_tokens.weight": normal(20, 32),
    "model.layers.0.mlp.up_proj.weight": normal(48, 32),
    "model.layers.1.mlp.up_proj.weight": normal(48, 32, seed=1),
    "model.norm.weight": normal(32),
}
KERNELS = {
    f"model.layers.{layer}.mlp.up_proj.weight": f"layers_{layer}/mlp/up_proj/kernel"
    for layer in range(2)
}
TREE = {
    "fc": {"kernel": normal(32, 6), "bias": normal(6)},
    "table": {"embedding": normal(10, 4)},
}


def assert_rounded(values, floats, how=TILES):
    """Int4 codes in tiles, each the nearest; at the middle of two either of both."""
    scale = expand(reference_scale(np.float64(floats), how)[0], floats.shape)
    codes = np.float64(values) / scale
    np.testing.assert_allclose(codes, np.round(codes), atol=1e-5)
    assert codes.min() > -8.1 and codes.max() < 7.1
    assert (np.abs(values - floats) <= scale * 0.50001).all()


def run(*arguments):
    return __main__.main(["convert", *map(str, arguments)])


def refused(capsys, *arguments):
    assert run(*arguments) == 1
    shown = capsys.readouterr()
    assert not shown.out
    return shown.err


@pytest.fixture
def llama(tmp_path):
    folder = tmp_path / "llama"
    folder.mkdir()
    save_file(LLAMA, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


def assert_quantized(tree, name, path):
    leaf = traverse_util.flatten_dict(tree, sep="/")[path]
    assert_rounded(stored.dequantized(leaf), LLAMA[name].T)


def test_a_float_folder_becomes_quantized_in_all_formats(capsys, llama, tmp_path):
    orbax, compressed = tmp_path / "orbax", tmp_path / "compressed"
    assert run(llama, orbax, "--to", "orbax", "--family", "llama", *INT4) == 0
    assert "4 params, 2 of them quantized" in capsys.readouterr().out
    tree = ptq.restore(orbax)
    for name, path in KERNELS.items():
        assert_quantized(tree, name, path)
    flat = traverse_util.flatten_dict(tree, sep="/")
    np.testing.assert_array_equal(flat["norm/scale"], LLAMA["model.norm.weight"])
    table = LLAMA["model.embed_tokens.weight"]
    np.testing.assert_array_equal(flat["embed_tokens/embedding"], table)

    # By way of the checkpoint, and directly: the files have the same bits.
    family = ["--to", "compressed-tensors", "--family", "llama"]
    assert run(orbax, compressed, *family) == 0
    assert run(llama, tmp_path / "direct", *family, *INT4) == 0
    files = [
        load_file(f / "model.safetensors") for f in (compressed, tmp_path / "direct")
    ]
    assert files[0].keys() == files[1].keys()
    for name in files[0]:
        np.testing.assert_array_equal(files[0][name], files[1][name])
    config = json.loads((compressed / "config.json").read_text())
    assert config["model_type"] == "llama"

    # And back: the values, under the names of the family.
    assert run(compressed, tmp_path / "back", "--to", "orbax", "--family", "llama") == 0
    back = ptq.restore(tmp_path / "back")
    assert_same(stored.by_path(back), stored.by_path(tree))


def test_quantized_params_become_float_ones(llama, tmp_path):
    named = ["--family", "llama"]
    run(llama, tmp_path / "int4", "--to", "compressed-tensors", *named, *INT4)
    to_float = ["--to", "hugging-face", "--weights", "float", *named]
    assert run(tmp_path / "int4", tmp_path / "float", *to_float) == 0
    found = load_file(tmp_path / "float" / "model.safetensors")
    assert found.keys() == LLAMA.keys()
    for name, tensor in LLAMA.items():
        if name in KERNELS:
            assert_rounded(found[name].T, tensor.T)
        else:
            np.testing.assert_array_equal(found[name], tensor)
    config = json.loads((tmp_path / "float" / "config.json").read_text())
    assert config == {"model_type": "llama"}


def test_a_checkpoint_of_ones_own_names(tmp_path):
    ptq.save(tmp_path / "float", TREE, metadata={"config": "v3"})
    # Its names say what is multiplied; the bits of the activations go into the file.
    options = [*INT4, "--activations", "int8", "--modules", "f."]
    to = tmp_path / "compressed"
    assert run(tmp_path / "float", to, "--to", "compressed-tensors", *options) == 0
    params = ptq.load_compressed_tensors(to)
    values = stored.dequantized(params["fc"]["kernel"])
    assert_rounded(values, TREE["fc"]["kernel"])
    np.testing.assert_array_equal(
        params["table"]["embedding"], TREE["table"]["embedding"]
    )
    groups = json.loads((to / "config.json").read_text())["quantization_config"]
    activations = groups["config_groups"]["group_0"]["input_activations"]
    assert (activations["num_bits"], activations["dynamic"]) == (8, True)
    # What the user says of it stays, whatever it is called.
    assert run(tmp_path / "float", tmp_path / "int4", "--to", "orbax", *options) == 0
    assert ptq.read_manifest(tmp_path / "int4").metadata == {"config": "v3"}
    # A float checkpoint as PyTorch has it.
    assert run(tmp_path / "float", tmp_path / "theirs", "--to", "hugging-face") == 0
    theirs = load_file(tmp_path / "theirs" / "model.safetensors")
    np.testing.assert_array_equal(theirs["fc.weight"], TREE["fc"]["kernel"].T)
    np.testing.assert_array_equal(theirs["table.weight"], TREE["table"]["embedding"])


def test_a_param_of_three_axes_stays_where_nothing_says_what_they_are(tmp_path):
    """A kernel of attention, of a convolution, or experts."""
    attention = {"query": {"kernel": normal(32, 16, 2)}}
    ptq.save(tmp_path / "float", TREE | attention)
    assert run(tmp_path / "float", tmp_path / "int4", "--to", "orbax", *INT4) == 0
    tree = ptq.restore(tmp_path / "int4")
    assert_rounded(stored.dequantized(tree["fc"]["kernel"]), TREE["fc"]["kernel"])
    np.testing.assert_array_equal(tree["query"]["kernel"], attention["query"]["kernel"])


def test_blocks_of_experts_are_those_of_each_matrix(tmp_path):
    name = "model.layers.0.mlp.experts.gate_up_proj"
    experts = normal(2, 4, 32)
    save_file({name: experts}, tmp_path / "model.safetensors")
    options = ["--family", "gpt_oss", "--weights", "int4", "--tile", "2x16"]
    assert run(tmp_path, tmp_path / "int4", "--to", "orbax", *options) == 0
    found = ptq.restore(tmp_path / "int4")["layers_0"]["mlp"]["experts"]["gate_up_proj"]
    assert found.array.scale.shape == (2, 2, 2)
    blocks = HowToQuantize(
        qtype="int4", channelwise_axes=(0,), tiled_axes={1: 2, 2: 16}
    )
    assert_rounded(stored.dequantized(found), experts, blocks)


@pytest.mark.slow
def test_experts_are_stacked(tmp_path):
    tensors = {f"experts.{i}.w1.weight": normal(6, 32, seed=i) for i in range(3)}
    save_file(tensors, tmp_path / "model.safetensors")
    place = Place("experts/w1/kernel", "out in -> expert in out")
    rules = [QuantizationRule(weight_qtype="int4", tile_size=16)]
    mapping = {"experts.{expert}.w1.weight": place}
    saved.convert(tmp_path, tmp_path / "orbax", "orbax", rules=rules, mapping=mapping)
    leaf = ptq.restore(tmp_path / "orbax")["experts"]["w1"]["kernel"]
    for index, tensor in enumerate(tensors.values()):
        assert_rounded(stored.dequantized(leaf)[index], tensor.T)
    # They are matrices of their own in the other format.
    to = tmp_path / "compressed"
    saved.convert(tmp_path / "orbax", to, "compressed-tensors", mapping=mapping)
    names = load_file(to / "model.safetensors")
    assert {f"experts.{i}.w1.weight_packed" for i in range(3)} <= names.keys()


def test_tensors_that_are_quantized_in_the_folder(capsys, tmp_path):
    codes = normal(128, 256).astype(ml_dtypes.float8_e4m3fn)
    scale = np.float32([[0.5, 2.0]])
    folder = tmp_path / "fp8"
    folder.mkdir()
    tensors = {"fc.weight": codes, "fc.weight_scale_inv": scale}
    save_file(tensors, folder / "model.safetensors")
    config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    text = json.dumps({"quantization_config": config})
    (folder / "config.json").write_text(text)
    assert "--weights float8_e4m3fn" in refused(
        capsys, folder, tmp_path / "a", "--to", "orbax"
    )
    values = ["--to", "hugging-face", "--weights", "float"]
    assert run(folder, tmp_path / "float", *values) == 0
    found = load_file(tmp_path / "float" / "model.safetensors")["fc.weight"]
    expected = np.float64(codes) * np.repeat(np.float64(scale), 128, axis=1)
    np.testing.assert_array_equal(found, expected)
    # The codes stay, where the type is that of the folder.
    rule = QuantizationRule(weight_qtype="float8_e4m3fn", tile_size={0: 128, 1: 128})
    mapping = {"fc.weight": Place("fc/kernel", "out in -> in out")}
    to = tmp_path / "codes"
    saved.convert(folder, to, "compressed-tensors", rules=[rule], mapping=mapping)
    file, _ = safetensors_files.read_file(to / "model.safetensors")
    assert_same(file["fc.weight"], codes)
    np.testing.assert_array_equal(file["fc.weight_scale"], scale)


@pytest.fixture(scope="module")
def adapters():
    rules = [lora.LoraRule(rank=2, alpha=3.0)]
    params = {
        "a": {"w": {"kernel": normal(8, 6)}},
        "v": {"kernel": normal(6, 4)},
    }

    def model(params, x):
        return x @ params["a"]["w"]["kernel"] @ params["v"]["kernel"]

    made, _, layouts = lora.init(params, model, rules, jax.random.key(0), normal(2, 8))
    return jax.tree.map(lambda x: normal(*x.shape), made), layouts


def test_adapters_there_and_back(tmp_path, adapters):
    lora.save(tmp_path / "ours", *adapters, metadata={"step": 3})
    assert run(tmp_path / "ours", tmp_path / "peft", "--to", "peft") == 0
    assert run(tmp_path / "peft", tmp_path / "again", "--to", "orbax-adapters") == 0
    arrays, layouts = adapters
    # What PEFT says of a layer is what the model says of its param.
    lora.restore(tmp_path / "again", layouts)
    assert_same(lora.restore(tmp_path / "again"), arrays)
    file = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    a = file["base_model.model.a.w.lora_A.weight"]
    np.testing.assert_array_equal(a.T, arrays["a"]["w"]["kernel_lora_a"])
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == 3
    # A mapping has to know each of them.
    mapping = {"a.w.weight": Place("b/kernel", "out in -> in out")}
    with pytest.raises(ValueError, match=r"no param of its own for v\.weight"):
        saved.convert(
            tmp_path / "peft", tmp_path / "b", "orbax-adapters", mapping=mapping
        )


@pytest.mark.slow
def test_adapters_of_convolutions_and_tables(tmp_path):
    """What PEFT's documentation says of the tensors of these layers."""
    tensors = {
        "conv.lora_A.weight": normal(2, 3, 5, 5),
        "conv.lora_B.weight": normal(7, 2, 1, 1),
        "table.lora_embedding_A": normal(2, 11),
        "table.lora_embedding_B": normal(4, 2),
    }
    named = {f"base_model.model.{name}": x for name, x in tensors.items()}
    save_file(named, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "task_type": "CAUSAL_LM"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert run(tmp_path, tmp_path / "ours", "--to", "orbax-adapters") == 0
    manifest = lora.read_manifest(tmp_path / "ours")
    shapes = {"/".join(path): layout.shape for path, layout in manifest.layouts.items()}
    assert shapes == {"conv/kernel": (5, 5, 3, 7), "table/embedding": (11, 4)}
    assert manifest.metadata == {"adapter_config": {"task_type": "CAUSAL_LM"}}
    base = {
        "conv": {"kernel": np.zeros((5, 5, 3, 7), np.float32)},
        "table": {"embedding": np.zeros((11, 4), np.float32)},
    }
    merged = lora.merge(base, lora.restore(tmp_path / "ours"), manifest.layouts)
    a, b, table_a, table_b = map(np.float64, tensors.values())
    # W[out, in, i, j] = 4 / 2 * sum_r B[out, r] A[r, in, i, j]
    kernel = 2 * np.einsum("or,rcij->ijco", b[:, :, 0, 0], a)
    np.testing.assert_allclose(merged["conv"]["kernel"], kernel, rtol=1e-5, atol=1e-6)
    table = 2 * np.einsum("rn,dr->nd", table_a, table_b)
    np.testing.assert_allclose(
        merged["table"]["embedding"], table, rtol=1e-5, atol=1e-6
    )


def test_what_cannot_be_converted_says_why(capsys, llama, tmp_path, adapters):
    lora.save_peft(tmp_path / "peft", *adapters)
    ptq.save(tmp_path / "float", TREE)
    to = tmp_path / "new"
    # Adapters are no params.
    said = refused(capsys, tmp_path / "peft", to, "--to", "orbax")
    assert "It can become orbax-adapters." in said and "lora.merge" in said
    # A program is none of both.
    (tmp_path / "model.tflite").write_bytes(b"")
    assert "odml.convert" in refused(
        capsys, tmp_path / "model.tflite", to, "--to", "orbax"
    )
    # A table of tokens is a matrix, too.
    said = refused(capsys, llama, to, "--to", "orbax", *INT4)
    assert "--family" in said
    # Nothing is quantized, or all is.
    assert "--weights int4" in refused(capsys, llama, to, "--to", "compressed-tensors")
    options = ["--to", "orbax", "--family", "llama"]
    assert run(llama, tmp_path / "int4", *options, *INT4) == 0
    capsys.readouterr()
    said = refused(capsys, tmp_path / "int4", to, "--to", "hugging-face")
    assert "--weights float" in said and "int4" in said
    again = refused(capsys, tmp_path / "int4", to, *options, *INT4)
    assert "rounded twice" in again
    assert "already" in refused(capsys, tmp_path / "int4", to, *options)
    # A tile that does not divide names the param; a module that is not there, the rule.
    said = refused(capsys, llama, to, *options, "--weights", "int4", "--tile", "24")
    assert "layers_0/mlp/up_proj" in said
    said = refused(capsys, llama, to, *options, *INT4, "--modules", "nothing")
    assert "layers_0/mlp/up_proj" in said and "--modules" in said
    assert "allow_unmatched" not in said
    ptq.save(tmp_path / "table", {"table": TREE["table"]})
    said = refused(capsys, tmp_path / "table", to, "--to", "orbax", *INT4)
    assert "known to be multiplied" in said
    assert not to.exists()


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_there_stays(capsys, llama, tmp_path):
    there = tmp_path / "float"
    ptq.save(there, TREE)
    before = contents(tmp_path)
    # It is checked before the work: such tiles do not fit.
    options = ["--family", "llama", "--weights", "int4", "--tile", "24"]
    said = refused(capsys, llama, there, "--to", "orbax", *options)
    assert f"{there} exists. Pass overwrite=True (--overwrite)" in said
    # Not even a file beside those of another format.
    for source, target, format in [
        (llama, there, "hugging-face"),
        (there, llama, "compressed-tensors"),
    ]:
        assert "exists" in refused(capsys, source, target, "--to", format, *INT4)
        options = ["--to", format, *INT4, "--overwrite"]
        said = refused(capsys, source, target, *options)
        assert f"{target} is not a folder of" in said
    # Float params would be gone, and only their codes left.
    said = refused(capsys, there, there, "--to", "orbax", *INT4, "--overwrite")
    assert "replaced by itself" in said
    assert contents(tmp_path) == before
    # What has the format is replaced.
    other = tmp_path / "other"
    ptq.save(other, {"bias": TREE["table"]})
    assert run(there, other, "--to", "orbax", *INT4, "--overwrite") == 0
    kernel = ptq.restore(other)["fc"]["kernel"]
    assert_rounded(stored.dequantized(kernel), TREE["fc"]["kernel"])


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        (["--tile", "16"], "--weights int4"),
        (["--activations", "int8", "--weights", "float"], "--weights int4"),
        (["--modules", "a"], "--weights int4"),
        (["--layers", "layers/{layer}"], "--family"),
    ],
)
def test_an_option_that_would_do_nothing_is_an_error(capsys, llama, options, advice):
    said = refused(capsys, llama, llama.parent / "new", "--to", "orbax", *options)
    assert options[0] in said and advice in said


@pytest.mark.parametrize("tile", ["abc", "0", "-2", "32x32x32", "32x", "1.5"])
def test_a_tile_is_one_or_two_sizes(capsys, llama, tile):
    with pytest.raises(SystemExit):
        run(llama, llama.parent / "new", "--to", "orbax", f"--tile={tile}")
    said = capsys.readouterr().err
    assert f"--tile: {tile!r} is not a size, such as 32, or two" in said


@pytest.mark.slow
def test_a_pipe_that_is_closed_is_no_error(tmp_path):
    wide = {f"layer_{i:04}": np.ones(2, np.float32) for i in range(2000)}
    save_file(wide, tmp_path / "model.safetensors")
    command = f"{sys.executable} -m qwix_train inspect {tmp_path} | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.stdout == "a checkpoint of safetensors\n"
    assert not done.stderr


@pytest.mark.interchange
def test_the_library_reads_what_a_folder_became(llama, tmp_path):
    to = tmp_path / "all" / "int4"
    options = ["--to", "compressed-tensors", "--family", "llama", *INT4]
    assert run(llama, to, *options) == 0
    other_python.run(library.__file__, "read", tmp_path / "all")
    found = np.load(to / "reference.npz")
    assert set(found.files) == set(KERNELS)
    for name in KERNELS:
        assert_rounded(found[name].T, LLAMA[name].T)
