"""Types with blocks, as the tensors of a compressed-tensors layer.

=========  ========================  ==========================  =====================
type       format                    codes                       ``weight_scale``
=========  ========================  ==========================  =====================
``nvfp4``  ``nvfp4-pack-quantized``  ``weight_packed``, uint8    ``[out, in / 16]``,
                                     ``[out, in / 2]``           float8_e4m3fn
``mxfp4``  ``mxfp4-pack-quantized``  the same                    ``[out, in / 32]``,
                                                                 uint8: E8M0
``mxfp6``  ``mxfp6-pack-quantized``  ``weight_packed``, uint8    the same
                                     ``[out, 3 * in / 4]``
``mxfp8``  ``mxfp8-quantized``       ``weight``, float8_e4m3fn   the same
=========  ========================  ==========================  =====================

Codes that share a byte fill it from the lowest bit on. nvfp4 has a
``weight_global_scale``, too. Scales are divided by it: it is the *reciprocal* of
``QArray.tensor_scale``, in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from qwix_train.core import formats, numerics, packing, tiling
from qwix_train.core.qarray import QArray

_FORMATS = {
    "nvfp4": "nvfp4-pack-quantized",
    "mxfp4": "mxfp4-pack-quantized",
    "mxfp6": "mxfp6-pack-quantized",
    "mxfp8": "mxfp8-quantized",
}
TYPES = tuple(_FORMATS)
"""The types."""


def type_with_codes_of(qtype: Any) -> str | None:
    """Returns the type of `TYPES` that has the codes and scales of a type, if one has.

    How scales were rounded does not show in a file.

    >>> type_with_codes_of('mxfp4_floor'), type_with_codes_of('mxfp6_e3m2')
    ('mxfp4', None)
    """
    name = numerics.qtype_name(qtype).removesuffix("_floor")
    return name if name in _FORMATS else None


def layer_format(name: str) -> str:
    """Returns the format that the codes of a type of `TYPES` are stored in."""
    return _FORMATS[name]


def encode(array: QArray) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Returns the tensors of a matrix and the ``weights`` entry of their config.

    Args:
        array: A matrix ``[out, in]`` of one of these types.

    Raises:
        ValueError: Its blocks are not parts of rows, or it has several tensor scales.
    """
    name = type_with_codes_of(array.qtype)
    assert name is not None
    block = numerics.format_of(name).block
    scale, tensor_scale = np.asarray(array.scale), array.tensor_scale
    whole = not tiling.padded_axes(array.shape, scale.shape)
    if not whole or array.scale_tile_shape != (1, block):
        raise ValueError(
            f"{name} is stored with one scale for {block} elements of a row, and it "
            f"has scales of shape {scale.shape} for a matrix [out, in] of shape "
            f"{tuple(array.shape)}"
        )
    tensors = {}
    if tensor_scale is None:
        tensors["weight_scale"] = scale.view(np.uint8)
    else:
        tensors["weight_scale"] = scale
        tensor_scale = np.asarray(tensor_scale)
        if tensor_scale.size != 1:
            raise ValueError(f"its tensor_scale has shape {tensor_scale.shape}, not 1")
        tensors["weight_global_scale"] = 1 / tensor_scale.reshape(1)
    if numerics.qtype_bits(name) < 8:
        codes = jnp.asarray(array.qvalue)
        tensors["weight_packed"] = np.asarray(packing.pack(codes, name))
    else:
        tensors["weight"] = np.asarray(array.qvalue)
    return tensors, {
        "num_bits": numerics.qtype_bits(name),
        "type": "float",
        "symmetric": True,
        "dynamic": False,
        "strategy": "group" if tensor_scale is None else "tensor_group",
        "group_size": block,
        "scale_dtype": f"torch.{tensors['weight_scale'].dtype}",
    }


def find(tensors: Mapping[str, np.ndarray], args: Mapping[str, Any]) -> str | None:
    """Returns the type of a layer by its tensors; None if that is not in `TYPES`.

    Args:
        tensors: The tensors, by name.
        args: The ``weights`` entry of the config.
    """
    if "weight_global_scale" in tensors:
        return "nvfp4"
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    if dtypes.get("weight_scale") != np.uint8:
        return None
    if dtypes.get("weight_packed") == np.uint8:
        return {4: "mxfp4", 6: "mxfp6"}.get(args.get("num_bits", 4))
    return "mxfp8" if dtypes.get("weight") == jnp.float8_e4m3fn else None


def decode(tensors: Mapping[str, np.ndarray], name: str, dtype: Any) -> QArray:
    """Returns the matrix ``[out, in]`` of a layer.

    Args:
        tensors: The tensors, by name.
        name: What `find` returned.
        dtype: The dtype of the dequantized array.

    Raises:
        ValueError: The tensors do not fit together.
    """
    entry = numerics.format_of(name)
    assert entry.block is not None
    packed = entry.bits < 8
    part = "weight_packed" if packed else "weight"
    wanted = {part: jnp.uint8 if packed else entry.storage}
    wanted["weight_scale"] = jnp.uint8
    if name == "nvfp4":
        wanted |= {"weight_scale": formats.E4M3, "weight_global_scale": jnp.float32}
    for key, kind in wanted.items():
        if key not in tensors or tensors[key].dtype != kind:
            found = tensors[key].dtype if key in tensors else "missing"
            raise ValueError(
                f"{name} has a {key} of dtype {jnp.dtype(kind)}, and that of this "
                f"layer is {found}"
            )
    if "weight_zero_point" in tensors:
        raise ValueError(f"zero points of {name} are not supported")
    codes, scale = tensors[part], tensors["weight_scale"]
    columns = codes.shape[-1] * 8 // entry.bits
    if codes.ndim != 2 or scale.shape != (len(codes), columns / entry.block):
        raise ValueError(
            f"scales of shape {scale.shape} do not fit {part} of shape {codes.shape}: "
            f"{name} has one for {entry.block} elements of a row"
        )
    tensor_scale = None
    if name == "nvfp4":
        reciprocal = tensors["weight_global_scale"]
        if reciprocal.size != 1:
            raise ValueError(f"its weight_global_scale has shape {reciprocal.shape}")
        with np.errstate(divide="ignore"):
            tensor_scale = jnp.asarray(1 / reciprocal.reshape(1, 1))
    else:
        scale = scale.view(formats.E8M0)
    qvalue = jnp.asarray(codes)
    if packed:
        qvalue = packing.unpack(qvalue, name, columns)
    return QArray(
        qvalue, jnp.asarray(scale), None, name, tensor_scale, float_dtype=dtype
    )
