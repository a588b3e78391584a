"""The results as a table, a JSON file and a plot."""

import pathlib
import statistics
from collections.abc import Mapping
from typing import Any

from example_trainers import reports
from qwix_train.files.figures import save_figure

PTQ, PLAIN, FLOAT = "PTQ", "QAT", "float, as many steps"
# How a metric is shown: its factor and its digits.
_SHOWN = {"accuracy": (100, 1), "loss": (1, 4)}
# Where PTQ loses less than this, a share of it says nothing: of 450 images, 9 images.
_MIN_LOST = {"accuracy": 0.02, "loss": 0.02}


def format_row(row: Mapping[str, Any], metric: str) -> str:
    """Returns a line that says what was just measured."""
    seeds = ", ".join(_shown(metric, value) for value in _values(row, metric))
    return f"weights {row['weights']} | {row['method']} | test {metric} {seeds}"


def summarize(measured: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the measurements of a task with means, spreads and recoveries.

    The recovery of a row is the share of what PTQ loses, in the mean over the seeds,
    that the method wins back: 0 for PTQ, 1 for the float model that was trained on for
    as many steps. Its spread is that of the metric over the seeds, as such a share.
    Both are None where PTQ loses next to nothing.

    Args:
        measured: What `Experiment.run` returns.
    """
    metric = measured["metric"]
    rows = []
    for row in measured["rows"]:
        values = _values(row, metric)
        std = statistics.stdev(values) if len(values) > 1 else 0.0
        rows.append({**row, "mean": statistics.fmean(values), "std": std})
    by_key = {(row["weights"], row["method"]): row for row in rows}
    floating = by_key["float", FLOAT]["mean"]
    for row in rows:
        row["recovery"] = row["recovery_std"] = None
        if row["weights"] == "float":
            continue
        start = by_key[row["weights"], PTQ]["mean"]
        lost = floating - start
        if abs(lost) >= _MIN_LOST[metric]:
            row["recovery"] = (row["mean"] - start) / lost
            row["recovery_std"] = row["std"] / abs(lost)
    return {**measured, "rows": rows}


def best(task: Mapping[str, Any], weights: str) -> Mapping[str, Any]:
    """Returns the row of the method that comes out best for a type of weights."""
    rows = [row for row in task["rows"] if row["weights"] == weights]
    sign = 1 if task["metric"] == "accuracy" else -1
    return max(rows, key=lambda row: sign * row["mean"])


def check(results: Mapping[str, Any], weights: str = "int2") -> list[str]:
    """What does not hold of what must, in words.

    At 2 bits the best method is better than plain QAT, by more than the spread of
    either over the seeds.
    """
    broken = []
    for task in results["tasks"]:
        metric = task["metric"]
        for plain in task["rows"]:
            if (plain["weights"], plain["method"]) != (weights, PLAIN):
                continue
            found = best(task, weights)
            gain = abs(found["mean"] - plain["mean"])
            if gain <= max(found["std"], plain["std"]):
                broken.append(
                    f"{task['label']}, {weights}: {found['method']} has a {metric} of "
                    f"{_cell(metric, found)}, and {PLAIN} {_cell(metric, plain)}."
                )
    return broken


def format_tables(results: Mapping[str, Any]) -> str:
    """Returns the results as tables for the terminal, one for each task."""
    count = len(results["config"]["seeds"])
    act_qtype = results["config"]["act_qtype"]
    parts = []
    for task in results["tasks"]:
        unit = "accuracy in %" if task["metric"] == "accuracy" else "loss"
        parts.append(
            "\n".join(
                [
                    f"{task['label']}: test {unit}, mean ± sample standard deviation "
                    f"over {count} seed{'s' if count > 1 else ''}",
                    *_table(task, results["config"]),
                ]
            )
        )
    parts.append(
        f"Activations in {act_qtype}; each quantized model was exported. "
        "recovered: (method - PTQ) / (float - PTQ),\nwith the float model that was "
        "trained for as many steps more; - where PTQ loses next to nothing."
    )
    return "\n\n".join(parts)


def _table(task: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    metric, weight_qtypes = task["metric"], config["weight_qtypes"]
    by_key = {(row["weights"], row["method"]): row for row in task["rows"]}
    head = ["method"]
    for weights in weight_qtypes:
        head += [weights, "recovered"]
    lines = [tuple(head)]
    floating = [method for weights, method in by_key if weights == "float"]
    for method in (*floating, PTQ, *config["methods"]):
        cells = [method]
        for weights in weight_qtypes:
            row = by_key.get(("float", method)) or by_key.get((weights, method))
            cells += ["", ""] if row is None else _cells(metric, row)
        lines.append(tuple(cells))
    return reports.align(lines, left=1)


def _cells(metric: str, row: Mapping[str, Any]) -> list[str]:
    if row["weights"] == "float" or row["method"] == PTQ:
        return [_cell(metric, row), ""]
    if row["recovery"] is None:
        return [_cell(metric, row), "-"]
    share = f"{100 * row['recovery']:.0f} ± {100 * row['recovery_std']:.0f}%"
    return [_cell(metric, row), share]


def _cell(metric: str, row: Mapping[str, Any]) -> str:
    return f"{_shown(metric, row['mean'])} ± {_shown(metric, row['std'])}"


def _shown(metric: str, value: float) -> str:
    factor, digits = _SHOWN[metric]
    return f"{factor * value:.{digits}f}"


def _values(row: Mapping[str, Any], metric: str) -> list[float]:
    return [measured["test"][metric] for measured in row["seeds"]]


def plot(results: Mapping[str, Any], path: pathlib.Path) -> None:
    """Draws what each method recovers, for each task and type of weights."""
    # The figure is drawn without pyplot, which would look for a display.
    from matplotlib.figure import Figure

    tasks = results["tasks"]
    figure = Figure(figsize=(5.5 * len(tasks) + 1, 4.4), layout="constrained")
    weight_qtypes = results["config"]["weight_qtypes"]
    methods = results["config"]["methods"]
    shades = "0.45 #1f6fb4 #d95f02 #7570b3 #1b9e77 #c51b7d #a6761d #e6ab02".split()
    colors = {method: shades[i % len(shades)] for i, method in enumerate(methods)}
    width = 0.8 / len(methods)
    for axes, task in zip(
        figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True
    ):
        for row in task["rows"]:
            if row["method"] not in colors or row["recovery"] is None:
                continue
            shift = (methods.index(row["method"]) - (len(methods) - 1) / 2) * width
            axes.bar(
                weight_qtypes.index(row["weights"]) + shift,
                100 * row["recovery"],
                width=0.9 * width,
                color=colors[row["method"]],
                yerr=100 * row["recovery_std"],
                error_kw={"elinewidth": 1, "ecolor": "0.2"},
            )
        axes.axhline(100, color="0.35", linestyle="--", linewidth=1)
        axes.set_xticks(range(len(weight_qtypes)), weight_qtypes)
        axes.set_xlabel("type of the weights")
        axes.set_ylabel("recovered of what PTQ loses (%)")
        axes.set_title(task["label"])
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.9")
        axes.set_axisbelow(True)
    handles = [
        figure.axes[0].bar([0], [0], color=color, label=method)
        for method, color in colors.items()
    ]
    figure.legend(handles=handles, loc="outside right center", frameon=False)
    save_figure(figure, path, overwrite=True)


def write(results: Mapping[str, Any], workdir: pathlib.Path) -> None:
    """Prints the tables, and writes `results.json` and `results.png`."""
    reports.write(results, workdir, [format_tables(results)], plot)
