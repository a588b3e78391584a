"""A session is part of the key of JAX's caches, and of no other thread."""

import threading

import jax
import pytest

from qwix_train.trace import session


def test_sessions_nest_and_are_left_after_an_exception():
    outer, inner = session.Session(print), session.Session(print)
    assert session.current() is None and not session.marking()
    with outer.open():
        assert session.current() is outer
        with pytest.raises(RuntimeError), inner.open(), session.tracing():
            assert session.marking() and session.current() is None
            with session.suspended():
                assert not session.marking() and session.current() is None
            raise RuntimeError
        assert session.current() is outer and not session.marking()
    assert session.current() is None


def test_a_jitted_function_is_traced_once_for_each_session():
    seen = []

    @jax.jit
    def function(x):
        seen.append(session.marking() or session.current())
        return x

    first, second = session.Session(print), session.Session(print)

    def run():
        function(1.0)
        for each in (first, second):
            with each.open():
                function(1.0)
        with first.open(), session.tracing():
            function(1.0)
        with first.open(), session.suspended():
            function(1.0)

    run()
    assert seen == [None, first, second, True]
    run()
    assert len(seen) == 4


def test_threads_do_not_see_each_other():
    seen = []
    with session.Session(print).open():
        thread = threading.Thread(target=lambda: seen.append(session.current()))
        thread.start()
        thread.join()
    assert seen == [None]


def test_sessions_that_do_the_same_share_traces():
    seen = []

    @jax.jit
    def function(x):
        seen.append(session.current())
        return x

    first, second = (session.Session(print, ("key", 1)) for _ in range(2))
    other = session.Session(print, ("key", 2))
    for each in (first, second, other):
        with each.open():
            assert session.current() is each
            function(1.0)
    with second.open(shared=False):
        function(1.0)
    assert seen == [first, other, second]
