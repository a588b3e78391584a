"""The same outputs and gradients as `qwix` 0.1.8, to float rounding."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

import qwix_train
from tests import reference_process
from tests.compare import assert_close
from tests.qat import parity

# A last bit decides what a gradient rounds to: both compile as users do.
pytestmark = pytest.mark.optimized
BY_DEFAULT = ("int8", "int4 tiles", "attention", "bwd int8", "nnx int8")


@pytest.fixture(scope="module")
def reference(request, tmp_path_factory):
    """What `qwix` computes, in a process that its patches cannot leave."""
    path = tmp_path_factory.mktemp("qwix") / "reference.npz"
    names = reference_process.selected(request)
    reference_process.run("tests.qat.parity", path, *names)
    with np.load(path) as results:
        return dict(results)


@pytest.mark.parametrize("name", reference_process.cases(parity.CASES, BY_DEFAULT))
def test_outputs_and_gradients(reference, name):
    ours = parity.run(qwix_train, parity.CASES[name])
    theirs = {
        key.split("|")[1]: value
        for key, value in reference.items()
        if key.split("|")[0] == name
    }
    assert ours.keys() == theirs.keys()
    tolerance = 2e-2 if name == "bfloat16" else 1e-5
    for key, value in ours.items():
        # With tiles, `qwix` takes the gradient at the unquantized operands. Ours is
        # that of the forward pass: see the next test.
        if "tiles" in name and "grads" in key:
            continue
        scale = np.abs(theirs[key]).max()
        np.testing.assert_allclose(
            value, theirs[key], tolerance, tolerance * scale, err_msg=key
        )


def in_tiles(x, bits, axis, size=4):
    """Fake quantization of `parity.CASES`, with a scale for each tile of an axis."""
    x = jnp.moveaxis(x, axis, -1)
    tiles = x.reshape(*x.shape[:-1], -1, size)
    bound = 2 ** (bits - 1) - 0.5
    scale = 1.1 * jnp.abs(tiles).max(-1, keepdims=True) / bound
    rounded = jnp.round(tiles / scale) * scale
    tiles = tiles + jax.lax.stop_gradient(rounded - tiles)
    return jnp.moveaxis(tiles.reshape(x.shape), -1, axis)


@pytest.mark.parametrize("name", ["int4 tiles", "int8 tiles"])
def test_gradients_with_tiles_are_those_of_the_forward(name):
    case = parity.CASES[name]
    bits = 4 if "int4" in name else 8
    x = jax.random.normal(jax.random.key(5), case.shape)
    params = jax.jit(case.model.init)(jax.random.key(0), x)["params"]

    def layer(params, x):
        if "act_qtype" in case.rule:
            x = in_tiles(x, 8, 1)
        return x @ in_tiles(params["kernel"], bits, 0) + params["bias"]

    @jax.jit
    def loss(params, x):
        # The last layer is made first.
        hidden = jnp.tanh(layer(params["Dense_1"], x))
        return (layer(params["Dense_0"], hidden) ** 2).mean()

    want = jax.grad(loss, (0, 1))(params, x)
    ours = parity.run(qwix_train, case)
    for path, leaf in jax.tree_util.tree_leaves_with_path({"grads": want}):
        assert_close(ours[jax.tree_util.keystr(path)], leaf)
