import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwix_train.core.qarray import dequantize, quantize, validate_qarray


def make(shape, **layout):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    method = layout.pop("method", "minmax")
    return quantize(jax.device_put(x), "int8", calibration_method=method, **layout)


LAYOUTS = [
    {},
    dict(channelwise_axes=(0,)),
    dict(channelwise_axes=(2,)),
    dict(tiled_axes={1: 2}),
    dict(channelwise_axes=(0,), tiled_axes={1: 2}),
    dict(channelwise_axes=(0, 1), tiled_axes={2: 3}),
]
SHAPES = [
    (24, 6), (4, 36), (4, 6, 6, 1), (144,), (4, 6, 3, 2), (12, 12), (4, 2, 3, 6),
]  # fmt: skip


def same(q, want):
    """The operation on the codes is that on the values, and the result is sound."""
    validate_qarray(q)
    np.testing.assert_array_equal(dequantize(q), want)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_reshape_is_exact_or_an_error(layout):
    q = make((4, 6, 6), **layout)
    done = 0
    for shape in SHAPES:
        try:
            reshaped = q.reshape(shape)
        except ValueError as error:
            assert "Dequantize it first" in str(error)
            continue
        same(reshaped, dequantize(q).reshape(shape))
        done += 1
    assert done >= 3


@pytest.mark.thinned(6)
@pytest.mark.parametrize(
    "shape, layout, new, scale_shape",
    [
        ((4, 6), dict(channelwise_axes=(1,)), (2, 2, 6), (1, 1, 6)),
        ((4, 6), dict(channelwise_axes=(1,)), (4, 2, 3), (1, 2, 3)),
        ((8, 6), dict(tiled_axes={0: 4}), (2, 4, 6), (2, 1, 1)),
        ((8, 6), dict(tiled_axes={0: 4}), (4, 2, 6), (2, 1, 1)),
        ((4, 6), dict(channelwise_axes=(0,)), (24,), (4,)),
        ((4, 6), dict(channelwise_axes=(1,)), (24,), None),
        ((4, 6), {}, (24,), (1,)),
    ],
)
def test_reshape_of_scales(shape, layout, new, scale_shape):
    q = make(shape, **layout)
    if scale_shape is None:
        with pytest.raises(ValueError, match="lose their scale"):
            q.reshape(new)
    else:
        assert q.reshape(*new).scale.shape == scale_shape


def test_reshape_to_another_size():
    with pytest.raises(ValueError, match=r"shape \(4, 6\) to \(5, 5\)"):
        make((4, 6)).reshape(5, 5)
    with pytest.raises(ValueError, match="Cannot reshape"):
        make((4, 6)).reshape(-1, 5)
    assert make((0, 6)).reshape(6, 0).shape == (6, 0)


@pytest.mark.slow
def test_transposes():
    q = make((4, 6, 5), channelwise_axes=(0,), tiled_axes={1: 3})
    x = dequantize(q)
    same(q.T, x.T)
    same(q.mT, x.mT)
    same(q.transpose(1, 2, 0), x.transpose(1, 2, 0))
    same(q.transpose((2, 0, 1)), x.transpose(2, 0, 1))
    same(q.swapaxes(0, -1), x.swapaxes(0, -1))


INDICES = [
    0,
    -1,
    slice(1, 3),
    (slice(None), 2),
    (Ellipsis, 1),
    (None, Ellipsis, None),
    (1, None, 2),
    (slice(None, None, 2), Ellipsis, slice(3)),
    np.array([2, 0, 1]),
    (slice(None), slice(None), np.array([[0, 1], [2, 3]])),
    (np.array([0, 1]), np.array([2, 3])),
    jnp.int32(2),
]


@pytest.mark.thinned(21)
@pytest.mark.parametrize("axes", [(), (0,), (1,), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("index", INDICES, ids=str)
def test_any_index_where_nothing_is_tiled(axes, index):
    q = make((4, 6, 5), channelwise_axes=axes)
    same(q[index], dequantize(q)[index])


@pytest.mark.slow
def test_tiles_take_elements_and_whole_tiles():
    q = make((3, 12), channelwise_axes=(0,), tiled_axes={1: 4})
    x = dequantize(q)
    for index in itertools.chain(range(-12, 12), [slice(4, 12), slice(None), slice(8)]):
        same(q[:, index], x[:, index])
    for index in (slice(1, 5), slice(None, None, 2), slice(0, 6), np.array([0, 4])):
        with pytest.raises(ValueError, match="cuts tiles of 4 elements along axis 1"):
            q[:, index]


def test_bad_indices():
    q = make((3, 4))
    with pytest.raises(IndexError, match="Too many indices"):
        q[0, 0, 0]
    with pytest.raises(IndexError, match="out of range"):
        q[3]
    with pytest.raises(IndexError, match="one ellipsis"):
        q[..., 0, ...]
    with pytest.raises(ValueError, match="Boolean mask"):
        q[np.array([True, False, True])]


def test_inside_a_compiled_function():
    q = make((4, 6), channelwise_axes=(0,))
    got = jax.jit(lambda q: dequantize(q.T[1].reshape(2, 2)))(q)
    np.testing.assert_array_equal(got, dequantize(q)[:, 1].reshape(2, 2))
