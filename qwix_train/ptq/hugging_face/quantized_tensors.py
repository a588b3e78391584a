"""Tensors that are quantized in the checkpoint, and keep their codes and scales.

=====================  ==========================================================
in the file            what it is
=====================  ==========================================================
``X``,                 fp8 of DeepSeek-V3 (arXiv 2412.19437): a matrix of
``X_scale_inv``        float8_e4m3fn, and what each block of 128 x 128 is
                       *multiplied* by; ``weight_block_size`` in ``config.json``
``X_blocks``,          mxfp4 of gpt-oss: uint8 ``[expert, out, in / 32, 16]``, two
``X_scales``           codes in a byte, the first in the lower bits, and uint8
                       ``[expert, out, in / 32]``, E8M0
=====================  ==========================================================

Here each pair is one tensor ``X``, as in the library transformers, when that
dequantizes them. The tensor of gpt-oss has the shape ``[expert, in, out]``.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeAlias

import jax.numpy as jnp
import numpy as np

from qwix_train.core import formats, numerics, packing
from qwix_train.core.errors import located
from qwix_train.core.how import HowToQuantize
from qwix_train.core.qarray import QArray, dequantize
from qwix_train.files import json_text
from qwix_train.ptq import compressed_config, compressed_layers, safetensors_files
from qwix_train.ptq.safetensors_files import TensorInFile

_SCALE_INV, _BLOCKS, _SCALES = "_scale_inv", "_blocks", "_scales"


@dataclasses.dataclass(frozen=True)
class _QuantizedTensor:
    """A tensor whose codes and scales are not read yet.

    Attributes:
        name: Its name.
        codes: The codes.
        scales: The scales.
    """

    name: str
    codes: TensorInFile
    scales: TensorInFile
    dtype: ClassVar[Any] = jnp.dtype(jnp.float32)
    """The dtype of its values."""

    def array(self) -> QArray:
        """Returns the codes and scales.

        Raises:
            ValueError: They do not fit together.
        """
        raise NotImplementedError

    def mapped(self) -> np.ndarray:
        """Returns the values, as `TensorInFile.mapped` does."""
        return np.asarray(dequantize(self.array().astype(self.dtype)))

    def verify(self) -> None:
        """Checks codes and scales, as `TensorInFile.verify` does."""
        self.codes.verify()
        self.scales.verify()


@dataclasses.dataclass(frozen=True)
class _Float8(_QuantizedTensor):
    """A matrix of DeepSeek-V3.

    Attributes:
        args: The entries of the config for it.
    """

    args: Mapping[str, Any]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def qtype(self) -> str:
        return self.codes.dtype.name

    @property
    def scale_dtype(self) -> Any:
        return self.scales.dtype

    def array(self) -> QArray:
        parts = {"weight": self.codes, "weight_scale_inv": self.scales}
        tensors = {name: part.mapped() for name, part in parts.items()}
        return compressed_layers.decode_layer(tensors, self.args).array


@dataclasses.dataclass(frozen=True)
class _Mxfp4(_QuantizedTensor):
    """The experts of gpt-oss."""

    qtype: ClassVar[str] = "mxfp4"
    scale_dtype: ClassVar[Any] = formats.E8M0

    @property
    def shape(self) -> tuple[int, ...]:
        *outer, out, groups, width = self.codes.shape
        return (*outer, groups * width * 2, out)

    def array(self) -> QArray:
        *outer, groups, width = self.codes.shape
        block = numerics.format_of("mxfp4").block
        if self.scales.shape != (*outer, groups) or 2 * width != block:
            raise ValueError(
                f"{_BLOCKS} of shape {self.codes.shape} do not fit {_SCALES} of shape "
                f"{self.scales.shape}: a group is {block} codes in 16 bytes, and one "
                "scale"
            )
        scale = self.scales.mapped()
        if (scale == 255).any():
            raise ValueError("it has a scale of nan")
        codes = jnp.asarray(self.codes.mapped().reshape(*outer, groups * width))
        return QArray(
            packing.unpack(codes, "mxfp4", 2 * groups * width),
            jnp.asarray(scale.view(formats.E8M0)),
            qtype="mxfp4",
            float_dtype=self.dtype,
        ).mT


QUANTIZED = (_Float8, _Mxfp4)
QuantizedTensor: TypeAlias = _Float8 | _Mxfp4
Tensor: TypeAlias = TensorInFile | QuantizedTensor


def joined(
    tensors: Mapping[str, TensorInFile], path: pathlib.Path
) -> dict[str, Tensor]:
    """Returns the tensors of a checkpoint, with codes and scales joined into one.

    Args:
        tensors: All tensors that are in the files.
        path: The folder, or the file.

    Raises:
        ValueError: ``config.json`` is wrong, or asks for something that cannot be read.
    """
    found: dict[str, Tensor] = dict(tensors)
    config = functools.cache(functools.partial(_config, path))
    for name, scales in tensors.items():
        base = name.removesuffix(_SCALE_INV)
        codes = tensors.get(base)
        if base != name and codes is not None and codes.dtype.name.startswith("float8"):
            layer = base.rpartition(".")[0]
            scheme = compressed_config.find_scheme(config(), layer)
            found[base] = _Float8(base, codes, scales, scheme.get("weights", {}))
            del found[name]
        base = name.removesuffix(_SCALES)
        codes = tensors.get(base + _BLOCKS)
        if base != name and codes is not None:
            if codes.dtype == scales.dtype == np.uint8 and len(codes.shape) >= 3:
                found[base] = _Mxfp4(base, codes, scales)
                del found[name], found[base + _BLOCKS]
    return found


def _config(path: pathlib.Path) -> dict[str, Any] | None:
    file = (path if path.is_dir() else path.parent) / safetensors_files.CONFIG
    entry = "quantization_config"
    config = json_text.read(file).get(entry) if file.exists() else None
    if config is not None:
        with located(f"{file}, {entry}"):
            compressed_config.check_config(config)
    return config


def checked(name: str, tensor: Tensor) -> QuantizedTensor:
    """Returns a tensor if it is quantized.

    Raises:
        ValueError: The tensor is not quantized.
    """
    if not isinstance(tensor, QUANTIZED):
        raise ValueError(
            f"{name} is not quantized in the checkpoint, and others of it are"
        )
    return tensor


def as_planned(array: QArray, how: HowToQuantize, scale_shape: Sequence[int]) -> QArray:
    """Returns a quantized array with scales for the tiles of a rule.

    Args:
        array: The array, from a file.
        how: How the rule quantizes it.
        scale_shape: The shape of its scales by the rule.

    Raises:
        ValueError: Codes or scales would change. The message begins with "it".

    >>> array = QArray(jnp.ones((4, 4), jnp.float8_e4m3fn), jnp.array([[1.], [2.]]))
    >>> how = HowToQuantize(qtype='float8_e4m3fn', channelwise_axes=[0])
    >>> as_planned(array, how, (4, 1)).scale.ravel().tolist()
    [1.0, 1.0, 2.0, 2.0]
    """
    own, asked = (numerics.qtype_name(x.qtype) for x in (array, how))
    if own != asked.removesuffix("_floor") or how.rotation is not None:
        rotated = "" if how.rotation is None else ", rotated"
        raise ValueError(
            f"it has codes of {own} in the checkpoint, and the rule asks for {asked}"
            f"{rotated}. Give the rule weight_qtype={own!r}, or load the params of the "
            "float model and quantize those"
        )
    scale = np.asarray(array.scale)
    for axis, n in enumerate(array.shape):
        have, want = scale.shape[axis], scale_shape[axis]
        if have == want:
            continue
        block, tile = -(-n // have), -(-n // want)
        of_elements = np.take(scale, np.arange(n) // block, axis)
        scale = np.take(of_elements, np.arange(want) * tile, axis)
        if (np.take(scale, np.arange(n) // tile, axis) != of_elements).any():
            raise ValueError(
                f"along axis {axis} of {n} it has {have} scales in the checkpoint, and "
                f"the rule asks for tiles of {tile}, and some of these have several. "
                "Give the rule a tile_size that divides the blocks of the checkpoint"
            )
    return array.replace(scale=jnp.asarray(scale), qtype=how.qtype)  # pyright: ignore
