"""One quantized matrix, as the tensors of a compressed-tensors layer.

The matrix is stored as PyTorch does, ``[out, in]``. Scales have the layout that the
``strategy`` of the config names:

=========  ==========================================  ======================
strategy   ``weight_scale``                            shared by
=========  ==========================================  ======================
tensor     ``[1]``                                     all
channel    ``[out, 1]``                                a row
group      ``[out, in / group_size]``                  part of a row
block      ``[ceil(out / rows), ceil(in / columns)]``  a rectangle
=========  ==========================================  ======================

The codes are ``weight`` (int8 or float8), or ``weight_packed`` (see `int32_packing`)
with ``weight_shape``. ``weight_zero_point`` has the layout of the scales. If codes are
packed and scales are for rows or groups, zero points are packed, too, along the rows.
Types with blocks, whose scales are codes, are in `compressed_blocks`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from qwix_train.core import numerics, tiling
from qwix_train.core.how import HowToQuantize
from qwix_train.core.qarray import QArray, WithAux
from qwix_train.ptq import compressed_blocks, compressed_config, int32_packing

PARTS = (
    "weight",
    "weight_packed",
    "weight_scale",
    "weight_scale_inv",
    "weight_global_scale",
    "weight_zero_point",
    "weight_shape",
)
"""What a layer may consist of. ``weight_scale_inv`` is a ``weight_scale``, too."""


def layer_format(qtype: Any, int8_format: str) -> str:
    """Returns the format in which the codes of a type are stored.

    Args:
        qtype: The type.
        int8_format: ``int-quantized`` or ``pack-quantized``, for int8.

    Raises:
        ValueError: The format has no such type.
    """
    name = numerics.qtype_name(qtype)
    if name == "float8_e4m3fn":
        return "float-quantized"
    if name == "int8":
        return int8_format
    block_type = compressed_blocks.type_with_codes_of(name)
    if block_type is not None:
        return compressed_blocks.layer_format(block_type)
    if name in ("int1", "ternary") or not numerics.is_integer_qtype(name):
        raise ValueError(
            f"compressed-tensors has no type {name}; it takes int2 to int8, "
            f"float8_e4m3fn, {', '.join(compressed_blocks.TYPES)}"
        )
    packed = numerics.qtype_bits(name) in int32_packing.PACKED_BITS
    return "pack-quantized" if packed else "int-quantized"


def encode_layer(
    array: QArray, format: str
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Returns the tensors of a matrix and the ``weights`` entry of their config.

    Args:
        array: A matrix ``[out, in]``.
        format: The format, as `layer_format` returns it.

    Raises:
        ValueError: The array is not a matrix, or the format has no such layout of
            scales.
    """
    if array.ndim != 2:
        raise ValueError(
            f"it has shape {tuple(array.shape)}, and the format holds matrices alone. "
            "Stacks of layers, and axes of heads, become matrices by `mapping`, as "
            "ptq.hugging_face.mapping gives it; a kernel of a convolution does not"
        )
    scale = np.asarray(array.scale)
    check_scale(scale)
    if numerics.format_of(array.qtype).coded_scales:
        if array.tensor_scale is not None:
            check_scale(np.asarray(array.tensor_scale))
        return compressed_blocks.encode(array)
    layout = _layout_args(array.shape, scale.shape)
    is_float = format == "float-quantized"
    bits = numerics.qtype_bits(array.qtype)
    args = {
        "num_bits": bits,
        "type": "float" if is_float else "int",
        "symmetric": array.zero_point is None,
        "dynamic": False,
        **layout,
    }
    per_tensor = layout["strategy"] == "tensor"
    codes = np.asarray(array.qvalue)
    if not is_float:
        check_codes(codes, bits, "code")
    tensors = {"weight_scale": scale.reshape(1) if per_tensor else scale}
    if format == "pack-quantized":
        tensors["weight_packed"] = int32_packing.pack(codes.astype(np.int8), bits)
        tensors["weight_shape"] = np.array(array.shape, np.int64)
    else:
        tensors["weight"] = codes if is_float else codes.astype(np.int8)
    if array.zero_point is not None:
        zero = np.asarray(array.zero_point)
        check_codes(zero, bits, "zero point")
        zero = np.broadcast_to(zero.astype(np.int8), scale.shape)
        if format == "pack-quantized" and layout["strategy"] in ("channel", "group"):
            zero = int32_packing.pack(np.ascontiguousarray(zero.T), bits).T
        tensors["weight_zero_point"] = zero.reshape(1) if per_tensor else zero
    return tensors, args


def _layout_args(shape: tuple[int, ...], scale_shape: tuple[int, ...]) -> dict:
    if tiling.padded_axes(shape, scale_shape):
        raise ValueError(
            f"its tiles are of unequal length (shape [out, in] {shape}, scales "
            f"{scale_shape}); choose a tile size that divides the axis"
        )
    rows, columns = tiling.tile_sizes(shape, scale_shape)
    if scale_shape == (1, 1):
        return {"strategy": "tensor"}
    if rows == 1:
        if scale_shape[1] == 1:
            return {"strategy": "channel"}
        return {"strategy": "group", "group_size": columns}
    return {"strategy": "block", "block_structure": [rows, columns]}


def decode_layer(
    tensors: Mapping[str, np.ndarray],
    args: Mapping[str, Any] | None,
    dtype: Any = jnp.float32,
) -> WithAux:
    """Returns the matrix ``[out, in]`` of a layer.

    Args:
        tensors: The tensors, by their names in `PARTS`.
        args: The ``weights`` entry of the config; None if there is no config.
        dtype: The dtype of the dequantized matrix, where scales do not say it.

    Raises:
        ValueError: The tensors are of another format, or do not fit together.
    """
    args = args or {}
    unknown = sorted(set(tensors) - set(PARTS))
    if unknown:
        raise ValueError(f"its scheme is not supported: it has {', '.join(unknown)}")
    if args.get("actorder") in ("group", "dynamic", True):
        raise ValueError("columns that were reordered by activation are not supported")
    block_type = compressed_blocks.find(tensors, args)
    if block_type is not None:
        array = compressed_blocks.decode(tensors, block_type, dtype)
        for part in array.layouts.values():
            check_scale(np.asarray(part))
        return WithAux(array, _how(array, "absmax"))
    codes, bits = _codes(tensors, args)
    is_float = codes.dtype != np.int8
    qtype = codes.dtype.name if is_float else f"int{bits}"
    scale = tensors.get("weight_scale", tensors.get("weight_scale_inv"))
    if scale is None:
        raise ValueError("it has no weight_scale")
    if not numerics.is_quantizable(scale.dtype):
        raise ValueError(f"scales of dtype {scale.dtype} are not supported")
    check_scale(scale)
    scale = _as_layout(scale, codes.shape, args)
    zero = _zero_point(tensors, args, bits, codes.shape, scale.shape)
    if zero is not None and is_float:
        raise ValueError("zero points of float8 codes are not supported")
    stored = numerics.storage_dtype(qtype)
    qvalue = jnp.asarray(codes).astype(stored)
    zero_point = None if zero is None else jnp.asarray(zero).astype(stored)
    array = QArray(qvalue, jnp.asarray(scale), zero_point, qtype)
    return WithAux(array, _how(array, "absmax" if zero is None else "minmax"))


def _how(array: QArray, method: str) -> HowToQuantize:
    counts = enumerate(zip(array.shape, array.scale.shape, strict=True))
    entries = [(axis, n, s) for axis, (n, s) in counts if s > 1]
    return HowToQuantize(
        qtype=array.qtype,
        channelwise_axes=[axis for axis, n, s in entries if s == n],
        tiled_axes={axis: n // s for axis, n, s in entries if s != n},
        calibration_method=method,
    )


def check_codes(codes: np.ndarray, bits: int, what: str) -> None:
    """Checks that codes or zero points are integers that so many bits hold.

    Raises:
        ValueError: They are not; the message says what they are, and one of them.
    """
    low, high = numerics.code_range(f"int{bits}")
    values = codes if codes.dtype == np.int8 else codes.astype(np.float64)
    wrong = values[~((values >= low) & (values <= high) & (values == np.rint(values)))]
    if wrong.size:
        raise ValueError(
            f"it has the {what} {wrong[0]:g}, and {bits} bits hold {low} to {high}"
        )


def check_scale(scale: np.ndarray) -> None:
    """Checks that scales are finite and not negative.

    Raises:
        ValueError: They are not; the message has one of them.
    """
    values = scale.astype(np.float64)
    wrong = values[~(np.isfinite(values) & (values >= 0))]
    if wrong.size:
        raise ValueError(f"it has a scale of {wrong[0]:g}")


def _codes(
    tensors: Mapping[str, np.ndarray], args: Mapping[str, Any]
) -> tuple[np.ndarray, int]:
    """Returns the codes, unpacked, and their bits."""
    if "weight_packed" not in tensors:
        if "weight" not in tensors:
            raise ValueError("it has scales, but no weight")
        codes = tensors["weight"]
        if codes.dtype.name not in ("int8", "float8_e4m3fn", "float8_e5m2"):
            raise ValueError(
                f"its weight is of dtype {codes.dtype}, not int8 or float8, though "
                "it has scales: it was not compressed"
            )
        bits = int(args.get("num_bits", 8))
        if codes.dtype == np.int8:
            check_codes(codes, bits, "code")
    else:
        packed = tensors["weight_packed"]
        if args.get("type", "int") != "int" or packed.dtype != np.int32:
            raise ValueError(
                f"packed {args.get('num_bits')}-bit codes of type {args.get('type')} "
                f"({packed.dtype}) are not supported"
            )
        if "num_bits" not in args or "weight_shape" not in tensors:
            raise ValueError(
                "its codes are packed, which needs num_bits in the "
                "quantization_config of config.json, and weight_shape"
            )
        bits = int(args["num_bits"])
        if bits not in int32_packing.PACKED_BITS:
            raise ValueError(
                f"packed codes of {bits} bits are not supported, only of "
                f"{', '.join(map(str, int32_packing.PACKED_BITS))}: how others are "
                "packed differs between releases"
            )
        out, columns = (int(n) for n in tensors["weight_shape"])
        if packed.shape != (out, -(-columns * bits // 32)):
            raise ValueError(
                f"weight_packed of shape {packed.shape} does not hold a matrix of "
                f"shape {(out, columns)} in {bits} bits"
            )
        codes = int32_packing.unpack(packed, bits, columns)
    if codes.ndim != 2:
        raise ValueError(f"its weight has shape {codes.shape}; it must be a matrix")
    return codes, bits


def _as_layout(
    part: np.ndarray, shape: tuple[int, ...], args: Mapping[str, Any]
) -> np.ndarray:
    """Returns scales or zero points in a layout of `tiling` for a matrix."""
    given = part.shape
    if part.size == 1:
        part = part.reshape(1, 1)
    elif part.shape == shape[:1]:
        part = part[:, None]
    sizes = [None, None]
    match args.get("strategy"):
        case "tensor":
            sizes = [*shape]
        case "channel":
            sizes = [1, shape[1]]
        case "group":
            sizes = [1, args["group_size"]]
        case "block" if args.get("block_structure"):
            sizes = compressed_config.block_sizes(args["block_structure"])
    fits = part.ndim == 2
    for axis in range(part.ndim) if fits else ():
        n, count, size = shape[axis], part.shape[axis], sizes[axis]
        if size is None:
            fits &= count > 0 and n % count == 0
        elif count != -(-n // max(size, 1)):
            fits = False
        elif n % size and count > 1:
            # Here the last block is the shorter one by more than a layout allows.
            part = np.take(part, np.arange(n) // size, axis)
    if not fits:
        raise ValueError(
            f"scales or zero points of shape {given} do not fit a matrix of shape "
            f"{shape} with the weights {json.dumps(dict(args), default=str)}"
        )
    return part


def _zero_point(
    tensors: Mapping[str, np.ndarray],
    args: Mapping[str, Any],
    bits: int,
    shape: tuple[int, ...],
    scale_shape: tuple[int, ...],
) -> np.ndarray | None:
    zero = tensors.get("weight_zero_point")
    if zero is None:
        if args.get("symmetric", True):
            return None
        raise ValueError("it is asymmetric, but has no weight_zero_point")
    if zero.dtype == np.int32 and "weight_packed" in tensors:
        if zero.shape != (-(-shape[0] * bits // 32), scale_shape[1]):
            raise ValueError(f"its packed zero points have shape {zero.shape}")
        zero = int32_packing.unpack(zero.T, bits, shape[0]).T
    if args.get("symmetric", True):
        # Some files hold the zeros of a symmetric scheme.
        if np.any(zero.astype(np.float32)):
            raise ValueError("it is symmetric, but has zero points other than 0")
        return None
    check_codes(zero, bits, "zero point")
    return _as_layout(zero, shape, args)
