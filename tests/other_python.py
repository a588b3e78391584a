"""Runs a script with an interpreter that has PyTorch and the libraries on it."""

import os
import pathlib
import subprocess

VARIABLE = "QWIX_TRAIN_INTERCHANGE_PYTHON"


def run(script: str | pathlib.Path, *arguments: str | pathlib.Path) -> None:
    """Runs a script to its end, without network and without our own package.

    Raises:
        RuntimeError: the script failed; its last words are in the message.
    """
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [os.environ[VARIABLE], script, *arguments],
        env=environment | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
