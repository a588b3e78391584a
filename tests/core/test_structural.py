"""Structural changes of quantized arrays, against NumPy on what they stand for."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax import numpy as jnp

from qwix_train.core import numerics, structural
from qwix_train.core.how import HowToQuantize
from qwix_train.core.qarray import QArray, quantize_array, validate_qarray
from tests.core.reference import expand, levels_of

TYPES = ["int8", "int6", "int4", "int2", "int1", "nf4", "float8_e4m3fn"]
SHAPES = [(6,), (1, 6), (4, 6), (5, 4), (2, 3, 4), (4, 1, 6)]

# Each new shape compiles.
few = settings(max_examples=20)


@st.composite
def arrays(draw, shape=None, qtype=None):
    """Arrays of any layout: channels, tiles, padded tiles, zero points."""
    shape = draw(st.sampled_from(SHAPES)) if shape is None else tuple(shape)
    qtype = draw(st.sampled_from(TYPES)) if qtype is None else qtype
    tiles = [draw(st.sampled_from(sorted({1, n, min(2, n), min(4, n)}))) for n in shape]
    counts = [-(-n // tile) for n, tile in zip(shape, tiles, strict=True)]
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    dtype = numerics.storage_dtype(qtype)
    if qtype == "int1":
        codes = rng.choice([-1, 1], shape)
    elif qtype.startswith("int"):
        low, high = numerics.code_range(qtype)
        codes = rng.integers(low, high + 1, shape)
    else:
        codes = rng.integers(0, 16, shape) if qtype == "nf4" else rng.normal(size=shape)
    zero_point = None
    if qtype.startswith("int") and draw(st.booleans()):
        low, high = numerics.code_range(qtype)
        zero_point = jax.device_put(rng.integers(low, high + 1, counts).astype(dtype))
    scale = jax.device_put(rng.uniform(0.5, 1, counts).astype(np.float32))
    return QArray(jax.device_put(codes.astype(dtype)), scale, zero_point, qtype)


def values_of(array: QArray) -> np.ndarray:
    """`(code - zero_point) * scale`, in float32 as `dequantize` has it."""
    codes = np.asarray(array.qvalue).astype(np.float32)
    if array.qtype == "nf4":
        codes = levels_of("nf4").astype(np.float32)[codes.astype(int)]
    if array.zero_point is not None:
        zero = np.asarray(array.zero_point).astype(np.float32)
        codes = codes - expand(zero, array.shape).astype(np.float32)
    return codes * expand(array.scale, array.shape).astype(np.float32)


def check(function, array, expected, *others, always=True):
    """Compares what `structural` makes of a function of one primitive.

    Args:
        function: The function; traced only.
        array: Its first argument.
        expected: What NumPy makes of the values.
        *others: Its other arguments.
        always: Whether there must be a result.
    """
    jaxpr = jax.make_jaxpr(function)(values_of(array), *others).jaxpr
    if not jaxpr.eqns:  # nothing to do
        return
    (eqn,) = jaxpr.eqns
    results = structural.CHANGES[eqn.primitive.name](eqn.params, array, others)
    if results is None:
        assert not always
        return
    expected = expected if isinstance(expected, list) else [expected]
    for result, value in zip(results, expected, strict=True):
        assert result.qtype == array.qtype
        assert result.qvalue.dtype == array.qvalue.dtype
        validate_qarray(result)
        np.testing.assert_array_equal(values_of(result), value)


def is_padded(array, axis):
    parts = [p for p in (array.scale, array.zero_point) if p is not None]
    return any(array.shape[axis] % part.shape[axis] for part in parts)


def is_tiled(array, axis):
    parts = [p for p in (array.scale, array.zero_point) if p is not None]
    return any(part.shape[axis] not in (1, array.shape[axis]) for part in parts)


@pytest.mark.slow
@few
@given(arrays(), st.data())
def test_axes_move_as_they_are(array, data):
    values = values_of(array)
    order = data.draw(st.permutations(range(array.ndim)))
    check(lambda x: lax.transpose(x, order), array, values.transpose(order))
    place = data.draw(st.integers(0, array.ndim))
    expected = np.expand_dims(values, place)
    check(lambda x: lax.expand_dims(x, [place]), array, expected)
    ones = [axis for axis in range(array.ndim) if array.shape[axis] == 1]
    check(lambda x: lax.squeeze(x, ones), array, values.squeeze(tuple(ones)))
    check(lax.neg, array, -values)


@pytest.mark.slow
@few
@given(arrays(), st.integers(0, 2))
def test_broadcasts(array, before):
    shape = [3] * before + [n if n > 1 else 4 for n in array.shape]
    places = tuple(range(before, len(shape)))
    expected = np.broadcast_to(values_of(array), shape)
    check(lambda x: lax.broadcast_in_dim(x, shape, places), array, expected)


@pytest.mark.slow
@few
@given(arrays(), st.data())
def test_reversals(array, data):
    axes = sorted(data.draw(st.sets(st.integers(0, array.ndim - 1), min_size=1)))
    exact = not any(is_padded(array, axis) for axis in axes)
    check(
        lambda x: lax.rev(x, axes),
        array,
        np.flip(values_of(array), tuple(axes)),
        always=exact,
    )


@pytest.mark.slow
@few
@given(arrays(), st.data())
def test_slices(array, data):
    index, cut = [], []
    for axis, size in enumerate(array.shape):
        start = data.draw(st.integers(0, size - 1))
        stop = data.draw(st.integers(start + 1, size))
        step = data.draw(st.integers(1, 2))
        index.append(slice(start, stop, step))
        cut += [axis] if (start, stop, step) != (0, size, 1) else []
    check(
        lambda x: lax.slice(
            x,
            [i.start for i in index],
            [i.stop for i in index],
            [i.step for i in index],
        ),
        array,
        values_of(array)[tuple(index)],
        always=not any(is_tiled(array, axis) for axis in cut),
    )


@few
@given(arrays(), st.data())
def test_splits(array, data):
    axis = data.draw(st.integers(0, array.ndim - 1))
    size = array.shape[axis]
    first = data.draw(st.integers(0, size))
    check(
        lambda x: lax.split(x, (first, size - first), axis),
        array,
        np.split(values_of(array), [first], axis),
        always=not is_tiled(array, axis),
    )


@pytest.mark.slow
@few
@given(arrays(), st.data())
def test_unstacking(array, data):
    axis = data.draw(st.integers(0, array.ndim - 1))
    results = structural.CHANGES["unstack"]({"axis": axis}, array, ())
    assert results is not None
    slices = np.moveaxis(values_of(array), axis, 0)
    for result, expected in zip(results, slices, strict=True):
        np.testing.assert_array_equal(values_of(result), expected)


@pytest.mark.slow
@few
@given(arrays(), st.data())
def test_dynamic_slices(array, data):
    """Starts are clamped such that the slice fits."""
    starts = [data.draw(st.integers(-3, 7)) for _ in array.shape]
    sizes = [data.draw(st.integers(1, size)) for size in array.shape]
    cut = [axis for axis, size in enumerate(sizes) if size != array.shape[axis]]

    def function(x, *starts):
        return lax.dynamic_slice(x, starts, sizes, allow_negative_indices=False)

    clamped = np.clip(starts, 0, np.subtract(array.shape, sizes))
    index = tuple(slice(c, c + n) for c, n in zip(clamped, sizes, strict=True))
    check(
        function,
        array,
        values_of(array)[index],
        *map(jnp.int32, starts),
        always=not any(is_tiled(array, axis) for axis in cut),
    )


@pytest.mark.slow
@few
@given(arrays(), st.data())
def test_reshapes(array, data):
    shape = [1]
    for factor in [f for size in array.shape for f in prime_factors(size)]:
        if data.draw(st.booleans()):
            shape.append(1)
        shape[-1] *= factor
    if tuple(shape) != array.shape:
        shared = all(n == 1 for part in jax.tree.leaves(array)[1:] for n in part.shape)
        expected = values_of(array).reshape(shape)
        check(lambda x: lax.reshape(x, shape), array, expected, always=shared)


def prime_factors(n):
    for factor in range(2, n + 1):
        while n % factor == 0:
            yield factor
            n //= factor


@pytest.mark.slow
@few
@given(arrays(), st.data(), st.sampled_from(["fill", "clip", "promise_in_bounds"]))
def test_lookups(array, data, mode):
    axis = data.draw(st.integers(0, array.ndim - 1))
    size = array.shape[axis]
    low, high = (0, size - 1) if mode == "promise_in_bounds" else (-3, size + 3)
    indices = [data.draw(st.integers(low, high)) for _ in range(4)]
    numbers = lax.GatherDimensionNumbers(
        offset_dims=tuple(range(1, array.ndim)),
        collapsed_slice_dims=(axis,),
        start_index_map=(axis,),
    )
    sizes = tuple(1 if a == axis else n for a, n in enumerate(array.shape))
    fill = data.draw(st.sampled_from([None, 0.0, 7.5])) if mode == "fill" else None
    rows = np.moveaxis(values_of(array), axis, 0)
    expected = rows[np.clip(indices, 0, size - 1)]
    if mode == "fill":
        outside = [not 0 <= index < size for index in indices]
        expected[outside] = np.nan if fill is None else fill

    def function(x, indices):
        return lax.gather(x, indices, numbers, sizes, mode=mode, fill_value=fill)

    indices = jnp.asarray(indices, jnp.int32)[:, None]
    check(function, array, expected, indices, always=not is_tiled(array, axis))


@pytest.mark.slow
@few
@given(st.data(), st.sampled_from(TYPES), st.integers(1, 3), st.integers(0, 1))
def test_joins(data, qtype, count, axis):
    shapes = [[4, 4] for _ in range(count)]
    for shape in shapes:
        shape[axis] = data.draw(st.sampled_from([2, 4, 5]))
    parts = [data.draw(arrays(shape, qtype)) for shape in shapes]
    joined = structural.JOINS["concatenate"]({"dimension": axis}, parts)
    if joined is None:
        mixed = len({part.zero_point is None for part in parts}) > 1
        assert mixed or any(is_tiled(part, 1 - axis) for part in parts)
    else:
        expected = np.concatenate([values_of(part) for part in parts], axis)
        np.testing.assert_array_equal(values_of(joined), expected)


@pytest.mark.slow
@few
@given(st.data(), st.sampled_from(TYPES), st.integers(0, 2))
def test_stacks(data, qtype, axis):
    parts = [data.draw(arrays([4, 3], qtype)) for _ in range(3)]
    joined = structural.JOINS["stack"]({"axis": axis}, parts)
    if joined is None:
        mixed = len({part.zero_point is None for part in parts}) > 1
        assert mixed or any(is_tiled(part, a) for part in parts for a in range(2))
    else:
        expected = np.stack([values_of(part) for part in parts], axis)
        np.testing.assert_array_equal(values_of(joined), expected)


def test_arrays_of_two_types_or_dtypes_are_not_joined():
    array = quantize_array(jnp.ones((2, 2)), HowToQuantize(qtype="int8"))
    other = quantize_array(jnp.ones((2, 2)), HowToQuantize(qtype="int6"))
    wide = dataclasses.replace(array, scale=array.scale.astype(jnp.bfloat16))
    for parts in ([array, other], [array, wide]):
        assert structural.JOINS["concatenate"]({"dimension": 0}, parts) is None


@pytest.mark.slow
@few
@given(arrays(), st.data())
def test_a_scale_for_every_index(array, data):
    axis = data.draw(st.integers(0, array.ndim - 1))
    spread = structural.spread(array, axis)
    assert spread.scale.shape[axis] == array.shape[axis]
    np.testing.assert_array_equal(values_of(spread), values_of(array))


@pytest.mark.parametrize("name", ["copy", "copy_p", "stop_gradient"])
def test_copies(name):
    array = quantize_array(jnp.ones((2, 2)), HowToQuantize(qtype="nf4"))
    assert structural.CHANGES[name]({}, array, ()) == [array]
