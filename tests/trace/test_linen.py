"""Which calls of Linen modules are rewritten, and under which path."""

import jax
import pytest
from flax import linen as nn
from jax import numpy as jnp

from qwix_train.frontends import linen
from qwix_train.trace import session

X = jnp.ones((2, 3))


class Model(nn.Module):
    def setup(self):
        self.layer = nn.Dense(3)

    def __call__(self, x):
        return self.helper(x)

    def helper(self, x):
        return self.layer(x)


def paths_of(call):
    """The module paths of the ops of each call that was rewritten."""
    seen = []

    def rewrite(traced):
        seen.append([op.module_path for op in traced.ops])
        return session.UNCHANGED

    with nn.intercept_methods(linen.interceptor), session.Session(rewrite).open():
        call()
    return seen


def test_the_outermost_call_is_rewritten():
    model = Model()
    variables = jax.jit(model.init)(jax.random.key(0), X)
    bound = model.bind(variables)
    assert paths_of(lambda: model.apply(variables, X)) == [["layer"]]
    assert paths_of(lambda: model.apply(variables, X, method="helper")) == [["layer"]]
    assert paths_of(lambda: bound(X)) == [["layer"]]
    # `setup` runs on the way to a submodule, and is no call of the model.
    assert paths_of(lambda: bound.layer(X)) == [["layer"]]
    assert paths_of(lambda: model.bind(variables).layer(X)) == [["layer"]]
    assert paths_of(lambda: model.init(jax.random.key(0), X)) == []


def test_without_a_session_nothing_happens():
    model = Model()
    variables = jax.jit(model.init)(jax.random.key(0), X)
    with nn.intercept_methods(linen.interceptor):
        assert (model.apply(variables, X) == model.apply(variables, X)).all()


def test_an_unbound_module_gives_the_error_of_flax():
    with pytest.raises(AttributeError, match="only accessible from inside"):
        paths_of(lambda: Model()(X))
