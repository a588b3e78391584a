"""What a model of the `gemma` package costs with `import qwix` as either library.

    make bench-clients [ARGS="--rounds 2"]

Each library has processes of its own, in the environment of `make test-gemma`, in
turns. Tracing is in seconds of the process's CPU time, which other programs on the
machine change little: the first trace, and one of the same function made anew. Running
is the shortest of 30 calls, in wall time. `grad` is a loss and its gradients with
`QtProvider`, `forward` a loss with `PtqProvider` and quantized params; both in int8.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

LIBRARIES = {"qwix_train": "import qwix_train.as_qwix", "qwix": "import qwix"}
GEMMA = pathlib.Path(__file__).parents[1] / "tests" / "clients" / "gemma_program.py"
COLUMNS = ("first trace", "trace", "run")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--python", required=True, help="of the project's environment")
    options = parser.parse_args()
    rounds = [
        {name: in_process(options.python, first) for name, first in LIBRARIES.items()}
        for _ in range(options.rounds)
    ]
    print(f"load {os.getloadavg()[0]:.1f}; qwix_train / qwix, medians of the rounds")
    print(f"{'':16}" + "".join(f"{column:>24}" for column in COLUMNS))
    for row in rounds[0]["qwix"]:
        cells = [f"{row:16}"]
        for column in range(len(COLUMNS)):
            ours, theirs = (
                statistics.median(found[name][row][column] for found in rounds)
                for name in LIBRARIES
            )
            times = f"{ours:.4f} / {theirs:.4f} s"
            cells.append(f"{times + f' {ours / theirs:.2f}':>24}")
        print("".join(cells))


def in_process(python: str, first: str) -> dict[str, list[float]]:
    """What `measure` finds in a process that executes a line before."""
    code = f"{first}; import runpy; runpy.run_path({__file__!r}, run_name='measured')"
    done = subprocess.run(
        [python, "-W", "ignore", "-c", code],
        stdout=subprocess.PIPE,
        check=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    return json.loads(done.stdout)


def measure() -> dict[str, list[float]]:
    """The seconds of each of `COLUMNS`, with what `qwix` is in this process."""
    import runpy

    import jax
    import numpy as np
    import qwix
    from jax import numpy as jnp

    gemma = runpy.run_path(str(GEMMA), run_name="gemma_program")
    config = dataclasses.replace(
        gemma["CONFIG"],
        attention_types=gemma["CONFIG"].attention_types * 4,
        num_embed=256,
        embed_dim=128,
        hidden_dim=256,
    )
    model = gemma["Gemma"](config=config, dtype=jnp.float32)
    tokens, loss_of = gemma["TOKENS"], gemma["loss_of"]
    rng, key = np.random.default_rng(0), jax.random.key(0)
    shapes = jax.eval_shape(model.init, key, tokens)["params"]
    params = jax.tree.map(lambda x: gemma["draw"](rng, x.shape), shapes)
    int8 = {"weight_qtype": "int8", "act_qtype": "int8"}
    rules = [qwix.QuantizationRule(module_path="layer_.*", **int8)]
    trained = qwix.quantize_model(model, qwix.QtProvider(rules))
    served = qwix.quantize_model(model, qwix.PtqProvider(rules))
    shapes = jax.eval_shape(served.init, key, tokens)["params"]
    quantized = qwix.quantize_params(params, shapes)

    def times(model, params, transform):
        def trace():
            function = transform(loss_of(model))
            begin = time.process_time()
            traced = jax.jit(lambda *args: function(*args)).trace(params, tokens)
            return time.process_time() - begin, traced

        (first, traced), *others = (trace() for _ in range(5))
        compiled = traced.lower().compile()
        runs = []
        for _ in range(30):
            begin = time.perf_counter()
            jax.block_until_ready(compiled(params, tokens))
            runs.append(time.perf_counter() - begin)
        return [first, statistics.median(found for found, _ in others), min(runs)]

    # What flax and gemma themselves keep between calls is made before.
    times(model, params, jax.value_and_grad)
    return {
        "float, grad": times(model, params, jax.value_and_grad),
        "grad": times(trained, params, jax.value_and_grad),
        "float, forward": times(model, params, lambda loss: loss),
        "forward": times(served, quantized, lambda loss: loss),
    }


if __name__ == "__main__":
    main()
elif __name__ == "measured":
    json.dump(measure(), sys.stdout)
