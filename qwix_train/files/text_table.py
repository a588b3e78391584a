"""Rows of text as a table."""

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows in columns of equal width, with a line below the first row.

    Example:
      >>> print(aligned([["param", "error"], ["kernel", "2%"]]))
      param   error
      -------------
      kernel  2%
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = [
        [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        for row in rows
    ]
    lines = ["  ".join(row).rstrip() for row in cells]
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)
