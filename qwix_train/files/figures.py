"""Figures of matplotlib."""

from __future__ import annotations

import io
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from qwix_train.core.errors import imported
from qwix_train.files import writing

_MARKS = "osD^vP*Xhp"


def points_in_rows(
    rows: Sequence[str],
    points: Mapping[str, Sequence[tuple[float, int]]],
    xlabel: str,
    needed_by: str,
    styles: Mapping[str, Mapping[str, Any]] | None = None,
) -> Any:
    """A figure with a row for each name, and points of several kinds in the rows.

    Args:
      rows: the names of the rows, from the top.
      points: for each kind, by its name, the value and the row of each point.
      xlabel: what the values are.
      needed_by: what needs matplotlib, for the message where there is none.
      styles: for kinds of points that look otherwise, options of `Axes.plot`.

    Returns:
      The figure.

    Raises:
      ImportError: if matplotlib is not installed.
    """
    matplotlib = imported(
        "matplotlib.figure",
        f"{needed_by} needs matplotlib: pip install 'qwix_train[examples]'.",
    )
    size = (8, 1.6 + 0.28 * len(rows))
    figure = matplotlib.Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    for index, (kind, found) in enumerate(points.items()):
        style = {"marker": _MARKS[index % len(_MARKS)], "color": f"C{index % 10}"}
        style |= (styles or {}).get(kind, {})
        values, places = [x for x, _ in found], [y for _, y in found]
        axes.plot(values, places, linestyle="", alpha=0.8, label=kind, **style)
    axes.set_yticks(range(len(rows)), rows)
    axes.invert_yaxis()
    axes.set_xlabel(xlabel)
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    return figure


def save_figure(
    figure: Any, path: str | os.PathLike[str], *, overwrite: bool = False
) -> None:
    """Writes a figure, as a whole or not at all.

    Args:
      figure: a `matplotlib.figure.Figure`.
      path: the file; its ending says the format, such as `.png` or `.pdf`.
      overwrite: whether to replace a figure that is there, of the same format.

    Raises:
      FileExistsError: if there is one and `overwrite` is not set, or something else.
      OSError: if the file cannot be written; what was there stays.
      ValueError: if matplotlib has no format of this ending.
    """
    path = pathlib.Path(path)
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix.removeprefix("."), dpi=150)
    writing.write_file(
        path,
        content.getvalue(),
        what="a figure of this format",
        signature=slice(0, 4),
        overwrite=overwrite,
    )
