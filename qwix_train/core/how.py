"""How an array is quantized: its type, which elements share a scale, which range."""

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from qwix_train.core import numerics, tiling
from qwix_train.core.formats import Scales
from qwix_train.core.rotation import Rotation

CALIBRATION_METHODS = {
    "absmax": "absmax[,factor]",
    "minmax": "minmax[,factor]",
    "absmean": "absmean[,factor]",
    "rms": "rms,factor",
    "fixed": "fixed,bound or fixed,low,high",
    "lsq": "lsq",
    "lsq+": "lsq+",
}
"""Each calibration method and how it is written."""


def parse_calibration_method(text: str) -> tuple[str, tuple[float, ...]]:
    """Splits a calibration method into its name and its numbers.

    Args:
        text: A method as `CALIBRATION_METHODS` writes it, in any case.

    Returns:
        The name and the numbers; for ``fixed`` always the two ends of the range.

    Raises:
        ValueError: The name is unknown, or the numbers are too few, too many, not
            finite, not positive (a factor), or no range that holds 0 (``fixed``).

    >>> parse_calibration_method('absmax,0.9'), parse_calibration_method('fixed,3')
    (('absmax', (0.9,)), ('fixed', (-3.0, 3.0)))
    """
    if not isinstance(text, str):
        raise ValueError(f"A calibration method is a string, not {text!r}.")
    name, *parts = (part.strip() for part in text.lower().split(","))
    if name not in CALIBRATION_METHODS:
        forms = "; ".join(CALIBRATION_METHODS.values())
        raise ValueError(f"Unknown calibration method {text!r}; choose from: {forms}.")

    def error(reason: str) -> ValueError:
        form = CALIBRATION_METHODS[name]
        return ValueError(f"Bad calibration method {text!r}: {reason}. Write {form}.")

    try:
        numbers = tuple(float(part) for part in parts)
    except ValueError:
        raise error("an argument is not a number") from None
    if not all(math.isfinite(number) for number in numbers):
        raise error("an argument is not finite")
    allowed = {"rms": (1,), "fixed": (1, 2), "lsq": (0,), "lsq+": (0,)}
    if len(numbers) not in allowed.get(name, (0, 1)):
        raise error(f"{len(numbers)} arguments")
    if name == "fixed":
        low, high = numbers if len(numbers) == 2 else (-numbers[0], numbers[0])
        if not low <= 0 <= high or low == high:
            raise error("the range must hold 0 and more")
        return name, (low, high)
    if numbers and numbers[0] <= 0:
        raise error("the factor must be positive")
    return name, numbers


def needs_zero_point(calibration_method: str) -> bool:
    """Whether a method gives ranges that are not centered at zero.

    >>> needs_zero_point('minmax'), needs_zero_point('fixed,-1,1')
    (True, False)
    """
    name, numbers = parse_calibration_method(calibration_method)
    return name == "minmax" or (name == "fixed" and numbers[0] != -numbers[1])


def is_learned(calibration_method: str) -> bool:
    """Whether a method is one whose scale is trained.

    >>> is_learned('lsq'), is_learned('absmax')
    (True, False)
    """
    return parse_calibration_method(calibration_method)[0] in ("lsq", "lsq+")


def _is_int(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HowToQuantize:
    """How to quantize an array. Hashable, and validated when it is made.

    Attributes:
        qtype: The type of the codes; becomes ``canonical_qtype(qtype)``.
        channelwise_axes: Axes along which every index has its own scale.
        tiled_axes: A mapping from an axis to its tile size: the elements of a tile
            or, as a float, the share of the axis that a tile takes (``1 / count``).
        calibration_method: ``absmax[,factor]``: the range is plus and minus the
            largest magnitude times the factor. ``minmax[,factor]``: from the smallest
            to the largest value, widened to hold 0, times the factor; codes get a
            zero point. ``rms,factor``: plus and minus the root mean square times the
            factor; ``absmean[,factor]``: the mean magnitude times the factor, which
            is what ``absmax`` without a factor stands for with ``ternary``.
            ``fixed,bound`` or ``fixed,low,high``: the range that is given,
            one scale for the whole array. ``lsq``, ``lsq+``: a scale that is trained;
            the range is the one at which these methods begin, see `initial_range`.
        noise_fn: Noise for stochastic rounding, see `numerics.NoiseFn`.
        pad_tiles: Whether a tile size that does not divide its axis is allowed. The
            axis is then cut into ``ceil(n / tile)`` tiles of as equal size as
            possible: all of ``ceil(n / tiles)`` elements but a shorter last one.
        rotation: The basis in which the array is quantized, if not in its own. The
            other fields are about the rotated array. What takes no rotated arrays
            complains of it; see `in_basis`.
        tensor_axes: Axes that stack tensors, each with a scale of its own where a type
            (nvfp4) has a scale for the tensor beside those of blocks.
        axis_names: Axes of the mesh of the `jax.shard_map` around, over which the
            ranges of shards are joined; see `joined_range`.

    Raises:
        ValueError: A field is wrong; the message names the value and the choices.
        TypeError: The axes are not given as a collection, or a mapping, of ints.

    >>> from qwix_train import HowToQuantize
    >>> how = HowToQuantize(qtype='int4', channelwise_axes=[1], tiled_axes={0: 32})
    >>> how.scale_shape((128, 10))
    (4, 10)
    """

    qtype: numerics.QType
    channelwise_axes: Collection[int] = ()
    tiled_axes: Mapping[int, int | float] = dataclasses.field(default_factory=dict)
    calibration_method: str = "absmax"
    noise_fn: numerics.NoiseFn | None = None
    pad_tiles: bool = False
    rotation: Rotation | None = None
    tensor_axes: Collection[int] = ()
    axis_names: Collection[str] = ()

    def __post_init__(self) -> None:
        def put(field: str, value: Any) -> None:
            object.__setattr__(self, field, value)

        put("qtype", numerics.canonical_qtype(self.qtype))
        if not isinstance(self.channelwise_axes, Collection) or not all(
            map(_is_int, self.channelwise_axes)
        ):
            raise TypeError(
                f"channelwise_axes={self.channelwise_axes!r} must be a collection of "
                "ints, such as (1,)."
            )
        if not isinstance(self.tiled_axes, Mapping) or not all(
            _is_int(axis) and not isinstance(size, bool)
            for axis, size in self.tiled_axes.items()
        ):
            raise TypeError(
                f"tiled_axes={self.tiled_axes!r} must map axes to tile sizes, such as "
                "{0: 32}."
            )
        put("channelwise_axes", tuple(sorted(set(self.channelwise_axes))))
        put("tiled_axes", tiling.TiledAxes(self.tiled_axes))
        put("tensor_axes", tuple(sorted(set(self.tensor_axes))))
        put("axis_names", tuple(sorted(set(self.axis_names))))
        if self.calibration_method == "absmax":
            put("calibration_method", numerics.format_of(self.qtype).method)
        parse_calibration_method(self.calibration_method)
        if needs_zero_point(self.calibration_method):
            numerics.asymmetric_bound(self.qtype)
        if is_learned(self.calibration_method):
            numerics.check_any_scale(self.qtype)
        for axis in self.channelwise_axes:
            if axis in self.tiled_axes:
                raise ValueError(f"Axis {axis} is both channelwise and tiled.")
        for axis, size in self.tiled_axes.items():
            is_share = isinstance(size, float)
            if not (0 < size <= 1 if is_share else size >= 1):
                raise ValueError(
                    f"Tile size {size!r} of axis {axis} must be a positive integer or "
                    "a float of at most 1, the share of the axis that a tile takes."
                )

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Returns the shape of the scale for an array of a shape.

        Raises:
            ValueError: An axis does not exist, is both channelwise and tiled, or is
                not divided by its tile size (without ``pad_tiles``); or the type has
                blocks, and the tiles are not such.
        """
        ndim = len(shape)
        channelwise = {tiling.normalize_axis(a, ndim) for a in self.channelwise_axes}
        scale_shape = [shape[a] if a in channelwise else 1 for a in range(ndim)]
        tiled: set[int] = set()
        for axis, size in self.tiled_axes.items():
            axis = tiling.normalize_axis(axis, ndim)
            if axis in channelwise:
                raise ValueError(f"Axis {axis} is both channelwise and tiled.")
            if axis in tiled:
                raise ValueError(
                    f"tiled_axes={self.tiled_axes!r} names axis {axis} of {ndim} twice."
                )
            tiled.add(axis)
            scale_shape[axis] = tiling.tile_count(axis, shape, size, self.pad_tiles)
        self._check_blocks(tuple(shape), scale_shape)
        return tuple(scale_shape)

    def _check_blocks(self, shape: tuple[int, ...], scale_shape: list[int]) -> None:
        """Complains of tiles that are not the blocks of a type.

        A block lies along one axis or several, is a square, or is as long as the axes
        that share a scale, if these are shorter.
        """
        block = numerics.format_of(self.qtype).block
        if block is None:
            return
        sizes = zip(shape, tiling.tile_sizes(shape, scale_shape), strict=True)
        tiles = [(size, tile) for size, tile in sizes if tile > 1]
        count = math.prod(tile for _, tile in tiles)
        shorter = count < block and (
            self.pad_tiles or all(size == tile for size, tile in tiles)
        )
        if count != block and not shorter and {tile for _, tile in tiles} != {block}:
            name = numerics.qtype_name(self.qtype)
            raise ValueError(
                f"{name} has one scale for {block} elements, and an array of shape "
                f"{shape} would have scales of shape {tuple(scale_shape)}. Tile the "
                f"axis that is contracted: tiled_axes={{axis: {block}}}, and make the "
                "others channelwise."
            )

    def of_slice(self) -> "HowToQuantize | None":
        """How a slice along axis 0 is quantized so that it is a slice of the whole.

        Returns:
            None if axis 0 has no scales of its own, or shares one for the tensor.
        """
        of_tensors = numerics.format_of(self.qtype).scales is Scales.TWO_LEVELS
        if 0 not in self.channelwise_axes or (of_tensors and 0 not in self.tensor_axes):
            return None
        rotation = self.rotation
        return dataclasses.replace(
            self,
            channelwise_axes=tuple(a - 1 for a in self.channelwise_axes if a > 0),
            tiled_axes={axis - 1: tile for axis, tile in self.tiled_axes.items()},
            rotation=rotation and rotation.at(rotation.axis - 1),
            tensor_axes=tuple(a - 1 for a in self.tensor_axes if a > 0),
        )

    @property
    def in_basis(self) -> "HowToQuantize":
        """How the rotated array is quantized; this, if there is no rotation."""
        if self.rotation is None:
            return self
        return dataclasses.replace(self, rotation=None)
