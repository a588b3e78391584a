"""Files for batches of any length."""

import jax
import numpy as np
import pytest
from flax import linen as nn
from jax import numpy as jnp

from qwix_train import odml
from qwix_train.odml import dynamic_batch
from qwix_train.odml.litert_model import make_interpreter
from tests.odml.small import INT8, Mlp, converted, init, module, normal


def _cnn(self, x):
    y = nn.relu(nn.Conv(4, (3, 3))(x))
    y = y + nn.Conv(4, (3, 3))(y)
    return nn.Dense(3)(y.reshape(y.shape[0], -1))


def _attention(self, x):
    mask = nn.make_causal_mask(x[..., 0])
    return x + nn.MultiHeadDotProductAttention(2)(x, mask=mask)


def _repeat(self, x):
    return jnp.repeat(nn.Dense(4)(x), 2, axis=1)


def _recurrent(self, x):
    return nn.RNN(nn.SimpleCell(4))(x)


def _slices(self, x):
    x = nn.Dense(6)(x)
    return x[:, ::2], x[:, 1:4], x.mean(-1)


MODELS = {
    "mlp": (Mlp(), (4, 8)),
    "cnn": (module(_cnn), (4, 6, 6, 2)),
    "attention": (module(_attention), (4, 5, 4)),
    "repeat": (module(_repeat), (4, 8)),
    "recurrent": (module(_recurrent), (4, 3, 4)),
    "slices": (module(_slices), (4, 8)),
}


SLOW = ("recurrent", "cnn", "attention")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else [])
        for name in MODELS
    ],
)
def test_row_by_row_as_in_jax(name):
    model, shape = MODELS[name]
    x = normal(*shape)
    variables = init(model, x)
    litert = converted(model, variables, x, dynamic_batch=True)
    assert litert.is_full_integer
    (signature,) = litert.signatures.values()
    for out in litert.report(normal(3, *shape[1:], seed=3)):
        # Several roundings on the way, each by a step.
        assert out.max_steps <= 3 and out.equal > 0.8, out
    # The rows do not depend on each other.
    x = normal(7, *shape[1:], seed=7)
    together = jax.tree.leaves(litert(x, dequantize=False))
    for row in range(7):
        alone = jax.tree.leaves(litert(x[row : row + 1], dequantize=False))
        for a, b in zip(together, alone, strict=True):
            assert len(a) == 7 and len(b) == 1
            np.testing.assert_array_equal(a[row], b[0])


def test_a_file_says_which_lengths_are_open():
    x = normal(4, 8)
    litert = converted(Mlp(), init(Mlp(), x), x, dynamic_batch=True)
    assert [op.outputs[0].shape[0] for op in litert.ops()] == [-1] * 4
    assert "int8[?x16]" in str(litert.ops())
    # An interpreter that is not told otherwise has one example.
    (detail,) = make_interpreter(litert.content).get_input_details()
    assert detail["shape"].tolist() == [1, 8]
    assert detail["shape_signature"].tolist() == [-1, 8]


def _without_last(self, x):
    return nn.Dense(4)(x)[:-1]


def _numbered(self, x):
    return nn.Dense(4)(x) + jnp.arange(x.shape[0], dtype=x.dtype)[:, None]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (_without_last, "a constant of SLICE, of the shape"),
        (_numbered, "a constant of ADD, of the shape"),
    ],
)
def test_what_depends_on_the_length_is_an_error(call, message):
    x = normal(4, 8)
    model = module(call)
    with pytest.raises(ValueError, match=message):
        converted(model, init(model, x), x, dynamic_batch=True)


@pytest.mark.slow
def test_a_length_that_is_baked_in_is_found(monkeypatch):
    """Where the comparison of two files would miss it."""
    x = normal(4, 8)
    variables = init(Mlp(), x)
    monkeypatch.setattr(
        dynamic_batch, "with_dynamic_batch", lambda content, larger: content
    )
    with pytest.raises(ValueError, match="does not run on another batch"):
        converted(Mlp(), variables, x, dynamic_batch=True)
    right = converted(Mlp(), variables, normal(5, 8))
    other = jax.tree.map(lambda w: w + 1, variables)
    wrong = converted(Mlp(), other, normal(5, 8))
    with pytest.raises(ValueError, match="computes something else"):
        dynamic_batch.check_dynamic_batch(
            "serving_default", wrong.content, right.content, [normal(5, 8)]
        )


@pytest.mark.slow
def test_operators_that_differ():
    x = normal(4, 8)
    variables = init(Mlp(), x)
    litert = converted(Mlp(), variables, x)
    model = module(lambda self, x: nn.tanh(nn.Dense(4)(x)))
    other = converted(model, init(model, x), x)
    with pytest.raises(ValueError, match="FULLY_CONNECTED in the place of TANH"):
        dynamic_batch.with_dynamic_batch(litert.content, other.content)


def test_inputs_without_a_batch():
    model = module(lambda self, x, y: nn.Dense(4)(x) + y)
    x, y = normal(4, 8), normal(1, 4)
    variables = init(model, x, y)
    with pytest.raises(ValueError, match=r"args_0: \(4, 8\), args_1: \(1, 4\)"):
        odml.convert(model, variables, INT8, x, y, quant_stats={}, dynamic_batch=True)


def test_batches_of_different_lengths():
    model = module(lambda self, x, y: nn.Dense(4)(x) + nn.Dense(4)(y))
    x, y = normal(4, 8), normal(4, 8, seed=1)
    variables = init(model, x, y)
    litert = converted(model, variables, x, y, dynamic_batch=True)
    assert litert(x[:2], y[:2]).shape == (2, 4)
    for a, b in ((x, y[:1]), (x[:0], y[:0])):
        with pytest.raises(ValueError, match="batches of one length, 1 or more"):
            litert(a, b)
