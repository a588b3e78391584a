"""What every example leaves: a text, the numbers as JSON, and a picture."""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qwix_train.files import json_text


def write(
    results: Mapping[str, Any],
    workdir: pathlib.Path,
    parts: Sequence[str],
    plot: Callable[[Any, pathlib.Path], None],
) -> None:
    """Prints a text, and writes `results.json` and `results.png`.

    Args:
        results: The numbers.
        workdir: The folder of the run.
        parts: The text, such as tables: one below the other.
        plot: Draws the results into a file.
    """
    numbers, picture = workdir / "results.json", workdir / "results.png"
    json_text.write(numbers, results, overwrite=True)
    plot(results, picture)
    print("\n" + "\n\n".join([*parts, f"{numbers}\n{picture}"]), flush=True)


def align(lines: list[tuple[str, ...]], left: int) -> list[str]:
    """Lays out a table. Its first line is the head.

    Args:
        lines: The cells.
        left: The number of columns that are aligned to the left.
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = "-" * (sum(widths) + 3 * (len(widths) - 1))

    def text(line: tuple[str, ...]) -> str:
        cells = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        return "   ".join(cells).rstrip()

    return [rule, text(lines[0]), rule, *map(text, lines[1:]), rule]
