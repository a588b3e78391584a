"""Tables of a LiteRT model: its operations, and how it differs from JAX."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from qwix_train.files.text_table import aligned
from qwix_train.odml.flatbuffer import OpInfo, TensorInfo


class OpTable(tuple[OpInfo, ...]):
    """The operations of a model; prints as a table."""

    def __str__(self) -> str:
        rows = [["op", "inputs", "output", "range"]]
        for op in self:
            out = op.outputs[0] if op.outputs else None
            ends = None if out is None else out.range
            rows.append(
                [
                    op.name,
                    " ".join(map(_short, op.inputs)),
                    " ".join(map(_short, op.outputs)),
                    "" if ends is None else f"{ends[0]:.4g} to {ends[1]:.4g}",
                ]
            )
        return aligned(rows)


@dataclasses.dataclass(frozen=True)
class OutputReport:
    """How an output of a LiteRT model differs from that of the model in JAX.

    Attributes:
      name: the name of the output.
      scale: the scale of its codes; None if it has none, such as an index, or an output
        in floats.
      max_steps: the largest difference, in steps: of the scale; without one, of a 255th
        of the range of the output in JAX if it is of floats, else of 1.
      equal: the share of elements that are equal, to a thousandth of a step.
      mean_steps: the mean difference, in steps.
    """

    name: str
    scale: float | None
    max_steps: float
    equal: float
    mean_steps: float


class Report(tuple[OutputReport, ...]):
    """A comparison of all outputs; prints as a table."""

    def __str__(self) -> str:
        rows = [["output", "scale", "max steps", "mean steps", "equal"]]
        for out in self:
            scale = "" if out.scale is None else f"{out.scale:.3g}"
            rows.append(
                [
                    out.name,
                    scale,
                    f"{out.max_steps:.2f}",
                    f"{out.mean_steps:.3f}",
                    f"{out.equal:.1%}",
                ]
            )
        return aligned(rows)


def output_report(
    name: str, scale: float | None, got: Any, expected: Any
) -> OutputReport:
    """Compares an output with that of the model in JAX.

    Args:
      name: the name of the output.
      scale: the scale of its codes, or None.
      got: what LiteRT gives, in floats where it has a scale.
      expected: what JAX gives, in the same shape.

    Raises:
      ValueError: if the shapes differ.
    """
    got, expected = np.asarray(got), np.asarray(expected)
    if got.shape != expected.shape:
        raise ValueError(
            f"The output {name!r} has the shape {got.shape} in LiteRT, and "
            f"{expected.shape} in JAX."
        )
    step = scale or 1.0
    if scale is None and np.issubdtype(expected.dtype, np.floating) and expected.size:
        step = float(np.ptp(expected.astype(np.float64))) / 255 or 1.0
    steps = np.abs(got.astype(np.float64) - expected.astype(np.float64)) / step
    return OutputReport(
        name,
        scale,
        float(steps.max(initial=0)),
        float((steps < 1e-3).mean()) if steps.size else 1.0,
        float(steps.mean()) if steps.size else 0.0,
    )


def _short(tensor: TensorInfo) -> str:
    shape = "x".join("?" if n < 0 else str(n) for n in tensor.shape)
    channels = " per channel" if len(tensor.scale) > 1 else ""
    return f"{tensor.dtype}[{shape}]{channels}"
