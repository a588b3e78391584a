"""How much memory it takes to quantize a model that is as large as the memory.

    python -m benchmarks.memory [--quick] ...

A checkpoint of a language model with random weights is written, in bfloat16, and read
in each way, in a process of its own. What is measured is the largest memory that the
process has had (`ru_maxrss`), above that of one that makes the same abstract model and
reads nothing. It is to be that of the result and of two tensors, in the dtype of the
params.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import resource
import subprocess
import sys
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import qwix_train
from benchmarks.qat_step import table
from benchmarks.results import run_sections
from qwix_train import QuantizationRule, ptq
from qwix_train.ptq import hugging_face

OUT = pathlib.Path(__file__).parent / "out" / "memory.json"
WAYS = ("nothing", "float", "int8", "int4")
MATRICES = ("query", "key", "value", "out", "gate", "up", "down")
BLOCK = 32  # Elements of a tile of int4.


class Layer(nn.Module):
    """The matrices of a layer, and no attention: nothing of it is ever computed."""

    width: int
    inner: int

    @nn.compact
    def __call__(self, x):
        def dense(features: int, name: str) -> nn.Dense:
            dtype = jnp.bfloat16
            return nn.Dense(features, use_bias=False, param_dtype=dtype, name=name)

        y = dense(self.width, "query")(x) + dense(self.width, "out")(x)
        key, value = (dense(self.width // 4, name)(x) for name in ("key", "value"))
        y = y + (key + value).mean(-1, keepdims=True)
        gate, up = (dense(self.inner, name)(y) for name in ("gate", "up"))
        return dense(self.width, "down")(nn.silu(gate) * up)


class Model(nn.Module):
    """Shapes like those of Llama 3.2 1B, whose embeddings are read twice."""

    layers: int
    width: int
    inner: int
    vocabulary: int

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(
            self.vocabulary, self.width, param_dtype=jnp.bfloat16, name="embed"
        )
        x = embed(tokens)
        for index in range(self.layers):
            x = Layer(self.width, self.inner, name=f"layer_{index}")(x)
        return x


MAPPING = {
    "embed": hugging_face.Place("embed/embedding"),
    **{
        f"layer_{{i}}.{name}": hugging_face.Place(
            f"layer_{{i}}/{name}/kernel", "out in -> in out"
        )
        for name in MATRICES
    },
}


def main() -> None:
    options = parse_options()
    if options.way:
        print(json.dumps(measured(options)))
    else:
        sections = {
            "read": (bench_read, read_table),
            "initialize": (bench_initialize, initialize_table),
        }
        run_sections(options, sections)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="a small model")
    add("--sections", nargs="*", default=["read", "initialize"])
    add("--layers", type=int, default=16)
    add("--width", type=int, default=2048)
    add("--inner", type=int, default=8192)
    add("--vocabulary", type=int, default=128_256)
    add("--ways", nargs="*", default=list(WAYS))
    add("--way", choices=WAYS, help=argparse.SUPPRESS)
    add("--checkpoint", type=pathlib.Path, help=argparse.SUPPRESS)
    add("--out", type=pathlib.Path, default=OUT, help="where the JSON goes")
    if parser.parse_args().quick:
        parser.set_defaults(layers=4, width=512, inner=2048, vocabulary=16_384)
    return parser.parse_args()


def model_of(options: argparse.Namespace, way: str = "float") -> Any:
    sizes = options.layers, options.width, options.inner, options.vocabulary
    if way in ("nothing", "float"):
        return Model(*sizes)
    tile = BLOCK if way == "int4" else None
    rules = [QuantizationRule(weight_qtype=way, tile_size=tile)]
    return qwix_train.quantize_model(Model(*sizes), ptq.PtqProvider(rules))


def shapes_of(model: Any) -> Any:
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    return jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]


def write_checkpoint(options: argparse.Namespace, file: pathlib.Path) -> None:
    """Writes a safetensors file, tensor by tensor: the header is JSON, then bytes."""
    header, offset = {}, 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes_of(model_of(options))):
        *modules, _ = (key.key for key in path)
        end = offset + 2 * leaf.size
        shape = leaf.shape if len(modules) == 1 else leaf.shape[::-1]
        entry = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        header[".".join(modules)], offset = entry, end
    text = json.dumps(header).encode()
    rng = np.random.default_rng(0)
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        for entry in header.values():
            rows, columns = entry["shape"]
            for start in range(0, rows, 4096):
                size = min(4096, rows - start), columns
                values = rng.standard_normal(size, np.float32) / columns**0.5
                opened.write(values.astype(jnp.bfloat16).tobytes())


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """Reads the checkpoint in one way, in this process."""
    shapes, params = shapes_of(model_of(options, options.way)), None
    tensors = [
        x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes_of(model_of(options)))
    ]
    if options.way != "nothing":
        params = hugging_face.load(options.checkpoint, MAPPING, shapes)
        jax.block_until_ready(params)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    # A device holds two codes of int4 in a byte; JAX counts a byte for each.
    leaves = jax.tree.leaves(params)
    result = sum(x.nbytes // (1 + (x.dtype == jnp.int4)) for x in leaves)
    return {"peak": peak, "result": result, "tensor": max(tensors), "sum": sum(tensors)}


def bench_read(options: argparse.Namespace) -> dict[str, Any]:
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder, "model.safetensors")
        write_checkpoint(options, file)
        sizes = ("layers", "width", "inner", "vocabulary")
        given = [f"--{name}={getattr(options, name)}" for name in sizes]
        for way in options.ways:
            command = [sys.executable, "-m", "benchmarks.memory", *given]
            command += [f"--way={way}", f"--checkpoint={file}"]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE)
            found[way] = json.loads(output.stdout.splitlines()[-1])
    return found


def read_table(found: dict[str, Any]) -> str:
    rows = [["", "peak", "above nothing", "result", "largest tensor", "rest / tensor"]]
    start = found["nothing"]["peak"]
    for way, numbers in found.items():
        above = numbers["peak"] - start
        rest = (above - numbers["result"]) / numbers["tensor"]
        sizes = numbers["peak"], above, numbers["result"], numbers["tensor"]
        texts = [f"{size / 2**20:,.0f} MiB" for size in sizes]
        rows.append([way, *texts, f"{rest:.2f}"])
    return table(rows)


def bench_initialize(options: argparse.Namespace) -> dict[str, Any]:
    """What XLA says of a compiled `init`, whose results are sharded over devices."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    by_row = jax.NamedSharding(mesh, jax.P("data"))
    found = {}
    for way in options.ways[1:]:
        model = model_of(options, way)
        tokens = jnp.zeros((1, 8), jnp.int32)

        def init(key, model=model, tokens=tokens):
            return model.init(key, tokens)["params"]

        shapes = shapes_of(model)
        shardings = jax.tree.map(
            lambda x: (
                by_row
                if x.shape[0] % mesh.size == 0
                else jax.NamedSharding(mesh, jax.P())
            ),
            shapes,
        )
        compiled = (
            jax.jit(init, out_shardings=shardings).lower(jax.random.key(0)).compile()
        )
        memory = compiled.memory_analysis()
        found[way] = {
            "result": memory.output_size_in_bytes,
            "temporary": memory.temp_size_in_bytes,
        }
    return found


def initialize_table(found: dict[str, Any]) -> str:
    rows = [["", "result of a device", "temporary"]]
    for way, numbers in found.items():
        sizes = [f"{size / 2**20:,.0f} MiB" for size in numbers.values()]
        rows.append([way, *sizes])
    return table(rows)


if __name__ == "__main__":
    main()
