"""Published recipes of quantized training against the equations of their papers.

Each reference quantizes the operands of the three products in NumPy float64, as the
paper says, and multiplies them.
"""

import dataclasses

import jax
import ml_dtypes
import numpy as np
import pytest
import scipy.linalg
from flax import linen as nn
from jax import numpy as jnp
from jax.sharding import AxisType

from qwix_train import QtProvider, QtRule, quantize_fn, quantize_model
from qwix_train.core.hadamard import Hadamard
from tests import models
from tests.core import formats_reference
from tests.spellings import data

E4M3, E5M2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2
FP8 = dict(weight_qtype="float8_e4m3fn", act_qtype="float8_e4m3fn")
TENSORWISE = QtRule(**FP8, bwd_qtype="float8_e5m2", disable_channelwise_axes=True)
ROWWISE = QtRule(**FP8, bwd_qtype="float8_e5m2", bwd_residuals="original")
DEEPSEEK = QtRule(
    **FP8,
    bwd_qtype="float8_e4m3fn",
    tile_size={0: 128, 1: 128},
    act_tile_size=128,
    bwd_tile_size=128,
    bwd_residuals="requantized",
)
MXFP8 = QtRule(
    weight_qtype="mxfp8",
    act_qtype="mxfp8",
    bwd_qtype="mxfp8",
    bwd_residuals="original",
)


def tiled(function, x, tile):
    """What a function makes of each tile of a matrix; None for a whole axis."""
    out = np.empty(x.shape)
    rows, columns = (t or n for t, n in zip(tile, x.shape, strict=True))
    for i in range(0, x.shape[0], rows):
        for j in range(0, x.shape[1], columns):
            part = np.s_[i : i + rows, j : j + columns]
            out[part] = function(np.asarray(x[part], np.float64))
    return out


def fp8(x, tile, dtype=E4M3):
    """Values whose largest magnitude in a tile becomes the largest of a type."""

    def one(x):
        scale = np.abs(x).max() / float(ml_dtypes.finfo(dtype).max)
        return formats_reference.rounded(x / scale, dtype) * scale

    return tiled(one, x, tile)


def mxfp8(x, tile):
    return tiled(lambda x: formats_reference.microscaling(x, "mxfp8")[0], x, tile)


def products(x, w, g):
    """The three products, from the operands of each."""
    return x[0] @ w[0], g[0] @ w[1].T, x[1].T @ g[1]


def tensorwise(x, w, g):
    whole = (None, None)
    x, w, g = fp8(x, whole), fp8(w, whole), fp8(g, whole, E5M2)
    return products((x, x), (w, w), (g, g))


def rowwise(x, w, g):
    """A scale for each row and column of what each product multiplies."""
    rows, columns = (1, None), (None, 1)
    return products(
        (fp8(x, rows), fp8(x, columns)),
        (fp8(w, columns), fp8(w, rows)),
        (fp8(g, rows, E5M2), fp8(g, columns, E5M2)),
    )


def deepseek(x, w, g):
    """arXiv 2412.19437, sections 3.3.1 and 3.3.2, and 3.5.2 for the way of x."""
    block, rows, columns = (128, 128), (1, 128), (128, 1)
    x, w = fp8(x, rows), fp8(w, block)
    return products((x, fp8(x, columns)), (w, w), (fp8(g, rows), fp8(g, columns)))


def microscaling(x, w, g):
    """arXiv 2506.08027, section 2: along what is contracted, from the originals."""
    rows, columns = (1, 32), (32, 1)
    return products(
        (mxfp8(x, rows), mxfp8(x, columns)),
        (mxfp8(w, columns), mxfp8(w, rows)),
        (mxfp8(g, rows), mxfp8(g, columns)),
    )


RECIPES = {
    "tensorwise": (TENSORWISE, tensorwise),
    "rowwise": (ROWWISE, rowwise),
    "deepseek": (DEEPSEEK, deepseek),
    "mxfp8": (MXFP8, microscaling),
}


def computed(rule, x, w, g, function=lambda w, x: x @ w):
    """The result of a product and its gradients, of the input first."""

    @jax.jit
    def run(x, w, g):
        quantized = quantize_fn(function, QtProvider([rule]))
        out, pull = jax.vjp(quantized, w, x)
        dw, dx = pull(g)
        return out, dx, dw

    return run(x, w, g)


def operands(tokens=256, inputs=128, outputs=256):
    """Matrices whose rows and columns differ in size, as those of networks do."""
    x, w, g = data(tokens, inputs), data(inputs, outputs, seed=1), data(tokens, outputs)
    rows = np.exp(data(tokens, 1, seed=3))
    return x * rows, 0.02 * w * np.exp(data(1, outputs, seed=4)), 1e-4 * g / rows


def assert_products(found, wanted):
    for got, want in zip(found, wanted, strict=True):
        got = np.asarray(got, np.float64)
        assert np.abs(got - want).max() < 2e-5 * np.abs(want).max()


@pytest.mark.parametrize("name", RECIPES)
def test_the_three_products_are_those_of_the_paper(name):
    rule, reference = RECIPES[name]
    arrays = operands()
    assert_products(computed(rule, *arrays), reference(*arrays))


@pytest.mark.thinned(2)
@pytest.mark.parametrize("name", ["rowwise", "deepseek"])
def test_a_weight_that_the_model_changes_on_the_way(name):
    """It is cut from a larger param, transposed and cast."""
    rule, reference = RECIPES[name]
    x, w, g = operands(128, 256, 128)

    def function(w, x):
        return x @ w[1].T.astype(jnp.float32)

    stored = np.stack([w, 2 * w]).transpose(0, 2, 1)
    out, dx, dw = computed(rule, x, stored, g, function)
    wanted = reference(x, 2 * w, g)
    assert_products((out, dx, dw[1].T), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("rule", [ROWWISE, MXFP8, TENSORWISE], ids=str)
def test_layers_under_scan_compute_what_they_do_one_by_one(rule, remat):
    rule = dataclasses.replace(rule, pad_tiles=True)
    layers, x = models.Layers(remat=remat), models.normal(6, 6)
    params = models.params_of(layers, x)

    def unrolled(stacked, x):
        for kernel in stacked:
            x = jnp.tanh(3 * (x @ kernel))
        return x

    def gradients(function, params):
        def loss(params, x):
            return (function(params, x) ** 2).sum()

        return jax.jit(jax.value_and_grad(loss, (0, 1)))(params, x)

    scanned = quantize_model(layers, QtProvider([rule]))
    found = gradients(lambda p, x: scanned.apply({"params": p}, x), params)
    kernels = list(params["layers"]["Dense_0"]["kernel"])
    wanted = gradients(quantize_fn(unrolled, QtProvider([rule])), kernels)
    models.assert_close(found[0], wanted[0])
    models.assert_close(found[1][1], wanted[1][1], 1e-4)
    got = found[1][0]["layers"]["Dense_0"]["kernel"]
    models.assert_close(got, np.stack(wanted[1][0]), 1e-4)


NVFP4 = QtRule(
    weight_qtype="nvfp4",
    act_qtype="nvfp4",
    bwd_qtype="nvfp4",
    tile_size={0: 16, 1: 16},
    bwd_residuals="original",
    bwd_weight_grad_rotation="hadamard,16,7",
    bwd_stochastic_rounding="uniform",
    channelwise_noise_axes=(0, 1),
)


def nvfp4(x, tile):
    """arXiv 2509.25149, appendix C: two levels of scales."""
    tensor = np.float32(np.abs(x).max() / (6 * 448))

    def one(x):
        ratio = np.clip(
            np.float32(np.abs(x).max()) / np.float32(6) / tensor, 2**-9, 448
        )
        code = np.clip(ratio, 2**-9, 448).astype(E4M3)
        scale = np.float64(np.float32(code) * tensor)
        return formats_reference.rounded(x / scale, ml_dtypes.float4_e2m1fn) * scale

    return tiled(one, x, tile)


def hadamard(x):
    """Blocks of 16 rows times signs and a Hadamard matrix (the paper's appendix C)."""
    matrix = scipy.linalg.hadamard(16) / 4
    # Of a block of ones in the other basis, its first vector is left: the signs.
    first = jnp.zeros(len(x)).at[::16].set(1.0)
    signs = np.sign(Hadamard(axis=0, block=16, seed=7).undo(first))
    blocks = (signs[:, None] * x).reshape(-1, 16, x.shape[1])
    return np.einsum("ij,bjk->bik", matrix, blocks).reshape(x.shape)


def test_nvfp4_multiplies_what_the_paper_does():
    """But for the noise: to nearest, one product after the other."""
    nearest = dataclasses.replace(NVFP4, bwd_stochastic_rounding=None)
    x, w, g = operands()
    rows, columns, block = (1, 16), (16, 1), (16, 16)
    both = nvfp4(w, block)
    wanted = products(
        (nvfp4(x, rows), nvfp4(hadamard(x), columns)),
        (both, both),
        (nvfp4(g, rows), nvfp4(hadamard(g), columns)),
    )
    assert_products(computed(nearest, x, w, g), wanted)


def test_gradients_of_nvfp4_are_unbiased():
    """The mean over keys is what the gradient in float gives next to the operands.

    Blocks whose E4M3 scale was rounded down would be cut off, which is a bias.
    """
    x, w, g = operands(32, 48, 32)
    draws = 1000

    class Product(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x @ self.param("w", nn.initializers.zeros, w.shape)

    quantized = quantize_model(Product(), QtProvider([NVFP4]))

    @jax.jit
    @jax.vmap
    def draw(key):
        def out(params, x):
            rngs = {"stochastic_rounding": key}
            return quantized.apply({"params": params}, x, rngs=rngs)

        return jax.vjp(out, {"w": w}, x)[1](g)

    both = nvfp4(w, (16, 16))
    dw, dx = draw(jax.random.split(jax.random.key(0), draws))
    turned = nvfp4(hadamard(x), (16, 1))
    for drawn, want in ((dx, g @ both.T), (dw["w"], turned.T @ hadamard(g))):
        drawn = np.asarray(drawn, np.float64)
        error = drawn.std(0) / np.sqrt(draws)
        assert np.all(np.abs(drawn.mean(0) - want) < 5 * error + 1e-6 * abs(want).max())
        assert np.median(drawn.std(0)) > 0.01 * np.abs(want).std()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "out"),
    [(("model", None), jax.P("data", None)), ((None, "model"), None)],
    ids=["rows", "columns"],
)
@pytest.mark.parametrize("name", [*RECIPES, "nvfp4"])
def test_explicit_meshes(name, names, out):
    """Gradients have the sharding of what they are for, and one device's numbers."""
    rule = NVFP4 if name == "nvfp4" else RECIPES[name][0]
    mesh = jax.make_mesh((2, 4), ("data", "model"), (AxisType.Explicit,) * 2)
    x, w, g = (np.asarray(a, np.float32) for a in operands(256, 512, 512))
    sharding = None

    def function(w, x):
        return jnp.einsum("bi,io->bo", x, w, out_sharding=sharding)

    wanted = computed(rule, x, w, g, function)
    with jax.set_mesh(mesh):
        sharding = out
        w = jax.device_put(w, jax.P(*names))
        x = jax.device_put(x, jax.P("data", names[0]))
        g = jax.device_put(g, jax.P("data", names[1]))
        found = computed(rule, x, w, g, function)
        assert found[1].sharding == x.sharding
        assert found[2].sharding == w.sharding
        for got, want in zip(found, wanted, strict=True):
            models.assert_close(got, want, 2e-5 * float(np.abs(want).max()))
