"""What recipes cost: schedules, learned scales, transforms, quantized training.

    python -m benchmarks.recipes [--quick] [--sections steps training quality] ...

Train steps of the same model on the same batch, and updates of the same params, in one
process. Every time is the median of rounds in which the variants take turns, so that a
busy machine slows all of them alike; the ratios are what to read. The section `quality`
runs only if it is named, as it takes a quarter of an hour: it has what recipes of
quantized training lose.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.training import train_state

import qwix_train
from benchmarks import models, text
from benchmarks.ptq import HAS_QWIX
from benchmarks.qat_step import amount, interleaved, table, timed
from benchmarks.results import run_sections
from qwix_train import optim

if HAS_QWIX:
    import qwix

OUT = pathlib.Path(__file__).parent / "out" / "recipes.json"

INT8: dict[str, Any] = {"weight_qtype": "int8", "act_qtype": "int8"}
INT4: dict[str, Any] = {"weight_qtype": "int4", "act_qtype": "int8"}

SECTIONS = ("steps", "training", "transforms")

# Names of the variants. The rest of the file reads measurements by them.
FLOAT, PLAIN = "float", "plain QAT"
RAMP, RAMPED, BITS = "in a ramp", "after a ramp", "after bits by step"
LSQ, LSQ_ACTIVATIONS = "LSQ", "LSQ, activations too"
QUANTIZED, ROUNDED = "int8 backward", "int8 backward, stochastic"
QWIX = "int8 backward, qwix"

# Recipes of quantized training, of docs/quantized_training.md. Attention and the layer
# that gives the logits stay in float, as in the papers.
HEAD = qwix_train.QuantizationRule(module_path="Dense_0")
FP8: dict[str, Any] = {
    "weight_qtype": "float8_e4m3fn",
    "act_qtype": "float8_e4m3fn",
    "act_act": False,
}
TENSORWISE = {**FP8, "bwd_qtype": "float8_e5m2", "disable_channelwise_axes": True}
BLOCKS: dict[str, Any] = {
    "tile_size": {0: 128, 1: 128},
    "act_tile_size": 128,
    "bwd_tile_size": 128,
    "bwd_residuals": "requantized",
}
MXFP8 = {f"{x}_qtype": "mxfp8" for x in ("weight", "act", "bwd")}
NVFP4: dict[str, Any] = {
    "weight_qtype": "nvfp4",
    "act_qtype": "nvfp4",
    "act_act": False,
    "bwd_qtype": "nvfp4",
    "tile_size": {0: 16, 1: 16},
    "bwd_residuals": "original",
    "bwd_weight_grad_rotation": "hadamard,16,7",
    "bwd_stochastic_rounding": "uniform",
    "channelwise_noise_axes": (0, 1, 2),
}


def _recipe(*first: qwix_train.QuantizationRule, **fields: Any) -> list[Any]:
    return [HEAD, *first, qwix_train.QtRule(**fields)]


BFLOAT16 = "bfloat16"
DELAYED = {
    "act_static_scale": True,
    "act_averaging": "amax_history,16",
    "bwd_averaging": "amax_history,16",
}
TRAINING_RECIPES: dict[str, list[Any]] = {
    "float32": [],
    BFLOAT16: [],
    "fp8, one scale": _recipe(**TENSORWISE),
    "fp8, delayed scaling": _recipe(**TENSORWISE, **DELAYED),
    "fp8, rows": _recipe(**FP8, bwd_qtype="float8_e5m2", bwd_residuals="original"),
    "fp8, blocks": _recipe(**FP8, **BLOCKS, bwd_qtype="float8_e4m3fn"),
    "MXFP8": _recipe(**MXFP8, act_act=False, bwd_residuals="original"),
    "NVFP4": _recipe(**NVFP4),
    "NVFP4, last block in float": _recipe(
        qwix_train.QuantizationRule(module_path="DecoderBlock_1/.*"), **NVFP4
    ),
    "NVFP4, rounded to nearest": _recipe(**NVFP4 | {"bwd_stochastic_rounding": None}),
    "NVFP4, no Hadamard": _recipe(**NVFP4 | {"bwd_weight_grad_rotation": None}),
    "NVFP4, weights in 1 x 16": _recipe(**NVFP4 | {"tile_size": None}),
}

# The most that a step may take, as a multiple of plain QAT's.
STEP_TARGETS = {RAMPED: 1.02, BITS: 1.02, LSQ: 1.1, LSQ_ACTIVATIONS: 1.1}
# The most that an update may take, as a multiple of that of the inner optimizer.
TRANSFORM_TARGET = 1.1


def main() -> None:
    sections = {
        "steps": (bench_steps, steps_table),
        "training": (bench_training, training_table),
        "transforms": (bench_transforms, transforms_table),
        "quality": (bench_quality, quality_table),
    }
    run_sections(parse_options(), sections)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="small models and few rounds")
    add("--sections", nargs="*", default=SECTIONS)
    add("--dtype", default="float32", help="dtype of the computation")
    add("--layers", type=int, default=4, help="of the model that is trained")
    add("--width", type=int, default=256)
    add("--batch", type=int, default=8, help="sequences in a batch")
    add("--tokens", type=int, default=128, help="tokens in a sequence")
    add("--update-layers", type=int, default=6, help="of the params that are updated")
    add("--update-width", type=int, default=768)
    add("--rounds", type=int, default=15)
    add("--text-steps", type=int, default=400, help="of the model of bytes")
    add("--seeds", type=int, default=2, help="of the model of bytes")
    add("--out", type=pathlib.Path, default=OUT, help="where the JSON goes")
    if parser.parse_args().quick:
        small = {"layers": 1, "width": 64, "tokens": 32}
        parser.set_defaults(update_layers=1, update_width=128, rounds=3, **small)
        parser.set_defaults(text_steps=20, seeds=1)
    return parser.parse_args()


def bench_steps(options) -> dict[str, Any]:
    """A step of each recipe, with int4 weights and int8 activations."""
    task = _task(options)
    state, x = task.state(), task.batch["x"]
    wrap = functools.partial(qwix_train.wrap_train_step, models.train_step)
    rules = [qwix_train.QuantizationRule(**INT4)]
    ramp = wrap(rules, schedule=qwix_train.Schedule(ramp_steps=10**6))
    ramped = wrap(rules, schedule=qwix_train.Schedule(ramp_steps=10))
    bits = qwix_train.Schedule(weight_qtypes={0: "int8", 10: "int4"})
    lsq = [qwix_train.QuantizationRule(**INT4, weight_calibration_method="lsq")]
    both = [
        qwix_train.QuantizationRule(
            **INT4, weight_calibration_method="lsq", act_calibration_method="lsq"
        )
    ]
    late = state.replace(step=100)
    variants = {
        FLOAT: (models.train_step, state),
        PLAIN: (wrap(rules), state),
        RAMP: (ramp, late),
        RAMPED: (ramped, late),
        BITS: (wrap(rules, schedule=bits), late),
        LSQ: (wrap(lsq), qwix_train.attach(state, lsq, x)),
        LSQ_ACTIVATIONS: (wrap(both), qwix_train.attach(state, both, x)),
    }
    return {"task": task.name, "step": _step_times(variants, task, options.rounds)}


def bench_training(options) -> dict[str, Any]:
    """A step of quantized training in int8, in all three products of an op."""
    task = _task(options)
    state = task.state()

    def ours(**fields: Any) -> Any:
        rule = qwix_train.QtRule(**INT8, **fields)
        return qwix_train.wrap_train_step(models.train_step, [rule]), state

    variants = {
        FLOAT: (models.train_step, state),
        PLAIN: ours(),
        QUANTIZED: ours(bwd_qtype="int8"),
        ROUNDED: ours(bwd_qtype="int8", bwd_stochastic_rounding="uniform"),
    }
    if HAS_QWIX:
        provider = qwix.QtProvider([qwix.QtRule(**INT8, bwd_qtype="int8")])
        model = qwix.quantize_model(task.model, provider)
        variants[QWIX] = models.train_step, state.replace(apply_fn=model.apply)
    return {"task": task.name, "step": _step_times(variants, task, options.rounds)}


def bench_transforms(options) -> dict[str, Any]:
    """An update of the params of a decoder, by Adam alone and in a chain with each."""
    task = models.decoder(options.update_layers, options.update_width, 1, 8)
    x = task.batch["x"]
    params = jax.jit(task.model.init)(jax.random.key(0), x)["params"]
    plan = qwix_train.plan(task.model, [qwix_train.QuantizationRule(**INT4)], x)
    adam, half = optax.adam(1e-4), jnp.bfloat16
    # Past the start of a ramp, and before its end.
    ramp = functools.partial(optax.linear_schedule, 1e-3, 1.0, 10**6)
    found = {
        "float32": _update_times(
            {
                "adam": adam,
                "dampen_oscillations": optax.chain(
                    optim.dampen_oscillations(plan, 0.1), adam
                ),
                "freeze_oscillations": optax.chain(
                    adam, optim.freeze_oscillations(plan, 0.02)
                ),
                "proximal, proxquant": optax.chain(adam, optim.proximal(plan, ramp())),
                "proximal, parq": optax.chain(
                    adam, optim.proximal(plan, ramp(), method="parq")
                ),
            },
            params,
            options.rounds,
        ),
        "bfloat16": _update_times(
            {"adam": adam, "stochastic_rounding": optim.stochastic_rounding(adam)},
            jax.tree.map(lambda param: param.astype(half), params),
            options.rounds,
        ),
    }
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    return {"params": count, "update": found}


def bench_quality(options) -> list[dict[str, Any]]:
    """The loss of a language model that is trained with each recipe, in bits a byte.

    It is that of the forward of the recipe, and that of the same params in float.
    """
    train, test = text.texts()
    tokens, results = test["x"][:1], []
    for name, rules in TRAINING_RECIPES.items():
        dtype = jnp.bfloat16 if name == BFLOAT16 else jnp.float32
        model = models.Decoder(2, 128, vocabulary=256, dtype=dtype)
        step, found = text.train_step, {"as trained": [], "in float": []}
        if rules:
            step = qwix_train.wrap_train_step(step, rules)
        step = jax.jit(step)
        for seed in range(options.seeds):
            params = jax.jit(model.init)(jax.random.key(seed), tokens)["params"]
            state = train_state.TrainState.create(
                apply_fn=model.apply,
                params=params,
                tx=optax.adam(optax.cosine_decay_schedule(2e-3, options.text_steps)),
            )
            if any(isinstance(x, qwix_train.QtRule) and x.bwd_averaging for x in rules):
                state = qwix_train.attach(state, rules, train["x"][: text.BATCH])
            state = text.trained(state, step, train, options.text_steps)
            found["in float"].append(text.loss(model, state.params, test))
            served = model
            if rules:
                stats = getattr(state, "quant_stats", None)
                if stats is not None:
                    stats = qwix_train.ranges(state, rules)
                provider = qwix_train.QtProvider(rules, quant_stats=stats)
                served = qwix_train.quantize_model(model, provider)
            found["as trained"].append(text.loss(served, state.params, test))
        results.append({"recipe": name, **found})
        print(f"{name}: {found}", flush=True)
    return results


def quality_table(results: list[dict[str, Any]]) -> str:
    rows = [["recipe", "loss as trained", "against float32", "params in float"]]
    exact = results[0]["as trained"]
    for found in results:
        trained = found["as trained"]
        gap = statistics.mean(a / b - 1 for a, b in zip(trained, exact, strict=True))
        losses = [
            " ".join(f"{x:.4f}" for x in found[key])
            for key in ("as trained", "in float")
        ]
        rows.append([found["recipe"], losses[0], f"{100 * gap:+.2f} %", losses[1]])
    return table(rows)


def _task(options) -> models.Task:
    sizes = options.layers, options.width, options.batch, options.tokens
    return models.transformer(*sizes, jnp.dtype(options.dtype))


def _step_times(
    variants: Mapping[str, tuple[Callable[..., Any], Any]],
    task: models.Task,
    rounds: int,
) -> dict[str, float]:
    """The medians of compiled steps, from train steps and their states."""
    steps, states = {}, {}
    for name, (step, state) in variants.items():
        # Copies, since a step is given its state to overwrite.
        states[name] = jax.tree.map(jnp.copy, state)
        steps[name] = jax.jit(step, donate_argnums=0)

    def run(name: str) -> jax.Array:
        states[name], loss = steps[name](states[name], task.batch)
        return jax.block_until_ready((states[name], loss))[1]

    losses = {name: float(run(name)) for name in variants}
    first = losses[FLOAT]
    assert all(abs(loss - first) < 0.1 * abs(first) for loss in losses.values()), losses
    return _medians(variants, run, rounds)


def _update_times(
    optimizers: Mapping[str, optax.GradientTransformation], params: Any, rounds: int
) -> dict[str, float]:
    """The medians of updates, with params and states that are overwritten."""
    keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(params))))
    grads = jax.tree.map(
        lambda param: jax.random.normal(next(keys), param.shape, param.dtype), params
    )
    updates, held = {}, {}
    for name, tx in optimizers.items():

        @functools.partial(jax.jit, donate_argnums=0)
        def update(carry, grads, tx=tx):
            params, state = carry
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        updates[name] = update
        held[name] = jax.tree.map(jnp.copy, (params, tx.init(params)))

    def run(name: str) -> Any:
        held[name] = updates[name](held[name], grads)
        return held[name]

    for name in optimizers:
        jax.block_until_ready(run(name))
    return _medians(optimizers, run, rounds)


def _medians(names: Any, run: Callable[[str], Any], rounds: int) -> dict[str, float]:
    times = interleaved(names, functools.partial(timed, run), rounds)
    return {name: statistics.median(values) for name, values in times.items()}


def steps_table(report: dict[str, Any]) -> str:
    times = report["step"]
    rows = [["", "step", f"step / {FLOAT}", f"step / {PLAIN}", "target"]]
    for name, seconds in times.items():
        target = STEP_TARGETS.get(name)
        rows.append(
            [
                name,
                amount("", seconds),
                f"{seconds / times[FLOAT]:.2f}",
                f"{seconds / times[PLAIN]:.2f}",
                "" if target is None else _verdict(seconds, times[PLAIN], target),
            ]
        )
    return f"{report['task']}, int4 weights, int8 activations\n\n{table(rows)}"


def training_table(report: dict[str, Any]) -> str:
    times = report["step"]
    names = [name for name in (FLOAT, QWIX) if name in times]
    rows = [["", "step", *(f"step / {name}" for name in names)]]
    for name, seconds in times.items():
        ratios = [f"{seconds / times[base]:.2f}" for base in names]
        rows.append([name, amount("", seconds), *ratios])
    return f"{report['task']}, int8\n\n{table(rows)}"


def transforms_table(report: dict[str, Any]) -> str:
    rows = [["", "params", "update", "update / adam", "target"]]
    for dtype, times in report["update"].items():
        for name, seconds in times.items():
            verdict = _verdict(seconds, times["adam"], TRANSFORM_TARGET)
            rows.append(
                [
                    name,
                    dtype,
                    amount("", seconds),
                    f"{seconds / times['adam']:.2f}",
                    "" if name == "adam" else verdict,
                ]
            )
    return f"{report['params'] / 1e6:.1f}M params\n\n{table(rows)}"


def _verdict(value: float, base: float, most: float) -> str:
    return f"<= {most}: {'met' if value <= most * base else 'missed'}"


if __name__ == "__main__":
    main()
