"""Adapters in PEFT's files, held against the library and against NumPy.

The library needs PyTorch: `make test-interchange` runs the tests that call it.
"""

import json

import jax
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax import numpy as jnp

from qwix_train import lora
from qwix_train.ptq import safetensors_files
from tests import models, other_python
from tests.lora import peft_reference as library
from tests.lora.test_merge import flat, random_like
from tests.models import Mlp, assert_same

OPS = ("dot_general", "einsum", "conv_general_dilated", "gather")
TOKENS = np.random.default_rng(0).integers(0, 11, (3, 6)).astype(np.int32)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return jnp.tanh(nn.Dense(8, name="proj")(x)), None


class Net(nn.Module):
    """What `peft_reference.build` makes in PyTorch."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(11, 8, name="embed")(tokens)
        x = jnp.tanh(nn.DenseGeneral((2, 3), name="split")(x))
        x = jnp.tanh(nn.DenseGeneral(8, axis=(-2, -1), name="join")(x))
        stack = nn.scan(
            Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2
        )
        x, _ = stack(name="layers")(x, None)
        x = nn.Conv(5, (2, 2), padding="VALID", name="conv")(x.reshape(-1, 6, 2, 4))
        return nn.Dense(3, name="head")(jnp.tanh(x.reshape(len(x), -1)))


def rules_of(case):
    """The rules that give what a config of PEFT says."""
    settings = library.CASES[case]

    def rule(module_path, rank=settings["r"], alpha=settings["lora_alpha"]):
        return lora.LoraRule(
            module_path=module_path,
            op_names=OPS,
            rank=rank,
            alpha=alpha,
            rank_stabilized=settings.get("use_rslora", False),
            dora=settings.get("use_dora", False),
        )

    if case != "patterns":
        return [rule(".*")]
    return [
        rule("head", rank=3),
        rule("conv", alpha=1.5),
        rule("layers/proj", rank=1, alpha=2),
        rule(".*"),
    ]


@pytest.fixture(scope="module")
def params():
    params = random_like(Net().init(jax.random.key(0), TOKENS)["params"], 7)
    return jax.tree.map(lambda x: 0.5 * (x - 1), params)


def state_of(rules, params):
    state = models.lora_state(
        Net().apply, params, optax.sgd(0.1), rules, jax.random.key(1), TOKENS
    )
    adapters = jax.tree.map(lambda x: x - 0.4, random_like(state.params))
    return state.replace(params=adapters)


def torch_weights(params):
    """The params with the names, axes and shapes that PyTorch has."""
    p = {name: np.asarray(x) for name, x in flat(params).items()}
    weights = {
        "embed.weight": p["embed/embedding"],
        "split.weight": p["split/kernel"].reshape(8, 6).T,
        "split.bias": p["split/bias"].reshape(6),
        "join.weight": p["join/kernel"].reshape(6, 8).T,
        "join.bias": p["join/bias"],
        "conv.weight": p["conv/kernel"].transpose(3, 2, 0, 1),
        "conv.bias": p["conv/bias"],
        "head.weight": p["head/kernel"].T,
        "head.bias": p["head/bias"],
    }
    for i in range(2):
        weights[f"layers.{i}.proj.weight"] = p["layers/proj/kernel"][i].T
        weights[f"layers.{i}.proj.bias"] = p["layers/proj/bias"][i]
    return weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory, params):
    folder = tmp_path_factory.mktemp("peft")
    for case in library.CASES:
        lora.save_peft(folder / "ours" / case, state_of(rules_of(case), params))
    frozen = state_of(rules_of("plain"), params).frozen
    np.savez(folder / "base.npz", tokens=TOKENS, **torch_weights(frozen))
    other_python.run(library.__file__, folder)
    return folder


@pytest.mark.interchange
@pytest.mark.parametrize("case", library.CASES)
def test_the_library_computes_the_same_with_our_files(folder, params, case):
    state = state_of(rules_of(case), params)
    theirs = np.load(folder / "ours" / case / "outputs.npz")
    ours = state.apply_fn({"params": state.params}, TOKENS)
    base = Net().apply({"params": state.frozen}, TOKENS)
    assert np.abs(ours - base).max() > 0.1
    np.testing.assert_allclose(theirs["adapted"], ours, 1e-5, 1e-5)
    ours = Net().apply({"params": lora.merge(state)}, TOKENS)
    np.testing.assert_allclose(theirs["merged"], ours, 1e-5, 1e-5)


@pytest.mark.interchange
@pytest.mark.parametrize("case", library.CASES)
def test_we_compute_the_same_with_files_of_the_library(folder, params, case):
    state = state_of(rules_of(case), params)
    state = lora.load_peft(folder / "theirs" / case, state)
    theirs = np.load(folder / "theirs" / case / "outputs.npz")
    ours = state.apply_fn({"params": state.params}, TOKENS)
    np.testing.assert_allclose(ours, theirs["adapted"], 1e-5, 1e-5)
    ours = Net().apply({"params": lora.merge(state)}, TOKENS)
    np.testing.assert_allclose(ours, theirs["merged"], 1e-5, 1e-5)


@pytest.mark.interchange
def test_a_smaller_rank_is_padded(folder, params):
    wide = state_of([lora.LoraRule(rank=3, alpha=7.0, op_names=OPS)], params)
    with pytest.raises(
        ValueError, match="rank 2, scaling 2, and rank 3, scaling 2.33333 in"
    ):
        lora.load_peft(folder / "theirs" / "patterns", wide)
    state = lora.load_peft(folder / "theirs" / "patterns", wide, pad=True)
    theirs = np.load(folder / "theirs" / "patterns" / "outputs.npz")
    ours = state.apply_fn({"params": state.params}, TOKENS)
    np.testing.assert_allclose(ours, theirs["adapted"], 1e-5, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("case", library.CASES)
def test_what_is_read_is_what_was_written(tmp_path, params, case):
    state = state_of(rules_of(case), params)
    lora.save_peft(tmp_path, state.params, state.layouts)
    assert_same(lora.load_peft(tmp_path, state.layouts), state.params)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == sorted(library.TARGETS)
    settings = library.CASES[case]
    for name in ("r", "lora_alpha", "use_rslora", "use_dora"):
        if case != "patterns":
            assert config[name] == settings.get(name, False)
    if case == "patterns":
        assert config["rank_pattern"] == {
            r"^layers\.0\.proj": 1,
            r"^layers\.1\.proj": 1,
            "^head": 3,
        }


@pytest.mark.slow
def test_the_tensors_are_those_of_the_merged_weight(tmp_path, params):
    """In NumPy, from the definition of LoRA in PyTorch's layout."""
    state = state_of(rules_of("plain"), params)
    lora.save_peft(tmp_path, state)
    tensors, _ = safetensors_files.read_file(tmp_path / "adapter_model.safetensors")
    base, merged = torch_weights(state.frozen), torch_weights(lora.merge(state))
    for module in library.TARGETS:
        prefix = f"base_model.model.{module}."
        delta = np.float64(merged[f"{module}.weight"]) - base[f"{module}.weight"]
        if module == "embed":
            a, b = (tensors.pop(f"{prefix}lora_embedding_{x}") for x in "AB")
            product = (np.float64(b) @ a).T
        else:
            a, b = (tensors.pop(f"{prefix}lora_{x}.weight") for x in "AB")
            assert a.ndim == b.ndim == delta.ndim
            product = np.tensordot(np.float64(b.reshape(b.shape[:2])), a, 1)
        np.testing.assert_allclose(delta, 1.5 * product, atol=1e-6)
    assert not tensors


def test_names(tmp_path, params):
    state = state_of(rules_of("plain"), params)
    paths = ["/".join(path) for path in state.layouts]

    def name(path):
        return f"model.{path.removesuffix('/kernel').replace('/', '.{layer}.')}"

    lora.save_peft(tmp_path, state, names=name, config={"task_type": "CAUSAL_LM"})
    tensors, _ = safetensors_files.read_file(tmp_path / "adapter_model.safetensors")
    assert "base_model.model.model.layers.1.proj.lora_A.weight" in tensors
    assert "base_model.model.model.embed.{layer}.embedding.lora_embedding_A" in tensors
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["task_type"] == "CAUSAL_LM" and config["peft_type"] == "LORA"
    names = {path: name(path) for path in paths}
    assert_same(lora.load_peft(tmp_path, state, names=names).params, state.params)
    names.pop("head/kernel")
    with pytest.raises(ValueError, match="no module for 'head/kernel'"):
        lora.save_peft(tmp_path, state, names=names)
    with pytest.raises(ValueError, match="'layers/proj/kernel' holds 2 stacked"):
        lora.save_peft(tmp_path, state, names=lambda path: path)
    with pytest.raises(ValueError, match="would both be those of the module 'x.0'"):
        names = dict.fromkeys(paths, "x.0") | {"layers/proj/kernel": "x.{layer}"}
        lora.save_peft(tmp_path, state, names=names)


class Experts(nn.Module):
    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.ones, (2, 6, 4))
        return jnp.einsum("ebi,eio->ebo", jnp.stack([x, x]), w)


def small_state(model, **kwargs):
    x = jnp.ones((5, 6))
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]
    rules = [lora.LoraRule(rank=2, alpha=3.0, **kwargs)]
    return models.lora_state(
        model.apply, params, optax.sgd(0.1), rules, jax.random.key(1), x
    )


@pytest.mark.slow
def test_what_peft_cannot_hold_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'w' has axes of a batch"):
        lora.save_peft(tmp_path, small_state(Experts()))
    with pytest.raises(ValueError, match="module of 'kernel' has no name"):
        lora.save_peft(tmp_path, small_state(nn.Dense(4)))
    dora, plain = small_state(Mlp(), dora=True), small_state(Mlp())
    layouts = {**plain.layouts}
    layouts["Dense_0", "kernel"] = dora.layouts["Dense_0", "kernel"]
    adapters = {**plain.params, "Dense_0": dora.params["Dense_0"]}
    with pytest.raises(ValueError, match="'Dense_0' has a magnitude .* 'Dense_1'"):
        lora.save_peft(tmp_path, adapters, layouts)
    with pytest.raises(TypeError, match=r"lora.save_peft\(adapters, layouts\)"):
        lora.save_peft(tmp_path, adapters)
    assert not list(tmp_path.iterdir())


class Tied(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        table = nn.Embed(11, 8, name="embed")
        return table.attend(jnp.tanh(table(tokens)))


class Image(nn.Module):
    layer: nn.Module

    @nn.compact
    def __call__(self, tokens):
        return self.layer(jnp.ones((1, 6, 6, 4)) * tokens.astype(jnp.float32).mean())


@pytest.mark.parametrize(
    "model, message",
    [
        (Tied(), r"embed/dot_general0 contracts its axes \(1,\), not \(0,\)"),
        (Image(nn.Conv(4, (3, 3), feature_group_count=2)), "feature_group_count=2"),
        (Image(nn.Conv(4, (3, 3), kernel_dilation=2)), r"rhs_dilation=\(2, 2\)"),
        (Image(nn.ConvTranspose(4, (3, 3), (2, 2))), r"lhs_dilation=\(2, 2\)"),
    ],
    ids=["tied", "groups", "dilation", "transposed"],
)
def test_a_layer_that_peft_computes_otherwise_is_refused(tmp_path, model, message):
    params = jax.jit(model.init)(jax.random.key(0), TOKENS)["params"]
    rules = [lora.LoraRule(rank=2, alpha=3.0, op_names=OPS)]
    adapters, _, layouts = lora.init(
        params, model.apply, rules, jax.random.key(1), TOKENS
    )
    with pytest.raises(ValueError, match=f"PEFT computes something else.*{message}"):
        lora.save_peft(tmp_path, adapters, layouts)
    assert not list(tmp_path.iterdir())


def test_weights_of_the_base_in_a_file(tmp_path, params):
    """As `PeftModel.save_pretrained` leaves them where a table is adapted."""
    state = state_of(rules_of("plain"), params)
    lora.save_peft(tmp_path, state)
    file = tmp_path / "adapter_model.safetensors"
    tensors, metadata = safetensors_files.read_file(file)
    for name, weight in torch_weights(state.frozen).items():
        if name.endswith("weight"):
            module = name.removesuffix(".weight")
            tensors[f"base_model.model.{module}.base_layer.weight"] = weight
    safetensors_files.write_file(file, tensors, metadata)
    assert_same(lora.load_peft(tmp_path, state).params, state.params)
    with pytest.warns(UserWarning, match=r"not be held .*: conv.base_layer.weight"):
        assert_same(lora.load_peft(tmp_path, state.layouts), state.params)
    tensors["base_model.model.other.weight"] = np.ones((2, 2), np.float32)
    safetensors_files.write_file(file, tensors, metadata)
    with pytest.warns(UserWarning, match=r"not be held .*: other.weight"):
        lora.load_peft(tmp_path, state)
    table = "base_model.model.embed.base_layer.weight"
    tensors[table] = tensors[table] + 0.01
    safetensors_files.write_file(file, tensors, metadata)
    with pytest.raises(ValueError, match=r"embed.base_layer.weight.*another base"):
        lora.load_peft(tmp_path, state)


def test_files_that_do_not_fit_are_refused(tmp_path):
    state = small_state(Mlp())
    with pytest.raises(FileNotFoundError, match="no adapter_config.json"):
        lora.load_peft(tmp_path, state)
    lora.save_peft(tmp_path, state)
    with pytest.raises(ValueError, match=r"Dense_0.lora_B.* \(16, 2\).*\(9, 2\)"):
        lora.load_peft(tmp_path, small_state(Mlp(width=9)))
    with pytest.raises(ValueError, match=r"Of no adapter of the model: Dense_1.lora_A"):
        lora.load_peft(tmp_path, small_state(Mlp(), module_path="Dense_0"))
    with pytest.raises(ValueError, match="there is no other.Dense_0.lora_A.weight"):
        lora.load_peft(tmp_path, state, names=lambda path: f"other.{path[:7]}")
    with pytest.raises(ValueError, match="scaling 1.5, and rank 2, scaling 2.12.*DoRA"):
        other = small_state(Mlp(), dora=True, rank_stabilized=True)
        lora.load_peft(tmp_path, other)
    with pytest.raises(TypeError, match="Expected a LoraTrainState or layouts"):
        lora.load_peft(tmp_path, None)
    with pytest.raises(TypeError, match="mapping of paths to AdapterLayouts.*a dict"):
        lora.load_peft(tmp_path, state.params)
    with pytest.raises(TypeError, match=r"lora.load_peft\(directory, state\)"):
        lora.load_peft(state, tmp_path)


@pytest.mark.parametrize(
    "entry, message",
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3', not 'LORA'"),
        ({"lora_bias": True}, "lora_bias=True is not supported"),
        ({"bias": "all"}, "bias='all' is not supported"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base"),
    ],
)
def test_a_config_that_means_something_else_is_refused(tmp_path, entry, message):
    state = small_state(Mlp())
    lora.save_peft(tmp_path, state, config=entry)
    with pytest.raises(ValueError, match=message):
        lora.load_peft(tmp_path, state)
