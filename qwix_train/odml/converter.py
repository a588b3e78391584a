"""From a JAX function with annotated tensors to the bytes of a `.tflite` file."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from qwix_train.odml.flatbuffer import read_codes
from qwix_train.odml.integer_grid import Grid
from qwix_train.odml.sixteen_bits import completed

_TYPES = {"int4": "i4", "int8": "i8", "int16": "i16"}


def annotate(x: jax.Array, grid: Grid | None, qtype: str = "int8") -> jax.Array:
    """Marks a tensor as quantized, for the converter.

    Args:
      x: the tensor.
      grid: its scale, zero point and type, concrete; None if they are found when the
        model runs.
      qtype: the type, if there is no grid.

    Raises:
      ValueError: if a scale is not finite, or is zero.
    """
    attributes: dict[str, Any] = {"dtype": _TYPES[qtype], "narrow_range": False}
    if grid is None:
        attributes["scale"] = np.zeros(0, np.float32)
    else:
        scale = np.asarray(grid.scale, np.float32)
        if not (np.isfinite(scale).all() and (scale > 0).all()):
            raise ValueError(f"A tensor of shape {x.shape} has the scale {scale}.")
        axes = [axis for axis, length in enumerate(scale.shape) if length > 1]
        assert len(axes) <= 1, scale.shape
        attributes = {
            "scale": scale.reshape(-1),
            "zero_point": np.broadcast_to(
                np.asarray(grid.zero_point, np.int64), scale.shape
            ).reshape(-1),
            "dtype": _TYPES[grid.qtype],
            "narrow_range": grid.narrow,
        }
        if axes:
            attributes["quantization_dimension"] = axes[0]

    # The converter reads the attributes; nothing runs what stands for it in JAX.
    @functools.partial(jax.lax.composite, name="quant.fake_quant")
    def fake_quant(x, **attributes):
        del attributes
        return x * 1

    return fake_quant(x, **attributes)


def to_flatbuffer(
    signatures: Mapping[str, tuple[Callable[..., Any], Sequence[Any]]],
    names: Mapping[str, tuple[Sequence[str], Sequence[str]]],
) -> bytes:
    """Converts functions to one `.tflite` file.

    Args:
      signatures: for each signature a function, and the shapes of its arguments.
      names: for each the names of its inputs and of its outputs.

    Raises:
      ImportError: if the converter is not installed.
      ValueError: if it fails.
    """
    # Importing it prints what the log of its C++ code has to say of the machine.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    try:
        api, ir, passmanager, stablehlo = map(
            importlib.import_module,
            (
                "litert_converter.converter_api_ext",
                "litert_converter.mlir.ir",
                "litert_converter.mlir.passmanager",
                "litert_converter.mlir.dialects.stablehlo",
            ),
        )
    except ImportError as error:
        raise ImportError(
            "Conversion to LiteRT needs litert-converter, of which there are wheels "
            "for Linux on x86-64 and macOS on arm64: pip install 'qwix_train[odml]'"
        ) from error
    context: Any = ir.Context()
    api.prepare_mlir_context(context)
    with context:
        modules = []
        for name, (function, shapes) in signatures.items():
            exported = jax.export.export(jax.jit(function), platforms=["cpu"])(*shapes)
            module = stablehlo.deserialize_portable_artifact(
                context, exported.mlir_module_serialized
            )
            api.set_signature(module.operation, name, *names[name])
            modules.append(module)
        module = modules[0]
        if len(modules) > 1:
            for index, each in enumerate(modules):
                _rename(ir, each, index)
            module = api.merge_modules(modules)
        config = api.ConvertToTFLConfig()
        # Otherwise what is annotated stays in the file as an operation in floats.
        config.strict_qdq_mode = True
        config.model_origin_framework = "JAX"
        try:
            api.run_convert_to_tfl_passes(module, passmanager.PassManager(), config)
            content = api.export_flatbuffer_to_bytes(module.operation)
        except Exception as error:
            raise ValueError(f"The LiteRT converter failed: {error}") from error
    return completed(read_codes(content))


def _rename(ir: Any, module: Any, index: int) -> None:
    """Gives the functions of a module names that no other module has."""
    table = ir.SymbolTable(module.operation)
    renamed = {}
    for op in list(module.body.operations):
        old = ir.StringAttr(op.attributes["sym_name"]).value
        renamed[old] = f"{old}_{index}"
    for op in list(module.body.operations):
        old = ir.StringAttr(op.attributes["sym_name"]).value
        ir.SymbolTable.replace_all_symbol_uses(old, renamed[old], module.operation)
        ir.SymbolTable.set_symbol_name(op, renamed[old])
    del table
