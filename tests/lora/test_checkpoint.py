"""Adapters saved without their base, and restored."""

import json
import re

import jax
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax import numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import qwix_train
from qwix_train import lora, ptq
from tests import models
from tests.models import Mlp, assert_same

X = jnp.ones((2, 6))
# One of the rules of a manifest is not for adapters, and matches nothing here.
pytestmark = pytest.mark.filterwarnings("ignore:Rule . .*matches no op")
RULES = [
    qwix_train.QuantizationRule(module_path="none"),
    lora.LoraRule(
        rank=2,
        alpha=3.0,
        dora=True,
        op_names=("dot_general", "einsum1"),
        weight_qtype=jnp.int4,
        tile_size=2,
        rank_stabilized=True,
        lora_b_initializer=nn.initializers.ones,
    ),
]


def state_of(rules=RULES, model=None, seed=0):
    model = model or Mlp()
    params = jax.jit(model.init)(jax.random.key(0), X)["params"]
    return models.lora_state(
        model.apply, params, optax.adam(0.1), rules, jax.random.key(seed), X
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("lora") / "adapters"
    state = state_of()
    lora.save(path, state, metadata={"step": 3})
    return path, state


@pytest.mark.slow
def test_what_is_restored_is_what_was_saved(saved):
    path, state = saved
    other = state_of(seed=1)
    assert not np.array_equal(*map(first, (other, state)))
    restored = lora.restore(path, other)
    assert_same(restored.params, state.params)
    assert_same(restored.opt_state, other.opt_state)
    assert restored.frozen is other.frozen
    assert_same(lora.restore(path, state.layouts), state.params)
    assert_same(lora.restore(path), state.params)
    y = restored.apply_fn({"params": restored.params}, X)
    np.testing.assert_array_equal(y, state.apply_fn({"params": state.params}, X))
    assert_same(ptq.restore(path), state.params)


def first(state):
    return state.params["Dense_0"]["kernel_lora_a"]


def test_the_manifest_says_what_they_are(saved):
    path, state = saved
    manifest = lora.read_manifest(path)
    assert manifest.layouts == state.layouts
    assert manifest.metadata == {"step": 3}
    assert manifest.versions["jax"] == jax.__version__
    rules = manifest.rules
    assert rules[0] == RULES[0] and type(rules[1]) is lora.LoraRule
    assert rules[1].lora_b_initializer is nn.initializers.zeros
    for field in ("rank", "alpha", "dora", "op_names", "rank_stabilized", "tile_size"):
        assert getattr(rules[1], field) == getattr(RULES[1], field)
    assert rules[1].weight_qtype == RULES[1].weight_qtype


def test_onto_a_mesh(saved):
    path, state = saved
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    whole = NamedSharding(mesh, PartitionSpec())
    by_row = NamedSharding(mesh, PartitionSpec("a", None))
    shardings = {"Dense_0": {"kernel_lora_a": by_row}, "Dense_1": whole}
    restored = lora.restore(path, state.layouts, shardings=shardings)
    rows = restored["Dense_0"]["kernel_lora_a"]
    assert rows.sharding.is_equivalent_to(by_row, 2)
    assert restored["Dense_1"]["kernel_lora_b"].sharding.is_equivalent_to(whole, 2)
    assert_same(restored, state.params)
    placed = state.replace(params=jax.device_put(state.params, whole))
    restored = lora.restore(path, placed)
    arrays = jax.tree.leaves(restored.params)
    assert all(x.sharding.is_equivalent_to(whole, x.ndim) for x in arrays)
    with pytest.raises(ValueError, match="'Dense_0/kernel_lora_a' of shape .6, 2."):
        bad = NamedSharding(mesh, PartitionSpec("b"))
        lora.restore(path, state.layouts, shardings=bad)


@pytest.mark.parametrize(
    "rule, message",
    [
        (
            dict(rank=3, alpha=3.0),
            r"Dense_0/kernel: rank 2 and 3 in the model, scaling 2.12.* and 1.0 .*"
            r"dora True and False .*a_shape \(6, 2\) and \(6, 3\).*"
            r"read_manifest\(path\).rules",
        ),
        (dict(rank=2, alpha=3.0, dora=True), "scaling 2.12.* and 1.5 in the model"),
        (
            dict(rank=2, alpha=3.0, module_path="Dense_1"),
            "another model, .*Without adapter in the model: Dense_0/kernel",
        ),
    ],
)
def test_adapters_of_another_kind_are_refused(saved, rule, message):
    with pytest.raises(ValueError, match=message):
        lora.restore(saved[0], state_of([lora.LoraRule(**rule)]))


@pytest.mark.slow
def test_adapters_of_another_model_are_refused(saved):
    with pytest.raises(
        ValueError, match=r"shapes: Dense_0/kernel \(6, 16\), and \(6, 8"
    ):
        lora.restore(saved[0], state_of(model=Mlp(width=8)))


def test_damage_is_noticed(saved, tmp_path):
    _, state = saved
    lora.save(tmp_path / "a", state)
    (file,) = (tmp_path / "a" / "manifest").glob("metadata*")
    text = file.read_text()
    file.write_text(re.sub(r'"alpha": 3.0', '"alpha": 4.0', text, count=1))
    with pytest.raises(ValueError, match="it was changed"):
        lora.restore(tmp_path / "a", state)
    file.write_text(text[:-10])
    with pytest.raises(ValueError, match="manifest"):
        lora.restore(tmp_path / "a", state)
    with pytest.raises(FileNotFoundError):
        lora.restore(tmp_path / "b", state)
    ptq.save(tmp_path / "base", state.frozen)
    with pytest.raises(ValueError, match="no adapters that lora.save wrote"):
        lora.restore(tmp_path / "base", state)


def test_another_version_of_the_format_is_refused(saved):
    record = json.loads(json.dumps(lora.read_manifest(saved[0]).to_json()))
    assert lora.AdapterManifest.from_json(record, {}).layouts == saved[1].layouts
    with pytest.raises(ValueError, match="format version 2.*reads version 1"):
        lora.AdapterManifest.from_json({**record, "version": 2}, {})
    with pytest.raises(ValueError, match="not one of adapters"):
        lora.AdapterManifest.from_json(None, {})


def test_a_path_is_not_overwritten_unless_asked(saved):
    path, state = saved
    with pytest.raises(FileExistsError, match="overwrite=True"):
        lora.save(path, state)
    lora.save(
        path,
        state.params,
        state.layouts,
        rules=RULES,
        metadata={"step": 3},
        overwrite=True,
    )
    assert_same(lora.restore(path, state).params, state.params)


def test_bad_calls(tmp_path, saved):
    _, state = saved
    with pytest.raises(TypeError, match=r"lora.save\(adapters, layouts\)"):
        lora.save(tmp_path / "a", state.params)
    with pytest.raises(ValueError, match="Missing: Dense_1/kernel_lora_a"):
        lora.save(tmp_path / "a", {"Dense_0": state.params["Dense_0"]}, state.layouts)
    with pytest.raises(TypeError, match="Expected a LoraTrainState or layouts"):
        lora.restore(saved[0], 3)
    with pytest.raises(TypeError, match="mapping of paths to AdapterLayouts.*a dict"):
        lora.restore(saved[0], state.params)
    with pytest.raises(TypeError, match=r"got a LoraTrainState: lora.restore\(path, s"):
        lora.restore(state, saved[0])
    with pytest.raises(TypeError, match=r"got a LoraTrainState: lora.save\(path, sta"):
        lora.save(state, tmp_path / "a")
