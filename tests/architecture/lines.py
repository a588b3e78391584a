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
import io
import tokenize

from tests.architecture import source

_NO_CODE = frozenset(
    {
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    }
)


def count(text: str) -> int:
    """The number of lines of code in the text of a file.

    Example:
      >>> count('"Docs."\\n\\n# A comment.\\nx = [\\n    1,\\n]\\n')
      3
    """
    lines = {
        line
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type not in _NO_CODE
        for line in range(token.start[0], token.end[0] + 1)
    }
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            if ast.get_docstring(node) is not None:
                docstring = node.body[0]
                assert docstring.end_lineno is not None
                lines -= set(range(docstring.lineno, docstring.end_lineno + 1))
    return len(lines)


@functools.cache
def by_file() -> dict[str, int]:
    """The lines of code of each file, by its path below `qwix_train`."""
    return {
        file: count((source.ROOT / file).read_text("utf-8"))
        for file in source.library()
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
