"""Every form against float64, whatever the table of measurements says."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwix_train.core import cpu_dots
from qwix_train.core.qarray import dequantize, quantize
from tests.pairwise import pairwise

pytestmark = pytest.mark.optimized

FORMS = ["rows", "blocks", "whole"]
LAYOUTS = {
    "columns last": ((64, 48), ((1,), (0,)), "mk,kn->mn"),
    "columns first": ((48, 64), ((1,), (1,)), "mk,nk->mn"),
    "contraction between": ((3, 64, 10), ((1,), (1,)), "mk,hkd->mhd"),
    "two axes": ((4, 32, 6), ((1, 2), (0, 1)), "mhd,hdn->mn"),
    "two axes in another order": ((4, 32, 6), ((2, 1), (0, 1)), "mdh,hdn->mn"),
    "odd columns": ((40, 7), ((1,), (0,)), "mk,kn->mn"),
    "prime contraction": ((37, 8), ((1,), (0,)), "mk,kn->mn"),
    "a vector": ((64,), ((1,), (0,)), "mk,k->m"),
}


def operands(layout, qtype, tile, method, rows=2):
    shape, contracting, subscripts = LAYOUTS[layout]
    rng = np.random.default_rng(0)
    tiled = {contracting[1][-1]: tile} if tile else {}
    kept = [a for a in range(len(shape)) if a not in contracting[1]]
    options = {"channelwise_axes": kept, "tiled_axes": tiled}
    weight = jax.jit(
        lambda w: quantize(w, qtype, calibration_method=method, **options)
    )(np.float32(rng.normal(0.2, 1, shape)))
    x_shape = [rows] + [0] * len(contracting[0])
    for a, b in zip(*contracting, strict=True):
        x_shape[a] = shape[b]
    x = jax.device_put(rng.normal(size=x_shape).astype(np.float32))
    return x, weight, contracting, subscripts


def run(x, weight, contracting, form, **kwargs):
    operand = cpu_dots.Operand(
        weight.qvalue, weight.scale, weight.zero_point, weight.qtype
    )
    return cpu_dots.weight_dot(
        x, operand, contracting, jnp.dtype(jnp.float32), None, form=form, **kwargs
    )


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    # So that small arrays take several blocks.
    monkeypatch.setattr(cpu_dots, "_BLOCK_ROWS", (16, 32))
    monkeypatch.setattr(cpu_dots, "_BLOCK_SIZE", 512)


TYPES = [
    ("int8", None, "absmax"),
    ("int4", None, "minmax"),
    ("int4", 16, "minmax"),
    ("nf4", 8, "absmax"),
]


def divides(layout, case, form):
    """Tiles must divide the last contracted axis."""
    shape, contracting, _ = LAYOUTS[layout]
    return shape[contracting[1][-1]] % (case[1] or 1) == 0


@pytest.mark.thinned(33)
@pytest.mark.parametrize(
    ("layout", "case", "form"),
    pairwise(LAYOUTS, TYPES, FORMS, allowed=divides),
    ids=str,
)
def test_weights(layout, case, form):
    x, weight, contracting, subscripts = operands(layout, *case)
    got = jax.jit(lambda x, w: run(x, w, contracting, form))(x, weight)
    want = np.einsum(subscripts, np.float64(x), np.float64(jax.jit(dequantize)(weight)))
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * np.abs(want).max())


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["columns last", "columns first"])
def test_the_form_for_the_way_back(layout):
    x, weight, contracting, subscripts = operands(layout, "int4", 16, "absmax")

    def fn(x):
        return run(x, weight, contracting, None, transposable=True)

    out, back = jax.vjp(fn, x)
    wide = np.float64(dequantize(weight))
    np.testing.assert_allclose(out, np.einsum(subscripts, x, wide), rtol=1e-4)
    inputs, result = subscripts.split("->")
    subscripts = f"{result},{inputs.split(',')[1]}->{inputs.split(',')[0]}"
    want = np.einsum(subscripts, np.float64(out), wide)
    (got,) = back(out)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * np.abs(want).max())


def test_what_fits_no_form():
    x, weight, _, _ = operands("two axes", "int8", None, "absmax")
    apart = ((1, 2), (0, 2))
    assert run(x[:, :, :6], weight, apart, None) is None
    assert run(x[:0], weight, ((1, 2), (0, 1)), None) is None


@pytest.mark.slow
@hypothesis.settings(max_examples=12)
@hypothesis.given(
    rows=st.integers(1, 3),
    depth=st.sampled_from([8, 31, 1024, 3000, 4096, 20_000]),
    narrow=st.booleans(),
    transposed=st.booleans(),
    form=st.sampled_from(["rows", "blocks"]),
    extreme=st.booleans(),
)
def test_integers_are_exact(rows, depth, narrow, transposed, form, extreme):
    rng = np.random.default_rng(rows * depth)
    dtype, low = (jnp.int4, -8) if narrow else (jnp.int8, -128)
    left = rng.integers(-128, 128, (rows, depth))
    right = rng.integers(low, -low, (depth, 4))
    if extreme:
        left, right = np.full_like(left, -128), np.full_like(right, low)
    contracting = ((1,), (1,) if transposed else (0,))
    codes = jnp.asarray(right.T if transposed else right, jnp.int8).astype(dtype)
    acts = jnp.asarray(left, jnp.int8)
    got = cpu_dots.integer_dot(acts, codes, contracting, form=form)
    swapped = cpu_dots.integer_dot(codes, acts, contracting[::-1], form=form)
    for out, want in ((got, left @ right), (swapped, (left @ right).T)):
        if out is not None:
            assert out.dtype == jnp.int32
            np.testing.assert_array_equal(out, want)
    assert depth == 20_000 or got is not None


def test_the_choice_of_a_form():
    assert cpu_dots.choose_form(1, 4096**2, "int8") == "rows"
    assert cpu_dots.choose_form(16, 4096**2, "nf4") == "blocks"
    assert cpu_dots.choose_form(16, 256**2, "int4") == "whole"
    assert cpu_dots.choose_integer_form(1, 4096**2) == "rows"
    assert cpu_dots.choose_integer_form(16, 4096**2) == "blocks"
    assert cpu_dots.choose_integer_form(256, 4096**2) == "integer"
