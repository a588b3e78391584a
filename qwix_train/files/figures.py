"""Figures of matplotlib on disk."""

from __future__ import annotations

import io
import os
import pathlib
from typing import Any

from qwix_train.files import writing


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
