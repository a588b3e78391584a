"""The results as a table, a JSON file and a plot."""

import json
import pathlib
import statistics
from typing import Any

import ml_collections

from example_trainers import reports
from qwix_train.files.figures import save_figure

# A loss of accuracy below this is within the noise of 450 test images (one image is
# 0.22 points), and a share of it says nothing.
MIN_LOSS = 0.01


def _mean_and_spread(values: list[float]) -> dict[str, Any]:
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else 0.0,
        "per_seed": values,
    }


def summarize(
    config: ml_collections.ConfigDict, measurements: list[dict[str, Any]]
) -> dict[str, Any]:
    """Returns mean and spread over the seeds, and what QAT recovers.

    Args:
        config: The settings of the run.
        measurements: One record for each seed, width of the weights and method.

    Returns:
        What `results.json` holds. The recovery of a width is the share of the accuracy
        lost by plain fake quant that QAT wins back, from the means; None where less
        than `MIN_LOSS` is lost.
    """

    def select(weights: str, method: str) -> list[dict[str, Any]]:
        return [
            m for m in measurements if m["weights"] == weights and m["method"] == method
        ]

    def spread(weights: str, method: str) -> dict[str, Any]:
        accuracies = [m["test_accuracy"] for m in select(weights, method)]
        return _mean_and_spread(accuracies)

    floating = spread("float", "float")
    rows = []
    for weights in config.weight_qtypes:
        ptq, qat = spread(weights, "ptq"), spread(weights, "qat")
        lost = floating["mean"] - ptq["mean"]
        rows.append(
            {
                "weight_qtype": weights,
                "act_qtype": weights
                if config.act_qtype == "same"
                else config.act_qtype,
                "ptq": ptq,
                "qat": qat,
                "lost": lost,
                "recovery": (qat["mean"] - ptq["mean"]) / lost
                if lost >= MIN_LOSS
                else None,
                "history": [m["history"] for m in select(weights, "qat")],
            }
        )
    return {
        "config": json.loads(config.to_json()),
        "float": {
            **floating,
            "history": [m["history"] for m in select("float", "float")],
        },
        "float_longer": {
            **spread("float_longer", "float"),
            "history": [m["history"] for m in select("float_longer", "float")],
        },
        "rows": rows,
    }


def format_table(results: dict[str, Any]) -> str:
    """Returns the results as a table for the terminal."""

    def cell(spread: dict[str, Any]) -> str:
        return f"{100 * spread['mean']:5.1f} ± {100 * spread['std']:4.1f}"

    lines = [("weights", "activations", "plain fake quant", "QAT", "recovered")]
    lines.append(("float", "float", cell(results["float"]), "", ""))
    longer = f"float, {results['config']['qat_steps']} steps more"
    lines.append((longer, "float", cell(results["float_longer"]), "", ""))
    for row in results["rows"]:
        recovery = row["recovery"]
        lines.append(
            (
                row["weight_qtype"],
                row["act_qtype"],
                cell(row["ptq"]),
                cell(row["qat"]),
                "-" if recovery is None else f"{recovery:.0%}",
            )
        )
    count = len(results["config"]["seeds"])
    return "\n".join(
        [
            f"Test accuracy in %, mean ± sample standard deviation over {count} "
            f"seed{'s' if count > 1 else ''}, 450 images",
            *reports.align(lines, left=2),
            "recovered: (QAT - plain) / (float - plain); "
            f"- where plain fake quant loses less than {100 * MIN_LOSS:g} point",
        ]
    )


def plot(results: dict[str, Any], path: pathlib.Path) -> None:
    """Draws accuracy over the width of the weights, and over the steps of QAT."""
    # The figure is drawn without pyplot, which would look for a display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    rows, count = results["rows"], len(results["config"]["seeds"])
    positions = range(len(rows))
    gray, orange, blue = "0.35", "#d95f02", "#1f6fb4"

    left.axhline(
        100 * results["float"]["mean"], color=gray, linestyle="--", label="float"
    )
    for method, offset, color, label in (
        ("ptq", -0.2, orange, "plain fake quant"),
        ("qat", 0.2, blue, "QAT"),
    ):
        places = [p + offset for p in positions]
        means = [100 * row[method]["mean"] for row in rows]
        left.bar(places, means, width=0.38, color=color, label=label)
        for place, mean in zip(places, means, strict=True):
            left.annotate(
                f"{mean:.1f}",
                (place, 2),
                ha="center",
                va="bottom",
                color="white",
                fontsize=9,
            )
        for place, row in zip(places, rows, strict=True):
            seeds = [100 * accuracy for accuracy in row[method]["per_seed"]]
            left.plot(
                [place] * len(seeds), seeds, ".", color="black", markersize=5, zorder=3
            )
    left.set_xticks(list(positions), [row["weight_qtype"] for row in rows])
    act_qtypes = ", ".join(dict.fromkeys(row["act_qtype"] for row in rows))
    left.set_xlabel(f"type of the weights (activations: {act_qtypes})")
    left.set_ylim(0, 119)
    left.set_yticks(range(0, 101, 20))
    left.set_ylabel("test accuracy (%)")
    left.set_title("After training (dots: seeds)")
    left.legend(loc="upper center", ncols=3, frameon=False)

    right.axhline(100 * results["float"]["mean"], color=gray, linestyle="--")
    shades = ["#7570b3", "#1f6fb4", "#1b9e77", "#c51b7d"]
    for i, row in enumerate(rows):
        steps = [0] + [record["step"] for record in row["history"][0]]
        curves = [
            [start] + [record["test_accuracy"] for record in history]
            for start, history in zip(
                row["ptq"]["per_seed"], row["history"], strict=True
            )
        ]
        means = [100 * statistics.fmean(column) for column in zip(*curves, strict=True)]
        right.plot(
            steps,
            means,
            marker="o",
            markersize=4,
            color=shades[i % len(shades)],
            label=row["weight_qtype"],
        )
    right.set_ylim(0, 105)
    right.set_xlabel("fine-tuning step (0: plain fake quant)")
    right.set_ylabel("test accuracy (%)")
    right.set_title("While fine-tuning (mean over seeds)")
    right.legend(title="weights", loc="lower right", frameon=False)

    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.9")
        axes.set_axisbelow(True)
    framework = {"linen": "Flax Linen", "nnx": "Flax NNX"}[
        results["config"]["framework"]
    ]
    figure.suptitle(
        f"Handwritten digits, {framework}, {count} seed{'s' if count > 1 else ''}"
    )
    save_figure(figure, path, overwrite=True)


def write(results: dict[str, Any], workdir: pathlib.Path) -> None:
    """Prints the table, and writes `results.json` and `results.png`."""
    reports.write(results, workdir, [format_table(results)], plot)
