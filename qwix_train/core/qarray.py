"""Quantized arrays, and the way there and back.

``quantize`` is ``calibrate`` (the range), ``compute_scale_zero_point`` (the scale of
the range) and ``quantize_with_scale_zero_point`` (the codes).

NaN and infinities in an array whose range comes from the data make their whole tile
NaN or infinite when dequantized. With a range given beforehand an infinity saturates,
and NaN becomes 0 (-/+ scale in ``int1``, NaN in the float8 types): what trains on codes
makes it visible with `with_nan`, and fake quantization keeps it. The largest float32
values (within half a step of the largest) may dequantize to an infinity, since the
center of the outermost bucket may lie half a step outside the range.
"""

from collections.abc import Collection, Mapping
from typing import Any, TypeAlias

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from qwix_train.core import formats, numerics, scaling, shape_ops, tiling
from qwix_train.core.calibration import (
    calibrate,
    check_quantizable,
    compute_scale_zero_point,
)
from qwix_train.core.formats import CodedScale
from qwix_train.core.how import HowToQuantize, parse_calibration_method
from qwix_train.core.traced_once import traced_once


class NoArray:
    """What NumPy and JAX must not take for an array, nor for a sequence of arrays."""

    _instead = ""

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        """Says what this is.

        Raises:
            TypeError: Always.
        """
        raise TypeError(f"{type(self).__name__} is not an array. {self._instead}")

    __jax_array__ = __array__


@flax.struct.dataclass
class QArray(NoArray):
    """A quantized array: ``(qvalue - zero_point) * scale`` is about the original.

    Attributes:
        qvalue: The codes, in the shape of the original array.
        scale: The scales; per axis 1 entry, one for each index, or one for each tile
            (see `tiling`). Floats, or codes as the type has them (see `formats`).
        zero_point: The code that stands for 0, in a layout such as the scale's and
            in the dtype of ``qvalue``; None where that is code 0.
        qtype: The type of the codes, which may be narrower than their storage;
            taken from ``qvalue`` where it is not given.
        tensor_scale: What scales that are codes are multiplied by, in a layout, too;
            None for 1.
        float_dtype: The dtype of the dequantized array, where scales are codes; where
            they are floats it is theirs, unless it is given here.

    Raises:
        ValueError: ``qtype`` is not a quantized type.

    >>> from jax import numpy as jnp
    >>> from qwix_train import quantize
    >>> q = quantize(jnp.array([[0., 1., -127.5], [0., 2., 3.]]), 'int8')
    >>> q.shape, q.dtype, q.qtype == jnp.int8, q.scale.shape
    ((2, 3), dtype('float32'), True, (1, 1))
    >>> q.T[1].qvalue.tolist()
    [1, 2]
    """

    qvalue: jax.Array
    scale: jax.Array
    zero_point: jax.Array | None = None
    qtype: Any = flax.struct.field(pytree_node=False, default=None)
    tensor_scale: jax.Array | None = None
    float_dtype: Any = flax.struct.field(pytree_node=False, default=None)

    _instead = "The array that its codes stand for is dequantize(array)."

    def __post_init__(self) -> None:
        qtype = self.qvalue.dtype if self.qtype is None else self.qtype
        object.__setattr__(self, "qtype", numerics.canonical_qtype(qtype))
        if self.float_dtype is not None:
            object.__setattr__(self, "float_dtype", jnp.dtype(self.float_dtype))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the original array."""
        return self.qvalue.shape

    @property
    def ndim(self) -> int:
        """The rank of the original array."""
        return self.qvalue.ndim

    @property
    def size(self) -> int:
        """The number of elements."""
        return self.qvalue.size

    @property
    def dtype(self) -> Any:
        """The dtype of the dequantized array."""
        return self.scale.dtype if self.float_dtype is None else self.float_dtype

    @property
    def layouts(self) -> dict[str, jax.Array]:
        """Scales and zero points by name: what has an entry for many elements."""
        names = ("scale", "zero_point", "tensor_scale")
        parts = {name: getattr(self, name) for name in names}
        return {name: part for name, part in parts.items() if part is not None}

    @property
    def float_scale(self) -> jax.Array:
        """The scales as floats, in the layout of `scale`: float32 if they are codes."""
        return formats.scale_value(self.scale, self.tensor_scale)

    @property
    def nbytes(self) -> int:
        """The bytes that codes (packed), scales and zero points take."""
        bits = numerics.qtype_bits(self.qtype)
        zeros = 0 if self.zero_point is None else self.zero_point.size
        codes = -(-self.size * bits // 8) + -(-zeros * bits // 8)
        of_tensor = 0 if self.tensor_scale is None else self.tensor_scale.nbytes
        return codes + self.scale.nbytes + of_tensor

    @property
    def scale_tile_shape(self) -> tuple[int, ...]:
        """The number of elements along each axis that share a scale."""
        return tiling.tile_sizes(self.shape, self.scale.shape)

    @property
    def zero_point_tile_shape(self) -> tuple[int, ...] | None:
        """The number of elements along each axis that share a zero point."""
        if self.zero_point is None:
            return None
        return tiling.tile_sizes(self.shape, self.zero_point.shape)

    @property
    def T(self) -> "QArray":
        """The array with its axes in reverse order."""
        return self.transpose()

    @property
    def mT(self) -> "QArray":
        """The array with its last two axes swapped."""
        return self.swapaxes(-1, -2)

    def __len__(self) -> int:
        return len(self.qvalue)

    def __getitem__(self, index: Any) -> "QArray":
        return shape_ops.take(self, index)

    def transpose(self, *axes: Any) -> "QArray":
        """Permutes the axes, as `jax.Array.transpose`."""
        return jax.tree.map(lambda x: x.transpose(*axes), self)

    def swapaxes(self, axis1: int, axis2: int) -> "QArray":
        """Swaps two axes."""
        return jax.tree.map(lambda x: x.swapaxes(axis1, axis2), self)

    def reshape(self, *shape: Any) -> "QArray":
        """Reshapes, where each element keeps its scale.

        Raises:
            ValueError: The new shape would separate elements from their scale.
        """
        return shape_ops.reshape(self, *shape)

    def astype(self, dtype: Any) -> "QArray":
        """Changes the dtype that the array dequantizes to; the codes stay.

        Raises:
            ValueError: The dtype is not a float dtype of at least 16 bits.
        """
        if not numerics.is_quantizable(dtype):
            raise ValueError(f"A QArray dequantizes to floats, not to {dtype}.")
        if formats.is_coded(self.scale):
            return self.replace(float_dtype=dtype)  # pyright: ignore
        scale = self.scale.astype(dtype)
        return self.replace(scale=scale, float_dtype=None)  # pyright: ignore


MaybeQArray: TypeAlias = jax.Array | QArray


_READ_IN_FLOAT = (
    "This param is quantized, and is read by code that does not know of it: a model "
    "that was not quantized, a method that was not given to quantize_model(..., "
    "methods=...), or a part of the model that was called by itself. What it holds is "
    "`param.array`, and the floats that it stands for are dequantize(param.array)."
)


@flax.struct.dataclass
class WithAux(NoArray):
    """A quantized array in a tree of params, with how it was quantized.

    Attributes:
        array: The array: a `QArray` or, packed, a `PackedQArray`; codes alone or the
            range of an activation in some trees.
        how: How it was quantized.
        learned_as: Of a range that is not known yet: the path among float params
            under which it is learned, where that is the one of another operation.
    """

    array: Any
    how: HowToQuantize = flax.struct.field(pytree_node=False)
    learned_as: tuple[str, ...] = flax.struct.field(
        pytree_node=False, default=(), repr=False
    )

    _instead = _READ_IN_FLOAT

    def __getitem__(self, index: Any) -> Any:
        """Says why a module finds this in the place of its array.

        Raises:
            TypeError: Always.
        """
        raise TypeError(_READ_IN_FLOAT)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the original array."""
        return self.array.shape

    @property
    def ndim(self) -> int:
        """The rank of the original array."""
        return self.array.ndim

    @property
    def dtype(self) -> Any:
        """The dtype of the dequantized array."""
        return self.array.dtype


def validate_qarray(array: QArray) -> None:
    """Checks that the parts of a QArray fit together.

    Raises:
        ValueError: A shape or dtype does not fit; the message names it.
    """
    for name, part in array.layouts.items():
        if not tiling.is_layout(array.shape, part.shape):
            raise ValueError(
                f"The {name} of shape {part.shape} does not fit codes of shape "
                f"{array.shape}: along each axis it has 1 entry, or one for each "
                "index or tile."
            )
    if array.qvalue.dtype.itemsize > 1:
        raise ValueError(f"Codes of dtype {array.qvalue.dtype} are wider than a byte.")
    coded = formats.is_coded(array.scale)
    if coded and not numerics.format_of(array.qtype).coded_scales:
        raise ValueError(f"Scales of {array.qtype} are no codes ({array.scale.dtype}).")
    if coded and array.float_dtype is None:
        raise ValueError(
            f"Scales of dtype {array.scale.dtype} do not say the dtype of the "
            "dequantized array: give float_dtype, such as jnp.float32."
        )
    if not coded and not numerics.is_quantizable(array.scale.dtype):
        raise ValueError(f"A scale cannot be of dtype {array.scale.dtype}.")
    if not coded and array.tensor_scale is not None:
        raise ValueError("A tensor_scale belongs to scales that are codes.")
    if array.zero_point is not None and array.zero_point.dtype != array.qvalue.dtype:
        raise ValueError(
            f"The zero point is of dtype {array.zero_point.dtype}, and the codes are "
            f"of dtype {array.qvalue.dtype}."
        )


def _check_codes(array: QArray) -> None:
    """Checks the codes of a QArray that is not traced, as far as they are here."""
    codes = array.qvalue
    if isinstance(codes, Tracer) or not getattr(codes, "is_fully_addressable", True):
        return
    if numerics.format_of(array.qtype).integers is None:
        return
    low, high = numerics.code_range(array.qtype)
    held = jnp.iinfo(array.qvalue.dtype)
    if array.qvalue.size and (held.min < low or held.max > high):
        codes = np.asarray(array.qvalue)
        for code in (codes.min(), codes.max()):
            if not low <= code <= high:
                raise ValueError(
                    f"A code is {code}, and {numerics.qtype_name(array.qtype)} has "
                    f"those from {low} to {high}."
                )


def quantize_with_scale_zero_point(
    array: jax.Array,
    qtype: numerics.QType,
    scale: jax.Array | CodedScale,
    zero_point: jax.Array | None,
    noise_fn: numerics.NoiseFn | None = None,
) -> QArray:
    """Quantizes an array with a scale and zero point that are given.

    Args:
        array: Any shape, a float dtype.
        qtype: The type.
        scale: In a layout for the array; cast to the dtype of the array by
            `numerics.scale_in_dtype`, unless it is coded.
        zero_point: None, or in the shape of the scale.
        noise_fn: Noise for stochastic rounding.

    Raises:
        ValueError: A dtype, shape or type does not fit.
    """
    check_quantizable(array)
    if isinstance(scale, CodedScale):
        y = scaling.scaled_values(array, scale.value, None)
        qvalue = numerics.round_to_qtype(y, qtype, noise_fn, dtype=array.dtype)
        return QArray(
            qvalue, scale.codes, None, qtype, scale.tensor, float_dtype=array.dtype
        )
    if zero_point is not None and zero_point.shape != scale.shape:
        raise ValueError(
            f"The zero point of shape {zero_point.shape} does not fit the scale of "
            f"shape {scale.shape}."
        )
    values = numerics.scale_in_dtype(jnp.asarray(scale), array.dtype)
    y = scaling.scaled_values(array, values, zero_point)
    qvalue = numerics.round_to_qtype(y, qtype, noise_fn, dtype=array.dtype)
    return QArray(qvalue, values, zero_point, qtype)


def with_nan(quantized: QArray, array: jax.Array) -> QArray:
    """Gives tiles that hold NaN the scale NaN, as a range of their own would have.

    Args:
        quantized: The quantized array.
        array: The array that it was.

    >>> x = jnp.array([[1., jnp.nan], [2., 3.]])
    >>> q = quantize(x, 'int8', channelwise_axes=[0], calibration_method='minmax')
    >>> dequantize(with_nan(q, x)).round(1).tolist()
    [[nan, nan], [2.0, 3.0]]
    """
    found = tiling.reduced(jnp.any, jnp.isnan(array), quantized.scale.shape)
    scale = quantized.scale
    scale = jnp.where(found, jnp.asarray(jnp.nan, scale.dtype), scale)
    return quantized.replace(scale=scale)  # pyright: ignore


def quantize_array(array: jax.Array, how: HowToQuantize) -> QArray:
    """Quantizes an array with the range that ``how`` says.

    Raises:
        ValueError: ``how`` does not fit the array.

    >>> how = HowToQuantize(qtype='int4', calibration_method='minmax')
    >>> quantize_array(jnp.array([0., 1., 15.]), how).zero_point.tolist()
    [-8]
    """
    check_quantizable(array)
    # Noise is not to be cached: each call may have its own. And XLA adds what a mean is
    # taken of in another order where it fuses the sum with what follows.
    method, _ = parse_calibration_method(how.calibration_method)
    whole = how.noise_fn is None and method not in ("rms", "absmean")
    return (_cached_quantize if whole else _quantize)(array, how)


def _quantize(array: jax.Array, how: HowToQuantize) -> QArray:
    scale, zero_point = compute_scale_zero_point(calibrate(array, how), how.qtype)
    return quantize_with_scale_zero_point(
        array, how.qtype, scale, zero_point, how.noise_fn
    )


def quantize(
    array: jax.Array,
    qtype: numerics.QType,
    *,
    channelwise_axes: Collection[int] = (),
    tiled_axes: Mapping[int, int | float] | None = None,
    calibration_method: str = "absmax",
    scale_dtype: Any = None,
) -> QArray:
    """Quantizes an array.

    Args:
        array: Any shape, a float dtype.
        qtype: The type of the codes, such as ``'int4'`` or ``jnp.int8``.
        channelwise_axes: Axes along which every index has its own scale.
        tiled_axes: A mapping from an axis to its tile size, see `HowToQuantize`.
        calibration_method: How the range is found, see `HowToQuantize`.
        scale_dtype: The dtype of the dequantized array, and of the scale where that is
            no code; that of the array if None.

    Raises:
        ValueError: An argument is wrong, or does not fit the array.

    >>> from jax import numpy as jnp
    >>> from qwix_train import dequantize, quantize
    >>> q = quantize(jnp.array([0., 0.4, 1.5]), 'int4', calibration_method='minmax')
    >>> q.qvalue.tolist(), [round(x, 3) for x in dequantize(q).tolist()]
    ([-8, -4, 7], [0.0, 0.4, 1.5])
    """
    how = HowToQuantize(
        qtype=qtype,
        channelwise_axes=channelwise_axes,
        tiled_axes=tiled_axes or {},
        calibration_method=calibration_method,
    )
    coded = numerics.format_of(qtype).coded_scales
    if scale_dtype is None or scale_dtype != jnp.float16 or coded:
        qarray = quantize_array(array, how)
        return qarray if scale_dtype is None else qarray.astype(scale_dtype)
    # It may change a scale by a large part. Codes are to fit the one that is kept.
    scale, zero_point = compute_scale_zero_point(calibrate(array, how), qtype)
    scale = numerics.scale_in_dtype(scale, scale_dtype)
    return quantize_with_scale_zero_point(array, qtype, scale, zero_point).astype(
        scale_dtype
    )


def dequantize(array: QArray) -> jax.Array:
    """Returns ``(qvalue - zero_point) * scale``, in the dtype ``array.dtype``.

    NaN and infinite scales are those of an array that held such values, and show in
    the result; negative ones are those of an array that was negated. Codes that no
    array has are refused where values are at hand, which they are not while a function
    is traced.

    Raises:
        TypeError: It is not a QArray.
        ValueError: The parts of the array do not fit together, or a code is outside of
            its type.

    >>> from jax import numpy as jnp
    >>> from qwix_train import QArray, dequantize
    >>> dequantize(QArray(jnp.array([100], jnp.int8), jnp.array([0.5]), qtype='int4'))
    Traceback (most recent call last):
    ...
    ValueError: A code is 100, and int4 has those from -8 to 7.
    """
    if not isinstance(array, QArray):
        held = " A quantized param holds one: param.array." * isinstance(array, WithAux)
        raise TypeError(f"Expected a QArray, got {type(array).__name__}.{held}")
    validate_qarray(array)
    _check_codes(array)
    return _cached_dequantize(array, not isinstance(array.qvalue, Tracer))


def dequantize_stored(array: QArray) -> jax.Array:
    """`dequantize` in a program that reads the codes, and does not compute them.

    The values are the same. See `numerics.codes_to_float`.
    """
    return _cached_dequantize(array, True)


def _dequantize(array: QArray, in_memory: bool) -> jax.Array:
    levels = numerics.codes_to_float(
        array.qvalue, array.qtype, array.dtype, in_memory=in_memory
    )
    parts = array.float_scale, array.zero_point
    return scaling.rescaled_values(levels, *parts, array.dtype)


_cached_quantize = traced_once(1)(_quantize)
_cached_dequantize = traced_once(1)(_dequantize)
