"""What LiteRT runs as one operation, and where that ends."""

import jax
import numpy as np
import pytest
from flax import linen as nn
from jax import lax
from jax import numpy as jnp

from qwix_train import QuantizationRule
from qwix_train.frontends.model import trace_function
from qwix_train.odml.evaluate import fold, scaled_weight
from qwix_train.odml.fusion import find_fusions, varying_axes, weight_channels
from qwix_train.odml.graph import build_graph, graph_of
from qwix_train.odml.patterns import find_patterns
from qwix_train.odml.planner import make_odml_plan
from tests import models

RULES = [QuantizationRule(weight_qtype="int8", act_qtype="int8")]
X = models.normal(2, 4, seed=0)
IMAGE = models.normal(2, 5, 5, 3, seed=1)
P = {
    "w": models.normal(4, 6, seed=2),
    "k": models.normal(3, 3, 3, 6, seed=3),
    "b": np.arange(6, dtype=np.float32) + 1,
    "s": np.linspace(-2, 3, 6, dtype=np.float32),
}


def fusions(fn, params=P, x=X, **kwargs):
    """The names of what is fused, and the fusions."""
    traced = trace_function(fn, (params, x), kwargs)
    graph = build_graph(traced)
    find_patterns(graph)
    found = find_fusions([n for n in graph.nodes if n.is_activation], set())
    names = [(f.anchor.name, *(n.name for n in f.rest)) for f in found]
    return names, found, dict(zip(map(id, graph.inputs), traced.inputs, strict=True))


def conv(p, x):
    return lax.conv_general_dilated(
        x, p["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


FUSED = {
    "bias": (lambda p, x: x @ p["w"] + p["b"], ("dot_general", "add")),
    "relu": (lambda p, x: nn.relu(x @ p["w"]), ("dot_general", "relu")),
    "bias, scale and relu6": (
        lambda p, x: nn.relu6((x @ p["w"] + p["b"]) * p["s"] - 1.0),
        ("dot_general", "add", "mul", "sub", "relu6"),
    ),
    "constant minus a product": (
        lambda p, x: p["b"] - x @ p["w"],
        ("dot_general", "sub"),
    ),
    "quotient": (lambda p, x: x @ p["w"] / p["b"], ("dot_general", "mul")),
    "negation": (lambda p, x: -(x @ p["w"]), ("dot_general", "mul")),
    "clip to one": (
        lambda p, x: jnp.clip(x @ p["w"], -1, 1),
        ("dot_general", "relu_n1_to_1"),
    ),
    "weight first": (
        lambda p, x: p["w"].T @ x.T + p["b"][:, None],
        ("dot_general", "add"),
    ),
    "sum of two": (lambda p, x: nn.relu(x + 2 * x), ("add", "relu")),
}


@pytest.mark.thinned(4)
@pytest.mark.parametrize("name", FUSED)
def test_fused(name):
    fn, expected = FUSED[name]
    names, found, _ = fusions(fn)
    assert names == [expected]
    assert found[0].end is found[0].rest[-1]


NOT_FUSED = {
    "a constant for each row": lambda p, x: x @ p["w"] + jnp.arange(2.0)[:, None],
    "a constant for each element": lambda p, x: (
        x @ p["w"] + jnp.arange(12.0).reshape(2, 6)
    ),
    "another activation": lambda p, x: x @ p["w"] + x[:, :1],
    "an activation function of its own": lambda p, x: nn.tanh(x @ p["w"]),
    "a clip to other numbers": lambda p, x: jnp.clip(x @ p["w"], -2, 2),
    "a result": lambda p, x: (lambda y: (y, nn.relu(y)))(x @ p["w"]),
    "another reader": lambda p, x: (lambda y: nn.relu(y) * nn.tanh(y))(x @ p["w"]),
    "itself": lambda p, x: (lambda y: y * y)(x @ p["w"]),
    "two activations": lambda p, x: (x @ x.T) * 3.0,
    "a batch of products": lambda p, x: (
        jnp.einsum("bi,bio->bo", x, jnp.stack([p["w"]] * 2)) + p["b"]
    ),
    "one element more": lambda p, x: x[0] @ p["w"] + jnp.ones((2, 1)),
}


@pytest.mark.thinned(4)
@pytest.mark.parametrize("name", NOT_FUSED)
def test_where_fusion_ends(name):
    names, _, _ = fusions(NOT_FUSED[name])
    assert [n for n in names if n[0] in ("dot_general", "einsum")] == []


def test_a_sum_between_stays_with_the_product():
    # The bias is fused, and the sum with an activation starts anew.
    names, _, _ = fusions(lambda p, x: nn.relu(x @ p["w"] + p["b"] + x[:, :1]))
    assert names == [("dot_general", "add"), ("add", "relu")]


class Block(nn.Module):
    train: bool = False

    @nn.compact
    def __call__(self, x):
        layer = nn.Conv(6, (3, 3)) if x.ndim == 4 else nn.Dense(6)
        x = nn.BatchNorm(use_running_average=not self.train)(layer(x))
        return nn.relu(x)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("x", [X, IMAGE], ids=["dense", "conv"])
def test_batch_normalization_is_fused_in_both_modes(x, train):
    variables = jax.jit(Block().init)(jax.random.key(0), x)
    traced = trace_function(
        Block(train).apply, (variables, x), {"mutable": ["batch_stats"]}
    )
    plan = make_odml_plan(traced, RULES)
    (fusion,) = [n.fusion for n in plan.nodes if n.fusion is not None]
    assert [n.name for n in fusion.rest] == ["add", "sub", "mul", "add", "relu"]
    assert len(plan.tensors) == 2


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", [*FUSED, "conv"])
def test_a_factor_and_an_addend_are_what_follows_a_product(name):
    fn, _ = FUSED.get(
        name, (lambda p, x: 2.0 * (conv(p, x) - p["b"]) * p["s"] + p["b"], None)
    )
    x = IMAGE if name == "conv" else X
    _, (fusion,), values = fusions(fn, P, x)
    if fusion.anchor.name == "add":
        return
    graph_values = dict(values)

    def read(value):
        if value.constant is not None:
            return value.constant
        if id(value) not in graph_values:
            node = value.producer
            outs = node.run(*map(read, node.inputs))
            graph_values.update(zip(map(id, node.outputs), outs, strict=True))
        return graph_values[id(value)]

    factor, addend = fold(fusion, read)
    anchor = fusion.anchor
    side = [value.static for value in anchor.inputs[:2]].index(True)
    operands = list(map(read, anchor.inputs))
    operands[side] = scaled_weight(anchor, side, operands[side], factor)
    (out,) = anchor.run(*operands)
    out = out if addend is None else out + addend
    expected = read(fusion.affine[-1].out) if fusion.affine else read(anchor.out)
    np.testing.assert_allclose(out, expected, 1e-5, 1e-5)


def node_of(fn, name, *xs):
    return next(n for n in graph_of(fn, *xs).nodes if n.name == name)


@pytest.mark.parametrize(
    "shape, into, axes",
    [
        ((), (2, 3, 4), set()),
        ((4,), (2, 3, 4), {2}),
        ((3, 1), (2, 3, 4), {1}),
        ((1, 1, 4), (2, 3, 4), {2}),
        ((2, 1, 1), (2, 3, 4), {0}),
        ((2, 3, 4), (2, 3, 4), {0, 1, 2}),
        ((1,), (2, 3, 4), set()),
    ],
)
def test_the_axes_along_which_a_broadcast_constant_varies(shape, into, axes):
    constant = np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)
    node = node_of(lambda x: x * jnp.broadcast_to(constant, into), "mul", np.ones(into))
    assert varying_axes(node.inputs[1], len(into)) == axes
    # The broadcast of a broadcast.
    twice = node_of(
        lambda x: x * jnp.broadcast_to(jnp.broadcast_to(constant, into), (5, *into)),
        "mul",
        np.ones((5, *into)),
    )
    assert varying_axes(twice.inputs[1], len(into) + 1) == {a + 1 for a in axes}


@pytest.mark.parametrize(
    "subscripts, shapes, weight, channels",
    [
        ("bi,io->bo", ((2, 4), (4, 6)), 1, (1,)),
        ("bti,iho->btho", ((2, 3, 4), (4, 5, 6)), 1, (2, 3)),
        ("bhd,hdo->bo", ((2, 3, 4), (3, 4, 6)), 1, (1,)),
        ("oi,bi->ob", ((6, 4), (2, 4)), 0, (0,)),
        ("bi,bio->bo", ((2, 4), (2, 4, 6)), 1, None),
    ],
)
def test_the_channels_of_a_product(subscripts, shapes, weight, channels):
    arrays = [jnp.ones(s) for s in shapes]

    def fn(w, x):
        operands = [x, x]
        operands[weight] = w
        return jnp.einsum(subscripts, *operands)

    traced = trace_function(fn, (arrays[weight], arrays[1 - weight]), {})
    graph = build_graph(traced)
    (node,) = [n for n in graph.nodes if n.name == "einsum"]
    found = weight_channels(node)
    if channels is None:
        assert found is None
        return
    # Sizes of the axes, as `jnp.einsum` may transpose its product.
    sizes = [node.out.shape[a] for a in found]
    assert sizes == [traced.body.jaxpr.outvars[0].aval.shape[a] for a in channels]
