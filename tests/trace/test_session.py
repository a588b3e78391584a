"""A session is part of the key of JAX's caches, and of no other thread."""

import gc
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


def counting():
    """A jitted function that calls no model, and how often it was traced."""
    count = []

    @jax.jit
    def function(x):
        count.append(x)
        return 2 * x

    return function, count


def test_what_calls_no_model_is_traced_once_for_all_sessions():
    function, count = counting()

    def step(run, x):
        def call(x):
            session.current()  # a model call, in a derivative or not
            return function(x)

        with session.Session(print).open():
            return run(call)(x)

    def mapped(call):
        return jax.grad(lambda x: jax.vmap(call)(x[None])[0])

    for run in (jax.jit(step, static_argnums=0), step):
        for how in (lambda call: call, jax.grad, mapped):
            run(how, 1.0)
    assert len(count) == 1


@pytest.mark.parametrize("kept", [jax.jit, jax.checkpoint, "scan"])
def test_a_key_is_not_given_on_where_jax_keeps_a_model_call(kept):
    seen = []

    def model(x):
        seen.append(session.current())
        return x

    compiled = model if kept == "scan" else kept(model)

    def run():
        if kept == "scan":
            return jax.lax.scan(lambda x, _: (compiled(x), None), 1.0, length=2)
        return jax.grad(compiled)(1.0)

    sessions = [session.Session(print) for _ in range(3)]
    for each in sessions:
        with each.open():
            run()
    assert dict.fromkeys(seen) == dict.fromkeys(sessions)


def test_sessions_that_are_open_at_once_have_different_keys():
    function, count = counting()
    for _ in range(2):
        with session.Session(print).open(), session.Session(print).open():
            function(1.0)
        with session.Session(print).open():
            function(1.0)
    assert len(count) == 2


def test_sessions_have_keys_in_common_if_they_hold_the_same_models():
    class Model:
        pass

    function, count = counting()
    one, other = Model(), Model()
    for held, traces in (([], 1), ([one], 2), ([one], 2), ([one, other], 3)):
        with session.Session(print, "key").open(held=held):
            function(1.0)
        assert len(count) == traces
    del one, held
    gc.collect()
    with session.Session(print).open(held=[Model()]):
        function(1.0)
    with session.Session(print).open(held=[object()]):  # which cannot be followed
        function(1.0)
    assert len(count) == 5
