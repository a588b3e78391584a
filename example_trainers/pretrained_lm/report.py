"""The results as tables, a JSON file and a picture."""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from example_trainers import reports
from qwix_train.files import figures

Row = Mapping[str, Any]

_TEXTS = {"prose": "help texts of Python", "code": "its source code"}


def format_row(row: Row) -> str:
    """Returns a line that says what was just measured."""
    return (
        f"{row['part']} | {row['weights']} | {row['activations']} | {row['method']} "
        f"| perplexity {math.exp(row['loss']):.2f} | {row['seconds']:.0f} s"
    )


def format_table(results: Mapping[str, Any]) -> str:
    """Returns the results as tables for the terminal, one for each kind of text."""
    tables = []
    for text, called in _TEXTS.items():
        rows = [row for row in results["rows"] if row["text"] == text]
        if rows:
            title = f"Perplexity of {results['test_tokens']:,} tokens of {called}"
            tables.append("\n".join([title, *_table(rows)]))
    tables.append(
        "params: those held, adapters among them; time: with compilation and "
        "evaluation;\nmemory: the peak, above what the process held before"
    )
    return "\n\n".join([*tables, *_notes(results)])


def _table(rows: Sequence[Row]) -> list[str]:
    head = "weights, activations, method, perplexity, vs float, params, time, memory"
    lines: list[tuple[str, ...]] = [tuple(head.split(", "))]
    (floating,) = (row for row in rows if row["part"] == "float")
    for row in rows:
        ratio = math.exp(row["loss"] - floating["loss"])
        peak = row["peak_bytes"]
        lines.append(
            (
                row["weights"],
                row["activations"],
                row["method"],
                f"{math.exp(row['loss']):.2f}",
                "" if row is floating else f"{ratio - 1:+.1%}",
                f"{row['bytes'] / 2**20:.1f} MiB",
                f"{row['seconds']:.0f} s",
                "-" if peak is None else f"{peak / 2**20:,.0f} MiB",
            )
        )
    return reports.align(lines, left=3)


def recovered(results: Mapping[str, Any]) -> float | None:
    """The share of the loss that rounding int3 to nearest adds that QAT takes away.

    None if QAT was not run.
    """
    rows = [row for row in results["rows"] if row["text"] == "prose"]
    in_float, *qat = (row["loss"] for row in rows if row["part"] in ("float", "qat"))
    if len(qat) < 2:
        return None
    nearest, trained = qat
    return (nearest - trained) / (nearest - in_float)


def _notes(results: Mapping[str, Any]) -> list[str]:
    notes = []
    if (share := recovered(results)) is not None:
        notes.append(f"QAT recovers {share:.0%} of the loss that rounding adds.")
    temporary = [row for row in results["rows"] if row.get("temporary_bytes")]
    if temporary:
        each = ", ".join(
            f"{row['method']} {row['temporary_bytes'] / 2**20:.1f} MiB"
            for row in temporary
        )
        layer = results["layer_bytes"] / 2**20
        notes.append(
            f"Temporary memory of a train step: {each}. A layer in float: "
            f"{layer:.1f} MiB."
        )
    for row in results["rows"]:
        if "answer" in row:
            notes.append(f"{row['prompt']}\n{row['answer']}")
    return notes


def plot(results: Mapping[str, Any], path: pathlib.Path) -> None:
    """Draws the perplexity of each row."""
    rows = [row for row in results["rows"] if row["text"] == "prose"]
    points: dict[str, list[tuple[float, int]]] = {}
    for index, row in enumerate(rows):
        points.setdefault(row["part"], []).append((math.exp(row["loss"]), index))
    names = [f"{row['weights']}, {row['activations']}, {row['method']}" for row in rows]
    figure = figures.points_in_rows(names, points, "perplexity", "The picture")
    (axes,) = figure.axes
    axes.set_xscale("log")
    figures.save_figure(figure, path, overwrite=True)


def write(results: dict[str, Any], workdir: pathlib.Path) -> None:
    """Prints the tables, and writes `results.json` and `results.png`."""
    reports.write(results, workdir, [format_table(results)], plot)
