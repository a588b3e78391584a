"""Quantized arrays of 4 bits, packed: the storage of a frozen base (QLoRA).

Two codes share a byte, and the scales are quantized themselves. That is the *double
quantization* of QLoRA (arXiv 2305.14314, section 3): with their mean taken away, scales
become codes of 8 bits, in blocks of 256 with one float32 factor each. At one scale for
64 codes an element then takes 4 + 8 / 64 + 32 / (64 * 256) = 4.127 bits.

Here the codes of scales are linear integers,

    scale ~ mean + code * step,    step = max |scale - mean| / 127 in its block

so the error of a scale is at most half a step.

Axes of *layers*, which stacked weights have in front, are kept apart: every array has
them, so that a `scan` over a `PackedQArray` and an index into each of its arrays give a
layer's own. The codes that share a byte lie half a tile apart, so unpacking writes
whole rows, and a shard that holds whole tiles is unpacked where it is.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from qwix_train.core import numerics, packing, tiling
from qwix_train.core.how import HowToQuantize
from qwix_train.core.operands import is_explicitly_sharded
from qwix_train.core.qarray import (
    NoArray,
    QArray,
    calibrate,
    quantize_array,
    validate_qarray,
)

SCALE_BLOCK = 256
"""Scales that share one factor."""

_STEPS = 127
_LONGEST_TILE = 64


@dataclasses.dataclass(frozen=True)
class PackedLayout:
    """How codes are packed.

    Attributes:
        qtype: The type of the codes.
        dtype: The dtype of the dequantized array.
        axis: The axis along which codes share bytes, counted from the last (-1).
        tile: The codes along it that are packed together: the first with the one half
            a tile later, and so on.
        length: The codes along it; a last code without a partner has a byte too.
    """

    qtype: Any
    dtype: Any
    axis: int
    tile: int
    length: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "qtype", numerics.canonical_qtype(self.qtype))
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))


@flax.struct.dataclass
class PackedQArray(NoArray):
    """A quantized array of 4 bits whose codes are packed and whose scales quantized.

    Attributes:
        packed: The codes, uint8, with an axis of half the length; the code of the first
            half of a tile in the lower bits.
        scale_codes: The codes of the scales, int8, in the layout of the scale.
        scale_steps: The factors of these, float32: axes of layers, and one entry for
            each `SCALE_BLOCK` scales of a layer, in their order in memory.
        scale_mean: The mean of the scales of each layer, float32.
        zero_point: The code that stands for 0, int8, or None where that is code 0.
        layout: How the codes are packed.

    >>> from qwix_train.core.qarray import quantize
    >>> q = quantize(jnp.ones((96, 8)), 'nf4', channelwise_axes=[1], tiled_axes={0: 32})
    >>> packed = pack(q)
    >>> packed.shape, packed.packed.shape, packed.scale_codes.shape
    ((96, 8), (48, 8), (3, 8))
    """

    packed: jax.Array
    scale_codes: jax.Array
    scale_steps: jax.Array
    scale_mean: jax.Array
    zero_point: jax.Array | None
    layout: PackedLayout = flax.struct.field(pytree_node=False)

    _instead = "The array that its codes stand for is dequantize(unpack(array))."

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the original array."""
        axis, shape = self.layout.axis, list(self.packed.shape)
        shape[axis] = self.layout.length
        return tuple(shape)

    @property
    def ndim(self) -> int:
        """The rank of the original array."""
        return self.packed.ndim

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def dtype(self) -> Any:
        """The dtype of the dequantized array."""
        return self.layout.dtype

    @property
    def qtype(self) -> Any:
        """The type of the codes."""
        return self.layout.qtype

    @property
    def layer_axes(self) -> int:
        """The number of leading axes that are axes of layers."""
        return self.scale_mean.ndim

    @property
    def nbytes(self) -> int:
        """The bytes of all its arrays."""
        return sum(array.nbytes for array in jax.tree.leaves(self))

    @property
    def bits_per_param(self) -> float:
        """The bits that an element takes, scales and all."""
        return 8 * self.nbytes / self.size


def pack(array: QArray, layer_axes: int = 0) -> PackedQArray:
    """Packs the codes of an array, and quantizes its scales.

    The codes are kept bit for bit. The scale 1, which tiles of zeros have, becomes the
    mean of the others if all of its codes stand for 0, so that it does not enlarge the
    steps. A scale that is not finite makes all of its layer so.

    Args:
        array: A quantized array of ``int4`` or ``nf4``, of rank 1 or more.
        layer_axes: The number of leading axes that stack layers.

    Returns:
        The packed array; its arrays are sharded as the codes and scales are.

    Raises:
        ValueError: The codes are of another type, or the rank is too low.

    >>> from qwix_train.core.qarray import quantize
    >>> q = quantize(jnp.array([[3., -1.], [1.5, 2.]]), 'int4', channelwise_axes=[0])
    >>> pack(q).packed.tolist()  # 7 and -2, then 6 and 7
    [[231], [118]]
    """
    validate_qarray(array)
    sharding = getattr(array.qvalue, "sharding", None)  # NumPy arrays have none.
    return _pack(array, _arrangement(array, layer_axes, sharding))


def quantize_packed(
    array: jax.Array, how: HowToQuantize, layer_axes: int = 0
) -> PackedQArray:
    """Quantizes an array and packs it, without codes of a byte each in between.

    Args:
        array: Any shape, a float dtype.
        how: How to quantize it, with codes of 4 bits.
        layer_axes: The number of leading axes that stack layers.

    Returns:
        ``pack(quantize_array(array, how), layer_axes)``.

    Raises:
        ValueError: ``how`` does not fit the array, or `pack` would raise.
    """
    shapes = jax.eval_shape(functools.partial(quantize_array, how=how), array)
    sharding = getattr(array, "sharding", None)
    return _quantize_packed(array, how, _arrangement(shapes, layer_axes, sharding))


def unpack(array: PackedQArray) -> QArray:
    """Returns the quantized array, its scales with the error of their quantization.

    >>> from qwix_train.core.qarray import quantize
    >>> q = quantize(jnp.linspace(-1., 1., 6), 'int4')
    >>> unpack(pack(q)).qvalue.tolist() == q.qvalue.tolist()
    True
    """
    layout, zero_point = array.layout, array.zero_point
    if zero_point is not None:
        zero_point = zero_point.astype(numerics.storage_dtype(layout.qtype))
    qvalue = packing.from_bits(_codes(array.packed, layout), layout.qtype)
    return QArray(qvalue, _unpacked_scale(array), zero_point, layout.qtype)


class _Arrangement(NamedTuple):
    """How an array is packed, and where; static."""

    layer_axes: int
    layout: PackedLayout
    scale_sharding: NamedSharding | None


def _arrangement(array: QArray, layer_axes: int, sharding: Any) -> _Arrangement:
    if (name := numerics.qtype_name(array.qtype)) not in ("int4", "nf4"):
        raise ValueError(
            f"Codes of {name} are not packed in pairs: those of int4 and nf4 are."
        )
    if not 0 <= layer_axes < array.ndim:
        raise ValueError(
            f"An array of shape {array.shape} with {layer_axes} axes of layers has no "
            "axis along which to pack codes."
        )
    layout = _layout(array, layer_axes, sharding)
    return _Arrangement(layer_axes, layout, _scale_sharding(array, sharding))


def _layout(array: QArray, layer_axes: int, sharding: Any) -> PackedLayout:
    """How to pack: along tiles if there are some, in tiles that no shard cuts."""
    shape, entries = array.shape, array.scale.shape
    local = shape
    if isinstance(sharding, NamedSharding):
        local = sharding.shard_shape(shape)
    shared = {
        axis: -(-shape[axis] // max(entries[axis], 1))
        for axis in range(layer_axes, len(shape))
    }

    def tile_of(axis: int) -> int:
        longest = shared[axis] if 1 < entries[axis] < shape[axis] else _LONGEST_TILE
        return math.gcd(local[axis], shape[axis], longest)

    # Elements that share a scale lie along the axes that a product sums over.
    axes = sorted(shared, key=lambda a: (shared[a] == 1, entries[a] == 1, -a))
    tiles = ((axis, tile_of(axis)) for axis in axes)
    fitting = ((axis, tile) for axis, tile in tiles if tile and tile % 2 == 0)
    axis, tile = next(fitting, (len(shape) - 1, 2))
    return PackedLayout(array.qtype, array.dtype, axis - len(shape), tile, shape[axis])


def _scale_sharding(array: QArray, sharding: Any) -> NamedSharding | None:
    """The sharding of the codes where it divides the scales; XLA would gather them."""
    if not isinstance(sharding, NamedSharding) or not isinstance(sharding.mesh, Mesh):
        return None
    if AxisType.Explicit in sharding.mesh.axis_types:
        return None
    shards = sharding.shard_shape(array.shape)
    axes = zip(array.shape, shards, array.scale.shape, strict=True)
    divided = [bool(own and n % own == 0 and m % (n // own) == 0) for n, own, m in axes]
    spec = [*sharding.spec, *[None] * array.ndim][: array.ndim]
    spec = [name if fits else None for name, fits in zip(spec, divided, strict=True)]
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _quantize_packed(
    array: jax.Array, how: HowToQuantize, arrangement: _Arrangement
) -> PackedQArray:
    ranges, q = calibrate(array, how), quantize_array(array, how)
    scale, zero_point = q.scale, q.zero_point
    # The range tells whether all is 0, where the scale is 1 that others have, too.
    # Reading the codes again would take as long as finding them.
    if zero_point is None:
        extent, bound = ranges["absmax"], numerics.symmetric_bound(how.qtype)
    else:
        low, high = numerics.asymmetric_bound(how.qtype)
        extent, bound = ranges["max"] - ranges["min"], high - low
    matters = (scale != 1) | (extent > bound / 2)
    return _packed(q, arrangement, matters)


@functools.partial(jax.jit, static_argnums=1)
def _pack(array: QArray, arrangement: _Arrangement) -> PackedQArray:
    return _packed(array, arrangement, (array.scale != 1) | _has_values(array))


def _packed(
    array: QArray, arrangement: _Arrangement, matters: jax.Array
) -> PackedQArray:
    """Packs codes, and quantizes the scales; those that matter, in earnest."""
    layer_axes, layout, scale_sharding = arrangement
    axis, codes = array.ndim + layout.axis, array.qvalue
    zero_point = array.zero_point
    bits = packing.bits_of(codes, array.qtype)
    pad = [(0, 0)] * codes.ndim
    pad[axis] = (0, -codes.shape[axis] % layout.tile)
    bits = jnp.pad(bits, pad) if pad[axis][1] else bits
    before, after = bits.shape[:axis], bits.shape[axis + 1 :]
    pairs = bits.reshape(*before, -1, 2, layout.tile // 2, *after)
    low, high = (jax.lax.index_in_dim(pairs, i, axis + 1, False) for i in (0, 1))
    packed = (low | high << 4).reshape(*before, -1, *after)

    layers = array.shape[:layer_axes]
    scale = _by_layer(array.scale, layers).astype(jnp.float32)
    matters = _by_layer(matters, layers)
    scale_codes, steps, mean = _quantized_scale(scale, matters, layer_axes)
    if scale_sharding is not None:
        scale_codes = jax.lax.with_sharding_constraint(scale_codes, scale_sharding)
    if zero_point is not None:
        zero_point = _by_layer(zero_point, layers).astype(jnp.int8)
    return PackedQArray(packed, scale_codes, steps, mean, zero_point, layout)


def _codes(packed: jax.Array, layout: PackedLayout) -> jax.Array:
    """The bits of each code."""
    axis = packed.ndim + layout.axis
    before, after = packed.shape[:axis], packed.shape[axis + 1 :]
    # An element-wise operation, which XLA fuses with the decoding of the codes. Put
    # together from two halves they would be copied first.
    shifts = jnp.array([0, 4], jnp.uint8).reshape(2, *(1,) * (1 + len(after)))
    pairs = packed.reshape(*before, -1, 1, layout.tile // 2, *after)
    codes = (pairs >> shifts & 15).reshape(*before, -1, *after)
    return jax.lax.slice_in_dim(codes, 0, layout.length, axis=axis)


def _by_layer(part: jax.Array, layers: tuple[int, ...]) -> jax.Array:
    """A scale or the like with an entry for each layer."""
    return jnp.broadcast_to(part, (*layers, *part.shape[len(layers) :]))


def _has_values(array: QArray) -> jax.Array:
    """Of each scale, whether a code that it scales stands for anything but 0."""
    zero = 7 if array.qtype == "nf4" else 0

    def is_value(code, zero_point):
        return code != (
            jnp.asarray(zero, code.dtype) if zero_point is None else zero_point
        )

    values = tiling.elementwise(is_value, array.qvalue, array.zero_point)
    return tiling.reduced(jnp.any, values, array.scale.shape)


def _quantized_scale(
    scale: jax.Array, matters: jax.Array, layer_axes: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The codes of scales, the steps of their blocks, and the mean of each layer."""
    shape, layers = scale.shape, scale.shape[:layer_axes]
    sharding = jax.typeof(scale).sharding
    is_explicit = is_explicitly_sharded(scale)
    if is_explicit:
        # Blocks run across shards.
        whole = PartitionSpec(*sharding.spec[:layer_axes])
        scale, matters = (jax.sharding.reshard(x, whole) for x in (scale, matters))
    flat = scale.reshape(*layers, -1)
    matters = matters.reshape(flat.shape)
    count = jnp.maximum(matters.sum(-1), 1)
    mean = jnp.where(matters, flat, 0).sum(-1) / count
    centered = jnp.where(matters, flat - mean[..., None], 0)
    size = flat.shape[-1]
    pad = [(0, 0)] * layer_axes + [(0, -size % SCALE_BLOCK)]
    blocks = jnp.pad(centered, pad).reshape(*layers, -1, SCALE_BLOCK)
    steps = jnp.abs(blocks).max(-1) / _STEPS
    inverse = jnp.where(steps > 0, 1 / steps, 0)
    codes = jnp.clip(jnp.round(blocks * inverse[..., None]), -_STEPS, _STEPS)
    codes = codes.astype(jnp.int8).reshape(*layers, -1)[..., :size].reshape(shape)
    if is_explicit:
        codes = jax.sharding.reshard(codes, sharding.spec)
    return codes, steps, mean


def _unpacked_scale(array: PackedQArray) -> jax.Array:
    codes = array.scale_codes
    layers = codes.shape[: array.layer_axes]
    steps = jnp.repeat(array.scale_steps, SCALE_BLOCK, axis=-1)
    steps = steps[..., : math.prod(codes.shape[len(layers) :])].reshape(codes.shape)
    if is_explicitly_sharded(codes):
        steps = jax.sharding.reshard(steps, jax.typeof(codes).sharding.spec)
    mean = array.scale_mean.reshape(*layers, *(1,) * (codes.ndim - len(layers)))
    # Half a step may take a small scale below 0, where none was.
    scale = jnp.maximum(mean + codes.astype(jnp.float32) * steps, 0)
    return scale.astype(array.dtype)
