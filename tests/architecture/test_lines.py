"""The script that counts lines of code, which the docs tell contributors to run."""

from __future__ import annotations

import pathlib

from tests.architecture import lines
from tests.architecture.test_layers import LAYERS

TEXT = '''"""What a module is about,
in two lines."""

import os  # a comment beside code counts with it

# A comment of its own does not.


class Thing:
    """A class."""

    field = """no docstring,
two lines"""

    def method(self):
        """A method."""
        return f(
            self,
        )
'''


def test_blank_lines_comments_and_docstrings_are_not_code():
    assert lines.count(TEXT) == 8


def test_each_package_is_printed_and_the_sum(capsys):
    lines.main([])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    counts = {name: int(number) for number, name in rows}
    total = counts.pop("all")
    assert set(counts) == {*LAYERS, "(doors)"}
    assert total == sum(counts.values()) == sum(lines.by_file().values())


def test_files_are_printed_by_their_paths(capsys):
    lines.main(["--files"])
    assert "trace/bodies.py" in capsys.readouterr().out.split()


def test_the_docs_name_the_script():
    text = pathlib.Path(__file__).parents[2].joinpath("CONTRIBUTING.md").read_text()
    assert "python -m tests.architecture.lines" in text
