"""Files in the layouts of compressed-tensors, held against its library and NumPy.

The library needs PyTorch: `make test-interchange` runs the tests that call it.
"""

import json
import struct
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

import qwix_train
from qwix_train.core import formats, numerics
from qwix_train.core.how import HowToQuantize, needs_zero_point
from qwix_train.core.qarray import QArray, WithAux, dequantize, quantize_array
from qwix_train.ptq.compressed_tensors import (
    load_compressed_tensors,
    save_compressed_tensors,
)
from qwix_train.ptq.hugging_face import Place
from qwix_train.ptq.trees import to_tree
from tests import other_python
from tests.compare import assert_same
from tests.ptq import compressed_tensors_reference as library
from tests.qat.parity import NnxMlp

ROWS = {"channelwise_axes": (1,)}
SQUARES = {0: 128, 1: 128}


def weight(qtype, shape=(64, 12), dtype=jnp.float32, **layout):
    """A weight with random codes and scales; those of "minmax" have zero points."""
    how = HowToQuantize(qtype=qtype, **layout)
    entry = numerics.format_of(qtype)
    rng, scale_shape = np.random.default_rng(0), how.scale_shape(shape)
    stored = numerics.storage_dtype(qtype)

    def random_codes(shape):
        if numerics.is_integer_qtype(qtype):
            low, high = numerics.code_range(qtype)
            codes = rng.integers(low, high, shape, endpoint=True)
        else:
            codes = rng.uniform(0, 15, shape)
        return codes.astype(stored)

    if entry.coded_scales:
        is_mx = entry.name != "nvfp4"
        scale = rng.integers(100, 130, scale_shape).astype(np.uint8)
        scale = scale.view(formats.E8M0) if is_mx else (scale / 64).astype(formats.E4M3)
        # A power of two is its own reciprocal's reciprocal.
        tensor = None if is_mx else np.full((1,) * len(shape), 2.0**-9, np.float32)
        codes = random_codes(shape)
        return WithAux(
            QArray(codes, scale, None, qtype, tensor, float_dtype=dtype), how
        )
    scale = rng.uniform(0.1, 1, scale_shape).astype(dtype)
    symmetric = not needs_zero_point(how.calibration_method)
    zero = None if symmetric else random_codes(scale_shape)
    return WithAux(QArray(random_codes(shape), scale, zero, qtype), how)


def static_scale(value, rank=2):
    how = HowToQuantize(qtype="int8")
    return WithAux(np.full((1,) * rank, value, np.float32), how)


def run_library(verb, folder):
    other_python.run(library.__file__, verb, folder)


def read_raw(file):
    """The tensors of a safetensors file, read by nothing but its specification."""
    data = file.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    header.pop("__metadata__", None)
    dtypes = {"F32": "<f4", "I8": "i1", "I32": "<i4", "I64": "<i8"}
    dtypes |= {"U8": "u1", "F8_E4M3": "u1"}
    tensors = {}
    for name, entry in header.items():
        start, end = (8 + size + offset for offset in entry["data_offsets"])
        array = np.frombuffer(data[start:end], dtypes[entry["dtype"]])
        tensors[name] = array.reshape(entry["shape"])
    return tensors


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compressed_tensors")
    run_library("write", folder)
    return folder


@pytest.mark.interchange
@pytest.mark.parametrize("name", library.SCHEMES)
def test_reads_what_the_library_writes(theirs, name):
    params = load_compressed_tensors(theirs / name)
    flat = traverse_util.flatten_dict(params, sep=".")
    quantized = {key for key, leaf in flat.items() if key.endswith("kernel")}
    expected = np.load(theirs / name / "reference.npz")
    head = quantized - {key.replace("weight", "kernel") for key in expected.files}
    assert head == {"head.kernel"} and len(expected.files) == 2
    assert not isinstance(flat["head.kernel"], WithAux)
    assert flat["head.kernel"].shape == library.SHAPES["head"][::-1]
    weights, activations, dtype = library.SCHEMES[name]
    for key in expected.files:
        leaf = flat[key.replace("weight", "kernel")]
        values = dequantize(leaf.array)
        assert values.dtype == dtype
        np.testing.assert_array_equal(values.astype(jnp.float32).T, expected[key])
        assert leaf.how.scale_shape(leaf.shape) == leaf.array.scale.shape
        module = key.removesuffix("weight")
        scale = flat.get(f"{module}dot_general0_lhs_scale")
        assert (scale is None) == (not activations or "dynamic" in activations)
        if scale is not None:
            assert (scale.how.qtype == "int8") == (weights["type"] == "int")
            np.testing.assert_allclose(scale.array, np.full((1, 1), np.float32(0.03)))
        if name == "int8-asymmetric":
            zero = flat[f"{module}dot_general0_lhs_zero_point"]
            assert zero.tolist() == [[-5]] and zero.dtype == jnp.int8


@pytest.mark.interchange
def test_refuses_what_the_library_can_write_beside(theirs):
    with pytest.raises(ValueError, match="packed codes of 3 bits are not supported"):
        load_compressed_tensors(theirs / "int3")


TREES = {
    "int8": {"Dense_0": {"kernel": weight("int8", **ROWS)}},
    "int8 bfloat16": {"a": {"kernel": weight("int8", dtype=jnp.bfloat16, **ROWS)}},
    "int8 tensor": {"Dense_0": {"kernel": weight("int8")}},
    "int8 minmax": {
        "a": {"kernel": weight("int8", calibration_method="minmax", **ROWS)},
        "b": {"kernel": weight("int8", calibration_method="minmax")},
    },
    "int4 groups": {"a": {"kernel": weight("int4", tiled_axes={0: 16}, **ROWS)}},
    "int4 ragged rows": {"a": {"kernel": weight("int4", (11, 5), **ROWS)}},
    "int4 minmax": {
        "a": {
            "kernel": weight(
                "int4", tiled_axes={0: 8}, calibration_method="minmax", **ROWS
            )
        },
        "b": {"kernel": weight("int4", calibration_method="minmax", **ROWS)},
        "c": {"kernel": weight("int4", calibration_method="minmax")},
        "d": {"kernel": weight("int4", calibration_method="fixed,-1,2")},
    },
    "other integers": {
        f"l{bits}": {"kernel": weight(f"int{bits}", **ROWS)} for bits in range(2, 8)
    },
    "fp8": {
        "a": {"kernel": weight("float8_e4m3fn", **ROWS)},
        "b": {"kernel": weight("float8_e4m3fn")},
        "c": {"kernel": weight("float8_e4m3fn", tiled_axes={0: 16, 1: 4})},
    },
    "fp8 blocks": {
        "a": {"kernel": weight("float8_e4m3fn", (256, 384), tiled_axes=SQUARES)},
    },
    "blocks": {
        "a": {"kernel": weight("nvfp4", tiled_axes={0: 16}, **ROWS)},
        "b": {"kernel": weight("mxfp4", tiled_axes={0: 32}, **ROWS)},
        "c": {"kernel": weight("mxfp8", tiled_axes={0: 32}, **ROWS)},
        # One block in a row.
        "d": {"kernel": weight("mxfp4", (32, 3), **ROWS)},
        "e": {"kernel": weight("mxfp6", tiled_axes={0: 32}, **ROWS)},
    },
    "static": {
        "Dense_0": {
            "kernel": weight("int8", **ROWS),
            "dot_general0_lhs_scale": static_scale(0.5, 3),
            "dot_general0_lhs_zero_point": jnp.full((1, 1, 1), 3, jnp.int8),
        }
    },
    "model": {
        "embed": {"embedding": weight("int8", (6, 32), channelwise_axes=(0,))},
        "Dense_0": {"kernel": weight("int4", **ROWS), "bias": jnp.arange(12.0)},
        "Dense_1": {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.ones(3)},
        "Conv_0": {"kernel": jnp.ones((3, 3, 2, 4))},
        "LayerNorm_0": {"scale": jnp.ones(4), "bias": jnp.zeros(4)},
        "temperature": jnp.float32(2),
    },
}


ROOT = {"kernel": weight("int8", **ROWS), "bias": jnp.ones(12)}


@pytest.mark.parametrize("tree", [*TREES.values(), ROOT], ids=[*TREES, "root"])
def test_a_tree_comes_back(tmp_path, tree):
    save_compressed_tensors(tmp_path, tree)
    back = traverse_util.flatten_dict(load_compressed_tensors(tmp_path))
    expected = traverse_util.flatten_dict(tree)
    assert back.keys() == expected.keys()
    for key, leaf in expected.items():
        if isinstance(leaf, WithAux) and isinstance(leaf.array, QArray):
            # The file does not say how ranges were found, only what they are.
            method = "absmax" if leaf.array.zero_point is None else "minmax"
            how = HowToQuantize(
                qtype=leaf.how.qtype,
                channelwise_axes=leaf.how.channelwise_axes,
                tiled_axes=leaf.how.tiled_axes,
                calibration_method=method,
            )
            leaf = leaf.replace(how=how)
        elif isinstance(leaf, WithAux):
            how = HowToQuantize(qtype="int8", calibration_method="minmax")
            leaf = leaf.replace(how=how)
        assert_same(back[key], leaf)


# Without activations, and with; int8 packed, and not.
OPTIONS = [
    {"int8_format": "pack-quantized"},
    {"act_qtype": "int8"},
    {"act_qtype": "mxfp8"},
]


@pytest.fixture(scope="module")
def read_by_library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ours")
    for name, tree in TREES.items():
        for index, options in enumerate(OPTIONS):
            save_compressed_tensors(folder / f"{name} {index}", tree, **options)
    run_library("read", folder)
    return folder


@pytest.mark.interchange
@pytest.mark.parametrize("index", range(len(OPTIONS)))
@pytest.mark.parametrize("name", TREES)
def test_the_library_reads_what_we_write(read_by_library, name, index):
    expected = {
        ".".join((*path[:-1], "weight")): leaf
        for path, leaf in traverse_util.flatten_dict(TREES[name]).items()
        if isinstance(leaf, WithAux) and path[-1] in ("kernel", "embedding")
    }
    got = np.load(read_by_library / f"{name} {index}" / "reference.npz")
    assert set(got.files) == set(expected)
    for key, leaf in expected.items():
        values = np.asarray(dequantize(leaf.array).astype(np.float32))
        values = values if "embed" in key else values.T
        np.testing.assert_array_equal(got[key], values)


@pytest.mark.slow
def test_an_nnx_model_is_written(tmp_path):
    rules = [qwix_train.QuantizationRule(weight_qtype="int8")]
    provider = qwix_train.PtqProvider(rules)
    model = qwix_train.quantize_model(NnxMlp(), provider, jnp.ones((2, 8)))
    save_compressed_tensors(tmp_path, model)
    back = load_compressed_tensors(tmp_path)
    for layer in ("l1", "l2"):
        expected = to_tree(model)[layer]
        assert_same(back[layer]["kernel"], expected["kernel"])
        np.testing.assert_array_equal(back[layer]["bias"], expected["bias"])


def test_tensors_are_laid_out_as_the_format_says(tmp_path):
    tree = {
        "a": {"kernel": weight("int8", (6, 4), **ROWS)},
        "b": {
            "kernel": weight(
                "int4",
                (20, 9),
                tiled_axes={0: 5},
                calibration_method="minmax",
                **ROWS,
            )
        },
        "c": {"kernel": weight("float8_e4m3fn", (6, 4))},
    }
    save_compressed_tensors(tmp_path, tree, act_qtype="int8")
    tensors = read_raw(tmp_path / "model.safetensors")
    a, b, c = (tree[key]["kernel"].array for key in "abc")
    np.testing.assert_array_equal(tensors["a.weight"], np.asarray(a.qvalue).T)
    assert tensors["a.weight"].dtype == np.int8
    np.testing.assert_array_equal(tensors["a.weight_scale"], np.asarray(a.scale).T)
    assert tensors["a.weight_scale"].shape == (4, 1)
    codes = np.asarray(b.qvalue).astype(int).T
    assert tensors["b.weight_packed"].dtype == np.int32
    for row, words in zip(codes, tensors["b.weight_packed"], strict=True):
        assert words.shape == (3,)
        number = sum(int(code + 8) << (4 * i) for i, code in enumerate(row))
        assert number.to_bytes(12, "little") == words.tobytes()
    assert tensors["b.weight_shape"].tolist() == [9, 20]
    assert tensors["b.weight_scale"].shape == (9, 4)
    zeros = np.asarray(b.zero_point).astype(int)
    assert tensors["b.weight_zero_point"].shape == (2, 4)
    for column, words in zip(zeros, tensors["b.weight_zero_point"].T, strict=True):
        number = sum(int(code + 8) << (4 * i) for i, code in enumerate(column))
        assert number.to_bytes(8, "little") == words.tobytes()
    np.testing.assert_array_equal(
        tensors["c.weight"], np.asarray(c.qvalue).T.view(np.uint8)
    )
    assert tensors["c.weight_scale"].shape == (1,)

    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    assert config["format"] == "mixed-precision"
    groups = {group["targets"][0]: group for group in config["config_groups"].values()}
    assert [groups[key]["format"] for key in "abc"] == [
        "int-quantized",
        "pack-quantized",
        "float-quantized",
    ]
    assert groups["b"]["weights"] == {
        "num_bits": 4,
        "type": "int",
        "symmetric": False,
        "dynamic": False,
        "strategy": "group",
        "group_size": 5,
    }
    assert groups["a"]["input_activations"]["strategy"] == "token"
    save_compressed_tensors(tmp_path, tree, act_qtype="mxfp4", overwrite=True)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["config_groups"]["group_0"]["input_activations"] == {
        "num_bits": 4,
        "type": "float",
        "symmetric": True,
        "dynamic": True,
        "strategy": "group",
        "group_size": 32,
        "scale_dtype": "torch.uint8",
    }


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def test_blocks_are_laid_out_as_the_format_says(tmp_path):
    values = np.random.default_rng(0).normal(size=(64, 6)).astype(np.float32)
    arrays = {}
    for qtype, block in (("nvfp4", 16), ("mxfp4", 32), ("mxfp4_floor", 32)):
        how = HowToQuantize(qtype=qtype, channelwise_axes=[1], tiled_axes={0: block})
        arrays[qtype] = WithAux(quantize_array(jnp.asarray(values), how), how)
    save_compressed_tensors(tmp_path, {k: {"kernel": x} for k, x in arrays.items()})
    tensors = read_raw(tmp_path / "model.safetensors")
    back = load_compressed_tensors(tmp_path)
    for qtype, leaf in arrays.items():
        packed = tensors[f"{qtype}.weight_packed"]
        bits = np.stack([packed & 15, packed >> 4], -1).reshape(6, 64)
        codes = np.where(bits > 7, -1, 1) * E2M1[bits & 7]
        scale = tensors[f"{qtype}.weight_scale"]
        if qtype == "nvfp4":
            scale = scale.view(formats.E4M3).astype(np.float64)
            scale /= tensors[f"{qtype}.weight_global_scale"]
        else:
            scale = 2.0 ** (scale.astype(np.float64) - 127)
        wanted = (codes.reshape(*scale.shape, -1) * scale[..., None]).reshape(6, 64)
        np.testing.assert_allclose(dequantize(leaf.array).T, wanted, rtol=3e-7)
        got = back[qtype]["kernel"]
        assert got.how.qtype == qtype.removesuffix("_floor")
        np.testing.assert_allclose(dequantize(got.array).T, wanted, rtol=3e-7)
        assert_same(got.array.qvalue, leaf.array.qvalue)
        assert_same(got.array.scale, leaf.array.scale)


def test_the_config_says_the_dtype_of_blocks(tmp_path):
    leaf = weight("mxfp4", tiled_axes={0: 32}, dtype=jnp.bfloat16, **ROWS)
    (tmp_path / "config.json").write_text('{"torch_dtype": "bfloat16"}')
    save_compressed_tensors(tmp_path, {"a": {"kernel": leaf}})
    assert_same(load_compressed_tensors(tmp_path)["a"]["kernel"], leaf)


def test_names_are_mapped_both_ways(tmp_path):
    tree = {
        "embedder": {"table": weight("int8", (6, 32), channelwise_axes=(0,))},
        "layers_0": {"kernel": weight("int8", **ROWS), "bias": jnp.ones(12)},
    }
    names = {
        "embedder/table": "model.embed_tokens.weight",
        "layers_0/kernel": "model.layers.0.proj.weight",
        "layers_0/bias": "model.layers.0.proj.bias",
    }
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    save_compressed_tensors(tmp_path, tree, rename=names.__getitem__)
    tensors = read_raw(tmp_path / "model.safetensors")
    assert tensors["model.embed_tokens.weight"].shape == (6, 32)
    assert tensors["model.layers.0.proj.weight"].shape == (12, 64)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama"
    paths = {name: f"x/{path}" for path, name in names.items()}
    back = load_compressed_tensors(tmp_path, rename=paths.__getitem__)["x"]
    expected = traverse_util.flatten_dict(tree)
    for path, got in traverse_util.flatten_dict(back).items():
        assert_same(got, expected.pop(path))
    assert not expected


def write_file(folder, tensors, config=None, name="model.safetensors"):
    from safetensors.numpy import save_file

    save_file(tensors, folder / name)
    if config is not None:
        text = json.dumps({"quantization_config": config})
        (folder / "config.json").write_text(text)


def test_shards(tmp_path):
    x = np.arange(6, dtype=np.int8).reshape(2, 3)
    scale = np.full((2, 1), 0.5, np.float32)
    write_file(tmp_path, {"a.weight": x, "b.weight_scale": scale}, name="1.safetensors")
    write_file(tmp_path, {"b.weight": x, "a.weight_scale": scale}, name="2.safetensors")
    first, second = ("a.weight", "b.weight_scale"), ("b.weight", "a.weight_scale")
    names = dict.fromkeys(first, "1.safetensors")
    index = {"weight_map": names | dict.fromkeys(second, "2.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    params = load_compressed_tensors(tmp_path)
    for key in "ab":
        values = dequantize(params[key]["kernel"].array)
        np.testing.assert_array_equal(values, x.T * 0.5)
    (tmp_path / "2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no 2.safetensors"):
        load_compressed_tensors(tmp_path)


def test_blocks_of_a_plain_fp8_checkpoint(tmp_path):
    rng = np.random.default_rng(0)
    codes = rng.normal(size=(9, 14)).astype(jnp.float8_e4m3fn)
    scale = rng.uniform(0.1, 1, (3, 4)).astype(np.float32)
    config = {"quant_method": "fp8", "weight_block_size": [4, 4]}
    tensors = {"a.weight": codes, "a.weight_scale_inv": scale}
    write_file(tmp_path, tensors, config)
    leaf = load_compressed_tensors(tmp_path)["a"]["kernel"]
    wide = scale.repeat(4, 0)[:9].repeat(4, 1)[:, :14]
    np.testing.assert_array_equal(
        dequantize(leaf.array).T, codes.astype(np.float32) * wide
    )


def test_a_file_without_a_config(tmp_path):
    codes = np.array([[1, -2], [3, 4]], np.int8)
    write_file(tmp_path, {"weight": codes, "weight_scale": np.array(0.5, np.float32)})
    leaf = load_compressed_tensors(tmp_path / "model.safetensors")["kernel"]
    np.testing.assert_array_equal(dequantize(leaf.array), codes.T * 0.5)


CODES = np.zeros((4, 8), np.int8)
ONES = np.ones((4, 1), np.float32)
BYTES = np.zeros((4, 16), np.uint8)
PACKED = {
    "a.weight_packed": np.zeros((4, 1), np.int32),
    "a.weight_shape": np.array([4, 8]),
    "a.weight_scale": ONES,
}


def groups(*weights, **fields):
    groups = {
        f"group_{i}": {"targets": ["Linear"], "weights": w}
        for i, w in enumerate(weights)
    }
    return {"config_groups": groups, **fields}


@pytest.mark.parametrize(
    "tensors, config, message",
    [
        ({}, {"quant_method": "gptq"}, "quant_method 'gptq'"),
        (
            {},
            {"sparsity_config": {"format": "sparse-24-bitmask"}},
            "compressed sparsity",
        ),
        ({}, {"transform_config": {"config_groups": {"u": {}}}}, "transforms"),
        (PACKED, None, "a.weight cannot be read: its codes are packed, which needs"),
        (
            {**PACKED, "a.weight_g_idx": np.arange(8)},
            groups(library.INT4),
            "its scheme is not supported: it has weight_g_idx",
        ),
        (
            PACKED,
            groups({**library.INT4, "actorder": "group"}),
            "columns that were reordered",
        ),
        (PACKED, groups({**library.INT4, "num_bits": 3}), "codes of 3 bits"),
        (PACKED, groups(library.INT8), r"shape \(4, 1\) does not hold a matrix"),
        (PACKED, groups(library.FLOAT8), "8-bit codes of type float"),
        (
            PACKED,
            groups({**library.INT4, "symmetric": False}),
            "it is asymmetric, but has no weight_zero_point",
        ),
        (
            {**PACKED, "a.weight_zero_point": np.ones((3, 1), np.int32)},
            groups({**library.INT4, "symmetric": False}),
            r"packed zero points have shape \(3, 1\)",
        ),
        (
            {"a.weight": CODES, "a.weight_scale": ONES}
            | {"a.weight_zero_point": np.ones((4, 1), np.int8)},
            groups(library.INT8),
            "it is symmetric, but",
        ),
        (
            {"a.weight": CODES.astype(jnp.float8_e4m3fn), "a.weight_scale": ONES}
            | {"a.weight_zero_point": np.ones((4, 1), jnp.float8_e4m3fn)},
            groups({**library.FLOAT8, "symmetric": False}),
            "zero points of float8",
        ),
        (PACKED, groups(library.INT4, library.INT8), "2 of the 2 config_groups"),
        (PACKED, {"config_groups": {"W4A16": ["Linear"]}}, "names schemes"),
        (
            {"a.weight": CODES.astype(np.float32), "a.weight_scale": ONES},
            None,
            "its weight is of dtype float32",
        ),
        (
            {"a.weight": CODES, "a.weight_scale": ONES.astype(np.uint8)},
            None,
            "scales of dtype uint8",
        ),
        (
            {"a.weight": CODES, "a.weight_scale": np.ones(3, np.float32)},
            None,
            r"shape \(3,\) do not fit a matrix of shape \(4, 8\)",
        ),
        (
            {"a.weight": CODES, "a.weight_scale": np.ones((4, 2), np.float32)},
            groups({**library.INT8, "strategy": "group", "group_size": 2}),
            r"shape \(4, 2\) do not fit",
        ),
        (
            {"a.weight": CODES[None], "a.weight_scale": ONES},
            None,
            r"its weight has shape \(1, 4, 8\)",
        ),
        (
            {"a.weight": CODES, "a.weight_scale": ONES}
            | {"a.input_scale": np.ones(2, np.float32)},
            None,
            r"its input_scale has shape \(2,\)",
        ),
        (
            {"a.weight": CODES, "a.weight_scale": ONES}
            | {"a.output_scale": np.ones(1, np.float32)},
            None,
            "it has output_scale",
        ),
        ({"a.weight_packed": CODES}, groups(library.INT4), "are not supported"),
        ({"a.weight_scale": ONES}, None, "it has scales, but no weight"),
        (
            {"a.weight_packed": BYTES, "a.weight_scale": np.ones((4, 2), np.uint8)},
            None,
            r"scales of shape \(4, 2\) do not fit weight_packed of shape \(4, 16\)",
        ),
        (
            {"a.weight_packed": BYTES, "a.weight_scale": np.full((4, 1), 255, "u1")},
            None,
            "it has a scale of nan",
        ),
        (
            {"a.weight_packed": BYTES, "a.weight_scale": BYTES[:, :1]}
            | {"a.weight_zero_point": BYTES[:, :1]},
            None,
            "zero points of mxfp4 are not supported",
        ),
        (
            {"a.weight_packed": BYTES, "a.weight_scale": np.ones((4, 2), np.float32)}
            | {"a.weight_global_scale": np.ones(1, np.float32)},
            None,
            "nvfp4 has a weight_scale of dtype float8_e4m3fn, and .* is float32",
        ),
        (
            {"a.weight_packed": BYTES, "a.weight_global_scale": np.zeros(1, "f4")}
            | {"a.weight_scale": np.ones((4, 2), formats.E4M3)},
            None,
            "it has a scale of inf",
        ),
    ],
)
def test_checkpoints_that_cannot_be_read(tmp_path, tensors, config, message):
    write_file(tmp_path, tensors, config)
    with pytest.raises(ValueError, match=message):
        load_compressed_tensors(tmp_path)


def test_integers_of_64_bits(tmp_path):
    write_file(tmp_path, {"ids": np.array([1, 2**31 - 1])})
    assert load_compressed_tensors(tmp_path)["ids"].tolist() == [1, 2**31 - 1]
    write_file(tmp_path, {"ids": np.array([1, 2**31])})
    with pytest.raises(
        ValueError, match="^ids: its int64 numbers from 1 to 2147483648"
    ):
        load_compressed_tensors(tmp_path)
    with jax.enable_x64(True):
        assert load_compressed_tensors(tmp_path)["ids"].tolist() == [1, 2**31]


def test_two_tensors_for_one_param(tmp_path):
    write_file(tmp_path, {"a.weight": CODES, "b.weight": CODES})
    with pytest.raises(ValueError, match="b.weight and another .* become x/kernel"):
        load_compressed_tensors(tmp_path, rename=lambda name: "x/kernel")


@pytest.mark.parametrize(
    "tree, options, message",
    [
        ({"w": {"kernel": weight("nf4")}}, {}, "w/kernel cannot .* no type nf4"),
        ({"w": {"kernel": weight("int1")}}, {}, "no type int1"),
        (
            {"w": {"kernel": weight("mxfp6_e3m2", tiled_axes={0: 32}, **ROWS)}},
            {},
            "no type mxfp6_e3m2",
        ),
        (
            {"w": {"kernel": weight("nvfp4", (64, 48), tiled_axes={0: 16, 1: 16})}},
            {},
            r"nvfp4 is stored with one scale for 16 elements of a row, .* \(3, 4\)",
        ),
        ({"w": {"kernel": weight("float8_e5m2")}}, {}, "no type float8_e5m2"),
        (
            {"w": {"kernel": weight("int8", (8, 2, 4), channelwise_axes=(1, 2))}},
            {"rename": lambda path: "w.weight"},
            r"shape \(8, 2, 4\), and the format holds matrices",
        ),
        (
            {
                "w": {
                    "kernel": weight("int8", (8, 4)),
                    "dot_general0_lhs_pre_quant_scale": np.full((1, 8), 0.5),
                }
            },
            {},
            "pre_quant_scale cannot be written: the format has no scales of input",
        ),
        # Another name is of no help there.
        (
            {"w": {"kernel": weight("int8", (3, 8, 4), channelwise_axes=(0, 2))}},
            {},
            r"the format holds matrices alone. Stacks of layers, and axes",
        ),
        (
            {"w": {"query": weight("int8", (8, 4))}},
            {},
            "quantized params are named 'weight', not 'w.query'",
        ),
        (
            {
                "w": {
                    "kernel": weight("int8", (10, 4), tiled_axes={0: 4}, pad_tiles=True)
                }
            },
            {},
            "tiles are of unequal length",
        ),
        (
            {"w": {"kernel": jnp.ones((2, 2)), "embedding": jnp.ones((2, 2))}},
            {},
            "w/kernel and w/embedding would both be written as w.weight",
        ),
        (
            {"w": {"dot_general0_lhs_scale": static_scale(1.0)}},
            {},
            "w/dot_general0_lhs_scale cannot be written",
        ),
        (
            {"w": {"einsum1_lhs_scale": static_scale(1.0)}},
            {},
            "w/einsum1_lhs_scale cannot be written: it is the scale of an activation",
        ),
        (
            {"w": {"kernel": {"array": {"qvalue": CODES, "scale": ONES}}}},
            {},
            "w/kernel is a quantized param as a pure dict",
        ),
        ({}, {"act_qtype": "nf4"}, "no activations of type nf4"),
        ({}, {"int8_format": "gguf"}, "Unknown int8_format 'gguf'"),
    ],
)
def test_params_that_cannot_be_written(tmp_path, tree, options, message):
    with pytest.raises(ValueError, match=message):
        save_compressed_tensors(tmp_path, tree, **options)
    assert not list(tmp_path.iterdir())


def test_float_params_are_refused(tmp_path):
    with pytest.raises(ValueError, match="No param is quantized"):
        save_compressed_tensors(tmp_path, {"w": {"kernel": jnp.ones((4, 2))}})
    array = TREES["int8"]["Dense_0"]["kernel"].array
    with pytest.raises(ValueError, match="w/kernel is a QArray that does not say how"):
        save_compressed_tensors(tmp_path, {"w": {"kernel": array}})
    assert not list(tmp_path.iterdir())


def test_safetensors_is_optional(tmp_path, monkeypatch):
    save_compressed_tensors(tmp_path, TREES["int8"])
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    message = r"pip install 'qwix_train\[interchange\]'"
    with pytest.raises(ImportError, match=message):
        load_compressed_tensors(tmp_path)
    with pytest.raises(ImportError, match=message):
        save_compressed_tensors(tmp_path, TREES["int8"])


@pytest.mark.interchange
def test_the_library_reads_shards_of_stacked_layers(tmp_path):
    how = HowToQuantize(qtype="int4", channelwise_axes=[0, 2], tiled_axes={1: 32})
    values = np.random.default_rng(0).normal(size=(3, 64, 8)).astype(np.float32)
    kernel = WithAux(quantize_array(jnp.asarray(values), how), how)
    save_compressed_tensors(
        tmp_path / "stack",
        {"fc": {"kernel": kernel}},
        mapping={"l.{layer}.weight": Place("fc/kernel", "o i -> layer i o")},
        max_shard_bytes=500,
    )
    assert len(list(tmp_path.glob("stack/model-*.safetensors"))) > 2
    run_library("read", tmp_path)
    got = np.load(tmp_path / "stack" / "reference.npz")
    for index, expected in enumerate(np.asarray(dequantize(kernel.array))):
        np.testing.assert_array_equal(got[f"l.{index}.weight"], expected.T)


def test_stacked_layers_and_heads_are_matrices_of_their_own(tmp_path):
    layers, heads, size, width = 3, 4, 16, 8
    how = HowToQuantize(qtype="int8", channelwise_axes=[0, 2, 3])
    query = np.random.default_rng(0).normal(size=(layers, size, heads, width))
    query = query.astype(np.float32)
    out = HowToQuantize(qtype="int4", channelwise_axes=[0, 3], tiled_axes={2: 4})
    back = query.transpose(0, 2, 3, 1)
    tree = {
        "layers": {
            "q_proj": {"kernel": WithAux(quantize_array(jnp.asarray(query), how), how)},
            "norm": {"scale": jnp.ones((layers, size))},
        },
    }
    mapping = {
        "layers.{layer}.q_proj.weight": Place(
            "layers/q_proj/kernel", "(h k) i -> layer i h k"
        ),
        "layers.{layer}.norm.weight": Place("layers/norm/scale", "d -> layer d"),
    }
    for shard in (10**9, 700):
        folder = tmp_path / str(shard)
        save_compressed_tensors(folder, tree, mapping=mapping, max_shard_bytes=shard)
        assert (folder / "model.safetensors.index.json").exists() == (shard == 700)
        got = load_compressed_tensors(folder)["layers"]
        for index, layer in enumerate(query):
            kernel = got[str(index)]["q_proj"]["kernel"]
            matrix = layer.reshape(size, heads * width)
            expected = np.abs(matrix).max(0, keepdims=True) / np.float32(127.5)
            np.testing.assert_allclose(kernel.array.scale, expected, rtol=1e-6)
            error = np.abs(dequantize(kernel.array) - matrix)
            assert (error <= kernel.array.scale * 0.5001).all()
            assert got[str(index)]["norm"]["scale"].shape == (size,)
    save_compressed_tensors(
        folder, tree, mapping=mapping, max_shard_bytes=700, overwrite=True
    )
    part = {name: place for name, place in mapping.items() if "q_proj" in name}
    with pytest.raises(ValueError, match="without a place.*: layers/norm/scale"):
        save_compressed_tensors(tmp_path / "no", tree, mapping=part)
    # Tiles of one head that are no tiles of a row of the matrix.
    kernel = WithAux(quantize_array(jnp.asarray(back), out), out)
    tree = {"o_proj": {"kernel": kernel}}
    mapping = {
        "layers.{layer}.weight": Place("o_proj/kernel", "i (h k) -> layer h k i")
    }
    with pytest.raises(ValueError, match="layers.0.weight cannot be written: "):
        save_compressed_tensors(tmp_path / "tiles", tree, mapping=mapping)
