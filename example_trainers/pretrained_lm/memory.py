"""How much memory a piece of a program takes."""

import contextlib
import gc
import pathlib
from collections.abc import Iterator

import jax

_PROCESS = pathlib.Path("/proc/self")


class Peak:
    """The most memory of a process within a `with` block.

    Attributes:
        nbytes: The most that was held at once, in bytes, above what was held at the
            start; None where the system does not say, which is everywhere but on Linux.
    """

    nbytes: int | None = None


@contextlib.contextmanager
def peak() -> Iterator[Peak]:
    """Measures the peak of a block."""
    found = Peak()
    gc.collect()
    # Linux forgets the peak so far when it is told to (man proc_pid_clear_refs).
    resets = _PROCESS / "clear_refs"
    if not resets.exists():
        yield found
        return
    resets.write_text("5")
    before = _status("VmRSS")
    yield found
    found.nbytes = _status("VmHWM") - before


def temporary_bytes(compiled: jax.stages.Compiled) -> int | None:
    """What a compiled program takes besides its arguments and results, in bytes.

    None where the platform does not say.
    """
    found = compiled.memory_analysis()
    return None if found is None else found.temp_size_in_bytes


def _status(name: str) -> int:
    for line in (_PROCESS / "status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise ValueError(f"{_PROCESS / 'status'} has no {name}.")
