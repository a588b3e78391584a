"""From a JAX function with annotated tensors to the bytes of a `.tflite` file."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from qwix_train.core.errors import imported
from qwix_train.core.grid import Grid
from qwix_train.odml.edit import completed
from qwix_train.odml.flatbuffer import ops_in


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
    name = qtype if grid is None else grid.qtype
    attributes: dict[str, Any] = {
        "scale": np.zeros(0, np.float32),
        "dtype": name.removesuffix("_narrow").replace("int", "i"),
        "narrow_range": name.endswith("_narrow"),
    }
    if grid is not None:
        scale = np.asarray(grid.scale, np.float32)
        if not (np.isfinite(scale).all() and (scale > 0).all()):
            raise ValueError(f"A tensor of shape {x.shape} has the scale {scale}.")
        zero_point = np.broadcast_to(np.asarray(grid.zero_point, np.int64), scale.shape)
        attributes |= {"scale": scale.ravel(), "zero_point": zero_point.ravel()}
        axes = [axis for axis, length in enumerate(scale.shape) if length > 1]
        assert len(axes) <= 1, scale.shape
        if axes:
            attributes["quantization_dimension"] = axes[0]

    # The converter reads the attributes; nothing runs what stands for it in JAX.
    @functools.partial(jax.lax.composite, name="quant.fake_quant")
    def fake_quant(x, **attributes):
        del attributes
        return x * 1

    return fake_quant(x, **attributes)


def uneven(x: Any) -> np.ndarray:
    """A constant with a scale for each channel, its elements not all equal.

    Of equal ones the converter quantizes the first, and gives its code to all, though
    their scales differ. The last bit of a float changes no code.
    """
    x = np.array(x, np.float32)
    if x.size > 1 and (x == x.flat[0]).all():
        x.flat[0] = np.nextafter(x.flat[0], np.float32(0))
    return x


def to_flatbuffer(
    function: Callable[..., Any],
    shapes: Sequence[Any],
    name: str,
    inputs: Sequence[str],
    outputs: Sequence[str],
) -> bytes:
    """Converts a function to a `.tflite` file.

    Args:
      function: the function, of arrays, with all else closed over; gives an array, or
        a tree of them.
      shapes: its arguments, or their shapes.
      name: the name of its signature.
      inputs: the names of its arguments.
      outputs: the names of its results.

    Raises:
      ImportError: if the converter is not installed.
      ValueError: if there are not as many names as arguments and results, or the
        converter fails.
    """
    api, ir, passmanager, stablehlo = _converter()
    # What nothing reads is an input of the signature all the same.
    jitted = jax.jit(function, keep_unused=True)
    exported = jax.export.export(jitted, platforms=["cpu"])(*shapes)
    for what, names, avals in (
        ("inputs", inputs, exported.in_avals),
        ("outputs", outputs, exported.out_avals),
    ):
        if len(names) != len(avals):
            raise ValueError(
                f"The signature {name!r} has {len(avals)} {what}, and names for "
                f"{len(names)}: {', '.join(names)}. Give each a name."
            )
    context: Any = ir.Context()
    api.prepare_mlir_context(context)
    with context:
        module = stablehlo.deserialize_portable_artifact(
            context, exported.mlir_module_serialized
        )
        api.set_signature(module.operation, name, inputs, outputs)
        config = api.ConvertToTFLConfig()
        # Otherwise what is annotated stays in the file as an operation in floats.
        config.strict_qdq_mode = True
        config.model_origin_framework = "JAX"
        try:
            api.run_convert_to_tfl_passes(module, passmanager.PassManager(), config)
            content = api.export_flatbuffer_to_bytes(module.operation)
        except Exception as error:
            raise ValueError(
                f"The LiteRT converter failed on the signature {name!r}: {error}"
            ) from error
    for op in ops_in(content):
        if op.name == "STABLEHLO_COMPOSITE":
            shapes = ", ".join(str(t.shape) for t in op.inputs)
            raise ValueError(
                f"The LiteRT converter found no operator that quantizes its input, of "
                f"shape {shapes}, when it runs (act_static_scale=False), and left an "
                "operation that other runtimes do not know. Use static ranges there, "
                "or a rule without act_qtype."
            )
    return completed(content, inputs, outputs)


def _converter() -> list[Any]:
    # Importing it prints what the log of its C++ code has to say of the machine.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    remedy = (
        "Conversion to LiteRT needs litert-converter, of which there are wheels "
        "for Linux on x86-64 and macOS on arm64: pip install 'qwix_train[odml]'"
    )
    names = (
        "converter_api_ext",
        "mlir.ir",
        "mlir.passmanager",
        "mlir.dialects.stablehlo",
    )
    return [imported(f"litert_converter.{name}", remedy) for name in names]
