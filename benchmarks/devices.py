"""What a quantized step costs against the number of devices that it is compiled for.

    python -m benchmarks.devices [--quick] [--devices 1 8 64 512] ...

A step of training of a language model is traced, lowered and compiled for a mesh of
pretended devices, with tensor parallelism over 8 of them and FSDP over the rest; a
shard of the batch has as many sequences whatever their number. It does not run. Each
number of devices has a process of its own, where the float step and the quantized ones
take turns. Times are CPU time; the ratios to the float step are what to read.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.training.train_state import TrainState

import qwix_train
from benchmarks.models import Decoder
from benchmarks.qat_step import amount, interleaved, table
from benchmarks.results import run_sections
from qwix_train import QtRule, QuantizationRule

OUT = pathlib.Path(__file__).parent / "out" / "devices.json"
INT8 = {"weight_qtype": "int8", "act_qtype": "int8"}
RULES = {
    "float": None,
    "QAT": QuantizationRule(**INT8),
    "static ranges": QuantizationRule(**INT8, act_static_scale=True),
    "quantized training": QtRule(**INT8, bwd_qtype="int8"),
}
TENSOR_PARALLEL = 8
PARTS = ("trace", "lower", "compile")


def main() -> None:
    options = parse_options()
    if options.child:
        print(json.dumps(measured(options)))
    else:
        run_sections(options, {"devices": (bench_devices, devices_table)})


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="a small model, few devices")
    add("--sections", nargs="*", default=["devices"])
    add("--devices", type=int, nargs="*", default=[1, 8, 64, 512])
    add("--layers", type=int, default=4)
    add("--width", type=int, default=512)
    add("--tokens", type=int, default=64, help="tokens in a sequence")
    add("--rows", type=int, default=4, help="sequences of a shard of the batch")
    add("--rounds", type=int, default=3)
    add("--child", action="store_true", help=argparse.SUPPRESS)
    add("--out", type=pathlib.Path, default=OUT, help="where the JSON goes")
    if parser.parse_args().quick:
        parser.set_defaults(devices=[1, 8], layers=2, width=128, rounds=1)
    return parser.parse_args()


def train_step(state, tokens):
    def loss_of(params):
        logits = state.apply_fn({"params": params}, tokens)[:, :-1]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return losses.mean()

    loss, grads = jax.value_and_grad(loss_of)(state.params)
    return state.apply_gradients(grads=grads), loss


def measured(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Measures each step for all devices of this process."""
    count = jax.device_count()
    parallel = min(TENSOR_PARALLEL, count)
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((count // parallel, parallel), ("data", "model"), auto)
    model = Decoder(options.layers, options.width)
    tokens = jax.ShapeDtypeStruct(
        (options.rows * mesh.shape["data"], options.tokens),
        jnp.int32,
        sharding=jax.NamedSharding(mesh, jax.P("data")),
    )
    tx = optax.adam(1e-3)

    def sharding_of(path: Any, leaf: Any) -> jax.NamedSharding:
        # A matrix is cut along both axes; the second one of each pair contracts what
        # the first one is cut along.
        cut = ("data", "model")
        if any(getattr(key, "key", "") in ("out", "down") for key in path):
            cut = ("model", "data")
        matrix = leaf.ndim == 2 and min(leaf.shape) > 1
        return jax.NamedSharding(mesh, jax.P(*cut) if matrix else jax.P())

    def state_of(rules: Any) -> Any:
        def make(tokens):
            params = model.init(jax.random.key(0), tokens)["params"]
            state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
            return qwix_train.attach(state, rules, tokens) if attached else state

        attached = rules and rules[0].act_static_scale
        shapes = jax.eval_shape(make, tokens)
        return jax.tree_util.tree_map_with_path(
            lambda path, x: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=sharding_of(path, x)
            ),
            shapes,
        )

    found: dict[str, dict[str, list[float]]] = {}
    rules = {name: rule and [rule] for name, rule in RULES.items()}
    states = {name: state_of(own) for name, own in rules.items()}

    def measure(name: str) -> float:
        jax.clear_caches()
        step, own = (lambda *args: train_step(*args)), rules[name]
        if own:
            step = qwix_train.wrap_train_step(step, own)
        out = jax.tree.map(lambda x: x.sharding, states[name])
        clocks = [time.process_time()]
        traced = jax.jit(step, out_shardings=(out, None)).trace(states[name], tokens)
        clocks.append(time.process_time())
        lowered = traced.lower()
        clocks.append(time.process_time())
        compiled = lowered.compile()
        clocks.append(time.process_time())
        times = found.setdefault(name, {part: [] for part in PARTS})
        for part, (start, end) in zip(PARTS, itertools.pairwise(clocks), strict=True):
            times[part].append(end - start)
        memory = compiled.memory_analysis()
        found[name]["temporary memory"] = [memory.temp_size_in_bytes]
        return clocks[-1] - clocks[0]

    measure("float")  # imports, and what JAX makes once
    found.clear()
    interleaved(rules, measure, options.rounds)
    return {
        name: {part: statistics.median(values) for part, values in own.items()}
        for name, own in found.items()
    }


def bench_devices(options: argparse.Namespace) -> dict[str, Any]:
    found = {}
    flags = re.sub(r"\S*device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
    sizes = ("layers", "width", "tokens", "rows", "rounds")
    given = [f"--{name}={getattr(options, name)}" for name in sizes]
    for count in options.devices:
        devices = f"--xla_force_host_platform_device_count={count}"
        child = subprocess.run(
            [sys.executable, "-m", "benchmarks.devices", "--child", *given],
            check=True,
            stdout=subprocess.PIPE,
            env={
                **os.environ,
                "JAX_PLATFORMS": "cpu",
                "XLA_FLAGS": f"{flags} {devices}",
            },
        )
        found[str(count)] = json.loads(child.stdout.splitlines()[-1])
    return found


def devices_table(found: dict[str, Any]) -> str:
    parts = list(next(iter(found.values()))["float"])
    others = [name for name in RULES if name != "float"]
    rows = [["", "devices", "float", *(f"{name} / float" for name in others)]]
    for part in parts:
        for count, own in found.items():
            base = own["float"][part]
            ratios = [f"{own[name][part] / base:.2f}" for name in others]
            rows.append([part, count, amount(part, base), *ratios])
    return table(rows)


if __name__ == "__main__":
    main()
