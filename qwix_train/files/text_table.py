"""Rows of text as a table."""

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]], texts: int | None = None) -> str:
    """Rows in columns of equal width, with a line below the first row.

    Args:
      rows: the rows.
      texts: how many columns, from the first, are aligned to the left. The others are
        numbers. All if None.

    Example:
      >>> print(aligned([["param", "error"], ["kernel", "2%"]]))
      param   error
      -------------
      kernel  2%
    """
    columns = []
    for index, column in enumerate(zip(*rows, strict=True)):
        side = str.ljust if texts is None or index < texts else str.rjust
        columns.append([side(cell, max(map(len, column))) for cell in column])
    lines = ["  ".join(row).rstrip() for row in zip(*columns, strict=True)]
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)
