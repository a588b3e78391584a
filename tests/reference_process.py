"""Runs the reference, `qwix`, in a process that its patches of JAX cannot leave."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]


def run(module: str, path: pathlib.Path) -> None:
    """Has a test module, as a program, write what `qwix` computes.

    Args:
      module: its name, such as `tests.qat.parity`.
      path: the file to write.
    """
    subprocess.run(
        [sys.executable, "-W", "ignore", "-m", module, path],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
    )
