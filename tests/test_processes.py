"""Several processes write once, and decide together."""

import hashlib

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from qwix_train import hooks
from qwix_train.files import processes


class Hook(hooks.PeriodicAction):
    def _apply(self, step, t):
        pass


@pytest.fixture
def second(monkeypatch):
    """This process as the second one, and what the first one says."""
    said = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(
        multihost_utils, "broadcast_one_to_all", lambda own: said.pop(0)
    )
    monkeypatch.setattr(
        multihost_utils, "process_allgather", lambda own: np.stack([said.pop(0), own])
    )
    return said


def padded(text):
    return np.frombuffer(text.encode().ljust(1000, b"\0"), np.uint8)


def test_only_the_first_process_acts(second):
    second.append(np.bool_(False))
    processes.once(lambda: pytest.fail("the second process acted"))
    second += [np.bool_(True), padded("OSError: full")]
    with pytest.raises(RuntimeError, match="Process 0 failed: OSError: full$"):
        processes.once(lambda: None)


def test_a_process_that_fails_raises_its_own_error(second):
    second += [np.bool_(False), padded("")]
    with pytest.raises(ZeroDivisionError):
        processes.together(lambda: 1 / 0)
    second.append(np.bool_(False))
    assert processes.together(lambda: 3) == 3


def test_what_differs_is_shown(second):
    other = "a\nthe type is int8\nc"
    digest = np.frombuffer(hashlib.sha256(other.encode()).digest(), np.uint8)
    lines = ["a", "the type is int4", "c"]
    first = np.frombuffer(other.encode(), np.uint8)
    second += [digest, np.int64(len(other)), first, np.bool_(False), padded("")]
    with pytest.raises(ValueError, match="In process 1 .*int4.* in the first .*int8"):
        processes.check_same("The types", lines)
    assert not second
    second.append(digest)
    processes.check_same("The types", other.split("\n"))


def test_the_clock_of_the_first_process_counts(second):
    hook = Hook(every_secs=10)
    second += [np.bool_(False), np.bool_(True), np.bool_(False)]
    assert [hook(step, t=100.0 * step) for step in range(3)] == [False, True, False]
    by_steps = Hook(every_steps=2)  # No process has to ask.
    assert [by_steps(step, t=0.0) for step in range(3)] == [True, False, True]
