"""Runs a function in several processes that are one JAX computation."""

import os
import pathlib
import pickle
import re
import socket
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[2]
MODULE = "tests.distributed.several"


def start(folder, function, count, *args, devices=1):
    """Starts the processes: each calls `function(*args)`, a function of a module.

    Args:
      folder: a folder of these processes alone.
      function: the function.
      count: the number of processes.
      *args: its arguments, pickled.
      devices: the number of devices of each process.

    Returns:
      The processes.
    """
    folder = pathlib.Path(folder)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    call = (function.__module__, function.__name__, args)
    (folder / "call").write_bytes(pickle.dumps(call))
    flags = re.sub(r"\S*device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
    flags += f" --xla_force_host_platform_device_count={devices}"
    command = [sys.executable, "-m", MODULE, str(folder), str(port), str(count)]
    children = []
    for index in range(count):
        with open(folder / f"{index}.log", "wb") as log:
            child = subprocess.Popen(
                [*command, str(index)],
                cwd=ROOT,
                env={**os.environ, "XLA_FLAGS": flags},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        children.append(child)
    return children


def run(function, count, *args, devices=1, timeout=240):
    """What `function(*args)` returns in each of the processes.

    Raises:
      AssertionError: if one of them fails, or they are not done in time. What it
        printed is in the message.
    """
    with tempfile.TemporaryDirectory() as folder:
        children = start(folder, function, count, *args, devices=devices)
        logs = [pathlib.Path(folder, f"{i}.log") for i in range(count)]
        end = time.monotonic() + timeout
        try:
            # One that failed may leave the others waiting for it.
            while any(child.poll() is None for child in children):
                late = time.monotonic() > end
                if late or any(child.poll() for child in children):
                    break
                time.sleep(0.05)
        finally:
            for child in children:
                child.kill()
                child.wait()
        said = "\n".join(f"{x.name}: {x.read_text()[-4000:]}" for x in logs)
        assert not any(child.returncode for child in children), said
        paths = [pathlib.Path(folder, f"{i}.result") for i in range(count)]
        return [pickle.loads(path.read_bytes()) for path in paths]


def _call(folder, port, count, index):
    import importlib

    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", int(count), int(index))
    assert jax.process_count() == int(count)
    module, name, args = pickle.loads(pathlib.Path(folder, "call").read_bytes())
    result = getattr(importlib.import_module(module), name)(*args)
    pathlib.Path(folder, f"{index}.result").write_bytes(pickle.dumps(result))


if __name__ == "__main__":
    _call(*sys.argv[1:])
