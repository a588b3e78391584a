import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwix_train.core import tiling


def test_tiled_axes_is_a_hashable_mapping():
    axes = tiling.TiledAxes({1: 4, 0: 0.5})
    assert dict(axes) == {0: 0.5, 1: 4} and axes == {1: 4, 0: 0.5}
    assert len({axes, tiling.TiledAxes({0: 0.5, 1: 4})}) == 1
    assert axes != 3 and repr(axes) == "{0: 0.5, 1: 4}"


def test_one_element_is_not_one_whole_axis():
    one, whole = tiling.TiledAxes({0: 1}), tiling.TiledAxes({0: 1.0})
    assert one != whole and len({one, whole}) == 2


@pytest.mark.parametrize("size", range(0, 14))
@pytest.mark.parametrize("tile", range(1, 16))
def test_tiles_are_known_from_the_count_alone(size, tile):
    count = tiling.tile_count(0, (size,), tile, pad=True)
    assert count == -(-size // tile)
    assert tiling.is_layout((size,), (count,)) or size == 0
    if size:
        (length,) = tiling.tile_sizes((size,), (count,))
        assert length <= tile and -(-size // length) == count
        assert (size % tile == 0) <= (length == min(tile, size))


def test_a_tile_size_that_does_not_divide():
    message = r"Tile size 4 does not divide axis 1 of size 10 in .* shape \(3, 10\)"
    with pytest.raises(ValueError, match=message):
        tiling.tile_count(1, (3, 10), 4, pad=False)


@pytest.mark.parametrize(
    "scale_shape", [(1, 1), (6, 1), (3, 10), (6, 3), (1, 4), (2, 5)]
)
def test_elementwise_repeats_each_entry_over_its_tile(scale_shape):
    shape = (6, 10)
    x = np.arange(60.0).reshape(shape)
    scale = np.arange(1.0, 1 + np.prod(scale_shape)).reshape(scale_shape)
    full = scale
    for axis, size in enumerate(tiling.tile_sizes(shape, scale_shape)):
        full = np.repeat(full, size, axis)
    full = full[: shape[0], : shape[1]]
    got = tiling.elementwise(
        lambda x, s, n: x * s, jax.device_put(x), jax.device_put(scale), None
    )
    np.testing.assert_array_equal(got, x * full)


def test_elementwise_refuses_what_does_not_fit():
    x = jnp.zeros((6, 10))
    with pytest.raises(ValueError, match="does not fit"):
        tiling.elementwise(lambda x, s: x, x, jnp.zeros((6, 7)))
    with pytest.raises(ValueError, match="Axis 0 .* 3 tiles .* 2"):
        tiling.elementwise(lambda x, s, t: x, x, jnp.zeros((3, 1)), jnp.zeros((2, 1)))


def test_axis_out_of_range():
    assert tiling.normalize_axis(-1, 3) == 2
    with pytest.raises(ValueError, match="Axis 3 is out of range"):
        tiling.normalize_axis(3, 3)
