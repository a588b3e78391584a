"""What collecting static ranges costs, and training with them.

    python -m benchmarks.calibration [--quick] [--tasks transformer resnet] ...

An eval step, the same wrapped by a `Calibrator` with each kind of statistics, and that
of `qwix`'s `QtProvider` with `mutable="quant_stats"`; then a quantization-aware train
step with ranges found in each batch, with ranges collected before, and with ranges that
the step itself updates. int8 weights and activations, in one process. Every number is
the median of rounds in which the variants take turns, so that a busy machine slows all
of them alike; the ratios are what to read.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import pathlib
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import qwix_train
from benchmarks import models
from benchmarks.qat_step import amount, interleaved, table, timed
from benchmarks.results import machine, write

OUT = pathlib.Path(__file__).parent / "out" / "calibration.json"
STATIC = {"weight_qtype": "int8", "act_qtype": "int8", "act_static_scale": True}
DYNAMIC = {"weight_qtype": "int8", "act_qtype": "int8"}

# What is collected, and the most that the step may take, in plain steps.
RANGES, HISTOGRAMS = 1.15, 1.5
OBSERVED: dict[str, tuple[dict[str, str], float]] = {
    "absmax, mean": ({"act_observer": "absmax"}, RANGES),
    "absmax, ema": ({"act_observer": "absmax", "act_averaging": "ema,0.99"}, RANGES),
    "absmax, minmax": ({"act_observer": "absmax", "act_averaging": "minmax"}, RANGES),
    "minmax, mean": ({"act_calibration_method": "minmax"}, RANGES),
    "percentile": ({"act_observer": "percentile,99.99"}, HISTOGRAMS),
    "mse": ({"act_observer": "mse"}, HISTOGRAMS),
    "entropy": ({"act_observer": "entropy"}, HISTOGRAMS),
}
QAT_TARGET = 1.1


def main(arguments: list[str] | None = None) -> None:
    options = parse_options(arguments)
    facts = machine()
    print("\n".join(f"{key}: {value}" for key, value in facts.items()))
    found: dict[str, Any] = {}
    shown: dict[str, str] = {}
    tasks: dict[str, Callable[[], models.Task]] = {
        "transformer": functools.partial(
            models.transformer,
            options.layers,
            options.width,
            options.batch,
            options.tokens,
        ),
        "resnet": functools.partial(
            models.resnet, options.channels, options.images, options.size
        ),
    }
    for name in options.tasks:
        task = tasks[name]()
        measured = {
            "eval": bench_eval(task, options),
            "train": bench_qat(task, options),
        }
        found[name] = measured
        shown[f"{task.name}: eval steps"] = eval_table(measured["eval"])
        shown[f"{task.name}: train steps"] = qat_table(measured["train"])
        print("\n" + "\n\n".join(list(shown.values())[-2:]), flush=True)
    write(options, facts, found, shown)


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="small models and few rounds")
    add("--tasks", nargs="*", default=["transformer", "resnet"])
    add("--layers", type=int, default=4)
    add("--width", type=int, default=256)
    add("--batch", type=int, default=8, help="sequences in a batch")
    add("--tokens", type=int, default=128, help="tokens in a sequence")
    add("--channels", type=int, default=32, help="channels of the first stage")
    add("--images", type=int, default=32, help="images in a batch")
    add("--size", type=int, default=32, help="height and width of an image")
    add("--rounds", type=int, default=21)
    add("--out", type=pathlib.Path, default=OUT, help="where the JSON goes")
    if parser.parse_args(arguments).quick:
        small = {"layers": 1, "width": 64, "batch": 2, "tokens": 16, "images": 2}
        parser.set_defaults(**small, channels=4, size=8, rounds=3)
    return parser.parse_args(arguments)


def eval_step(state, batch):
    """One step of an eval loop that knows nothing of quantization."""
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    logits = state.apply_fn(variables, batch["x"], train=False)
    return _metrics(logits, batch["y"])


def _metrics(logits, labels):
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return {"loss": loss.mean(), "accuracy": (logits.argmax(-1) == labels).mean()}


def bench_eval(task: models.Task, options) -> dict[str, dict[str, float]]:
    """Times the eval step, and what finds the ranges after the loop."""
    state, batch = task.state(), task.batch
    plain = jax.jit(eval_step)
    calls: dict[str, Callable[[], Any]] = {"plain": lambda: (plain(state, batch), None)}
    ends: dict[str, Callable[[], Any]] = {}
    for name, (observer, _) in OBSERVED.items():
        rules = [qwix_train.QuantizationRule(**STATIC, **observer)]
        calibrator = qwix_train.calib.Calibrator(rules)
        step = calibrator.wrap(jax.jit(eval_step))
        calls[name] = functools.partial(_collect, calibrator, step, state, batch)
        ends[name] = functools.partial(getattr, calibrator, "quant_stats")
    if importlib.util.find_spec("qwix") is not None:
        try:
            calls["qwix"] = _qwix_call(task, state)
        except jax.errors.UnexpectedTracerError:
            # Version 0.1.8 keeps a tracer of each convolution's custom_vjp.
            print(f"{task.name}: qwix does not collect ranges of convolutions in jit")
    for call in calls.values():
        call()
    losses = {name: float(calls[name]()[0]["loss"]) for name in ("plain", *OBSERVED)}
    first = losses["plain"]
    assert all(abs(loss - first) < 1e-5 * first for loss in losses.values()), losses
    times = medians(calls, options.rounds)
    found = medians(ends, 3)
    return {name: {"step": times[name], "end": found.get(name)} for name in calls}


def _collect(calibrator, step, state, batch) -> Any:
    """A step, and the statistics, which are computed even if nobody waits for them."""
    return step(state, batch), calibrator.state


def _qwix_call(task: models.Task, state) -> Callable[[], Any]:
    import qwix

    provider = qwix.QtProvider([qwix.QtRule(**STATIC)])
    model = qwix.quantize_model(task.model, provider)
    variables = {"params": state.params, "batch_stats": state.batch_stats}

    @jax.jit
    def step(variables, quant_stats, batch):
        logits, updates = model.apply(
            {**variables, **quant_stats},
            batch["x"],
            train=False,
            mutable=["quant_stats"],
        )
        return _metrics(logits, batch["y"]), updates

    _, kept = step(variables, {}, task.batch)

    def call():
        nonlocal kept
        metrics, kept = step(variables, kept, task.batch)
        return metrics, kept

    return call


def bench_qat(task: models.Task, options) -> dict[str, float]:
    """Times the train step with dynamic and with static ranges."""
    state, batch = task.state(), task.batch
    dynamic = [qwix_train.QuantizationRule(**DYNAMIC)]
    static = [qwix_train.QuantizationRule(**STATIC)]
    calibrator = qwix_train.calib.Calibrator(static)
    calibrator.wrap(jax.jit(eval_step))(state, batch)
    wrap = qwix_train.wrap_train_step
    steps: dict[str, tuple[Callable[..., Any], Any]] = {
        "float": (models.train_step, state),
        "dynamic ranges": (wrap(models.train_step, dynamic), state),
        "static, collected before": (
            wrap(models.train_step, static, quant_stats=calibrator.quant_stats),
            state,
        ),
        "static, kept in the state": (
            wrap(models.train_step, static),
            qwix_train.attach(state, static, batch, step=models.train_step),
        ),
    }
    # Copies, since a step is given its state to overwrite.
    states = {name: jax.tree.map(jnp.copy, own) for name, (_, own) in steps.items()}
    compiled = {
        name: jax.jit(step, donate_argnums=0).lower(states[name], batch).compile()
        for name, (step, _) in steps.items()
    }

    def run(name):
        states[name], loss = compiled[name](states[name], batch)
        return states[name], loss

    losses = {name: float(run(name)[1]) for name in steps}
    first = losses["float"]
    assert all(abs(loss - first) < 0.1 * abs(first) for loss in losses.values()), losses
    return medians(
        {name: functools.partial(run, name) for name in steps}, options.rounds
    )


def medians(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    for call in calls.values():
        jax.block_until_ready(call())
    times = interleaved(calls, lambda name: timed(calls[name]), rounds)
    return {name: statistics.median(values) for name, values in times.items()}


def eval_table(measured: dict[str, dict[str, float]]) -> str:
    base = measured["plain"]["step"]
    rows = [["eval step", "time", "of plain", "then quant_stats", "target"]]
    for name, times in measured.items():
        ratio, end = times["step"] / base, times["end"]
        shown = [amount("", times["step"]), f"{ratio:.2f}"]
        shown.append(amount("", end) if end else "")
        target = OBSERVED[name][1] if name in OBSERVED else None
        rows.append([name, *shown, _verdict(ratio, target)])
    return table(rows)


def qat_table(times: dict[str, float]) -> str:
    base = times["dynamic ranges"]
    rows = [["train step", "time", "of dynamic", "target"]]
    for name, value in times.items():
        target = QAT_TARGET if name.startswith("static") else None
        verdict = _verdict(value / base, target)
        rows.append([name, amount("", value), f"{value / base:.2f}", verdict])
    return table(rows)


def _verdict(ratio: float, target: float | None) -> str:
    if target is None:
        return ""
    return f"<= {target}: {'met' if ratio <= target else 'missed'}"


if __name__ == "__main__":
    main()
