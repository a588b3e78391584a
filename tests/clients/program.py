"""Runs a program in the environment of another project that imports `qwix`.

`make test-clients` makes these environments: each has the project, `qwix` and this
library, and `QWIX_TRAIN_TUNIX_PYTHON` and the like are their interpreters.
"""

import os
import pathlib
import subprocess

QUICK_FLAGS = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)
"""Compiling takes most of the time, and the programs run for moments."""


def run(client: str, first: str, *arguments: str | pathlib.Path) -> None:
    """Runs `tests/clients/CLIENT_program.py`.

    Args:
        client: The project, such as ``tunix``.
        first: What is executed before, such as ``import qwix``.
        *arguments: The arguments of the program.
    """
    here = pathlib.Path(__file__).parent
    path = str(here / f"{client}_program.py")
    code = f"import runpy; {first}; runpy.run_path({path!r}, run_name='__main__')"
    done = subprocess.run(
        [os.environ[variable(client)], "-W", "ignore", "-c", code, *arguments],
        cwd=here,
        env={**os.environ, "XLA_FLAGS": QUICK_FLAGS, "WANDB_MODE": "disabled"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def variable(client: str) -> str:
    """The environment variable that has the interpreter of a project."""
    return f"QWIX_TRAIN_{client.upper()}_PYTHON"
