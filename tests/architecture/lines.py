"""Prints how many lines of code each package of the library has.

    python -m tests.architecture.lines [--files]

A line of code is one that holds any of it: blank lines, comments, and the docstrings of
modules, classes and functions are not counted.
"""

from __future__ import annotations

import argparse
import ast
import collections
import functools

from tests.architecture import source


def count(text: str, tree: ast.Module | None = None) -> int:
    """The number of lines of code in the text of a file.

    Args:
      text: the text.
      tree: its syntax tree, if it is at hand.

    Example:
      >>> count('"Docs."\\n\\n# A comment.\\nx = [\\n    1,\\n]\\n')
      3
    """
    numbered = enumerate(text.split("\n"), 1)
    lines = {n for n, line in numbered if line.strip() and line.strip()[0] != "#"}
    docstrings: set[int] = set()
    for node in ast.walk(tree or ast.parse(text)):
        if isinstance(node, ast.Constant | ast.JoinedStr):
            # Within a string of several lines nothing is a comment.
            lines.update(_span(node))
        elif isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            if ast.get_docstring(node, clean=False) is not None:
                docstrings.update(_span(node.body[0]))
    return len(lines - docstrings)


def _span(node: ast.expr | ast.stmt) -> range:
    return range(node.lineno, (node.end_lineno or node.lineno) + 1)


@functools.cache
def by_file() -> dict[str, int]:
    """The lines of code of each file, by its path below `qwix_train`."""
    return {
        file: count((source.ROOT / file).read_text("utf-8"), tree)
        for file, tree in source.library().items()
    }


def by_package() -> dict[str, int]:
    """The lines of code of each package, most first; "(doors)" are the files beside."""
    counts: collections.Counter[str] = collections.Counter()
    for file, lines in by_file().items():
        package, is_in_package, _ = file.partition("/")
        counts[package if is_in_package else "(doors)"] += lines
    return dict(counts.most_common())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Lines of code of the library.")
    parser.add_argument("--files", action="store_true", help="count each file")
    options = parser.parse_args(argv)
    counts = by_file() if options.files else by_package()
    for name, lines in {**counts, "all": sum(counts.values())}.items():
        print(f"{lines:6} {name}")


if __name__ == "__main__":
    main()
