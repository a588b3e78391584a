"""Runs an example in a process of its own, and kills it."""

import pathlib
import signal
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


def run_and_kill(module: str, *flags: str, after: str) -> str:
    """Kills an example as soon as it has printed a line.

    Args:
        module: The example, such as `example_trainers.digits_qat`.
        *flags: Its flags.
        after: What the line contains. The checkpoint of a step is written in the
            background while its line is printed, so that the kill hits an unfinished
            one.

    Returns:
        What it printed.
    """
    lines = []
    with subprocess.Popen(
        [sys.executable, "-m", module, *flags],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if after in line:
                process.send_signal(signal.SIGKILL)
                break
        process.stdout.read()
    output = "".join(lines)
    assert process.returncode == -signal.SIGKILL, output
    return output
