"""What types of blocks lose, and what encoding and reading them costs.

    python -m benchmarks.formats [--quick] [--sections error encode layers ...] ...

The error of quantizing normal numbers, the time that it takes, the time of a product
with a quantized weight, the loss of a language model, and the accuracy of layers that
read digits, in one process. Every time is the median of rounds in which the variants
take turns; the ratios are what to read.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.training import train_state

import qwix_train
from benchmarks import models, text
from benchmarks.ptq import HAS_QWIX, medians
from benchmarks.qat_step import table
from benchmarks.results import run_sections
from example_trainers.digits_qat import data
from qwix_train import QuantizationRule, ptq
from qwix_train.core import formats
from qwix_train.core.compiled import quantize_compiled

if HAS_QWIX:
    import qwix

OUT = pathlib.Path(__file__).parent / "out" / "formats.json"
OURS = ("mxfp8", "mxfp8_e5m2", "mxfp6", "mxfp6_e3m2", "mxfp4", "mxint8", "nvfp4")
TRAINED = ("mxfp8", "mxfp6", "mxfp4", "nvfp4", "nf4", "int4")
METHODS = ("PTQ", "GPTQ", "QAT")
OTHERS = ("nf4", "int4", "int8")
OF_QWIX = ("mxfp8", "mxfp4", "nvfp4", "nf4", "int4", "int8")
SECTIONS = ["error", "encode", "layers", "model", "digits"]
TILE = 32  # Of types without blocks.


def main() -> None:
    sections = {
        "error": (bench_error, error_table),
        "encode": (bench_encode, encode_table),
        "layers": (bench_layers, layers_table),
        "model": (bench_model, model_table),
        "digits": (bench_digits, digits_table),
    }
    run_sections(parse_options(), sections)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="a small matrix and few steps")
    add("--sections", nargs="*", default=SECTIONS)
    add("--size", type=int, default=2048, help="rows and columns of the matrix")
    add("--rows", type=int, nargs="*", default=[1, 16])
    add("--rounds", type=int, default=11)
    add("--seeds", type=int, default=3, help="of the digits")
    add("--width", type=int, default=128)
    add("--layers", type=int, default=2)
    add("--steps", type=int, default=600, help="of the model in float")
    add("--qat-steps", type=int, default=200)
    add("--out", type=pathlib.Path, default=OUT, help="where the JSON goes")
    if parser.parse_args().quick:
        parser.set_defaults(
            size=512, rounds=3, seeds=1, width=64, steps=60, qat_steps=20
        )
    return parser.parse_args()


def layout(qtype: str) -> dict[str, Any]:
    entry = formats.find(qtype)
    assert entry is not None
    return dict(channelwise_axes=(1,), tiled_axes={0: entry.block or TILE})


def normal(*shape: int, seed: int = 0) -> jax.Array:
    values = np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(values.astype(np.float32))


def bench_error(options) -> list[dict[str, Any]]:
    """The relative error of normal numbers, for two standard deviations."""
    results = []
    for qtype in (*OURS, *OTHERS):
        found: dict[str, Any] = {"type": qtype}
        for sigma in (1.0, 1e-3):
            x = sigma * normal(options.size, 512)
            values = qwix_train.dequantize(
                qwix_train.quantize(x, qtype, **layout(qtype))
            )
            found[f"qwix_train, {sigma:g}"] = _error(values, x)
            if HAS_QWIX and qtype in OF_QWIX:
                values = qwix.dequantize(qwix.quantize(x, qtype, **layout(qtype)))
                found[f"qwix, {sigma:g}"] = _error(values, x)
        results.append(found)
    return results


def _error(values: jax.Array, x: jax.Array) -> float:
    return float(jnp.linalg.norm(values - x) / jnp.linalg.norm(x))


def error_table(results) -> str:
    columns = ["qwix_train, 1", "qwix, 1", "qwix_train, 0.001", "qwix, 0.001"]
    rows = [["type", *columns]]
    for found in results:
        cells = [f"{100 * found[c]:.2f} %" if c in found else "-" for c in columns]
        rows.append([found["type"], *cells])
    return table(rows)


def bench_encode(options) -> list[dict[str, Any]]:
    """The time to quantize a matrix, as `quantize_params` does it."""
    x, results = normal(options.size, options.size), []
    for qtype in (*OURS, *OTHERS):
        how = qwix_train.HowToQuantize(qtype=qtype, **layout(qtype))
        calls: dict[str, Any] = {}
        calls["qwix_train"] = functools.partial(quantize_compiled, x, how)
        if HAS_QWIX and qtype in OF_QWIX:
            theirs = functools.partial(qwix.quantize, qtype=qtype, **layout(qtype))
            calls["qwix"] = functools.partial(theirs, x)
            calls["qwix, jitted"] = functools.partial(jax.jit(theirs), x)
        results.append({"type": qtype, **medians(calls, options.rounds)})
    return results


def encode_table(results) -> str:
    rows = [["type", "qwix_train", "qwix", "qwix, jitted", "qwix / qwix_train"]]
    for found in results:
        times = [
            f"{1e3 * found[name]:.1f} ms" if name in found else "-"
            for name in ("qwix_train", "qwix", "qwix, jitted")
        ]
        ratio = "-"
        if "qwix" in found:
            ratio = f"{found['qwix'] / found['qwix_train']:.1f}"
        rows.append([found["type"], *times, ratio])
    return table(rows)


def bench_layers(options) -> list[dict[str, Any]]:
    """A product of float rows with a weight that is quantized beforehand."""
    weight, results = normal(options.size, options.size), []
    for rows in options.rows:
        x = normal(rows, options.size, seed=1)
        calls = {"float32": functools.partial(jax.jit(jnp.matmul), x, weight)}
        for qtype in (*OURS, *OTHERS):
            how = qwix_train.HowToQuantize(qtype=qtype, **layout(qtype))
            quantized = quantize_compiled(weight, how)
            calls[qtype] = functools.partial(jax.jit(qwix_train.dot), x, quantized)
        results.append({"rows": rows, **medians(calls, options.rounds)})
    return results


def layers_table(results) -> str:
    names = ["float32", *OURS, *OTHERS]
    head = ["type", *(f"M={found['rows']}" for found in results)]
    rows = [
        [name, *(f"{1e3 * found[name]:.2f} ms" for found in results)] for name in names
    ]
    return table([head, *rows])


def bench_model(options) -> list[dict[str, Any]]:
    """The loss of a model of this repository's own text, in bits a byte."""
    train, test = text.texts()
    model = models.Decoder(options.layers, options.width, vocabulary=256)
    task = _Task(
        model,
        test["x"][:1],
        train_step=text.train_step,
        trained=lambda state, step, count: text.trained(state, step, train, count),
        score=lambda model, params: text.loss(model, params, test),
        samples=[train["x"][start : start + 16] for start in range(0, 64, 16)],
        rates=(2e-3, 5e-4),
    )
    return _by_method(task, [0], options.steps, options.qat_steps)


def bench_digits(options) -> list[dict[str, Any]]:
    """The accuracy of layers that read handwritten digits, in percent."""
    splits = [
        {"x": jnp.asarray(part["image"].reshape(-1, 64)), "y": part["label"]}
        for part in data.load_split()
    ]
    train, test = splits

    def trained(state, step, count):
        for _ in range(count):
            state, _ = step(state, train)
        return state

    def score(model, params):
        logits = jax.jit(model.apply)({"params": params}, test["x"])
        return 100 * float((logits.argmax(-1) == test["y"]).mean())

    task = _Task(
        Layers(),
        test["x"],
        train_step=text.train_step,
        trained=trained,
        score=score,
        samples=[train["x"]],
        rates=(1e-2, 1e-3),
    )
    return _by_method(task, range(options.seeds), 100, 50)


class Layers(nn.Module):
    """Three dense layers; the lengths of what they sum over are blocks of any type."""

    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.relu(nn.Dense(64)(x))
        return nn.Dense(10)(x)


class _Task(NamedTuple):
    """What is trained, and how good it is."""

    model: nn.Module
    inputs: jax.Array
    train_step: Callable[..., Any]
    trained: Callable[..., Any]  # Called with a state, a compiled step, and how many.
    score: Callable[[Any, Any], float]
    samples: Sequence[jax.Array]  # What GPTQ sees.
    rates: tuple[float, float]  # Of learning: at first, and of what goes on from there.


def _by_method(
    task: _Task, seeds: Iterable[int], steps: int, more: int
) -> list[dict[str, Any]]:
    """The mean score of each type over seeds: PTQ, GPTQ, and QAT that goes on."""
    model, compiled = task.model, jax.jit(task.train_step)
    found: dict[str, list[dict[str, float]]] = {}
    steps_of, quantized_of = {}, {}
    first, later = (
        optax.adam(optax.cosine_decay_schedule(rate, count))
        for rate, count in zip(task.rates, (steps, more), strict=True)
    )
    for seed in seeds:
        params = jax.jit(model.init)(jax.random.key(seed), task.inputs)["params"]
        state = train_state.TrainState.create(
            apply_fn=model.apply, params=params, tx=first
        )
        state = task.trained(state, compiled, steps)
        start = state.replace(step=0, tx=later, opt_state=later.init(state.params))
        tuned = task.trained(start, compiled, more)
        exact = task.score(model, state.params)
        scores = {"PTQ": exact, "GPTQ": exact, "QAT": task.score(model, tuned.params)}
        found.setdefault("float32", []).append(scores)
        for qtype in TRAINED:
            entry = formats.find(qtype)
            assert entry is not None
            tile = None if entry.block else TILE
            rules = [QuantizationRule(weight_qtype=qtype, tile_size=tile)]
            if qtype not in steps_of:
                step = qwix_train.wrap_train_step(task.train_step, rules)
                steps_of[qtype] = jax.jit(step)
                quantized_of[qtype] = ptq.quantize(model, params, rules, task.inputs)
            quantized, shapes = quantized_of[qtype]
            tree = qwix_train.quantize_params(state.params, shapes)
            scores = {"PTQ": task.score(quantized, tree)}
            method = ptq.Gptq(rules)
            apply = method.wrap(jax.jit(model.apply))
            for sample in task.samples:
                apply({"params": state.params}, sample)
            tree = method.quantize_params(state.params, shapes)
            scores["GPTQ"] = task.score(quantized, tree)
            tuned = task.trained(start, steps_of[qtype], more)
            tree = qwix_train.quantize_params(tuned.params, shapes)
            scores["QAT"] = task.score(quantized, tree)
            found.setdefault(qtype, []).append(scores)
    return [
        {"type": name, **{m: statistics.mean(s[m] for s in own) for m in METHODS}}
        for name, own in found.items()
    ]


def model_table(results) -> str:
    rows = [["type", *METHODS]]
    for found in results:
        rows.append([found["type"], *(f"{found[name]:.4f}" for name in METHODS)])
    return table(rows)


def digits_table(results) -> str:
    rows = [["type", *METHODS]]
    for found in results:
        rows.append([found["type"], *(f"{found[name]:.2f} %" for name in METHODS)])
    return table(rows)


if __name__ == "__main__":
    main()
