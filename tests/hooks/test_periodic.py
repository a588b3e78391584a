"""When hooks are due: whenever those of `clu.periodic_actions` are."""

import importlib
import subprocess
import sys
import time
import types

import hypothesis
import pytest
from hypothesis import strategies as st

from qwix_train import hooks

NO_CLU = """
import sys
import qwix_train.hooks
print(sorted({m.split(".")[0] for m in sys.modules} & {"clu", "tensorflow"}))
"""


class Ours(hooks.PeriodicAction):
    """Records when it was due, and with what."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.calls = []

    def _apply(self, step, t, *args, **kwargs):
        self.calls.append((step, t, args, kwargs))


@pytest.fixture(scope="module")
def clu_action():
    """An action of clu's, which records the same.

    Its module imports writers and profilers that need TensorFlow, and that the base
    class has no use for.
    """
    stubs = {"clu.metric_writers": ["MetricWriter"], "clu.profiler": []}
    with pytest.MonkeyPatch.context() as patch:
        import clu

        for name, attributes in stubs.items():
            stub = types.ModuleType(name)
            for attribute in attributes:
                setattr(stub, attribute, object)
            patch.setitem(sys.modules, name, stub)
            patch.setattr(clu, name.split(".")[1], stub, raising=False)
        patch.delitem(sys.modules, "clu.periodic_actions", raising=False)
        module = importlib.import_module("clu.periodic_actions")
        patch.delitem(sys.modules, "clu.periodic_actions")

    class Theirs(module.PeriodicAction):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.calls = []

        def _apply(self, step, t):
            self.calls.append((step, t, (), {}))

    return Theirs


def outcomes(hook, calls):
    """What each call returns, up to the first that is refused."""
    found = []
    for step, t in calls:
        try:
            found.append(hook(step, t))
        except ValueError as error:
            found.append("every_steps" in str(error))
            break
    return found


SCHEDULES = st.fixed_dictionaries(
    {},
    optional={
        "every_steps": st.none() | st.integers(1, 5),
        "every_secs": st.none() | st.floats(0, 20),
        "on_steps": st.none() | st.lists(st.integers(0, 30)),
    },
).filter(lambda schedule: any(value is not None for value in schedule.values()))
# Steps that follow one another, and some that are left out, repeated, or go back.
ADVANCES = st.lists(
    st.tuples(st.sampled_from([1] * 12 + [0, 2, -1]), st.floats(0, 15)), max_size=40
)


@hypothesis.given(schedule=SCHEDULES, first=st.integers(0, 10), advances=ADVANCES)
def test_is_due_when_clu_is(clu_action, schedule, first, advances):
    calls, t = [(first, 100.0)], 100.0
    for by, seconds in advances:
        t += seconds
        calls.append((calls[-1][0] + by, t))
    ours, theirs = Ours(**schedule), clu_action(**schedule)
    assert outcomes(ours, calls) == outcomes(theirs, calls)
    assert ours.calls == theirs.calls


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({"every_steps": 3}, [0, 3, 6]),
        ({"on_steps": (1, 5)}, [1, 5]),
        # More than 20 seconds after the first call, then after the last time.
        ({"every_secs": 20}, [3, 6]),
        ({"every_secs": 20, "on_steps": [1]}, [1, 4, 7]),
        # As a config may say it: never.
        ({"on_steps": []}, []),
    ],
)
def test_schedules(schedule, expected):
    hook = Ours(**schedule)
    assert [step for step in range(8) if hook(step, 10.0 * step)] == expected


def test_takes_the_time_itself(monkeypatch):
    monkeypatch.setattr(time, "monotonic", lambda: 7.5)
    hook = Ours(every_steps=1)
    assert hook(1)
    assert hook.calls == [(1, 7.5, (), {})]


def test_passes_arguments_on():
    hook = Ours(on_steps=[2])
    assert not hook(1, 0.0, "a", state="b")
    assert hook(2, 1.0, "a", state="b")
    assert hook.calls == [(2, 1.0, ("a",), {"state": "b"})]


def test_an_action_that_fails_is_still_due():
    class Fails(hooks.PeriodicAction):
        def _apply(self, step, t):
            raise RuntimeError("disk is full")

    hook = Fails(every_secs=5)
    hook(1, 0.0)
    for step in (2, 3):
        with pytest.raises(RuntimeError, match="disk is full"):
            hook(step, 6.0)


def test_refuses_steps_that_do_not_follow():
    hook = Ours(every_steps=10)
    hook(4)
    for step in (6, 4, 3):
        with pytest.raises(ValueError, match=f"step {step} after step 4"):
            hook(step)
    assert hook(5) is False
    # Other schedules take any steps.
    other = Ours(on_steps=[3, 9])
    assert [other(step) for step in (3, 9, 9, 1)] == [True, True, True, False]


@pytest.mark.parametrize("every_steps", [0, -1])
def test_refuses_schedules_that_cannot_be(every_steps):
    with pytest.raises(ValueError, match=f"every_steps={every_steps}"):
        Ours(every_steps=every_steps)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"every_steps": 2.5}, TypeError, "every_steps=2.5: a number of steps is an"),
        ({"every_steps": True}, TypeError, "every_steps=True"),
        ({"on_steps": [1, "2"]}, TypeError, "on_steps='2': a number of steps is an"),
        ({"every_secs": "60"}, TypeError, "every_secs='60': it is a number"),
        ({"every_secs": -1.0}, ValueError, "every_secs=-1.0: it must not be negative"),
        ({"every_secs": float("nan")}, ValueError, "every_secs=nan"),
    ],
)
def test_refuses_what_is_no_schedule(fields, error, message):
    with pytest.raises(error, match=message):
        Ours(**fields)


def test_refuses_to_be_called_without_a_schedule():
    with pytest.raises(ValueError, match="Ours is called, and never due: give every_"):
        Ours()(1)


@pytest.mark.slow
def test_imports_neither_clu_nor_tensorflow():
    done = subprocess.run(
        [sys.executable, "-c", NO_CLU], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
