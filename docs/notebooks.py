"""Tutorials as notebooks: the same page, its code in cells that can be run."""

from __future__ import annotations

import json
import pathlib
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

_CODE = re.compile(r"^```python\n(.*?)^```\n?", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\(\.\./(\w+)\.md")


def notebook(markdown: str) -> dict[str, Any]:
    """A page as a notebook, in version 4.5 of Jupyter's format."""
    cells = []
    # What stands between the blocks, and the blocks, in turn.
    for index, text in enumerate(_CODE.split(markdown)):
        cell: dict[str, Any] = {"id": f"cell-{index}", "metadata": {}}
        if index % 2:
            cell |= {"cell_type": "code", "execution_count": None, "outputs": []}
        else:
            cell["cell_type"] = "markdown"
            text = _LINK.sub(r"](../\1.html", text)
        if text.strip():
            cells.append(cell | {"source": text.strip()})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel}
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Puts a notebook beside each tutorial."""
    from mkdocs.structure.files import File  # Tests of notebooks need no MkDocs.

    for page in files.documentation_pages():
        if page.src_uri.startswith("tutorials/"):
            content = json.dumps(notebook(page.content_string), indent=1)
            files.append(File.generated(config, _beside(page.src_uri), content=content))
    return files


def on_page_markdown(markdown: str, page: Page, **kwargs: Any) -> str:
    """Links the notebook of a tutorial below the heading."""
    if not page.file.src_uri.startswith("tutorials/"):
        return markdown
    heading, rest = markdown.split("\n", 1)
    link = f"[Download this page as a notebook]({_name(page.file.src_uri)})"
    return f"{heading}\n\n{link}\n{rest}"


def _beside(uri: str) -> str:
    return str(pathlib.PurePosixPath(uri).with_suffix(".ipynb"))


def _name(uri: str) -> str:
    return pathlib.PurePosixPath(_beside(uri)).name
