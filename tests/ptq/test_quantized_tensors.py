"""Checkpoints that others have quantized: codes and scales stay as they are."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util
from safetensors.numpy import save_file

import qwix_train
from qwix_train import HowToQuantize
from qwix_train.core.qarray import dequantize
from qwix_train.ptq import hugging_face
from qwix_train.ptq.hugging_face import Place
from qwix_train.values import stored
from tests import other_python
from tests.ptq import quantized_tensors_reference as library

LAYERS, EXPERTS, OUT, IN = 2, 3, 8, 64
RNG = np.random.default_rng(0)
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
EXPERT_PLACE = Place("layers/experts/kernel", "expert i o -> layer expert i o")
MXFP4 = {"layers.{layer}.up": EXPERT_PLACE}
SQUARES = HowToQuantize(qtype="float8_e4m3fn", tiled_axes={0: 128, 1: 128})


def experts(*outer, groups=IN // 32):
    """Codes, and scales, as gpt-oss has them; and what they stand for."""
    blocks = RNG.integers(0, 256, (*outer, OUT, groups, 16)).astype(np.uint8)
    scales = RNG.integers(110, 130, (*outer, OUT, groups)).astype(np.uint8)
    bits = np.stack([blocks & 15, blocks >> 4], -1).reshape(*outer, OUT, groups, 32)
    values = np.where(bits > 7, -1, 1) * E2M1[bits & 7]
    values = values * 2.0 ** (scales.astype(np.float64) - 127)[..., None]
    return blocks, scales, values.reshape(*outer, OUT, -1).swapaxes(-1, -2)


def matrix(out, columns, block=128):
    """Codes, and scales, as DeepSeek-V3 has them; and what they stand for."""
    codes = RNG.normal(0, 60, (out, columns)).astype(ml_dtypes.float8_e4m3fn)
    shape = -(-out // block), -(-columns // block)
    scale = RNG.uniform(0.001, 0.1, shape).astype(np.float32)
    of_rows = scale[np.arange(out) // block]
    values = codes.astype(np.float32) * of_rows[:, np.arange(columns) // block]
    return codes, scale, values


def write(folder, tensors, config=None):
    save_file(tensors, folder / "model.safetensors")
    if config is not None:
        text = json.dumps({"quantization_config": config})
        (folder / "config.json").write_text(text)


def nested(path, leaf):
    return functools.reduce(lambda x, name: {name: x}, reversed(path.split("/")), leaf)


def abstract(path, shape, how=None, dtype=jnp.float32):
    struct = jax.ShapeDtypeStruct(shape, dtype)
    return nested(path, struct if how is None else stored.quantize_param(struct, how))


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt_oss")
    blocks, scales, values = experts(LAYERS, EXPERTS)
    tensors = {}
    for layer in range(LAYERS):
        tensors[f"layers.{layer}.up_blocks"] = blocks[layer]
        tensors[f"layers.{layer}.up_scales"] = scales[layer]
    write(folder, tensors, {"quant_method": "mxfp4"})
    return folder, scales, values


@pytest.mark.parametrize("qtype", ["mxfp4", "mxfp4_floor"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_experts_keep_codes_and_scales(gpt_oss, qtype, dtype):
    folder, scales, values = gpt_oss
    how = HowToQuantize(qtype=qtype, channelwise_axes=[0, 1, 3], tiled_axes={2: 32})
    target = abstract(EXPERT_PLACE.param, values.shape, how, dtype)
    leaf = hugging_face.load(folder, MXFP4, target)["layers"]["experts"]["kernel"]
    wanted = target["layers"]["experts"]["kernel"]
    assert jax.tree.structure(leaf) == jax.tree.structure(wanted)
    assert jax.tree.map(stored.shape_of, leaf) == wanted
    got = np.asarray(leaf.array.scale).view(np.uint8)
    np.testing.assert_array_equal(got, scales.swapaxes(-1, -2))
    np.testing.assert_array_equal(
        dequantize(leaf.array).astype(jnp.float32), values.astype(np.float32)
    )


def test_experts_in_float(gpt_oss):
    folder, _, values = gpt_oss
    target = abstract(EXPERT_PLACE.param, values.shape)
    got = hugging_face.load(folder, MXFP4, target)["layers"]["experts"]["kernel"]
    np.testing.assert_array_equal(got, values)


def test_experts_onto_a_mesh(gpt_oss):
    folder, _, values = gpt_oss
    how = HowToQuantize(qtype="mxfp4", channelwise_axes=[0, 1, 3], tiled_axes={2: 32})
    target = abstract(EXPERT_PLACE.param, values.shape, how)
    mesh = jax.sharding.Mesh(np.reshape(jax.devices()[:4], (2, 2)), ("x", "y"))
    sharding = jax.NamedSharding(mesh, jax.P(None, None, "x", "y"))
    got = hugging_face.load(folder, MXFP4, target, shardings=lambda path: sharding)
    array = got["layers"]["experts"]["kernel"].array
    assert array.qvalue.sharding.is_equivalent_to(sharding, 4)
    assert array.scale.sharding.is_equivalent_to(sharding, 4)
    np.testing.assert_array_equal(dequantize(array), values)


@pytest.mark.parametrize(
    "out, columns, tiles, dtype",
    [
        (256, 384, {0: 128, 1: 128}, jnp.float32),
        (256, 256, {0: 128, 1: 128}, jnp.bfloat16),
        (256, 128, {0: 32, 1: 128}, jnp.float32),
        # The last block is shorter, as in DeepSeek's kv_a_proj_with_mqa.
        (192, 256, {0: 128, 1: 64}, jnp.float32),
    ],
)
def test_blocks_keep_codes_and_scales(tmp_path, out, columns, tiles, dtype):
    codes, scale, values = matrix(out, columns)
    config = FP8 if out % 128 else None  # Without one, blocks are of equal size.
    write(tmp_path, {"a.weight": codes, "a.weight_scale_inv": scale}, config)
    how = HowToQuantize(qtype="float8_e4m3fn", tiled_axes=tiles)
    target = abstract("a/kernel", (columns, out), how, dtype)
    mapping = {"a.weight": Place("a/kernel", "o i -> i o")}
    array = hugging_face.load(tmp_path, mapping, target)["a"]["kernel"].array
    assert array.dtype == dtype and array.scale.dtype == np.float32
    np.testing.assert_array_equal(array.qvalue, codes.T)
    assert {*np.ravel(array.scale)} == {*scale.ravel()}
    wanted = values.T.astype(dtype).astype(np.float32)
    rtol = 0 if dtype == jnp.float32 else 2**-7
    got = dequantize(array).astype(np.float32)
    np.testing.assert_allclose(got, wanted, rtol=rtol)
    target = abstract("a/kernel", (columns, out))
    got = hugging_face.load(tmp_path, mapping, target)["a"]["kernel"]
    np.testing.assert_array_equal(got, values.T)


def test_a_model_runs_on_blocks_and_others_are_quantized(tmp_path):
    (codes, scale, values), other = matrix(128, 256), RNG.normal(size=(128, 128))
    other = other.astype(np.float32)
    tensors = {"a.weight": codes, "a.weight_scale_inv": scale, "b.weight": other}
    write(tmp_path, tensors, FP8)
    rule = qwix_train.QuantizationRule(
        weight_qtype="float8_e4m3fn", tile_size={0: 128, 1: 128}
    )
    layers = [nn.Dense(128, use_bias=False, name=name) for name in "ab"]
    model = qwix_train.quantize_model(
        nn.Sequential(layers), qwix_train.PtqProvider([rule])
    )
    x = RNG.normal(size=(2, 256)).astype(np.float32)
    target = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    mapping = {
        f"{name}.weight": Place(f"{layer}/kernel", "o i -> i o")
        for name, layer in zip("ab", target, strict=True)
    }
    params = hugging_face.load(tmp_path, mapping, target)
    assert jax.tree.structure(params) == jax.tree.structure(target)
    first, second = (params[layer]["kernel"] for layer in target)
    np.testing.assert_array_equal(dequantize(first.array), values.T)
    assert second.array.scale.shape == (1, 1)
    wanted = x @ values.T @ np.asarray(dequantize(second.array))
    got = model.apply({"params": params}, x)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


UP = {"up": Place("up", "e i o -> e i o")}
DOWN = {"a.weight": Place("a", "o i -> i o")}
STACK = {"{n}.weight": Place("a", "o i -> n i o")}
MX = HowToQuantize(qtype="mxfp4", channelwise_axes=[0, 2], tiled_axes={1: 32})
INT8 = HowToQuantize(qtype="int8", channelwise_axes=[1])
FINE = HowToQuantize(qtype="float8_e4m3fn", tiled_axes={0: 128, 1: 96})
PER_LAYER = HowToQuantize(
    qtype="float8_e4m3fn", channelwise_axes=[0], tiled_axes={1: 128, 2: 64}
)
OF_STACK = HowToQuantize(qtype="float8_e4m3fn", tiled_axes={1: 128, 2: 64})


@pytest.mark.parametrize(
    "case, mapping, how, message",
    [
        ("fp8", DOWN, INT8, r"'a', a.weight: it has codes of float8_e4m3fn .* int8"),
        ("fp8", DOWN, FINE, "along axis 1 of 192 it has 192 scales .* tiles of 96"),
        ("nan", UP, MX, "Param 'up', up: it has a scale of nan"),
        ("groups", UP, MX, r"_blocks of shape \(2, 8, 2, 16\) do not fit _scales"),
        ("partly", STACK, PER_LAYER, "1.weight is not quantized in the checkpoint"),
        ("stack", STACK, OF_STACK, "its tensors have scales of their own"),
        ("method", DOWN, None, "quantization_config.*'gptq'"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, case, mapping, how, message):
    codes, scale, _ = matrix(192, 128)
    blocks, scales, values = experts(2)
    fp8 = {"a.weight": codes, "a.weight_scale_inv": scale}
    stack = {f"{i}.{key[2:]}": x for i in range(2) for key, x in fp8.items()}
    floats = {"1.weight": np.ones((192, 128), np.float32)}
    partly = {key: x for key, x in stack.items() if key[0] == "0"} | floats
    tensors, shape = {
        "fp8": (fp8, (128, 192)),
        "method": (fp8, (128, 192)),
        "nan": ({"up_blocks": blocks, "up_scales": scales | 255}, values.shape),
        "groups": ({"up_blocks": blocks, "up_scales": scales[..., :1]}, values.shape),
        "partly": (partly, (2, 128, 192)),
        "stack": (stack, (2, 128, 192)),
    }[case]
    write(tmp_path, tensors, FP8 | ({"quant_method": "gptq"} if how is None else {}))
    (place,) = mapping.values()
    with pytest.raises(ValueError, match=message):
        hugging_face.load(tmp_path, mapping, abstract(place.param, shape, how))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("transformers")
    other_python.run(library.__file__, folder)
    return folder


def params_of(tensors):
    """The params of a model whose modules have the names of the checkpoint's."""
    params, stacks = {}, {}
    for name in sorted(tensors):
        x, path = tensors[name], re.sub(r"layers\.(\d)", r"layers_\1", name)
        *modules, last = path.removeprefix("model.").split(".")
        if last == "weight":
            kernel = "embedding" if modules[-1] == "embed_tokens" else "kernel"
            last = "scale" if x.ndim == 1 else kernel
        x = x.T if last == "kernel" else x
        path = "/".join([m for m in modules if not m.isdigit()] + [last])
        if any(map(str.isdigit, modules)):
            stacks.setdefault(path, []).append(x)
        else:
            params[path] = x
    return params | {path: np.stack(x) for path, x in stacks.items()}


def how_in_file(path, shape):
    """How a param is quantized in the file; None if it is not."""
    if path.endswith(("gate_up_proj", "down_proj")):
        return MX
    if "_proj" in path and not any(n % 128 for n in shape[-2:]):
        tiles = {len(shape) - 2: 128, len(shape) - 1: 128}
        return HowToQuantize(
            qtype="float8_e4m3fn",
            channelwise_axes=range(len(shape) - 2),
            tiled_axes=tiles,
        )
    return None


@pytest.mark.interchange
@pytest.mark.parametrize("family, count", [("gpt_oss", 4), ("deepseek_v3", 11)])
def test_the_values_of_transformers(theirs, family, count):
    values = params_of(np.load(theirs / family / "reference.npz"))
    mapping = hugging_face.mapping(family)
    floats = traverse_util.unflatten_dict(values, sep="/")
    got = hugging_face.load(theirs / family, mapping, floats)
    assert jax.tree.structure(got) == jax.tree.structure(floats)
    jax.tree.map(np.testing.assert_array_equal, got, floats)
    quantized = {}
    for path, x in values.items():
        how, struct = how_in_file(path, x.shape), jax.ShapeDtypeStruct(x.shape, x.dtype)
        if how is not None:
            quantized[path] = stored.quantize_param(struct, how)
    assert len(quantized) == count
    target = traverse_util.unflatten_dict(values | quantized, sep="/")
    got = hugging_face.load(theirs / family, mapping, target)
    assert jax.tree.structure(got) == jax.tree.structure(target)
    got = traverse_util.flatten_dict(got, sep="/")
    for path in quantized:
        np.testing.assert_array_equal(dequantize(got[path].array), values[path])
