"""What quantization-aware training costs: a float step, ours, and that of `qwix`.

    python -m benchmarks.qat_step [--quick] [--dtype bfloat16] ...

The three train the same models on the same batch, int8 weights and activations, in
one process. Every number is the median of rounds in which the variants take turns,
so that a busy machine slows all of them alike; the ratios are what to read. Tracing
is Python in one thread, so it is measured in CPU time; all else in wall time.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib.util
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import qwix_train
from benchmarks import models
from benchmarks.results import machine, write

RULE = {"weight_qtype": "int8", "act_qtype": "int8"}
OUT = pathlib.Path(__file__).parent / "out" / "qat_step.json"

# The most that a measurement may be, as a multiple of the float step's, or, where
# qwix's is larger, of that.
TARGETS = {"cold trace": 2.2, "warm trace": 2.2, "step": 1.05, "temporary memory": 1.15}


def main() -> None:
    options = parse_options()
    dtype = jnp.dtype(options.dtype)
    tasks = {
        "transformer": functools.partial(
            models.transformer,
            options.layers,
            options.width,
            options.batch,
            options.tokens,
            dtype,
        ),
        "resnet": functools.partial(
            models.resnet, options.channels, options.images, options.size, dtype
        ),
    }
    facts = machine()
    print("\n".join(f"{key}: {value}" for key, value in facts.items()))
    found: dict[str, Any] = {}
    tables: dict[str, str] = {}

    def add(name: str, title: str, measured: Any, shown: str) -> None:
        found[name], tables[title] = measured, shown
        print(f"\n{title}\n\n{shown}", flush=True)

    for name in options.tasks:
        task = tasks[name]()
        measured = bench_task(task, options)
        add(name, f"{task.name}, {dtype}", measured, task_table(measured))
    if options.depths:
        measured = bench_depth(options)
        add("depth", "Trace time against depth", measured, depth_table(measured))
    if options.eager:
        measured = bench_eager(options)
        title = "Overhead per call, without compiling"
        add("eager", title, measured, eager_table(measured))
    write(options, facts, found, tables)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="small models and few rounds")
    add("--tasks", nargs="*", default=["transformer", "resnet"])
    add("--dtype", default="float32", help="dtype of the computation")
    add("--layers", type=int, default=4)
    add("--width", type=int, default=256)
    add("--batch", type=int, default=8, help="sequences in a batch")
    add("--tokens", type=int, default=128, help="tokens in a sequence")
    add("--channels", type=int, default=32, help="channels of the first stage")
    add("--images", type=int, default=32, help="images in a batch")
    add("--size", type=int, default=32, help="height and width of an image")
    add("--depths", type=int, nargs="*", default=[12, 24, 48])
    add("--no-eager", dest="eager", action="store_false")
    add("--trace-rounds", type=int, default=5)
    add("--compile-rounds", type=int, default=3)
    add("--step-rounds", type=int, default=15)
    add("--out", type=pathlib.Path, default=OUT, help="where the JSON goes")
    if parser.parse_args().quick:
        small = {"layers": 2, "width": 128, "batch": 4, "tokens": 64, "images": 8}
        few = {"trace_rounds": 3, "compile_rounds": 1, "step_rounds": 5}
        parser.set_defaults(**small, channels=16, size=16, depths=[4, 8, 16], **few)
    return parser.parse_args()


def variants(
    task: models.Task, state: models.TrainState
) -> dict[str, tuple[Callable[[], Any], models.TrainState]]:
    """For each variant, what makes a step that nothing has traced, and its state."""

    def float_step():
        return lambda state, batch: models.train_step(state, batch)

    def our_step():
        rules = [qwix_train.QuantizationRule(**RULE)]
        return qwix_train.wrap_train_step(float_step(), rules)

    made = {"float": (float_step, state), "qwix_train": (our_step, state)}
    if importlib.util.find_spec("qwix") is not None:
        import qwix

        provider = qwix.QtProvider([qwix.QtRule(**RULE)])
        model = qwix.quantize_model(task.model, provider)
        made["qwix"] = (float_step, state.replace(apply_fn=model.apply))
    return made


def bench_task(task: models.Task, options) -> dict[str, dict[str, float]]:
    """Measures one model; returns the measurements of each variant."""
    made = variants(task, task.state())
    times: dict[str, dict[str, float]] = {name: {} for name in made}
    batch = task.batch
    steps = {}

    def traced(name):
        make, state = made[name]
        return jax.jit(make(), donate_argnums=0).trace(state, batch)

    def cold_trace(name):
        jax.clear_caches()
        return timed(traced, name, clock=time.process_time)

    def warm_trace(name):
        return timed(traced, name, clock=time.process_time)

    def compiled(name):
        lowered = traced(name).lower()
        start = time.perf_counter()
        steps[name] = lowered.compile()
        return time.perf_counter() - start

    record(times, "cold trace", interleaved(made, cold_trace, options.trace_rounds))
    for name in made:
        traced(name)
    record(times, "warm trace", interleaved(made, warm_trace, options.trace_rounds))
    record(times, "compile", interleaved(made, compiled, options.compile_rounds))

    for name, step in steps.items():
        memory = step.memory_analysis()
        if memory is not None:
            times[name]["temporary memory"] = memory.temp_size_in_bytes
    # Copies, since a step is given its state to overwrite.
    states = {name: jax.tree.map(jnp.copy, state) for name, (_, state) in made.items()}

    def run(name):
        states[name], loss = steps[name](states[name], batch)
        return jax.block_until_ready((states[name], loss))[1]

    losses = {name: float(run(name)) for name in made}
    first = losses["float"]
    assert all(abs(loss - first) < 0.1 * abs(first) for loss in losses.values()), losses
    step_times = interleaved(made, functools.partial(timed, run), options.step_rounds)
    record(times, "step", step_times)
    return times


def bench_depth(options) -> dict[str, dict[str, float]]:
    """Traces deeper and deeper transformers, with caches cleared before each."""
    result: dict[str, dict[str, float]] = {}
    for depth in options.depths:
        task = models.transformer(depth, 64, 2, 16)
        made = variants(task, jax.eval_shape(task.state))

        def trace(name, made=made, task=task):
            make, state = made[name]
            jax.clear_caches()
            return timed(
                lambda: jax.jit(make()).trace(state, task.batch),
                clock=time.process_time,
            )

        rounds = interleaved(made, trace, min(3, options.trace_rounds))
        result[str(depth)] = {name: statistics.median(t) for name, t in rounds.items()}
    return result


def bench_eager(options) -> dict[str, float]:
    """Calls of a tiny model, so that what is measured is the overhead per call."""
    task = models.transformer(options.layers, 64, 1, 8)
    rules = [qwix_train.QuantizationRule(**RULE)]
    state, batch = task.state(), task.batch
    wrap = qwix_train.wrap_train_step
    compiled = jax.jit(models.train_step)
    quantized = qwix_train.quantize_model(task.model, qwix_train.QtProvider(rules))
    variables = {"params": state.params}
    calls: dict[str, Callable[[], Any]] = {
        "jit(step)": functools.partial(compiled, state, batch),
        "jit(wrap(step))": functools.partial(
            jax.jit(wrap(models.train_step, rules)), state, batch
        ),
        "wrap(jit(step))": functools.partial(wrap(compiled, rules), state, batch),
        "step": functools.partial(models.train_step, state, batch),
        "wrap(step)": functools.partial(wrap(models.train_step, rules), state, batch),
        "model.apply": functools.partial(task.model.apply, variables, batch["x"]),
        "quantize_model(model).apply": functools.partial(
            quantized.apply, variables, batch["x"]
        ),
    }
    slow = {name: not name.startswith(("jit", "wrap(jit")) for name in calls}

    def call(name):
        count = 1 if slow[name] else 20
        return timed(lambda: [calls[name]() for _ in range(count)]) / count

    for name in calls:
        call(name)
    rounds = interleaved(calls, call, options.trace_rounds)
    return {name: statistics.median(t) for name, t in rounds.items()}


def interleaved(
    names: Sequence[str] | Mapping[str, Any],
    measure: Callable[[str], float],
    rounds: int,
) -> dict[str, list[float]]:
    """Measures each in turn, `rounds` times, each round starting with another."""
    results: dict[str, list[float]] = {name: [] for name in names}
    order = list(names)
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name in order:
                results[name].append(measure(name))
            order = [*order[1:], order[0]]
            gc.collect()
    finally:
        gc.enable()
    return results


def timed(
    function: Callable[..., Any],
    *args: Any,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    start = clock()
    jax.block_until_ready(jax.tree.leaves(function(*args)))
    return clock() - start


def record(times, measure: str, rounds: dict[str, list[float]]) -> None:
    for name, values in rounds.items():
        times[name][measure] = statistics.median(values)


def task_table(times: dict[str, dict[str, float]]) -> str:
    header = ["", *times, *(f"{name} / float" for name in times if name != "float")]
    rows = [[*header, "target"]]
    for measure, base in times["float"].items():
        values = {name: measured[measure] for name, measured in times.items()}
        ratios = [f"{v / base:.2f}" for n, v in values.items() if n != "float"]
        shown = [amount(measure, value) for value in values.values()]
        rows.append([measure, *shown, *ratios, verdict(measure, values)])
    return table(rows)


def verdict(measure: str, values: dict[str, float]) -> str:
    if measure not in TARGETS:
        return ""
    base = values["float"]
    if measure == "step":
        base = max(base, values.get("qwix", base))
    ratio, target = values["qwix_train"] / base, TARGETS[measure]
    against = "float" if base == values["float"] else "qwix"
    met = "met" if ratio <= target else f"missed: {ratio:.2f}"
    return f"<= {target} of {against}: {met}"


def depth_table(depths: dict[str, dict[str, float]]) -> str:
    names = list(next(iter(depths.values())))
    rows = [["layers", *names, *(f"{name}, per layer" for name in names), "ratio"]]
    for depth, values in depths.items():
        seconds = [amount("", values[name]) for name in names]
        each = [amount("", values[name] / int(depth)) for name in names]
        ratio = values["qwix_train"] / values["float"]
        rows.append([depth, *seconds, *each, f"{ratio:.2f}"])
    return table(rows)


def eager_table(eager: dict[str, float]) -> str:
    rows = [["call", "time"]]
    return table(rows + [[name, amount("", t)] for name, t in eager.items()])


def amount(measure: str, value: float) -> str:
    if measure == "temporary memory":
        return f"{value / 2**20:.1f} MiB"
    if value < 1e-3:
        return f"{value * 1e6:.0f} us"
    return f"{value * 1e3:.1f} ms" if value < 0.1 else f"{value * 1e3:.0f} ms"


def table(rows: list[list[str]]) -> str:
    """A Markdown table; numbers are to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(cells):
        first, *rest = zip(cells, widths, strict=True)
        padded = [first[0].ljust(first[1]), *(c.rjust(w) for c, w in rest)]
        return f"| {' | '.join(padded)} |"

    head, *body = rows
    rule = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]
    return "\n".join(map(line, [head, rule, *body]))


if __name__ == "__main__":
    main()
