"""The classes that NNX modules have while calls are rewritten."""

import threading

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from jax import numpy as jnp

from qwix_train import WithAux, plan, ptq, wrap_eval_step
from qwix_train.core.how import HowToQuantize
from qwix_train.frontends import marks, nnx_objects
from qwix_train.frontends import nnx as nnx_calls
from qwix_train.trace import session
from tests import models

X = jnp.ones((2, 4))


def test_paths_start_at_the_outermost_module():
    model = models.NnxMlp(nnx.Rngs(0))
    both = nnx.ModelAndOptimizer(model, optax.sgd(0.1))
    for tree in (model, both, (both, model), {"a": [model]}, (model.l1, model)):
        paths = {path for path, _ in nnx_objects.modules_in(tree)}
        assert {"", "bn", "dropout", "l2"} <= paths and len(paths) <= 5
    assert nnx_objects.modules_in((X, None, "text", nnx.Rngs(0))) == []


def test_classes_come_back_also_from_other_holders():
    model = models.NnxMlp(nnx.Rngs(0))
    graphdef = nnx.graphdef(model)
    with nnx_calls.intercepted(model):
        assert type(model) is not models.NnxMlp and isinstance(model, models.NnxMlp)
        assert type(model).__name__ == "NnxMlp"
        changed = nnx.graphdef(model)
        assert changed != graphdef
        assert nnx_calls.original_graphdef(changed) == graphdef
        assert nnx_calls.intercepted_graphdef(graphdef) == changed
        with pytest.raises(RuntimeError), nnx_calls.intercepted((model, model.l1)):
            raise RuntimeError
        assert type(model) is not models.NnxMlp
        models.assert_same(model.l1(X), nnx.clone(model.l1)(X))
    assert nnx.graphdef(model) == graphdef


def test_threads_may_hold_one_model():
    model = models.NnxMlp(nnx.Rngs(0))
    barrier = threading.Barrier(4)
    errors = []

    def work():
        barrier.wait()
        for _ in range(20):
            with nnx_calls.intercepted(model):
                if type(model.l1) is nnx.Linear:
                    errors.append("released while it was held")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and type(model.l1) is nnx.Linear


def test_methods_that_are_rewritten():
    class Odd(models.NnxMlp):
        text = "x"

        @property
        def width(self):
            return 8

        @staticmethod
        def static(x):
            return x

        @classmethod
        def make(cls):
            return cls(nnx.Rngs(0))

        @nnx.jit
        def jitted(self, x):
            return self.l1(x)

        def _private(self, x):
            return self.l1(x)

    assert marks.methods_of(Odd) == ["__call__", "features", "jitted"]
    model = Odd.make()
    seen = []

    def rewrite(traced):
        seen.append([op.module_path for op in traced.ops])
        return session.UNCHANGED

    with nnx_calls.intercepted(model), session.Session(rewrite).open():
        model(X)
        model.jitted(X)
        model._private(X)
        assert model.width == 8 and model.static(3) == 3
        nnx.jit(lambda m, x: m.features(x))(model, X)
    assert seen == [["l1", "l2"], ["l1"], ["l1"], ["l1"]]


def test_classes_that_are_no_pytrees():
    class Opaque(nnx.Module, pytree=False):
        def __init__(self):
            self.l1 = nnx.Linear(4, 3, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.l1(x)

    model = Opaque()
    plain = model(X)
    with nnx_calls.intercepted(model):
        assert jax.tree.leaves(model) == [model]
        models.assert_same(model(X), plain)
    assert type(model) is Opaque


def test_stored_params_are_found_in_one_order():
    how = HowToQuantize(qtype="int8")
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    # The attributes of a copy are sorted, and those of the original are not.
    for name in ("z", "a"):
        setattr(model, name, WithAux(nnx.Param(jnp.ones(2)), how))
    for root in (model, nnx.clone(model)):
        paths = [slot.path for slot, _ in nnx_objects.stored_params(root)]
        assert paths == [("a",), ("z",)]


class HoldsArrays(nnx.Module):
    """Its params are no variables."""

    def __init__(self):
        self.first = nnx.data(jax.device_put(KERNELS[0]))
        self.rest = nnx.data([KERNELS[1]])
        self.count = nnx.data(jnp.arange(3))

    def __call__(self, x):
        return jnp.tanh(x @ self.first) @ self.rest[0] + self.count


KERNELS = np.random.default_rng(0).normal(size=(2, 3, 3)).astype(np.float32)


def test_arrays_that_a_module_holds_as_they_are_are_params():
    model, x = HoldsArrays(), np.eye(3, dtype=np.float32)
    found = plan(model, models.INT8, x)
    assert [op.weights for op in found.ops] == [(("first",),), (("rest", "0"),)]
    assert found.float_bytes == 2 * 9 * 4
    out = wrap_eval_step(lambda model, x: model(x), models.INT8)(model, x)
    zeros = np.zeros(3, np.float32)
    want = x
    for i, kernel in enumerate(KERNELS):
        layer = {"kernel": kernel, "bias": zeros}
        want = models.dense(layer, jnp.tanh(want) if i else want)
    models.assert_close(out, want + np.arange(3))
    with pytest.raises(ValueError, match=r"'first' is an array.*nnx\.Param"):
        ptq.quantize(model, None, models.INT8, x)
