"""What a token costs a quantized model that decodes in a loop.

    python -m benchmarks.decode [--quick] [--schemas nf4 "int4, tiles"] ...

A transformer takes one token (or a batch of them) and gives the next, in a `scan` over
tokens within one program, as samplers do it. Float32, this package and `qwix` take
turns, in one process; beside the time stands the temporary memory of the program, as
XLA's `memory_analysis` counts it, in layers of the float model.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import models
from benchmarks.ptq import packages
from benchmarks.qat_step import amount, interleaved, table, timed
from benchmarks.results import run_sections

OUT = pathlib.Path(__file__).parent / "out" / "decode.json"
SCHEMAS = {
    "int8": dict(weight_qtype="int8"),
    "int4": dict(weight_qtype="int4"),
    "int4, tiles of 32": dict(weight_qtype="int4", tile_size=32),
    "nf4": dict(weight_qtype="nf4"),
    "nf4, tiles of 64": dict(weight_qtype="nf4", tile_size=64),
    "mxfp4": dict(weight_qtype="mxfp4", tile_size=32),
    "nvfp4": dict(weight_qtype="nvfp4", tile_size=16),
    "dynamic int8": dict(weight_qtype="int8", act_qtype="int8"),
}


def main() -> None:
    run_sections(parse_options(), {"loop": (bench_loop, loop_table)})


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="a small model and few rounds")
    add("--sections", nargs="*", default=["loop"])
    add("--schemas", nargs="*", default=list(SCHEMAS), choices=list(SCHEMAS))
    add("--layers", type=int, default=4)
    add("--width", type=int, default=1024)
    add("--rows", type=int, nargs="*", default=[1, 16])
    add("--tokens", type=int, default=8, help="rounds of the loop")
    add("--rounds", type=int, default=15)
    add("--out", type=pathlib.Path, default=OUT, help="where the JSON goes")
    if parser.parse_args().quick:
        parser.set_defaults(layers=2, width=256, rounds=3)
    return parser.parse_args()


def bench_loop(options) -> list[dict[str, Any]]:
    """The time of a token, and the temporary memory of the loop."""
    model, results = models.Decoder(options.layers, options.width), []
    for rows in options.rows:
        first = jnp.zeros((rows, 1), jnp.int32)
        params = jax.jit(model.init)(jax.random.key(0), first)["params"]
        layer = sum(leaf.nbytes for leaf in jax.tree.leaves(params["DecoderBlock_0"]))
        for schema in options.schemas:
            loops = {"float32": _loop(model, params, first, options.tokens)}
            for name, package in packages().items():
                rule = package.QuantizationRule(**SCHEMAS[schema])
                quantized = package.quantize_model(model, package.PtqProvider([rule]))
                shapes = jax.eval_shape(quantized.init, jax.random.key(0), first)
                tree = package.quantize_params(params, shapes["params"])
                loops[name] = _loop(quantized, tree, first, options.tokens)
            calls = {name: call for name, (call, _) in loops.items()}
            for call in calls.values():
                jax.block_until_ready(call())
            times = interleaved(calls, lambda name: timed(calls[name]), options.rounds)
            results.append(
                {
                    "schema": schema,
                    "rows": rows,
                    "layer bytes": layer,
                    "memory": {name: size for name, (_, size) in loops.items()},
                    "time": {
                        name: statistics.median(found) / options.tokens
                        for name, found in times.items()
                    },
                }
            )
    return results


def _loop(model, params, first, tokens) -> tuple[Callable[[], jax.Array], int]:
    """Decodes so many tokens; and the bytes of temporary memory that takes."""

    @jax.jit
    def decode(params, first):
        def step(token, _):
            logits = model.apply({"params": params}, token)
            token = jnp.argmax(logits, axis=-1).astype(token.dtype)
            return token, token

        return jax.lax.scan(step, first, length=tokens)[1]

    compiled = decode.lower(params, first).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    return functools.partial(compiled, params, first), memory.temp_size_in_bytes


def loop_table(results: list[dict[str, Any]]) -> str:
    names = list(results[0]["time"])
    rows = [["weights", "rows", *names]]
    rows[0] += [f"{name} / ours" for name in names if name != "qwix_train"]
    rows[0] += [f"{name}, layers of memory" for name in names]
    for found in results:
        times, ours = found["time"], found["time"]["qwix_train"]
        ratios = [times[n] / ours for n in names if n != "qwix_train"]
        layers = [found["memory"][n] / found["layer bytes"] for n in names]
        rows.append(
            [
                found["schema"],
                str(found["rows"]),
                *(amount("", times[name]) for name in names),
                *(f"{ratio:.2f}" for ratio in ratios),
                *(f"{count:.2f}" for count in layers),
            ]
        )
    return table(rows)


if __name__ == "__main__":
    main()
