"""Long work says how far it is.

Work that takes long goes through `tracked`, or a `task`. Who sees it is decided in one
place: by `progress`, or by a line on stderr, where that is a terminal.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, TypeAlias, TypeVar

import jax

T = TypeVar("T")

# Work that is done sooner says nothing, and a line or a log says no more.
_SECONDS_BEFORE_THE_FIRST, _BETWEEN_LINES, _BETWEEN_LOGGED = 1.0, 0.1, 5.0


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a piece of work is.

    Attributes:
      what: what is done, such as "quantizing params".
      done: how many items are done.
      total: how many there are; None if that is not known yet.
      item: the last one that was done, such as the path of a param.
      seconds: since the first one was begun.
    """

    what: str
    done: int
    total: int | None
    item: str
    seconds: float

    def __str__(self) -> str:
        counted = str(self.done) if self.total is None else f"{self.done}/{self.total}"
        return f"{self.what}: {counted} in {self.seconds:.0f} s {self.item}".rstrip()


Report: TypeAlias = Callable[[Progress], Any]

_reports: contextvars.ContextVar[Report | bool | None] = contextvars.ContextVar(
    "reports", default=None
)


@contextlib.contextmanager
def progress(report: Report | bool = True) -> Iterator[None]:
    """A context in which long work says how far it is.

    Without it there is one line on stderr, if that is a terminal and the work takes
    longer than a second. Of several processes the first one alone says something. JAX
    computes while Python goes on, so on an accelerator the count is of what was begun.

    Args:
      report: True for lines on stderr, also in a notebook or a log; False for silence;
        or a function, which is called with a `Progress` after each item.

    Example:
      >>> from jax import numpy as jnp
      >>> from qwix_train import QuantizationRule, progress, ptq
      >>> rules = [QuantizationRule(weight_qtype="int8")]
      >>> with progress(lambda p: print(p.what, p.done, "of", p.total, p.item)):
      ...     _, params = ptq.quantize(
      ...         lambda params, x: x @ params["w"], {"w": jnp.ones((4, 2))}, rules,
      ...         jnp.ones((1, 4)),
      ...     )
      quantizing params 1 of 1 w
    """
    token = _reports.set(report)
    try:
        yield
    finally:
        _reports.reset(token)


class Task:
    """A piece of work with a count.

    Attributes:
      what: see `Progress`.
      total: see there. It may be set later.
    """

    def __init__(self, what: str, total: int | None, report: Report | None):
        """Begins. Use `task`."""
        self.what: str = what
        self.total: int | None = total
        self._report: Report | None = report
        self._done: int = 0
        self._start: float = time.monotonic()

    def advance(self, item: str = "") -> None:
        """Says that one more item is done."""
        self._done += 1
        if self._report is not None:
            seconds = time.monotonic() - self._start
            state = Progress(self.what, self._done, self.total, item, seconds)
            self._report(state)


@contextlib.contextmanager
def task(what: str, total: int | None = None) -> Iterator[Task]:
    """A piece of work, whose items are counted by `Task.advance`.

    Args:
      what: see `Progress`.
      total: see there.
    """
    chosen = _reports.get()
    # A program without a console has no stderr.
    is_terminal = getattr(sys.stderr, "isatty", bool)()
    if chosen is None:
        chosen = is_terminal
    if chosen is False:
        yield Task(what, total, None)
    elif chosen is True:
        line = _Line(is_terminal)
        finish = line.end
        try:
            yield Task(what, total, line.show)
        except GeneratorExit:
            # The loop was left some time ago: what stands on the line may be others'.
            finish = line.leave
            raise
        finally:
            finish()
    else:
        yield Task(what, total, functools.partial(_by_one_process, chosen))


def _by_one_process(report: Callable[..., Any], *args: Any) -> None:
    # JAX starts its backends when it is asked, so it is not asked before.
    if not jax.process_index():
        report(*args)


def tracked(
    what: str, items: Iterable[T], name: Callable[[T], str] = lambda item: ""
) -> Iterator[T]:
    """The items of a piece of work. Each is done when the next one is asked for.

    Args:
      what: see `Progress`.
      items: the items.
      name: what to call one.

    Example:
      >>> with progress(print):
      ...     squares = [x * x for x in tracked("squaring", [2, 3], str)]
      squaring: 1/2 in 0 s 2
      squaring: 2/2 in 0 s 3
    """
    with task(what, len(items) if isinstance(items, Sized) else None) as counted:
        for item in items:
            yield item
            counted.advance(name(item))


class _Line:
    """A line on stderr that is written over, or, in a log, one now and then."""

    def __init__(self, is_terminal: bool):
        self._stream = sys.stderr
        self._is_terminal = is_terminal
        self._shown = -1.0
        self._last: Progress | None = None

    def show(self, state: Progress) -> None:
        self._last = state
        wait = _BETWEEN_LINES if self._is_terminal else _BETWEEN_LOGGED
        next_time = _SECONDS_BEFORE_THE_FIRST if self._shown < 0 else self._shown + wait
        if state.seconds >= next_time:
            self._shown = state.seconds
            self._write(state)

    def end(self) -> None:
        """Shows how far the work came."""
        if self._last is not None and self._shown >= 0:
            self._write(dataclasses.replace(self._last, item=""))
            self.leave()

    def leave(self) -> None:
        """Lets what else is written begin on a line of its own."""
        if self._is_terminal and self._shown >= 0:
            self._print("\n")

    def _write(self, state: Progress) -> None:
        if self._is_terminal:
            # From the first column on, and no more than fits: a line that wraps stays.
            columns = shutil.get_terminal_size().columns - 1
            self._print(f"\r\x1b[K{str(state)[:columns]}")
        else:
            self._print(f"{state}\n")

    def _print(self, text: str) -> None:
        write = functools.partial(print, end="", file=self._stream, flush=True)
        _by_one_process(write, text)
