"""Every way for a weight to reach a product, with float64 NumPy references.

A reference gets the params with the fake quantization that they are expected to
have, written out by hand for each case; so a scale on a wrong axis, a weight left in
float or a param quantized twice shows as a wrong number.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

from qwix_train.planning.rules import QuantizationRule


def data(*shape: int, seed: int = 0) -> np.ndarray:
    """Numbers of which, along any axis, the largest is positive.

    The negative end of a range scales to half a code, a tie, which float64 and
    float32 may break differently.
    """
    rng = np.random.default_rng([seed, *shape])
    odd = np.indices(shape).sum(0) % 2 == 1
    low = rng.uniform(0.1, 0.4, shape) * rng.choice([1, -1], shape)
    return np.where(odd, low, rng.uniform(0.5, 1, shape)).astype(np.float32)


def fq(x, channels=(), bits=8, tile=None) -> np.ndarray:
    """Fake quantization with absmax scales, in float64.

    Args:
      x: the array.
      channels: the axes that have a scale for each element.
      bits: the width of the codes.
      tile: an axis and the number of its elements that share a scale.
    """
    x = np.asarray(x, np.float64)
    if tile is not None:
        axis, size = tile
        shape = (*x.shape[:axis], -1, size, *x.shape[axis + 1 :])
        split = (*(a if a < axis else a + 1 for a in channels), axis)
        return fq(x.reshape(shape), split, bits).reshape(x.shape)
    shared = tuple(a for a in range(x.ndim) if a not in channels)
    scale = np.abs(x).max(shared, keepdims=True) / (2 ** (bits - 1) - 0.5)
    scale = np.where(scale == 0, 1, scale)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return np.clip(np.round(x / scale), low, high) * scale


@dataclasses.dataclass
class Case:
    """A function of params and x, the same in NumPy, and what its plan says."""

    function: Callable[..., Any]
    params: Any
    reference: Callable[..., Any]
    ops: list[tuple[str, tuple[str, ...], str | None]]
    x: Any = dataclasses.field(default_factory=lambda: data(3, 4, seed=1))


W = {"w": data(4, 5)}
DOT = [("dot_general0", ("w",), "channel 1")]
EINSUM = [("einsum0", ("w",), "channel 1")]


def simple(function, ops=DOT, params=W, **kwargs):
    return Case(
        function, params, lambda p, x: fq(x, (0,)) @ fq(p["w"], (1,)), ops, **kwargs
    )


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _loop_over_slices(p, x):
    def body(i, y):
        return y + x @ p["w"][i]

    return lax.fori_loop(0, 3, body, jnp.zeros((3, 5)))


def _split_heads(p, x):
    q, k, v = jnp.split(p["w"], 3, axis=1)
    heads = [m.reshape(4, 2, 3) for m in (q, k, v)]
    return jnp.stack([jnp.einsum("bd,dhk->bhk", x, m) for m in heads])


def _standardized(p, x):
    w = p["w"]
    return x @ ((w - w.mean(0)) / w.std(0))


def _weight_norm(p, x):
    return x @ (p["g"] * p["w"] / jnp.linalg.norm(p["w"], axis=0))


def _scan_raw_layers(p, x):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]


def _scan_hands_layers_back(p, x):
    x, (layers, _) = lax.scan(
        lambda x, w: (jnp.tanh(x @ w), (w, jnp.sum(x))), x, p["w"]
    )
    return x @ layers[1]


def _scan_reference(p, x):
    for w in p["w"]:
        x = np.tanh(fq(x, (0,)) @ fq(w, (1,)))
    return x


def _tied(p, tokens):
    x = p["table"][tokens]
    return x @ p["table"].T


def _attention(p, x):
    q, k, v = x @ p["q"], x @ p["k"], x @ p["v"]
    return jax.nn.softmax(q @ k.T) @ v


def _attention_reference(p, x):
    q, k, v = (fq(x, (0,)) @ fq(p[name], (1,)) for name in "qkv")
    return fq(softmax(fq(q, (0,)) @ fq(k, (0,)).T), (0,)) @ fq(v, (1,))


def conv(x, w, strides=1, padding="VALID", **kwargs):
    return lax.conv_general_dilated(
        x,
        w,
        (strides, strides),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        **kwargs,
    )


def conv_reference(x, w, groups=1):
    """VALID, stride 1, NHWC and HWIO."""
    (n, h, width, c), (kh, kw, i, o) = x.shape, w.shape
    out = np.zeros((n, h - kh + 1, width - kw + 1, o))
    for g in range(groups):
        ins = slice(g * i, (g + 1) * i)
        outs = slice(g * o // groups, (g + 1) * o // groups)
        for a in range(kh):
            for b in range(kw):
                patch = x[:, a : a + h - kh + 1, b : b + width - kw + 1, ins]
                out[..., outs] += patch @ w[a, b][:, outs]
    assert c == i * groups
    return out


def dilate(w):
    """Zeros between the rows and columns of an HWIO kernel."""
    out = np.zeros((2 * w.shape[0] - 1, 2 * w.shape[1] - 1, *w.shape[2:]))
    out[::2, ::2] = w
    return out


IMAGE = data(2, 6, 6, 4, seed=2)
CONV = [("conv_general_dilated0", ("w",), "channel 3")]
EXPERTS = np.array([2, 0, 2])
TOKENS = np.array([[1, 2, 0], [6, 3, 1]])
MASK = np.arange(20).reshape(4, 5) % 3 > 0

CASES = {
    # Ways to write a product.
    "matmul": simple(lambda p, x: x @ p["w"]),
    "jnp.dot": simple(lambda p, x: jnp.dot(x, p["w"])),
    "jnp.matmul": simple(lambda p, x: jnp.matmul(x, p["w"])),
    "tensordot": simple(lambda p, x: jnp.tensordot(x, p["w"], 1)),
    "lax.dot": simple(lambda p, x: lax.dot(x, p["w"])),
    "lax.dot_general": simple(
        lambda p, x: lax.dot_general(x, p["w"], (((1,), (0,)), ((), ())))
    ),
    "inner": Case(
        lambda p, x: jnp.inner(x, p["w"]),
        {"w": data(5, 4)},
        lambda p, x: fq(x, (0,)) @ fq(p["w"], (0,)).T,
        [("dot_general0", ("w",), "channel 0")],
    ),
    "vdot": Case(
        lambda p, x: jnp.vdot(x, p["w"]),
        {"w": data(3, 4)},
        lambda p, x: (fq(x) * fq(p["w"])).sum(),
        [("dot_general0", ("w",), "tensor")],
    ),
    "vector": Case(
        lambda p, x: x @ p["w"],
        {"w": data(4)},
        lambda p, x: fq(x, (0,)) @ fq(p["w"]),
        [("dot_general0", ("w",), "tensor")],
    ),
    "einsum": simple(lambda p, x: jnp.einsum("bi,io->bo", x, p["w"]), EINSUM),
    "einsum ellipsis": Case(
        lambda p, x: jnp.einsum("...i,io->...o", x, p["w"]),
        W,
        lambda p, x: fq(x, (0, 1)) @ fq(p["w"], (1,)),
        EINSUM,
        x=data(2, 3, 4),
    ),
    "einsum with spaces": simple(
        lambda p, x: jnp.einsum("b i, i o -> b o", x, p["w"]), EINSUM
    ),
    "einsum implicit": simple(lambda p, x: jnp.einsum("bi,io", x, p["w"]), EINSUM),
    "einsum of one operand": Case(
        lambda p, x: jnp.einsum("bi->ib", x) + jnp.einsum("ii->i", p["w"])[:, None],
        {"w": data(4, 4)},
        lambda p, x: x.T + np.diag(p["w"])[:, None],
        [],
    ),
    "einsum of three": Case(
        lambda p, x: jnp.einsum("bi,io,op->bp", x, p["w"], p["v"]),
        {**W, "v": data(5, 6)},
        lambda p, x: fq(fq(x, (0,)) @ fq(p["w"], (1,)), (0,)) @ fq(p["v"], (1,)),
        [("einsum0", ("w",), "channel 1"), ("einsum1", ("v",), "channel 1")],
    ),
    "einsum batched weight": Case(
        lambda p, x: jnp.einsum("ebi,eio->ebo", x, p["w"]),
        {"w": data(2, 4, 5)},
        lambda p, x: fq(x, (0, 1)) @ fq(p["w"], (0, 2)),
        [("einsum0", ("w",), "channel 0,2")],
        x=data(2, 3, 4),
    ),
    "einsum two contracted": Case(
        lambda p, x: jnp.einsum("bhk,hkd->bd", x, p["w"]),
        {"w": data(2, 3, 4)},
        lambda p, x: np.einsum("bhk,hkd->bd", fq(x, (0,)), fq(p["w"], (2,))),
        [("einsum0", ("w",), "channel 2")],
        x=data(5, 2, 3),
    ),
    "weight on the left": Case(
        lambda p, x: p["w"].T @ x.T,
        W,
        lambda p, x: fq(p["w"], (1,)).T @ fq(x, (0,)).T,
        DOT,
    ),
    "einsum weight on the left": Case(
        lambda p, x: jnp.einsum("io,bi->bo", p["w"], x),
        W,
        lambda p, x: fq(x, (0,)) @ fq(p["w"], (1,)),
        EINSUM,
    ),
    # What may happen to a weight before.
    "transposed": Case(
        lambda p, x: x @ p["w"].T,
        {"w": data(5, 4)},
        lambda p, x: fq(x, (0,)) @ fq(p["w"], (0,)).T,
        [("dot_general0", ("w",), "channel 0")],
    ),
    "channels merged": Case(
        lambda p, x: x @ p["w"].reshape(4, 6),
        {"w": data(4, 2, 3)},
        lambda p, x: fq(x, (0,)) @ fq(p["w"], (1, 2)).reshape(4, 6),
        [("dot_general0", ("w",), "channel 1,2")],
    ),
    "contracted merged": Case(
        lambda p, x: x @ p["w"].reshape(4, 5),
        {"w": data(2, 2, 5)},
        lambda p, x: fq(x, (0,)) @ fq(p["w"], (2,)).reshape(4, 5),
        [("dot_general0", ("w",), "channel 2")],
    ),
    "channels split": Case(
        lambda p, x: jnp.einsum("bd,dhk->bhk", x, p["w"].reshape(4, 2, 3)),
        {"w": data(4, 6)},
        lambda p, x: (fq(x, (0,)) @ fq(p["w"], (1,))).reshape(3, 2, 3),
        EINSUM,
    ),
    "contracted split": Case(
        lambda p, x: jnp.einsum("bhk,hkd->bd", x, p["w"].reshape(2, 2, 5)),
        W,
        lambda p, x: fq(x, (0,)).reshape(3, 4) @ fq(p["w"], (1,)),
        EINSUM,
        x=data(3, 2, 2),
    ),
    "contracted outer part": Case(
        lambda p, x: jnp.einsum("bi,ijd->bjd", x, p["w"].reshape(4, 2, 5)),
        {"w": data(8, 5)},
        lambda p, x: np.einsum(
            "bi,ijd->bjd", fq(x, (0,)), fq(p["w"], (1,)).reshape(4, 2, 5)
        ),
        EINSUM,
    ),
    "contracted inner part": Case(
        lambda p, x: jnp.einsum("bi,jid->bjd", x, p["w"].reshape(2, 4, 5)),
        {"w": data(8, 5)},
        lambda p, x: np.einsum(
            "bi,jid->bjd",
            fq(x, (0,)),
            fq(p["w"].reshape(2, 4, 5), (0, 2)),
        ),
        [("einsum0", ("w",), "channel 1 tile 0:4")],
    ),
    "one part of a split axis": Case(
        lambda p, x: x @ p["w"].reshape(2, 4, 5)[1],
        {"w": data(8, 5)},
        lambda p, x: fq(x, (0,)) @ fq(p["w"].reshape(2, 4, 5), (0, 2))[1],
        [("dot_general0", ("w",), "channel 1 tile 0:4")],
    ),
    "bfloat16": Case(
        lambda p, x: (x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16)).astype(
            jnp.float32
        ),
        W,
        lambda p, x: fq(x, (0,)) @ fq(p["w"], (1,)),
        DOT,
    ),
    "scaled": Case(
        lambda p, x: x @ (p["w"] * 0.5),
        W,
        lambda p, x: fq(x, (0,)) @ (fq(p["w"], (1,)) * 0.5),
        DOT,
    ),
    "scaled by channel": Case(
        lambda p, x: x @ (p["w"] * np.arange(1, 6, dtype=np.float32)),
        W,
        lambda p, x: fq(x, (0,)) @ (fq(p["w"], (1,)) * np.arange(1, 6)),
        DOT,
    ),
    "negated": Case(
        lambda p, x: x @ -p["w"],
        W,
        lambda p, x: fq(x, (0,)) @ -fq(p["w"], (1,)),
        DOT,
    ),
    "tanh": Case(
        lambda p, x: x @ jnp.tanh(p["w"]),
        W,
        lambda p, x: fq(x, (0,)) @ np.tanh(fq(p["w"], (1,))),
        DOT,
    ),
    "padded": Case(
        lambda p, x: x @ jnp.pad(p["w"], ((1, 0), (0, 2))),
        {"w": data(3, 5)},
        lambda p, x: fq(x, (0,)) @ np.pad(fq(p["w"], (1,)), ((1, 0), (0, 2))),
        DOT,
    ),
    "reversed": Case(
        lambda p, x: x @ p["w"][::-1],
        W,
        lambda p, x: fq(x, (0,)) @ fq(p["w"], (1,))[::-1],
        DOT,
    ),
    "indexed by unpacking": Case(
        lambda p, x: jnp.stack([x @ w for w in p["w"]]),
        {"w": data(3, 4, 5)},
        lambda p, x: fq(x, (0,)) @ fq(p["w"], (0, 2)),
        [(f"dot_general{i}", ("w",), "channel 0,2") for i in range(3)],
    ),
    "tiled": Case(
        lambda p, x: x @ jnp.tile(p["w"], (2, 3)),
        {"w": data(2, 5)},
        lambda p, x: fq(x, (0,)) @ np.tile(fq(p["w"], (1,)), (2, 3)),
        DOT,
    ),
    "transposed and merged": Case(
        lambda p, x: x @ lax.reshape(p["w"], (4, 6), dimensions=(1, 0, 2)),
        {"w": data(2, 4, 3)},
        lambda p, x: fq(x, (0,)) @ fq(p["w"], (0, 2)).transpose(1, 0, 2).reshape(4, 6),
        [("dot_general0", ("w",), "channel 0,2")],
    ),
    "broadcast": Case(
        lambda p, x: jnp.einsum("ebi,eio->ebo", x, jnp.broadcast_to(p["w"], (2, 4, 5))),
        W,
        lambda p, x: fq(x, (0, 1)) @ fq(p["w"], (1,)),
        EINSUM,
        x=data(2, 3, 4),
    ),
    "repeated heads": Case(
        lambda p, x: jnp.einsum("bd,dhk->bhk", x, jnp.repeat(p["w"], 3, axis=1)),
        {"w": data(4, 2, 5)},
        lambda p, x: np.einsum(
            "bd,dhk->bhk", fq(x, (0,)), np.repeat(fq(p["w"], (1, 2)), 3, axis=1)
        ),
        [("einsum0", ("w",), "channel 1,2")],
    ),
    "masked by a constant": Case(
        lambda p, x: x @ jnp.where(MASK, p["w"], 0),
        W,
        lambda p, x: fq(x, (0,)) @ np.where(MASK, fq(p["w"], (1,)), 0),
        DOT,
    ),
    "masked by an input": Case(
        lambda p, x: x[0] @ jnp.where(x[1] > 0.5, p["w"], 0),
        W,
        lambda p, x: fq(x[0], (0,)) @ np.where(x[1] > 0.5, fq(p["w"], (1,)), 0),
        DOT,
        x=(data(3, 4, seed=1), data(4, 5, seed=2)),
    ),
    "pruned by magnitude": Case(
        lambda p, x: x @ jnp.where(jnp.abs(p["w"]) > 0.5, p["w"], 0),
        W,
        lambda p, x: (
            fq(x, (0,)) @ np.where(np.abs(fq(p["w"], (1,))) > 0.5, fq(p["w"], (1,)), 0)
        ),
        DOT,
    ),
    "behind a barrier": simple(
        lambda p, x: jnp.matmul(*lax.optimization_barrier((x, p["w"])))
    ),
    "chosen by a branch": Case(
        lambda p, x: x @ lax.cond(x[0, 0] > 9, lambda: p["w"], lambda: p["v"]),
        {**W, "v": data(4, 5, seed=3)},
        lambda p, x: fq(x, (0,)) @ fq(p["v"], (1,)),
        [("dot_general0", ("v", "w"), "channel 1")],
    ),
    # Fused, stacked and joined weights.
    "static index": Case(
        lambda p, x: jnp.stack([x @ p["w"][i] for i in range(3)]),
        {"w": data(3, 4, 5)},
        lambda p, x: fq(x, (0,)) @ fq(p["w"], (0, 2)),
        [(f"dot_general{i}", ("w",), "channel 0,2") for i in range(3)],
    ),
    "traced index": Case(
        _loop_over_slices,
        {"w": data(3, 4, 5)},
        lambda p, x: (fq(x, (0,)) @ fq(p["w"], (0, 2))).sum(0),
        [("dot_general0", ("w",), "channel 0,2")],
    ),
    "slice of channels": Case(
        lambda p, x: x @ p["w"][:, 1:4],
        W,
        lambda p, x: fq(x, (0,)) @ fq(p["w"], (1,))[:, 1:4],
        DOT,
    ),
    "slice of the contracted axis": Case(
        lambda p, x: x @ p["w"][2:6],
        {"w": data(8, 5)},
        lambda p, x: fq(x, (0,)) @ fq(p["w"], (1,))[2:6],
        DOT,
    ),
    "split to heads": Case(
        _split_heads,
        {"w": data(4, 18)},
        lambda p, x: np.stack(
            [
                (fq(x, (0,)) @ part).reshape(3, 2, 3)
                for part in np.split(fq(p["w"], (1,)), 3, axis=1)
            ]
        ),
        [(f"einsum{i}", ("w",), "channel 1") for i in range(3)],
    ),
    "unequal split to heads": Case(
        lambda p, x: jnp.einsum(
            "bd,dhk->bhk", x, jnp.split(p["w"], [2], axis=1)[1].reshape(4, 2, 3)
        ),
        {"w": data(4, 8)},
        lambda p, x: (fq(x, (0,)) @ fq(p["w"], (1,))[:, 2:]).reshape(3, 2, 3),
        EINSUM,
    ),
    "concatenated channels": Case(
        lambda p, x: x @ jnp.concatenate([p["w"], p["v"]], 1),
        {**W, "v": 3 * data(4, 2)},
        lambda p, x: (
            fq(x, (0,)) @ np.concatenate([fq(p["w"], (1,)), fq(p["v"], (1,))], 1)
        ),
        [("dot_general0", ("w", "v"), "channel 1")],
    ),
    "concatenated contracted": Case(
        lambda p, x: x @ jnp.concatenate([p["w"], p["v"]]),
        {"w": data(2, 5), "v": 3 * data(2, 5)},
        lambda p, x: fq(x, (0,)) @ np.concatenate([fq(p["w"], (1,)), fq(p["v"], (1,))]),
        [("dot_general0", ("w", "v"), "channel 1")],
    ),
    "concatenated, then split to heads": Case(
        lambda p, x: jnp.einsum(
            "bd,dhk->bhk", x, jnp.concatenate([p["w"], p["v"]], 1).reshape(4, 3, 2)
        ),
        {"w": data(4, 4), "v": 3 * data(4, 2)},
        lambda p, x: np.einsum(
            "bd,dhk->bhk",
            fq(x, (0,)),
            np.concatenate([fq(p["w"], (1,)), fq(p["v"], (1,))], 1).reshape(4, 3, 2),
        ),
        [("einsum0", ("w", "v"), "channel 1")],
    ),
    "stacked": Case(
        lambda p, x: jnp.einsum("bi,eio->ebo", x, jnp.stack([p["w"], p["v"]])),
        {**W, "v": 3 * data(4, 5, seed=3)},
        lambda p, x: fq(x, (0,)) @ np.stack([fq(p["w"], (1,)), fq(p["v"], (1,))]),
        [("einsum0", ("w", "v"), "channel 1")],
    ),
    "raw layers under scan": Case(
        _scan_raw_layers,
        {"w": data(3, 4, 4)},
        _scan_reference,
        [("dot_general0", ("w",), "channel 0,2")],
    ),
    "layers that a scan hands back": Case(
        _scan_hands_layers_back,
        {"w": data(3, 4, 4)},
        lambda p, x: fq(_scan_reference(p, x), (0,)) @ fq(p["w"][1], (1,)),
        [
            ("dot_general0", ("w",), "channel 0,2"),
            ("dot_general1", ("w",), "channel 0,2"),
        ],
    ),
    "raw layers under vmap": Case(
        lambda p, x: jax.vmap(lambda w: x @ w)(p["w"]),
        {"w": data(3, 4, 5)},
        lambda p, x: fq(x, (0,)) @ fq(p["w"], (0, 2)),
        [("dot_general0", ("w",), "channel 0,2")],
    ),
    "einsum under vmap": Case(
        lambda p, x: jax.vmap(lambda x, w: jnp.einsum("i,io->o", x, w))(x, p["w"]),
        {"w": data(3, 4, 5)},
        lambda p, x: np.einsum("bi,bio->bo", fq(x, (0,)), fq(p["w"], (0, 2))),
        [("einsum0", ("w",), "channel 0,2")],
    ),
    "in a list in a dictionary": Case(
        lambda p, x: x @ p["layers"][1]["w"] @ p["layers"][0]["w"],
        {"layers": [{"w": data(5, 4)}, {"w": data(4, 5)}]},
        lambda p, x: (
            fq(fq(x, (0,)) @ fq(p["layers"][1]["w"], (1,)), (0,))
            @ fq(p["layers"][0]["w"], (1,))
        ),
        [
            ("dot_general0", ("layers/1/w",), "channel 1"),
            ("dot_general1", ("layers/0/w",), "channel 1"),
        ],
    ),
    # Tables and experts.
    "tied embedding": Case(
        _tied,
        {"table": data(7, 4)},
        lambda p, tokens: (
            fq(fq(p["table"], (0,))[tokens], (0, 1)) @ fq(p["table"], (0,)).T
        ),
        [("dot_general0", ("table",), "channel 0")],
        x=TOKENS,
    ),
    "looked up": Case(
        lambda p, tokens: p["table"][tokens] @ p["w"],
        {"table": data(7, 4), **W},
        lambda p, tokens: fq(p["table"][tokens], (0, 1)) @ fq(p["w"], (1,)),
        DOT,
        x=TOKENS,
    ),
    "looked up and summed": Case(
        lambda p, tokens: (p["table"][tokens] + p["place"]) @ p["w"],
        {"table": data(7, 4), "place": data(3, 4), **W},
        lambda p, tokens: (
            fq(p["table"][tokens] + p["place"], (0, 1)) @ fq(p["w"], (1,))
        ),
        DOT,
        x=TOKENS,
    ),
    "two tables": Case(
        lambda p, ij: jnp.einsum("bd,bd->b", p["u"][ij[0]], p["v"][ij[1]]),
        {"u": data(7, 4), "v": data(6, 4)},
        lambda p, ij: (fq(p["u"], (0,))[ij[0]] * fq(p["v"], (0,))[ij[1]]).sum(-1),
        [("einsum0", ("u", "v"), "channel 0")],
        x=(np.array([1, 6, 2]), np.array([0, 5, 5])),
    ),
    "experts": Case(
        lambda p, x: jnp.einsum("bi,bio->bo", x[0], p["w"][x[1]]),
        {"w": data(4, 4, 5)},
        lambda p, x: np.einsum("bi,bio->bo", fq(x[0], (0,)), fq(p["w"], (0, 2))[x[1]]),
        [("einsum0", ("w",), "channel 0,2")],
        x=(data(3, 4), EXPERTS),
    ),
    "expert by vmap": Case(
        lambda p, x: jax.vmap(lambda x, e: x @ p["w"][e])(*x),
        {"w": data(4, 4, 5)},
        lambda p, x: np.einsum("bi,bio->bo", fq(x[0], (0,)), fq(p["w"], (0, 2))[x[1]]),
        [("dot_general0", ("w",), "channel 0,2")],
        x=(data(3, 4), EXPERTS),
    ),
    "experts summed over": Case(
        lambda p, x: jnp.einsum("bki,bkio->bo", x[0], p["w"][x[1]]),
        {"w": data(4, 4, 5)},
        lambda p, x: np.einsum("bki,bkio->bo", fq(x[0], (0,)), fq(p["w"], (2,))[x[1]]),
        [("einsum0", ("w",), "channel 2")],
        x=(data(3, 2, 4), np.array([[2, 0], [1, 1], [0, 3]])),
    ),
    "normalized queries": Case(
        lambda p, x: (p["q"] / jnp.linalg.norm(p["q"])) @ p["w"] + x.sum(),
        {"q": data(3, 4), **W},
        lambda p, x: (
            fq(p["q"] / np.linalg.norm(p["q"]), (0,)) @ fq(p["w"], (1,)) + x.sum()
        ),
        DOT,
    ),
    # Not weights.
    "weight standardization": Case(
        _standardized,
        W,
        lambda p, x: x @ ((p["w"] - p["w"].mean(0)) / p["w"].std(0)),
        [("dot_general0", (), None)],
    ),
    "weight norm": Case(
        _weight_norm,
        {**W, "g": data(5)},
        lambda p, x: x @ (p["g"] * p["w"] / np.linalg.norm(p["w"], axis=0)),
        [("dot_general0", (), None)],
    ),
    "sum of two params": Case(
        lambda p, x: x @ (p["w"] + p["v"]),
        {**W, "v": data(4, 5, seed=3)},
        lambda p, x: x @ (p["w"] + p["v"]),
        [("dot_general0", (), None)],
    ),
    "product of two params": Case(
        lambda p, x: x @ (p["a"] @ p["b"]),
        {"a": data(4, 2), "b": data(2, 5)},
        lambda p, x: x @ (fq(p["a"], (0,)) @ fq(p["b"], (1,))),
        [
            ("dot_general0", ("a", "b"), "channel 0"),
            ("dot_general1", (), None),
        ],
    ),
    "gated by a param": Case(
        lambda p, x: (x * p["scale"]) @ p["w"],
        {"scale": 1 + data(4) / 8, **W},
        lambda p, x: fq(x * p["scale"], (0,)) @ fq(p["w"], (1,)),
        DOT,
    ),
    "constants": Case(
        lambda p, x: x + jnp.ones((3, 2)) @ jnp.ones((2, 4)) @ p["w"],
        {"w": data(4, 4)},
        lambda p, x: x + fq(np.full((3, 4), 2), (0,)) @ fq(p["w"], (1,)),
        [("dot_general0", (), None), ("dot_general1", ("w",), "channel 1")],
    ),
    "integers": Case(
        lambda p, x: (x[0] @ x[0].T) + (x[1] @ p["w"]).sum(),
        {"w": data(4, 5)},
        lambda p, x: x[0] @ x[0].T + (fq(x[1], (0,)) @ fq(p["w"], (1,))).sum(),
        [("dot_general0", (), None), ("dot_general1", ("w",), "channel 1")],
        x=(np.arange(12).reshape(3, 4), data(3, 4)),
    ),
    "attention": Case(
        _attention,
        {name: data(4, 5, seed=i) for i, name in enumerate("qkv")},
        _attention_reference,
        [
            ("dot_general0", ("q",), "channel 1"),
            ("dot_general1", ("k",), "channel 1"),
            ("dot_general2", ("v",), "channel 1"),
            ("dot_general3", (), None),
            ("dot_general4", (), None),
        ],
    ),
    "the same operand twice": Case(
        lambda p, x: (x @ x.T) + lax.dot_general(x, x, (((1,), (1,)), ((), ()))),
        {},
        lambda p, x: 2 * (fq(x, (0,)) @ fq(x, (0,)).T),
        [("dot_general0", (), None), ("dot_general1", (), None)],
    ),
    # Convolutions.
    "conv": Case(
        lambda p, x: conv(x, p["w"]),
        {"w": data(3, 3, 4, 6)},
        lambda p, x: conv_reference(fq(x, (0,)), fq(p["w"], (3,))),
        CONV,
        x=IMAGE,
    ),
    "grouped conv": Case(
        lambda p, x: conv(x, p["w"], feature_group_count=2),
        {"w": data(3, 3, 2, 6)},
        lambda p, x: conv_reference(fq(x, (0,)), fq(p["w"], (3,)), 2),
        CONV,
        x=IMAGE,
    ),
    "depthwise conv": Case(
        lambda p, x: conv(x, p["w"], feature_group_count=4),
        {"w": data(3, 3, 1, 4)},
        lambda p, x: conv_reference(fq(x, (0,)), fq(p["w"], (3,)), 4),
        CONV,
        x=IMAGE,
    ),
    "dilated conv": Case(
        lambda p, x: conv(x, p["w"], rhs_dilation=(2, 2)),
        {"w": data(2, 2, 4, 6)},
        lambda p, x: conv_reference(fq(x, (0,)), dilate(fq(p["w"], (3,)))),
        CONV,
        x=IMAGE,
    ),
    "transposed conv": Case(
        lambda p, x: lax.conv_transpose(
            x,
            p["w"],
            (1, 1),
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            transpose_kernel=True,
        ),
        {"w": data(3, 3, 6, 4)},
        lambda p, x: conv_reference(
            np.pad(fq(x, (0,)), ((0, 0), (2, 2), (2, 2), (0, 0))),
            fq(p["w"], (2,))[::-1, ::-1].swapaxes(2, 3),
        ),
        [("conv_general_dilated0", ("w",), "channel 2")],
        x=IMAGE,
    ),
    "standardized conv": Case(
        lambda p, x: conv(x, p["w"] - p["w"].mean((0, 1, 2))),
        {"w": data(3, 3, 4, 6)},
        lambda p, x: conv_reference(x, p["w"] - p["w"].mean((0, 1, 2))),
        [("conv_general_dilated0", (), None)],
        x=IMAGE,
    ),
    "conv under vmap, weights batched": Case(
        lambda p, x: jax.vmap(lambda w: conv(x, w))(p["w"]),
        {"w": data(2, 3, 3, 4, 6)},
        lambda p, x: np.stack(
            [conv_reference(fq(x, (0,)), w) for w in fq(p["w"], (0, 4))]
        ),
        [("conv_general_dilated0", ("w",), "channel 0,4")],
        x=IMAGE,
    ),
}

RULE = QuantizationRule(weight_qtype="int8", act_qtype="int8")


def cast(tree, dtype):
    def one(x):
        return np.asarray(x, dtype) if np.issubdtype(x.dtype, np.floating) else x

    return jax.tree.map(one, tree)
