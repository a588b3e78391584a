"""One param that a model reads in two places."""

import jax
import numpy as np
import pytest
from flax import nnx
from jax import numpy as jnp

import qwix_train
from qwix_train import QtProvider, ptq
from qwix_train.ptq import trees
from tests import models

X = np.linspace(-1, 1, 16, dtype=np.float32).reshape(2, 8)


@pytest.mark.slow
@pytest.mark.parametrize("tile_size", [8, 4, 0.5])
def test_a_pair_of_products_along_both_axes(tile_size):
    def tied(params, x):
        return (x @ params["w"]) @ params["w"].T

    rules = [models.rule("int8", "int8", tile_size=tile_size)]
    params = {"w": np.sin(np.arange(128, dtype=np.float32)).reshape(8, 16)}
    model, quantized = ptq.quantize(tied, params, rules, X)
    qat = qwix_train.quantize_fn(tied, QtProvider(rules))(params, X)
    models.assert_close(model(quantized, X), qat)


class Tied(nnx.Module):
    """A table that is an attribute of two modules, and a kernel of one."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(8, 8, rngs=rngs)
        self.head = nnx.Linear(8, 8, rngs=rngs)
        self.table = self.embed.embedding

    def __call__(self, x):
        return self.head(x @ self.table) @ self.embed.embedding.T


@pytest.mark.slow
def test_a_param_of_an_nnx_model_is_saved_once(tmp_path):
    model, params = ptq.quantize(Tied(), None, models.INT8, X)
    assert set(params) == {"embed", "head"}
    ptq.save(tmp_path / "tied", model)
    for restored in (
        ptq.restore(tmp_path / "tied", model),
        ptq.restore(tmp_path / "tied", nnx.merge(*nnx.split(model))),
    ):
        models.assert_same(restored(X), model(X))
        table, embedding = restored.table.array, restored.embed.embedding.array
        assert table.qvalue is embedding.qvalue and table.scale is embedding.scale


def test_a_param_of_an_nnx_model_stays_one_after_a_merge():
    model, _ = ptq.quantize(Tied(), None, models.INT8, X)
    merged = nnx.merge(*nnx.split(model))
    tree = ptq.quantize_params(nnx.to_pure_dict(nnx.state(Tied(), nnx.Param)), merged)
    nnx.update(merged, jax.tree.map(jnp.zeros_like, tree))
    assert set(tree) == {"embed", "head"}
    assert not merged.table.array.qvalue[...].any()
    assert not merged.embed.embedding.array.qvalue[...].any()


def test_a_float_param_of_an_nnx_model_is_listed_once():
    assert set(trees.to_tree(Tied())) == {"embed", "head"}
