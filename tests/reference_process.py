"""Runs the reference, `qwix`, in a process that its patches of JAX cannot leave."""

import os
import pathlib
import subprocess
import sys
from collections.abc import Iterable

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def run(module: str, path: pathlib.Path, *names: str) -> None:
    """Has a test module, as a program, write what `qwix` computes.

    Args:
      module: its name, such as `tests.qat.parity`.
      path: the file to write.
      names: the cases to compute, if the module has a choice.
    """
    subprocess.run(
        [sys.executable, "-W", "ignore", "-m", module, path, *names],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
    )


def cases(names: Iterable[str], by_default: Iterable[str]) -> list:
    """The names as params of a test: those that do not run by default are slow."""
    quick = set(by_default)
    return [
        name if name in quick else pytest.param(name, marks=pytest.mark.slow)
        for name in names
    ]


def selected(request: pytest.FixtureRequest) -> list[str]:
    """The names of the cases that tests of this module are about to run."""
    names = {
        item.callspec.params["name"]
        for item in request.session.items
        if isinstance(item, pytest.Function)
        and item.path == request.path
        and hasattr(item, "callspec")
        and "name" in item.callspec.params
    }
    return sorted(names)
