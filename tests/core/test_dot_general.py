import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwix_train.core.dot_general import MIN_TILE_SIZE, dot, dot_general
from qwix_train.core.qarray import QArray, dequantize, quantize
from tests.core.reference import QTYPE_NAMES

NUMBERS = (((2,), (1,)), ((0,), (0,)))
LHS, RHS = (2, 3, 256), (2, 256, 4)


def operand(shape, side, qtype, method="absmax", tile=None, numbers=NUMBERS):
    rng = np.random.default_rng(len(shape) + (side == "rhs"))
    x = jax.device_put(rng.normal(0.3, 1, shape).astype(np.float32))
    if qtype is None:
        return x
    contracted = numbers[0][side == "rhs"]
    kept = tuple(axis for axis in range(len(shape)) if axis not in contracted)
    tiled = tile if isinstance(tile, dict) else {max(contracted): tile} if tile else {}
    return quantize(
        x,
        qtype,
        channelwise_axes=kept,
        tiled_axes=tiled,
        calibration_method=method,
    )


def exact(x):
    return np.asarray(dequantize(x) if isinstance(x, QArray) else x, np.float64)


def check(got, lhs, rhs, rtol=2e-6):
    want = np.matmul(exact(lhs), exact(rhs))
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=0, atol=rtol * np.abs(want).max())


def primitives(fn, *args):
    """Returns (input dtypes, output dtype) of every dot in a function."""
    dots = []

    def visit(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "dot_general":
                dots.append(
                    (
                        *(str(v.aval.dtype) for v in eqn.invars),
                        str(eqn.outvars[0].aval.dtype),
                    )
                )
            for inner in jax.extend.core.jaxprs_in_params(eqn.params):
                visit(inner)

    visit(jax.make_jaxpr(fn)(*args).jaxpr)
    return dots


# int8 against all, each with itself, and some of two kinds.
PAIRS = [
    (a, b)
    for a, b in itertools.product(QTYPE_NAMES, repeat=2)
    if "int8" in (a, b)
    or a == b
    or {a, b} in ({"int3", "int2"}, {"int4", "nf4"})
    or {a, b} == {"float8_e4m3fn", "float8_e5m2"}
]


@pytest.mark.thinned(18)
@pytest.mark.parametrize("lhs_type, rhs_type", PAIRS)
def test_every_pair_of_types_compiled(lhs_type, rhs_type):
    lhs, rhs = operand(LHS, "lhs", lhs_type), operand(RHS, "rhs", rhs_type)
    check(jax.jit(lambda a, b: dot_general(a, b, NUMBERS))(lhs, rhs), lhs, rhs)


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    "lhs_type, rhs_type",
    [("int4", "int4"), ("int3", "int2"), ("int4", "int8"), ("int1", "int8")]
    + [("float8_e4m3fn", "float8_e5m2"), ("float8_e5m2", "int8"), ("nf4", "int4")]
    + [(None, "int4"), ("int8", None)],
)
def test_mixed_types_eager(lhs_type, rhs_type):
    lhs, rhs = operand(LHS, "lhs", lhs_type), operand(RHS, "rhs", rhs_type)
    check(dot_general(lhs, rhs, NUMBERS), lhs, rhs)


@pytest.mark.thinned(9)
@pytest.mark.parametrize("tiles", [(None, None), (128, None), (128, 128), (None, 128)])
@pytest.mark.parametrize(
    "methods", list(itertools.product(["absmax", "minmax"], repeat=2)), ids=str
)
def test_zero_points_and_tiles_on_either_side(methods, tiles):
    lhs = operand(LHS, "lhs", "int8", methods[0], tiles[0])
    rhs = operand(RHS, "rhs", "int4", methods[1], tiles[1])
    fn = jax.jit(lambda a, b: dot_general(a, b, NUMBERS))
    check(fn(lhs, rhs), lhs, rhs)
    assert primitives(fn, lhs, rhs) == [("int8", "int8", "int32")]


@pytest.mark.thinned(2)
@pytest.mark.parametrize("tile", [32, 1])
def test_small_tiles_are_dequantized(tile):
    assert tile < MIN_TILE_SIZE
    lhs, rhs = operand(LHS, "lhs", "int8", tile=tile), operand(RHS, "rhs", "int8")
    check(dot_general(lhs, rhs, NUMBERS), lhs, rhs)


def test_padded_tiles():
    from qwix_train.core.how import HowToQuantize
    from qwix_train.core.qarray import quantize_array

    how = HowToQuantize(qtype="int4", tiled_axes={1: 100}, pad_tiles=True)
    rhs = quantize_array(operand(RHS, "rhs", None), how)
    lhs = operand(LHS, "lhs", "int8")
    assert rhs.scale.shape == (1, 3, 1)
    check(dot_general(lhs, rhs, NUMBERS), lhs, rhs)


@pytest.mark.slow
@pytest.mark.parametrize("tile", [512, 1])
def test_tiles_that_differ(tile):
    numbers = (((1,), (0,)), ((), ()))
    lhs = operand((4, 1024), "lhs", "int8", tile=256, numbers=numbers)
    rhs = operand((1024, 4), "rhs", "int8", tile=tile, numbers=numbers)
    check(dot_general(lhs, rhs, numbers), lhs, rhs)


@pytest.mark.slow
def test_several_contracted_axes_and_any_order():
    numbers = (((3, 1), (0, 2)), ((0,), (3,)))
    lhs = operand((2, 5, 3, 128), "lhs", "int8", "minmax", numbers=numbers)
    rhs = operand((128, 6, 5, 2), "rhs", "int4", "minmax", {0: 128}, numbers=numbers)
    got = dot_general(lhs, rhs, numbers)
    want = np.einsum("bkim,mjkb->bij", exact(lhs), exact(rhs))
    np.testing.assert_allclose(got, want, atol=2e-6 * np.abs(want).max())


@pytest.mark.thinned(2)
@pytest.mark.parametrize("method", ["fixed,1", "fixed,-1,1e-9", "fixed,-1e-9,1"])
def test_an_int32_sum_that_would_overflow(method):
    # Every product is the largest there is, so that the sum is beyond 2**31.
    size = 140_000
    sign = 1.0 if method == "fixed,-1e-9,1" else -1.0
    lhs = quantize(jnp.full((2, size), sign), "int8", calibration_method=method)
    rhs = quantize(jnp.full((size, 3), sign), "int8", calibration_method=method)
    zero = 0 if lhs.zero_point is None else int(lhs.zero_point[0, 0])
    total = size * (int(lhs.qvalue[0, 0]) - zero) ** 2
    assert total > 2**31 or method == "fixed,-1e-9,1" or abs(zero) in (127, 0)
    fn = jax.jit(dot)
    check(fn(lhs, rhs), lhs, rhs)
    outs = {(a, out) for a, _, out in primitives(fn, lhs, rhs)}
    assert outs == {("int8", "int32")} and len(primitives(fn, lhs, rhs)) > 1


@pytest.mark.slow
def test_an_overflow_over_several_axes():
    numbers = (((1, 2), (0, 1)), ((), ()))
    lhs = quantize(jnp.full((1, 400, 400), -1.0), "int8", calibration_method="fixed,1")
    rhs = quantize(jnp.full((400, 400, 1), -1.0), "int8", calibration_method="fixed,1")
    got = dot_general(lhs, rhs, numbers)
    np.testing.assert_allclose(got, [[160_000.0]], rtol=1e-2)


def test_result_dtypes():
    lhs, rhs = operand(LHS, "lhs", "int8"), operand(RHS, "rhs", "int8")
    half = rhs.astype(jnp.bfloat16)
    assert dot_general(lhs, rhs, NUMBERS).dtype == jnp.float32
    assert dot_general(lhs, half, NUMBERS).dtype == jnp.float32
    both = dot_general(lhs.astype(jnp.bfloat16), half, NUMBERS)
    assert both.dtype == jnp.bfloat16
    wide = dot_general(lhs, half, NUMBERS, preferred_element_type=jnp.bfloat16)
    assert wide.dtype == jnp.bfloat16
    raw = lhs.qvalue
    assert dot_general(raw, rhs, NUMBERS).dtype == jnp.float32
    np.testing.assert_allclose(
        dot_general(raw, rhs, NUMBERS),
        np.matmul(np.float64(raw), exact(rhs)),
        rtol=1e-5,
    )
    assert dot_general(raw, raw.mT, NUMBERS).dtype == jnp.int8


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    "shapes",
    [((3,), (3,)), ((2, 3), (3,)), ((3,), (3, 2)), ((2, 3), (4, 3, 2)), ((), (2,))],
)
def test_dot_is_that_of_numpy(shapes):
    lhs, rhs = (quantize(jnp.ones(s) * 2, "int8") for s in shapes)
    want = np.dot(exact(lhs), exact(rhs))
    np.testing.assert_allclose(dot(lhs, rhs), want, rtol=1e-6)
    np.testing.assert_allclose(dot(lhs, dequantize(rhs)), want, rtol=1e-6)


def test_without_quantized_operands_it_is_jax():
    x, y = operand(LHS, "lhs", None), operand(RHS, "rhs", None)
    np.testing.assert_array_equal(
        dot_general(x, y, NUMBERS), jax.lax.dot_general(x, y, NUMBERS)
    )


def test_gradient_reaches_the_float_operand_and_the_scale():
    lhs, rhs = operand(LHS, "lhs", None), operand(RHS, "rhs", "int4")
    grad = jax.grad(lambda x: dot_general(x, rhs, NUMBERS).sum())(lhs)
    want = np.broadcast_to(exact(rhs).sum(-1)[:, None], LHS)
    np.testing.assert_allclose(grad, want, rtol=1e-5, atol=1e-5)
    both = operand(LHS, "lhs", "int8")
    scale_grad = jax.grad(
        lambda s: dot_general(both, rhs.replace(scale=s), NUMBERS).sum()
    )(rhs.scale)
    assert (scale_grad != 0).all()


@pytest.mark.slow
def test_a_large_weight_on_either_side():
    numbers = (((1,), (0,)), ((), ()))
    weight = operand((1024, 1536), "rhs", "int8", "minmax", 128, numbers)
    for act_type in (None, "nf4"):
        act = operand((5, 1024), "lhs", act_type, numbers=numbers)
        got = dot(act, weight)
        check(got, act, weight)
        swapped = dot_general(weight, act, (((0,), (1,)), ((), ())))
        np.testing.assert_allclose(swapped, got.T, atol=1e-5 * np.abs(got).max())


@pytest.mark.slow
@pytest.mark.parametrize("rhs_type", ["int8", "int4"])
def test_rows_do_not_depend_on_how_many_there_are(rhs_type):
    # Few rows are multiplied in another way on a CPU: the bits must be the same.
    numbers = (((1,), (0,)), ((), ()))
    act = operand((64, 4096), "lhs", "int8", "minmax", numbers=numbers)
    weight = operand((4096, 1040), "rhs", rhs_type, "minmax", numbers=numbers)
    fn = jax.jit(dot)
    many = fn(act, weight)
    check(many, act, weight)
    for rows in (1, 3):
        np.testing.assert_array_equal(fn(act[:rows], weight), many[:rows])


@pytest.mark.parametrize("quantized", ["left", "right", "both"])
def test_axes_of_different_sizes_are_named(quantized):
    a, b = jnp.ones((5, 8)), jnp.ones((16, 3))
    a = quantize(a, "int8") if quantized != "right" else a
    b = quantize(b, "int8") if quantized != "left" else b
    message = r"\(5, 8\) and \(16, 3\) cannot contract the axes \(1,\) and \(0,\)"
    with pytest.raises(ValueError, match=message):
        dot_general(a, b, (((1,), (0,)), ((), ())))
    with pytest.raises(ValueError, match="sizes .5, 8. and .16,."):
        dot_general(a, b, (((0, 1), (0,)), ((), ())))
