"""The results as a table, a JSON file and a plot."""

import math
import pathlib
from collections.abc import Mapping
from typing import Any

from example_trainers import reports
from qwix_train.files.figures import save_figure


def format_row(row: Mapping[str, Any], floating: Mapping[str, Any]) -> str:
    """Returns a line that says what was just measured."""
    return (
        f"weights {row['weights']:5} | activations {row['activations']:12} "
        f"| {row['method'] or '-':26} | loss {row['loss']:.4f} "
        f"({row['loss'] - floating['loss']:+.4f})"
    )


def format_table(results: dict[str, Any]) -> str:
    """Returns the results as a table for the terminal."""
    rows = results["rows"]
    floating = rows[0]
    lines = [
        ("weights", "activations", "method", "loss", "vs float", "accuracy", "params")
    ]
    for row in rows:
        lines.append(
            (
                row["weights"],
                row["activations"],
                row["method"] or "-",
                f"{row['loss']:.4f}",
                f"{row['loss'] - floating['loss']:+.4f}" if row != floating else "",
                f"{100 * row['accuracy']:.2f}%",
                f"{row['bytes'] / 1024:.0f} KiB",
            )
        )
    config = results["config"]
    length = config["sequence_length"]
    count = config["test_batches"] * config["eval_batch_size"] * length
    return "\n".join(
        [
            f"Loss (nats per byte) and accuracy of the next byte, {count:,} bytes of "
            "held-out topics",
            *reports.align(lines, left=3),
            "Each quantized model was exported, and restored from its files.",
        ]
    )


def plot(results: dict[str, Any], path: pathlib.Path) -> None:
    """Draws the loss of each quantized model, and the loss while training."""
    # The figure is drawn without pyplot, which would look for a display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    floating, *rows = results["rows"]
    # Within a factor of ten of zero on either side the axis is linear.
    gaps = [row["loss"] - floating["loss"] for row in rows]
    labels = [
        f"{row['weights']}, {row['activations']}"
        + (f": {row['method']}" if row["method"] else "")
        for row in rows
    ]
    places = range(len(rows))
    left.barh(places, gaps, color=[_color(row) for row in rows])
    smallest = min((abs(gap) for gap in gaps if gap), default=1.0)
    left.set_xscale("symlog", linthresh=10 ** math.floor(math.log10(smallest) + 1))
    left.axvline(0, color="0.35", linewidth=1)
    left.set_yticks(list(places), labels, fontsize=8)
    left.invert_yaxis()
    left.set_xlabel("test loss minus that of the float model (nats per byte)")
    left.set_title("After quantization")

    start = 0  # of what goes on from the float weights
    for name, history in results["histories"].items():
        steps = [start + record["step"] for record in history]
        losses = [record["validation_loss"] for record in history]
        right.plot(steps, losses, marker="o", markersize=4, label=name)
        if name == "float":
            start = steps[-1]
    right.set_xlabel("step")
    right.set_ylabel("validation loss (nats per byte)")
    right.set_title("While training")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x" if axes is left else "y", color="0.9")
        axes.set_axisbelow(True)
    save_figure(figure, path, overwrite=True)


def _color(row: Mapping[str, Any]) -> str:
    if row["weights"] == "float":
        return "0.35"
    if row["weights"] == "int4":
        return "#d95f02" if row["activations"] == "float" else "#c51b7d"
    return "#7570b3" if "dynamic" in row["activations"] else "#1f6fb4"


def write(results: dict[str, Any], workdir: pathlib.Path) -> None:
    """Prints the table, and writes `results.json` and `results.png`."""
    reports.write(results, workdir, [format_table(results)], plot)
