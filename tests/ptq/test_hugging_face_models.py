"""Checkpoints of transformers, and what its models compute: `make test-interchange`."""

import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util

import qwix_train
from qwix_train.ptq import hugging_face, safetensors_files
from tests import other_python
from tests.ptq import hugging_face_models as models
from tests.ptq import hugging_face_reference as library

SCRIPT = library.__file__
DECODERS = tuple(family for family in library.MODELS if family != "bert")
LAYOUTS = {
    "a param per layer": ({}, {}),
    "scanned": ({"scanned": True}, {"layers": "layers"}),
    "scanned, heads split": (
        {"scanned": True, "split_heads": True},
        {"layers": "layers", "split_heads": True},
    ),
}

pytestmark = pytest.mark.interchange


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("transformers")
    other_python.run(SCRIPT, "write", folder)
    return folder


def reference(folder):
    found = np.load(folder / "reference.npz")
    return jnp.asarray(found["tokens"]), found["output"]


def abstract_of(model, tokens):
    return jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]


def assert_close(got, wanted):
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", DECODERS)
def test_a_linen_model_computes_the_same(theirs, family, layout):
    options, names = LAYOUTS[layout]
    tokens, logits = reference(theirs / family)
    model = models.Llama(models.Config.of(theirs / family, **options))
    mapping = hugging_face.mapping(family, **names)
    params = hugging_face.load(theirs / family, mapping, abstract_of(model, tokens))
    assert_close(model.apply({"params": params}, tokens), logits)


@pytest.mark.parametrize("split_heads", [False, True])
def test_bert_computes_the_same(theirs, split_heads):
    tokens, output = reference(theirs / "bert")
    config = models.Config.of(theirs / "bert", split_heads=split_heads)
    model, mapping = (
        models.Bert(config),
        hugging_face.mapping("bert", split_heads=split_heads),
    )
    params = hugging_face.load(theirs / "bert", mapping, abstract_of(model, tokens))
    assert_close(model.apply({"params": params}, tokens), output)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_an_nnx_model_computes_the_same(theirs, family):
    tokens, logits = reference(theirs / family)
    config = models.Config.of(theirs / family)
    model = nnx.eval_shape(lambda: models.NnxLlama(config, nnx.Rngs(0)))
    mapping = hugging_face.mapping(family, layers="layers/{layer}")
    nnx.update(model, hugging_face.load(theirs / family, mapping, model))
    assert_close(model(tokens), logits)


def expected_of(tensors):
    """Params under their natural names, by NumPy; see `hugging_face.mapping`."""
    params, stacks = {}, {}
    for name, tensor in tensors.items():
        path = name.removeprefix("model.").replace("encoder.layer.", "layers.")
        path = re.sub(r"layers\.(\d+)", r"layers_\1", path).replace(".", "/")
        is_matrix = tensor.ndim == 2
        if path.endswith("weight"):
            last = "scale"
            if is_matrix:
                last = "embedding" if "embed" in path else "kernel"
            path = path.removesuffix("weight") + last
        tensor = tensor.T if path.endswith("kernel") else tensor
        if match := re.search(r"experts/(\d+)/", path):
            path = path.replace(match[0], "experts/")
            stacks.setdefault(path, {})[int(match[1])] = tensor
        else:
            params[path] = tensor
    for path, stack in stacks.items():
        params[path] = np.stack([stack[index] for index in sorted(stack)])
    return traverse_util.unflatten_dict(params, sep="/")


@pytest.fixture(scope="module")
def ours(theirs, tmp_path_factory):
    """What we write of each checkpoint that we have read, and what their models do."""
    folder = tmp_path_factory.mktemp("ours")
    for family in library.MODELS:
        tensors, _, config = safetensors_files.read_checkpoint(theirs / family)
        expected, mapping = expected_of(tensors), hugging_face.mapping(family)
        params = hugging_face.load(theirs / family, mapping, expected)
        jax.tree.map(np.testing.assert_array_equal, params, expected)
        hugging_face.save(folder / family, params, mapping, max_shard_bytes=20_000)
        shutil.copy(config, folder / family)
    other_python.run(SCRIPT, "read", folder)
    return folder


@pytest.mark.parametrize("family", library.MODELS)
def test_what_was_read_is_written_and_read_by_the_library(theirs, ours, family):
    before, _, _ = safetensors_files.read_checkpoint(theirs / family)
    after, _, _ = safetensors_files.read_checkpoint(ours / family)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        np.testing.assert_array_equal(tensor, after[name])
    got, wanted = (np.load(f / family / "reference.npz") for f in (ours, theirs))
    np.testing.assert_array_equal(got["output"], wanted["output"])


def test_it_is_quantized_on_the_way(theirs):
    tokens, logits = reference(theirs / "qwen2")
    config = models.Config.of(theirs / "qwen2", scanned=True, split_heads=True)
    model, rules = (
        models.Llama(config),
        [qwix_train.QuantizationRule(weight_qtype="int8")],
    )
    mapping = hugging_face.mapping("qwen2", layers="layers", split_heads=True)
    floats = hugging_face.load(theirs / "qwen2", mapping, abstract_of(model, tokens))
    model = qwix_train.quantize_model(model, qwix_train.PtqProvider(rules))
    abstract = abstract_of(model, tokens)
    params = hugging_face.load(theirs / "qwen2", mapping, abstract)
    expected = qwix_train.quantize_params(floats, abstract)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    error = np.abs(model.apply({"params": params}, tokens) - logits)
    assert error.max() < 0.05 * np.abs(logits).max()
