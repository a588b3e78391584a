"""The results as a table, a JSON file and a plot."""

import pathlib
import statistics
from collections.abc import Mapping
from typing import Any

from example_trainers import reports
from qwix_train.files.figures import save_figure


def format_row(row: Mapping[str, Any]) -> str:
    """Returns a line that says what was just measured."""
    losses = " ".join(f"{loss:.4f}" for loss in row["losses"])
    exported = row["exported"]
    return (
        f"{row['label']} | test loss {row['loss_before']:.4f} -> {losses} "
        f"| exported in {exported['qtype']}: {exported['loss']:.4f}"
    )


def format_table(results: dict[str, Any]) -> str:
    """Returns the results as a table for the terminal."""
    rows, config = results["rows"], results["config"]
    reference = statistics.fmean(rows[0]["losses"])
    head = "method, trained, weights, optimizer, step, loss, vs, exported, loss, size"
    lines = [tuple(head.replace("vs", f"vs {rows[0]['method']}").split(", "))]
    for row in rows:
        mean = statistics.fmean(row["losses"])
        exported = row["exported"]
        weights = row["trained_bytes"] + row["frozen_bytes"]
        lines.append(
            (
                row["label"],
                f"{row['trained_params']:,}",
                f"{weights / 1024:,.0f} KiB",
                f"{row['optimizer_bytes'] / 1024:,.0f} KiB",
                f"{1e3 * row['step_seconds']:.0f} ms",
                f"{mean:.4f}" + _spread(row["losses"]),
                "" if row is rows[0] else f"{mean / reference - 1:+.2%}",
                exported["qtype"],
                f"{exported['loss']:.4f}",
                f"{exported['bytes'] / 1024:,.0f} KiB",
            )
        )
    count = len(config["seeds"])
    length = config["test_batches"] * config["eval_batch_size"]
    length *= config["sequence_length"]
    base = results["base"]
    return "\n".join(
        [
            f"Loss (nats per byte) on {length:,} bytes of held-out source code, "
            f"mean over {count} seed{'s' if count > 1 else ''}",
            f"Before fine-tuning: {base['code']['loss']:.4f}, after training "
            f"{base['params']:,} params on prose to {base['prose']['loss']:.4f}",
            *reports.align(lines, left=1),
            "trained: params; weights: all that are held, adapters and base; exported: "
            "merged, quantized, saved,\nrestored (of the first seed)",
        ]
    )


def _spread(values: list[float]) -> str:
    return f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""


def plot(results: dict[str, Any], path: pathlib.Path) -> None:
    """Draws the validation loss while fine-tuning, and what is held in memory."""
    # The figure is drawn without pyplot, which would look for a display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    rows = results["rows"]
    colors = ["0.35", "#1f6fb4", "#d95f02", "#7570b3"]
    for row, color in zip(rows, colors, strict=False):
        steps = [record["step"] for record in row["histories"][0]]
        curves = [
            [record["validation_loss"] for record in history]
            for history in row["histories"]
        ]
        means = [statistics.fmean(values) for values in zip(*curves, strict=True)]
        left.plot(
            steps, means, color=color, marker="o", markersize=4, label=row["label"]
        )
    left.set_xlabel("fine-tuning step")
    left.set_ylabel("validation loss on code (nats per byte)")
    left.set_title("While fine-tuning (mean over seeds)")
    left.legend(frameon=False)

    places = range(len(rows))
    start = [0.0] * len(rows)
    parts = ("frozen_bytes", "trained_bytes", "optimizer_bytes")
    labels = ("frozen weights", "trained weights", "optimizer")
    for part, label, color in zip(parts, labels, ("0.6", *colors[1:3]), strict=True):
        sizes = [row[part] / 2**20 for row in rows]
        right.barh(places, sizes, left=start, color=color, label=label)
        start = [a + b for a, b in zip(start, sizes, strict=True)]
    right.set_yticks(list(places), [row["label"] for row in rows])
    right.invert_yaxis()
    right.set_xlabel("MiB between steps")
    right.set_title("What training holds")
    right.legend(frameon=False, loc="lower right")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y" if axes is left else "x", color="0.9")
        axes.set_axisbelow(True)
    save_figure(figure, path, overwrite=True)


def write(results: dict[str, Any], workdir: pathlib.Path) -> None:
    """Prints the table and the sample, and writes `results.json` and `results.png`."""
    parts, sample = [format_table(results)], results["sample"]
    if sample:
        parts.insert(
            0,
            f"What {sample['method']} writes, restored from its export, after "
            f"{sample['prompt'][-40:]!r}:\n{sample['text']}",
        )
    reports.write(results, workdir, parts, plot)
