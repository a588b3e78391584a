"""What the files of the library say, by their syntax trees."""

from __future__ import annotations

import ast
import functools
import pathlib
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).parents[2] / "qwix_train"


@functools.cache
def library() -> dict[str, ast.Module]:
    """The syntax tree of each file of the library, by its path below `qwix_train`."""
    return {
        file.relative_to(ROOT).as_posix(): ast.parse(file.read_text("utf-8"))
        for file in sorted(ROOT.rglob("*.py"))
    }


def strings(tree: ast.AST) -> Iterator[str]:
    """The string constants of a file, parts of f-strings too, without its docstrings.

    A string that is a statement of its own is a docstring, or one of an attribute.
    """
    documentation = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) not in documentation:
                yield node.value


def imports(tree: ast.AST) -> Iterator[str]:
    """The full names that a file imports, within functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "The library has absolute imports alone."
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
