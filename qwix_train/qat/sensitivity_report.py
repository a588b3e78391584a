"""The result of `qat.sensitivity`: rows, a table, a plot."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import Any

from qwix_train.files.figures import points_in_rows, save_figure
from qwix_train.files.text_table import aligned
from qwix_train.planning import table as plan_table
from qwix_train.planning.rules import QuantizationRule


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpSensitivity:
    """What one weight type does to an op, or to ops that share params.

    Attributes:
      ops: the ops: the path of the module and the id, as `"Dense_0/dot_general0"`.
      params: the paths of the quantized params that these ops read.
      size: the number of elements of these params.
      qtype: the type.
      bits: the bits of a code of the type.
      bytes: the size of the params, with codes packed, and scales and zero points.
      sqnr_db: the ratio of signal to quantization noise of the outputs of the ops, in
        dB; infinite without noise, NaN without a signal.
      weight_error: the sum of squared quantization errors of the params.
      loss_increase: the loss with these ops quantized, minus that of the float model;
        None if it was not measured.
      trace: the trace of the Hessian of the float loss by the params; None if it was
        not estimated.
      trace_error: its standard error, from how much the probes differ.
      omega: the sum over the params of the mean eigenvalue of the Hessian (its trace
        divided by the number of elements) times the squared error; None if it was not
        estimated.
      rules: rules that quantize these ops with this type, and no other ops.
    """

    ops: tuple[str, ...]
    params: tuple[str, ...]
    size: int
    qtype: str
    bits: int
    bytes: int
    sqnr_db: float
    weight_error: float
    loss_increase: float | None = None
    trace: float | None = None
    trace_error: float | None = None
    omega: float | None = None
    rules: tuple[QuantizationRule, ...] = dataclasses.field(repr=False)

    @property
    def cost(self) -> float:
        """What `assign_bits` adds up: the increase of the loss, or else `abs(omega)`.

        With a trace below 0, as of an untrained model or from few probes, a larger
        error would count as better, so its sign is dropped.
        """
        if self.loss_increase is not None:
            return self.loss_increase
        assert self.omega is not None
        return abs(self.omega)


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """How much quantizing each op alone hurts. Made by `sensitivity`.

    It prints as a table with a row for each op, or group of ops that share params. For
    each type, the row has the increase of the loss (`omega` with
    ``method="hutchinson"``) and the signal-to-quantization-noise ratio of the output.

    Attributes:
      rows: a row for each op and type. The rows of one op follow each other.
      rules: the rules that were given.
      method: `"loss"` or `"hutchinson"`.
      loss: the loss of the float model, its mean over the batches.
      batches: the number of batches.
    """

    rows: tuple[OpSensitivity, ...]
    rules: tuple[QuantizationRule, ...]
    method: str
    loss: float
    batches: int

    @property
    def groups(self) -> list[tuple[OpSensitivity, ...]]:
        """The rows of each op, one for each type."""
        by_op: dict[tuple[str, ...], list[OpSensitivity]] = {}
        for row in self.rows:
            by_op.setdefault(row.ops, []).append(row)
        return [tuple(rows) for rows in by_op.values()]

    def records(self) -> list[dict[str, Any]]:
        """A dictionary of plain values for each row, all but its rules."""
        return [
            {
                field.name: getattr(row, field.name)
                for field in dataclasses.fields(row)
                if field.name != "rules"
            }
            for row in self.rows
        ]

    def __str__(self) -> str:
        """The table."""
        groups = self.groups
        header = ["op", "weight", "elements"]
        if self.method == "hutchinson":
            header.append("trace")
        for row in groups[0]:
            header += [row.qtype, "dB"]
        rows = [header]
        for group in groups:
            first = group[0]
            cells = [_some(first.ops), _some(first.params), f"{first.size:,}"]
            if first.trace is not None:
                cells.append(f"{first.trace:.3g} ± {first.trace_error:.2g}")
            for row in group:
                shown = row.omega if row.loss_increase is None else row.loss_increase
                cells += [f"{shown:+.3g}", _ratio(row.sqnr_db)]
            rows.append(cells)
        what = {
            "loss": "Increase of the loss when one op alone is quantized",
            "hutchinson": "Curvature times squared error of the weight (omega)",
        }[self.method]
        title = (
            f"{what}, by the type of its weight (float loss {self.loss:.4g}, "
            f"{self.batches} {'batch' if self.batches == 1 else 'batches'})"
        )
        note = "dB: signal to quantization noise of the output"
        return "\n".join([title, aligned(rows), note])

    def plot(
        self, path: str | pathlib.Path | None = None, *, overwrite: bool = False
    ) -> Any:
        """A plot of the increases, a row for each op.

        Args:
          path: a file to write it to, such as `"sensitivity.png"`; the suffix says
            which format.
          overwrite: whether to replace a plot that is there.

        Returns:
          The matplotlib figure.

        Raises:
          FileExistsError: if a plot is there and `overwrite` is not set, or something
            else is there.
          ImportError: if matplotlib is not installed.
        """
        groups = self.groups
        points = {
            kind[0].qtype: [(row.cost, place) for place, row in enumerate(kind)]
            for kind in zip(*groups, strict=True)
        }
        names = [_some(group[0].ops) for group in groups]
        label = "increase of the loss" if self.method == "loss" else "|omega|"
        figure = points_in_rows(names, points, label, "Sensitivity.plot")
        sizes = [abs(row.cost) for row in self.rows if math.isfinite(row.cost)]
        # A measured increase may be below 0; near 0 the scale is linear.
        linear = max([1e-12, *sizes]) * 1e-4
        figure.axes[0].set_xscale("symlog", linthresh=linear)
        if path is not None:
            save_figure(figure, path, overwrite=overwrite)
        return figure


def _ratio(sqnr_db: float) -> str:
    return "-" if math.isnan(sqnr_db) else f"{sqnr_db:.1f}"


def _some(names: Sequence[str]) -> str:
    return plan_table.some(names, most=2)
