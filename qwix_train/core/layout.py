"""Which axes of an operand share a scale, for each kind of op.

The axes that an op keeps get a scale for each index, because the result can be scaled
along them. The axes that it sums over share a scale, or have one for each tile.
"""

from collections.abc import Mapping
from typing import Any, Literal

import jax

from qwix_train.core import tiling

Side = Literal["lhs", "rhs"]


def dot_axes(
    dimension_numbers: Any,
    ndim: int,
    side: Side,
    tile_size: Mapping[int, int | float] | int | float | None = None,
) -> tuple[tuple[int, ...], dict[int, int | float]]:
    """Returns the channelwise and the tiled axes of an operand of a dot.

    Args:
        dimension_numbers: Those of `jax.lax.dot_general`.
        ndim: The rank of the operand.
        side: Which operand.
        tile_size: The tile size of the operand's last contracted axis, whatever the
            order in which the axes are listed; or a mapping from axes to tile sizes.

    Returns:
        Every axis that is neither contracted nor tiled, and the tiled axes.

    Raises:
        ValueError: ``side`` is neither lhs nor rhs.

    >>> dot_axes((((1,), (0,)), ((), ())), 2, 'rhs', tile_size=32)
    ((1,), {0: 32})
    """
    contracting = dimension_numbers[0][_side_index(side)]
    contracting = [tiling.normalize_axis(int(axis), ndim) for axis in contracting]
    tiled: dict[int, int | float] = {}
    if isinstance(tile_size, Mapping):
        tiled = {tiling.normalize_axis(a, ndim): t for a, t in tile_size.items()}
    elif tile_size and contracting:
        tiled = {max(contracting): tile_size}
    kept = (a for a in range(ndim) if a not in contracting and a not in tiled)
    return tuple(kept), tiled


def conv_axes(
    dimension_numbers: jax.lax.ConvDimensionNumbers, side: Side
) -> tuple[tuple[int, ...], dict[int, int | float]]:
    """Returns the channelwise and the tiled axes of an operand of a convolution.

    Args:
        dimension_numbers: As `jax.lax.conv_dimension_numbers` returns them.
        side: Which operand.

    Returns:
        The batch axis (lhs) or the output-feature axis (rhs), and no tiled axes.

    Raises:
        ValueError: ``side`` is neither lhs nor rhs.

    >>> spec = ('NHWC', 'HWIO', 'NHWC')
    >>> numbers = jax.lax.conv_dimension_numbers((1, 8, 8, 3), (3, 3, 3, 16), spec)
    >>> conv_axes(numbers, 'rhs')
    ((3,), {})
    """
    specs = (dimension_numbers.lhs_spec, dimension_numbers.rhs_spec)
    return (specs[_side_index(side)][0],), {}


def _side_index(side: str) -> int:
    if side not in ("lhs", "rhs"):
        raise ValueError(f"The side of an operand is 'lhs' or 'rhs', not {side!r}.")
    return ("lhs", "rhs").index(side)
