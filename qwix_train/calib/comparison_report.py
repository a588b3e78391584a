"""The result of `calib.compare`: a table, records, a plot, and suggested rules."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from qwix_train.files.figures import points_in_rows, save_figure
from qwix_train.files.text_table import aligned
from qwix_train.observers.averaging import Averaging
from qwix_train.observers.statistics import Observer, RangeObserver
from qwix_train.planning import table as plan_table
from qwix_train.planning.rules import QuantizationRule

Record: TypeAlias = dict[str, Any]

DYNAMIC = "dynamic"
"""The method that is not an observer: a range for each batch, or each token."""


class Method(NamedTuple):
    """A way to find a range."""

    observer: Observer
    averaging: str | Averaging


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The quantization error of each activation, with each method. Made by `compare`.

    It prints as a table of signal-to-quantization-noise ratios. A star marks the best
    observer of each activation.

    Attributes:
      records: a dictionary for each activation and method: `op`, the path of the
        activation, with the layer if it is one of several under `scan`; `range`, the
        path without the layer; `method`; `sqnr_db`; `saturated`, the share of elements
        outside of the range; `absmax`, or `min` and `max`, the range: a number, or a
        nested list if channels or tiles have their own; `qtype`; `elements`, `batches`
        and `skipped`, which are numbers of these; `note`. If a method cannot be used,
        `note` says why, and there are no numbers.
      methods: the observers that are compared, by name.
      templates: for each `range`, the rule that quantizes it, for its op alone.
      given_rules: the rules that were given.
    """

    records: Sequence[Record]
    methods: Mapping[str, Method]
    templates: Mapping[str, QuantizationRule]
    given_rules: Sequence[QuantizationRule]

    def best(self) -> dict[str, str]:
        """The observer with the highest ratio, for each activation.

        If several have it, the first. Activations for which no observer can be used are
        left out.
        """
        best: dict[str, Record] = {}
        for record in self._observed():
            rival = best.get(record["op"])
            if rival is None or _ratio(record) > _ratio(rival):
                best[record["op"]] = record
        return {op: record["method"] for op, record in best.items()}

    def worst(self, n: int = 5) -> list[str]:
        """The activations that quantization hurts most, whatever the observer.

        Args:
          n: how many. The first is that with the lowest ratio of its best observer.
        """
        best = self.best()
        ratios = {
            r["op"]: _ratio(r)
            for r in self._observed()
            if best[r["op"]] == r["method"] and not math.isnan(r["sqnr_db"])
        }
        return sorted(ratios, key=lambda op: ratios[op])[:n]

    def rules(self) -> list[QuantizationRule]:
        """Rules with static ranges and, for each op, its best observer.

        An op has one rule. If both of its operands are activations, or there are
        layers, its observer is that whose lowest ratio is the highest. The rules that
        were given follow, for everything else that they match.
        """
        lowest: dict[Any, dict[str, float]] = collections.defaultdict(dict)
        templates = {}
        for record in self._observed():
            template = self.templates[record["range"]]
            key = template.module_path, tuple(template.op_names)
            templates[key] = template
            by_method, method = lowest[key], record["method"]
            by_method[method] = min(by_method.get(method, math.inf), _ratio(record))
        rules = []
        for key, by_method in lowest.items():
            observer, averaging = self.methods[
                max(by_method, key=by_method.__getitem__)
            ]
            streams = not isinstance(observer, RangeObserver)
            rules.append(
                dataclasses.replace(
                    templates[key],
                    act_static_scale=True,
                    act_observer=observer,
                    act_averaging=averaging,
                    act_batch_axes=None if streams else templates[key].act_batch_axes,
                )
            )
        return [*rules, *self.given_rules]

    def __str__(self) -> str:
        """The ratios as a table, with notes: what is hurt most, what was left out."""
        best, methods = self.best(), [DYNAMIC, *self.methods]
        cells = {(r["op"], r["method"]): r for r in self.records}
        rows = [["activation", "type", *methods]]
        for op in dict.fromkeys(r["op"] for r in self.records):
            row = [_cell(cells[op, m], best.get(op) == m) for m in methods]
            rows.append([op, cells[op, DYNAMIC]["qtype"], *row])
        title = "Signal to quantization noise, in dB (*: the best observer)"
        head, rule, *lines = aligned(rows, texts=2).splitlines()
        return "\n".join([title, rule, head, rule, *lines, rule, *self._notes()])

    def plot(self, path: str | pathlib.Path, *, overwrite: bool = False) -> None:
        """Writes a plot of the ratios, a row for each activation.

        Args:
          path: the file, such as `"comparison.png"`; the suffix says which format.
          overwrite: whether to replace a plot that is there.

        Raises:
          FileExistsError: if a plot is there and `overwrite` is not set, or something
            else is there.
          ImportError: if matplotlib is not installed.
        """
        measured = [r for r in self.records if "sqnr_db" in r]
        ops = list(dict.fromkeys(r["op"] for r in measured))
        points = {method: [] for method in [DYNAMIC, *self.methods]}
        for record in measured:
            if math.isfinite(record["sqnr_db"]):
                place = record["sqnr_db"], ops.index(record["op"])
                points[record["method"]].append(place)
        label = "signal to quantization noise (dB)"
        styles = {DYNAMIC: {"marker": "|", "markersize": 12, "color": "black"}}
        figure = points_in_rows(ops, points, label, "Comparison.plot", styles)
        save_figure(figure, path, overwrite=overwrite)

    def _observed(self) -> list[Record]:
        return [r for r in self.records if "sqnr_db" in r and r["method"] != DYNAMIC]

    def _notes(self) -> list[str]:
        best = self.best()
        found = {(r["op"], r["method"]): r for r in self.records}
        lines = []
        if worst := self.worst(3):
            hurt = [
                f"{op} ({found[op, best[op]]['sqnr_db']:.1f} dB, {best[op]}, "
                f"{found[op, best[op]]['saturated']:.2%} saturated)"
                for op in worst
            ]
            lines.append(f"hurt most: {'; '.join(hurt)}")
        notes = collections.defaultdict(list)
        for record in self.records:
            if record["note"]:
                notes[f"{record['method']}: {record['note']}"].append(record["op"])
            elif record["method"] == DYNAMIC and record["skipped"]:
                total = record["batches"] + record["skipped"]
                note = f"{record['skipped']} of {total} batches, empty or not finite"
                notes[f"skipped: {note}"].append(record["op"])
        some = functools.partial(plan_table.some, most=1)
        return lines + [f"{note} ({some(ops)})" for note, ops in notes.items()]


def _ratio(record: Record) -> float:
    """The ratio to rank by: infinite if all values are 0, as there is no error."""
    return math.inf if math.isnan(record["sqnr_db"]) else record["sqnr_db"]


def _cell(record: Record, best: bool) -> str:
    if "sqnr_db" not in record or math.isnan(record["sqnr_db"]):
        return "- "
    return f"{record['sqnr_db']:.1f}{'*' if best else ' '}"
