"""The results as a table, a JSON file and a picture."""

import math
import pathlib
from collections.abc import Mapping
from typing import Any

from example_trainers.digits_qat.report import align
from qwix_train.files import figures, json_text


def format_row(row: Mapping[str, Any]) -> str:
    """Returns a line that says what was just measured."""
    return (
        f"{row['part']} | {row['weights']} | {row['activations']} | {row['method']} "
        f"| perplexity {math.exp(row['loss']):.2f} | {row['seconds']:.0f} s"
    )


def format_table(results: Mapping[str, Any]) -> str:
    """Returns the results as a table for the terminal."""
    head = "weights, activations, method, perplexity, vs float, params, time, memory"
    lines = [tuple(head.split(", "))]
    floating = {row["text"]: row for row in results["rows"] if row["part"] == "float"}
    for row in results["rows"]:
        ratio = math.exp(row["loss"] - floating[row["text"]]["loss"])
        peak = row["peak_bytes"]
        lines.append(
            (
                row["weights"],
                row["activations"],
                row["method"],
                f"{math.exp(row['loss']):.2f}",
                "" if row["part"] == "float" else f"{ratio - 1:+.1%}",
                f"{row['bytes'] / 2**20:.1f} MiB",
                f"{row['seconds']:.0f} s",
                "-" if peak is None else f"{peak / 2**20:.0f} MiB",
            )
        )
    return "\n".join(
        [
            f"Perplexity of {results['test_tokens']:,} tokens that ship with Python",
            *align(lines, left=3),
            "time: with compilation and evaluation; memory: the peak above what the "
            "float model takes",
        ]
    )


def plot(results: Mapping[str, Any], path: pathlib.Path) -> None:
    """Draws the perplexity of each row."""
    rows = results["rows"]
    points: dict[str, list[tuple[float, int]]] = {}
    for index, row in enumerate(rows):
        points.setdefault(row["part"], []).append((math.exp(row["loss"]), index))
    names = [f"{row['weights']}, {row['activations']}, {row['method']}" for row in rows]
    figure = figures.points_in_rows(names, points, "perplexity", "The picture")
    (axes,) = figure.axes
    axes.set_xscale("log")
    figures.save_figure(figure, path, overwrite=True)


def write(results: dict[str, Any], workdir: pathlib.Path) -> None:
    """Prints the table, and writes `results.json` and `results.png`."""
    json_path, png_path = workdir / "results.json", workdir / "results.png"
    json_text.write(json_path, results, overwrite=True)
    plot(results, png_path)
    print(f"\n{format_table(results)}\n\n{json_path}\n{png_path}")
