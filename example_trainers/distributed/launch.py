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

from example_trainers import reports
from example_trainers.workdirs import SettingsError, claim_workdir
from qwix_train.files.figures import save_figure


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
    written = workdir / "results.json"
    if not written.exists():
        return {}
    results = json.loads(written.read_text())
    reports.write(results, workdir, [], plot)
    return results


def plot(results: dict[str, Any], path: pathlib.Path) -> None:
    """Draws the loss over the steps."""
    # The figure is drawn without pyplot, which would look for a display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    steps = [record["step"] for record in results["history"]]
    losses = [record["loss"] for record in results["history"]]
    axes.plot(steps, losses, marker="o", markersize=4)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per byte)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9")
    save_figure(figure, path, overwrite=True)


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
