import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwix_train.core.integer_dot import integer_dot

NUMBERS = (((1,), (0,)), ((), ()))


def codes(*shape, dtype=jnp.int8, seed=0):
    values = np.random.default_rng(seed).integers(-8, 8, shape)
    return jnp.asarray(values, jnp.int8).astype(dtype)


@pytest.mark.thinned(6)
@pytest.mark.parametrize("rows", [1, 4, 40])
@pytest.mark.parametrize("dtype", [jnp.int8, jnp.int4])
def test_it_is_the_dot_in_integers(rows, dtype):
    # Large enough for every form.
    left, right = codes(rows, 4096), codes(4096, 1040, dtype=dtype, seed=1)
    got = integer_dot(left, right, NUMBERS)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, np.matmul(np.int32(left), np.int32(right)))


@pytest.mark.parametrize("length, columns", [(6, 5), (7, 5), (0, 5), (6, 0)])
def test_the_first_axes_of_both_contracted(length, columns):
    left, right = codes(length, columns), codes(length, 4, seed=1)
    got = integer_dot(left, right, (((0,), (0,)), ((), ())))
    np.testing.assert_array_equal(got, np.int32(left).T @ np.int32(right))


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0)], ids=str)
def test_vmap(axes):
    shapes = [(5, 2, 16) if axes[0] == 0 else (2, 16)]
    shapes.append((5, 16, 3) if axes[1] == 0 else (16, 3))
    left, right = codes(*shapes[0]), codes(*shapes[1], seed=1)
    fn = jax.vmap(lambda a, b: integer_dot(a, b, NUMBERS), axes)
    want = np.matmul(np.int32(left), np.int32(right))
    np.testing.assert_array_equal(fn(left, right), want)


def test_vmap_with_batch_axes():
    left, right = codes(5, 4, 2, 16), codes(4, 16, 3, seed=1)
    numbers = (((2,), (1,)), ((0,), (0,)))
    want = np.matmul(np.int32(left), np.int32(right))
    got = jax.vmap(lambda a: integer_dot(a, right, numbers))(left)
    np.testing.assert_array_equal(got, want)
    flipped = jax.vmap(lambda a: integer_dot(right, a, (numbers[0][::-1], numbers[1])))
    np.testing.assert_array_equal(flipped(left), want.swapaxes(-1, -2))


def test_bytes_of_other_types():
    for dtype in (jnp.uint8, jnp.bool_):
        left = jnp.asarray([[0, 1, 200]], dtype)
        got = integer_dot(left, codes(3, 2), NUMBERS)
        want = np.int32(left) @ np.int32(codes(3, 2))
        np.testing.assert_array_equal(got, want)
