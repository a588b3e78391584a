"""Starts the processes on this machine."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from typing import Any

import ml_collections

from example_trainers.digits_qat.train import SettingsError, claim_workdir


def launch(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> dict[str, Any]:
    """Runs the processes to their end.

    SIGTERM is handed on to them: they save a checkpoint, and end. If one of them dies,
    the others are stopped. The same command goes on from the latest checkpoint, with
    any number of processes.

    Args:
        config: The settings.
        workdir: Where everything goes.

    Returns:
        The results; nothing if the run was told to stop.

    Raises:
        SettingsError: The processes, the mesh and the batch do not divide one another.
        RuntimeError: A process failed.
    """
    workdir = workdir.resolve()
    _check(config)
    same = config.copy_and_resolve_references()
    for name in ("processes", "devices"):
        del same[name]
    claim_workdir(same, workdir)
    children = start(config, workdir)
    signal.signal(signal.SIGTERM, lambda *_: [child.terminate() for child in children])
    try:
        while any(child.poll() is None for child in children):
            if any(child.poll() for child in children):
                break
            time.sleep(0.1)
    finally:
        for child in children:
            child.kill()
            child.wait()
    if any(child.returncode for child in children):
        codes = [child.returncode for child in children]
        raise RuntimeError(
            f"The processes ended with {codes}. Run the same command to go on from the "
            "latest checkpoint."
        )
    results = workdir / "results.json"
    return json.loads(results.read_text()) if results.exists() else {}


def start(
    config: ml_collections.ConfigDict, workdir: pathlib.Path
) -> list[subprocess.Popen[bytes]]:
    """Starts the processes, each with devices of its own."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    # The last of two flags counts.
    flags = os.environ.get("XLA_FLAGS", "")
    flags += f" --xla_force_host_platform_device_count={config.devices}"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    worker = [sys.executable, "-m", "example_trainers.distributed.worker"]
    command = [*worker, config.to_json(), str(workdir), port]
    return [
        subprocess.Popen([*command, str(index)], env=env)
        for index in range(config.processes)
    ]


def _check(config: ml_collections.ConfigDict) -> None:
    if config.devices % config.model_parallel:
        raise SettingsError(
            f"model_parallel={config.model_parallel} does not divide the "
            f"{config.devices} devices of a process."
        )
    rows = config.processes * config.devices // config.model_parallel
    if config.batch_size % rows:
        raise SettingsError(
            f"A batch of {config.batch_size} cannot be cut into {rows} parts."
        )
