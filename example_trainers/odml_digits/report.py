"""The results as tables, a JSON file and a plot."""

import pathlib
import statistics
from collections.abc import Mapping
from typing import Any

from example_trainers import reports
from qwix_train.files.figures import save_figure

_COLORS = {"float": "0.35", "int8": "#1f6fb4", "int4": "#d95f02"}


def format_table(results: dict[str, Any]) -> str:
    """Returns what the models predict, and their sizes, as a table for the terminal."""
    head = (
        "weights",
        "method",
        "in JAX",
        "in LiteRT",
        "same predictions",
        "same logits",
        "furthest",
        "integers",
        "file",
    )
    lines: list[tuple[str, ...]] = [head]
    floating = _mean(results["rows"][0], "bytes")
    for row in results["rows"]:
        seeds = row["seeds"]
        images = sum(measured["images"] for measured in seeds)
        quantized = seeds[0]["equal_logits"] is not None
        size = _mean(row, "bytes")
        lines.append(
            (
                row["weights"],
                _method(row, results["config"]) or "-",
                _accuracy(row, "jax_accuracy"),
                _accuracy(row, "litert_accuracy"),
                f"{sum(m['same_predictions'] for m in seeds)} of {images}",
                f"{_mean(row, 'equal_logits'):.1%}" if quantized else "",
                f"{max(m['max_steps'] for m in seeds):.0f}" if quantized else "",
                "all" if all(m["full_integer"] for m in seeds) else "none",
                f"{size / 1024:.1f} KiB ({size / floating:.2f}x)",
            )
        )
    count = len(results["config"]["seeds"])
    return "\n".join(
        [
            "Test accuracy in %, mean ± sample standard deviation over "
            f"{count} seed{'s' if count > 1 else ''}, 450 images",
            *reports.align(lines, left=2),
            "furthest: the largest difference of a logit in JAX and in LiteRT, in "
            "steps of its scale",
        ]
    )


def format_latency(results: dict[str, Any]) -> str:
    """Returns the times of the models as a table for the terminal."""
    measured = results["latency"]
    head = ["model"]
    for record in measured:
        count = record["images"]
        head.append("1 image" if count == 1 else f"{count} images")
    lines = [tuple(head)]
    for name in measured[0]["microseconds"]:
        cells = []
        for record in measured:
            taken = record["microseconds"]
            ratio = taken[name] / taken["jax.jit"]
            cells.append(f"{taken[name]:.0f} µs ({ratio:.2f}x)")
        lines.append((_model(name), *cells))
    return "\n".join(
        [
            "Median time of a call on one thread, models in turns",
            *reports.align(lines, left=1),
        ]
    )


def plot(results: dict[str, Any], path: pathlib.Path) -> None:
    """Draws the accuracy of the models, their sizes, and their times."""
    # The figure is drawn without pyplot, which would look for a display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    rows = results["rows"]
    labels = [
        ", ".join(filter(None, (row["weights"], _method(row, results["config"]))))
        for row in rows
    ]
    colors = [_COLORS.get(row["weights"], "#7570b3") for row in rows]

    for place, (row, color) in enumerate(zip(rows, colors, strict=True)):
        for key, shift, marker in (
            ("jax_accuracy", -0.15, "o"),
            ("litert_accuracy", 0.15, "x"),
        ):
            accuracies = [100 * measured[key] for measured in row["seeds"]]
            left.plot(
                accuracies,
                [place + shift] * len(accuracies),
                marker,
                color=color,
                markersize=6,
                fillstyle="none",
                linestyle="none",
            )
    left.set_yticks(range(len(rows)), labels)
    left.set_xlabel("test accuracy of each seed (%)\no: in JAX, x: in LiteRT")
    left.set_title("What they predict")

    sizes = [_mean(row, "bytes") / 1024 for row in rows]
    middle.barh(range(len(rows)), sizes, color=colors)
    middle.set_yticks(range(len(rows)), labels)
    middle.set_xlabel("size of the .tflite file (KiB)")
    middle.set_title("What they take")

    taken = results["latency"][0]["microseconds"]
    shades = ["0.65", *(_COLORS.get(name, "#7570b3") for name in list(taken)[1:])]
    right.barh(range(len(taken)), list(taken.values()), color=shades)
    right.set_yticks(range(len(taken)), [_model(name) for name in taken])
    right.set_xlabel("µs for one image (median)")
    right.set_title("How long they take")
    for axes in (left, middle, right):
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", color="0.9")
        axes.set_axisbelow(True)
    save_figure(figure, path, overwrite=True)


def write(results: dict[str, Any], workdir: pathlib.Path) -> None:
    """Prints the tables, and writes `results.json` and `results.png`."""
    parts = [
        f"The file of {results['shown']}\n{results['ops']}",
        f"Its outputs, and those of the fake-quantized model in JAX\n"
        f"{results['report']}",
        format_table(results),
        format_latency(results),
    ]
    reports.write(results, workdir, parts, plot)


def _mean(row: Mapping[str, Any], key: str) -> float:
    return statistics.fmean(measured[key] for measured in row["seeds"])


def _accuracy(row: Mapping[str, Any], key: str) -> str:
    values = [100 * measured[key] for measured in row["seeds"]]
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.1f} ± {spread:.1f}"


def _method(row: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    if row["method"] == "longer":
        return f"{config['qat_steps']} steps more"
    return row["method"]


def _model(name: str) -> str:
    return "jax.jit, float" if name == "jax.jit" else f"LiteRT, {name}"
