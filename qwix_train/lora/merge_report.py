"""What merging did to each weight, as records and as a table."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from qwix_train.core import numerics
from qwix_train.core.qarray import QArray, dequantize
from qwix_train.files import text_table
from qwix_train.lora.layout import AdapterLayout
from qwix_train.values import stored


@dataclasses.dataclass(frozen=True)
class MergeRecord:
    """What merging did to one weight, or to one layer of a stacked weight.

    Sizes and errors are Frobenius norms.

    Attributes:
      param: the path of the param.
      layer: the index among stacked layers, such as those of a scan; empty if it is not
        stacked.
      qtype: the type of the codes, or None if the result is in float.
      adapter_size: what the adapter adds, relative to the base.
      adapter_in_steps: what the adapter adds, relative to the distance between
        neighboring codes, both as root mean squares. If it is well below one half, most
        codes stay as they were. None in float.
      error: the error of the result, relative to the sum of base and adapter in
        float32.
      adapter_error: the same error, relative to what the adapter adds. From 1 on,
        rounding loses more than the adapter adds. None if the adapter adds nothing.
    """

    param: str
    layer: tuple[int, ...]
    qtype: str | None
    adapter_size: float
    adapter_in_steps: float | None
    error: float
    adapter_error: float | None


@dataclasses.dataclass(frozen=True)
class MergeReport:
    """What merging did to the weights of a model. It prints as a table.

    Attributes:
      weights: a record for each weight that has an adapter.

    Example:
      >>> from qwix_train.lora import MergeRecord, MergeReport
      >>> record = MergeRecord('Dense_0/kernel', (), 'nf4', 0.02, 0.3, 0.08, 0.9)
      >>> print(MergeReport((record,)))
      param           type  adapter / base  adapter / step  error  error / adapter
      ----------------------------------------------------------------------------
      Dense_0/kernel  nf4            2.00%           0.300  8.00%           90.00%
    """

    weights: tuple[MergeRecord, ...]

    def records(self) -> list[dict[str, Any]]:
        """The records as dictionaries."""
        return [dataclasses.asdict(weight) for weight in self.weights]

    def __str__(self) -> str:
        heads = ["adapter / base", "adapter / step", "error", "error / adapter"]
        rows = [["param", "type", *heads]]
        for weight in self.weights:
            layer = "".join(f"[{index}]" for index in weight.layer)
            steps = weight.adapter_in_steps
            numbers = [
                _percent(weight.adapter_size),
                "-" if steps is None else f"{steps:.3f}",
                _percent(weight.error),
                _percent(weight.adapter_error),
            ]
            rows.append([weight.param + layer, weight.qtype or "float", *numbers])
        return text_table.aligned(rows, texts=2)


def is_weight(param: Any) -> bool:
    """Whether a param, unboxed, is quantized and no range of an activation."""
    if not stored.is_quantized(param):
        return False
    return not isinstance(param.array, jax.Array | np.ndarray | jax.ShapeDtypeStruct)


def measure(
    layout: AdapterLayout,
    base: jax.Array,
    merged: jax.Array,
    result: Any,
) -> list[MergeRecord]:
    """The records of a weight, one for each of its stacked layers.

    Args:
      layout: the layout of its adapter.
      base: the weight without the adapter, float32 or wider.
      merged: the weight with it, the same.
      result: what became of that: a float array, or a quantized param.
    """
    rest = tuple(a for a in range(len(layout.shape)) if a not in layout.layers)

    def size(x):
        squares = jnp.square(x.astype(jnp.float32))
        return np.sqrt(np.asarray(jnp.sum(squares, axis=rest), np.float64))

    is_quantized = stored.is_quantized(result)
    value = stored.dequantized(result) if is_quantized else result
    wide = [x.astype(jnp.float32) for x in (base, merged, value)]
    sizes = [size(wide[0]), size(wide[1] - wide[0]), size(wide[1])]
    sizes.append(size(wide[2] - wide[1]))
    sizes.append(size(_steps(result.array)) if is_quantized else np.ones_like(sizes[0]))
    qtype = numerics.qtype_name(result.array.qtype) if is_quantized else None
    records = []
    for index in np.ndindex(*sizes[0].shape):
        of_base, of_adapter, of_merged, of_error, of_steps = (
            float(x[index]) for x in sizes
        )
        records.append(
            MergeRecord(
                "/".join(layout.path),
                index,
                qtype,
                adapter_size=_share(of_adapter, of_base) or 0.0,
                adapter_in_steps=of_adapter / of_steps if is_quantized else None,
                error=_share(of_error, of_merged) or 0.0,
                adapter_error=_share(of_error, of_adapter),
            )
        )
    return records


def _steps(array: QArray) -> jax.Array:
    """For each element, half the distance between the values next to its code's."""
    values = numerics.format_of(array.qtype).levels
    gaps = jnp.asarray(np.gradient(values), jnp.float32)
    levels = numerics.codes_to_float(array.qvalue, array.qtype, jnp.float32)
    found = gaps[jnp.searchsorted(jnp.asarray(values, jnp.float32), levels)]
    unit = QArray(
        jnp.ones(array.shape, jnp.int8), array.float_scale.astype(jnp.float32)
    )
    return found * dequantize(unit)


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f}%"
