"""What fine-tuning costs: all weights, LoRA and QLoRA, ours and that of `qwix`.

    python -m benchmarks.qlora [--quick] [--sections steps codec] ...

One train step of a decoder with each, on the same batch, and nf4 on its own, in one
process. Every time is the median of rounds in which the variants take turns, so that a
busy machine slows all of them alike; the ratios are what to read.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import pathlib
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util
from flax.training import train_state

import qwix_train
from benchmarks import models
from benchmarks.ptq import HAS_QWIX, normal, packages
from benchmarks.qat_step import amount, interleaved, table, timed
from benchmarks.results import run_sections
from qwix_train import HowToQuantize, lora
from qwix_train.core import packed_array
from qwix_train.core.qarray import dequantize_stored

if HAS_QWIX:
    import qwix

OUT = pathlib.Path(__file__).parent / "out" / "qlora.json"

QLORA = {"weight_qtype": "nf4", "tile_size": 64}

# Names of the variants. The rest of the file reads measurements by them.
FULL = "full fine-tuning"
OUR_LORA, OUR_QLORA = "LoRA", "QLoRA"
QWIX_LORA, QWIX_QLORA = "LoRA, qwix", "QLoRA, qwix"
# nf4 as QLoRA keeps it: two codes in a byte, and scales of 8 bits.
PACKED = "packed"


def main() -> None:
    sections = {
        "steps": (bench_steps, steps_table),
        "codec": (bench_codec, codec_table),
    }
    run_sections(parse_options(), sections)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="a small model and few rounds")
    add("--sections", nargs="*", default=["steps", "codec"])
    add("--layers", type=int, default=6)
    add("--width", type=int, default=768)
    add("--batch", type=int, default=4, help="sequences in a batch")
    add("--tokens", type=int, default=128, help="tokens in a sequence")
    add("--rank", type=int, default=16)
    add("--rounds", type=int, default=11)
    add("--size", type=int, default=4096, help="rows and columns of the nf4 array")
    add("--out", type=pathlib.Path, default=OUT, help="where the JSON goes")
    if parser.parse_args().quick:
        parser.set_defaults(layers=2, width=128, rounds=3, size=1024)
    return parser.parse_args()


@dataclasses.dataclass(frozen=True)
class Variant:
    """A train step and its state.

    Attributes:
        step: Takes the state and a batch; returns the new state and the loss.
        state: The state at the start.
        held: The arrays that lie in memory between steps: weights and optimizer state.
    """

    step: Callable[..., Any]
    state: Any
    held: Callable[[Any], Any]


class QwixState(train_state.TrainState):
    """Adapters as the params, and the base next to them, as a user of qwix would."""

    base: Any


def _loss(logits: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
    labels = batch["y"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def train_step(state: train_state.TrainState, batch):
    """One step of a loop that knows nothing of adapters."""

    def loss_fn(params):
        return _loss(state.apply_fn({"params": params}, batch["x"]), batch)

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads), loss


def qwix_train_step(state: QwixState, batch):
    """The same with the params of `qwix`, adapters among those of the base."""

    def loss_fn(adapters):
        params = traverse_util.unflatten_dict(state.base | adapters)
        return _loss(state.apply_fn({"params": params}, batch["x"]), batch)

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads), loss


def make_variants(task: models.Task, rank: int) -> dict[str, Variant]:
    """All that is compared, from the same weights."""
    x, apply_fn, tx = task.batch["x"], task.model.apply, optax.adam(1e-4)
    params = jax.jit(task.model.init)(jax.random.key(0), x)["params"]
    settings: dict[str, Any] = {"rank": rank, "alpha": float(rank)}

    def ours(**base: Any) -> Variant:
        rules = [lora.LoraRule(**settings, **base)]
        state = train_state.TrainState(0, apply_fn, params, tx, opt_state=())
        state = qwix_train.attach(state, rules, x, rng=jax.random.key(1))
        return Variant(train_step, state, lambda s: (s.params, s.frozen, s.opt_state))

    def theirs(**base: Any) -> Variant:
        provider = qwix.LoraProvider(module_path=".*", **settings, **base)
        model = qwix.apply_lora_to_model(task.model, provider)
        variables = jax.jit(model.init)(jax.random.key(1), x)["params"]
        flat = traverse_util.flatten_dict(variables)
        adapters = {path: a for path, a in flat.items() if "_lora_" in path[-1]}
        abstract = {path: a for path, a in flat.items() if path not in adapters}
        quantized = params
        if base:
            tree = traverse_util.unflatten_dict(abstract)
            quantized = qwix.quantize_params(params, tree)
        state = QwixState.create(
            apply_fn=model.apply,
            params=adapters,
            tx=tx,
            base=traverse_util.flatten_dict(quantized),
        )
        return Variant(
            qwix_train_step, state, lambda s: (s.params, s.base, s.opt_state)
        )

    full = train_state.TrainState.create(apply_fn=apply_fn, params=params, tx=tx)
    variants = {
        FULL: Variant(train_step, full, lambda s: (s.params, s.opt_state)),
        OUR_LORA: ours(),
        OUR_QLORA: ours(**QLORA, double_quant=True),
    }
    if HAS_QWIX:
        variants |= {QWIX_LORA: theirs(), QWIX_QLORA: theirs(**QLORA)}
    return variants


def bench_steps(options) -> dict[str, Any]:
    """Step time, temporary memory, and what is held between steps."""
    task = models.decoder(options.layers, options.width, options.batch, options.tokens)
    variants = make_variants(task, options.rank)
    results: dict[str, dict[str, float]] = {name: {} for name in variants}
    steps, states, losses = {}, {}, {}
    for name, variant in variants.items():
        step = jax.jit(variant.step, donate_argnums=0)
        steps[name] = step.lower(variant.state, task.batch).compile()
        memory = steps[name].memory_analysis()
        if memory is not None:
            results[name]["temporary memory"] = memory.temp_size_in_bytes
        leaves = jax.tree.leaves(variant.held(variant.state))
        results[name]["held"] = sum(leaf.nbytes for leaf in leaves)
        results[name]["trained"] = sum(
            leaf.size for leaf in jax.tree.leaves(variant.state.params)
        )
        # Copies, since a step is given its state to overwrite.
        states[name] = jax.tree.map(jnp.copy, variant.state)

    def run(name):
        states[name], loss = steps[name](states[name], task.batch)
        return jax.block_until_ready((states[name], loss))[1]

    losses = {name: float(run(name)) for name in variants}
    first = losses[FULL]
    assert all(abs(loss - first) < 0.1 * abs(first) for loss in losses.values()), losses
    times = interleaved(variants, functools.partial(timed, run), options.rounds)
    for name, values in times.items():
        results[name]["step"] = statistics.median(values)
    block = 12 * options.width**2 * 4
    full = variants[FULL].state.params
    count = sum(leaf.size for leaf in jax.tree.leaves(full))
    return {
        "task": task.name,
        "params": count,
        "layer bytes": block,
        "variants": results,
    }


def steps_table(report: dict[str, Any]) -> str:
    variants = report["variants"]
    rows = [["", "trained", "held", "temporary memory", "step", "step / full"]]
    full = variants[FULL]
    for name, found in variants.items():
        rows.append(
            [
                name,
                f"{found['trained'] / 1e6:.2f} M",
                _mebibytes(found["held"]),
                _mebibytes(found.get("temporary memory")),
                amount("", found["step"]),
                f"{found['step'] / full['step']:.2f}",
            ]
        )
    title = f"{report['task']}, {report['params'] / 1e6:.1f}M params"
    goals = "\n".join(f"- {line}" for line in targets(report))
    return f"{title}\n\n{table(rows)}\n\n{goals}"


def targets(report: dict[str, Any]) -> list[str]:
    """What is to be reached, and whether it was."""
    variants = report["variants"]
    full, adapted, ours = (variants[name] for name in (FULL, OUR_LORA, OUR_QLORA))
    lines = [
        at_most("LoRA's step, of full fine-tuning's", adapted, full, "step", 0.9),
        at_most("QLoRA's step, of LoRA's", ours, adapted, "step", 1.15),
    ]
    if "temporary memory" in ours:
        over = ours["temporary memory"] - adapted["temporary memory"]
        layers = over / report["layer bytes"]
        lines.append(
            f"QLoRA's temporary memory, beyond LoRA's: {layers:.2f} layers, at most 2: "
            + _verdict(layers <= 2)
        )
    ratio = full["held"] / ours["held"]
    lines.append(
        f"held in full fine-tuning, of QLoRA's: {ratio:.2f}, at least 5: "
        + _verdict(ratio >= 5)
    )
    return lines


def at_most(what: str, ours, base, measure: str, most: float) -> str:
    ratio = ours[measure] / base[measure]
    return f"{what}: {ratio:.2f}, at most {most}: {_verdict(ratio <= most)}"


def _verdict(met: bool) -> str:
    return "met" if met else "missed"


def _mebibytes(value: float | None) -> str:
    return "-" if value is None else f"{value / 2**20:.1f} MiB"


def bench_codec(options) -> list[dict[str, Any]]:
    """nf4 in blocks of 64: finding the codes of an array, and its values from them."""
    array = normal(options.size, options.size)
    encoders: dict[str, Callable[[], Any]] = {}
    decoders: dict[str, Callable[[], Any]] = {}
    for name, package in packages().items():
        encode = functools.partial(
            package.quantize, qtype="nf4", channelwise_axes=(1,), tiled_axes={0: 64}
        )
        encoders[name] = functools.partial(jax.jit(encode), array)
        quantized = encoders[name]()
        decoders[name] = functools.partial(jax.jit(package.dequantize), quantized)
    how = HowToQuantize(qtype="nf4", channelwise_axes=(1,), tiled_axes={0: 64})
    encode = jax.jit(functools.partial(packed_array.quantize_packed, how=how))
    encoders[PACKED] = functools.partial(encode, array)
    decode = jax.jit(lambda packed: dequantize_stored(packed_array.unpack(packed)))
    decoders[PACKED] = functools.partial(decode, encoders[PACKED]())
    values = {name: np.asarray(decode()) for name, decode in decoders.items()}
    # Quantized scales are off by half a step at most.
    tolerance = {name: 0.02 if name == PACKED else 1e-5 for name in values}
    for name, found in values.items():
        np.testing.assert_allclose(found, values["qwix_train"], rtol=tolerance[name])
    results = []
    for call, calls in (("encode", encoders), ("decode", decoders)):
        for run in calls.values():
            jax.block_until_ready(run())
        times = interleaved(
            calls, lambda name, calls=calls: timed(calls[name]), options.rounds
        )
        medians = {name: statistics.median(found) for name, found in times.items()}
        results.append({"call": call, "size": array.size, **medians})
    return results


def codec_table(results: list[dict[str, Any]]) -> str:
    least = {"encode": 10, "decode": 2}
    names = [name for name in ("qwix_train", PACKED, "qwix") if name in results[0]]
    rows = [["nf4", *(f"{name}, M/s" for name in names), f"{PACKED} / qwix", "target"]]
    for result in results:
        speeds = {name: result["size"] / result[name] / 1e6 for name in names}
        ratio, verdict = "-", ""
        if "qwix" in speeds:
            found = speeds[PACKED] / speeds["qwix"]
            goal = least[result["call"]]
            ratio = f"{found:.2f}"
            verdict = f">= {goal} x qwix: {_verdict(found >= goal)}"
        shown = [f"{speed:.0f}" for speed in speeds.values()]
        rows.append([result["call"], *shown, ratio, verdict])
    return table(rows)


if __name__ == "__main__":
    main()
