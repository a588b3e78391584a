"""Trains a tiny decoder of MaxText, with its own code, on what `qwix` is.

Its argument is a folder. It writes what came out into `results.json`: for each case the
losses of some steps, the shapes of all variables, and the seconds that the model took
to be made and its step to be traced.
"""

import dataclasses
import json
import pathlib
import sys
import time

import jax
import numpy as np
import optax
from flax import nnx
from flax.linen import partitioning
from jax import numpy as jnp
from maxtext.configs import pyconfig
from maxtext.layers import quantizations
from maxtext.utils import lora_utils, maxtext_utils, model_creation_utils
from maxtext.utils.globals import MAXTEXT_CONFIGS_DIR

SIZES = {
    "base_emb_dim": 32,
    "base_num_query_heads": 4,
    "base_num_kv_heads": 2,
    "head_dim": 8,
    "base_mlp_dim": 64,
    "base_num_decoder_layers": 2,
    "vocab_size": 64,
    "max_target_length": 12,
    "per_device_batch_size": 2,
    "attention": "dot_product",
    "dtype": "float32",
    "weight_dtype": "float32",
    "enable_dropout": False,
    "enable_checkpointing": False,
    "skip_jax_distributed_system": True,
    "run_name": "tiny",
    "remat_policy": "full",
}
INT8 = {"quantization": "int8", "use_qwix_quantization": True}
FP8 = {"quantization": "fp8_full", "use_qwix_quantization": True}
LORA = {"enable_lora": True, "lora_rank": 4, "lora_alpha": 8.0}
CASES = {
    "int8 scanned": {**INT8, "scan_layers": True},
    "fp8_full": {**FP8, "scan_layers": False},
    "lora scanned": {"lora": LORA, "scan_layers": True},
    "qlora scanned": {
        "lora": {**LORA, "lora_weight_qtype": "nf4", "lora_tile_size": 8},
        "scan_layers": True,
    },
}
STEPS = 4
# The end of a range lies between two codes, and compiled programs of `qwix` round it to
# either. What lies beyond the end of a smaller one has one code.
SMALLER = {
    f"{kind}_calibration_method": "absmax,0.8" for kind in ("weight", "act", "bwd")
}
rules_of = quantizations.get_quantization_rule
quantizations.get_quantization_rule = lambda config: [
    dataclasses.replace(rule, **SMALLER)
    if rule.weight_calibration_method == "absmax"
    else rule
    for rule in rules_of(config)
]


def made(settings):
    """The model of a case, its params the same whatever the library draws."""
    config = pyconfig.initialize(
        ["", str(pathlib.Path(MAXTEXT_CONFIGS_DIR) / "base.yml")], **SIZES, **settings
    )
    mesh = jax.sharding.Mesh(maxtext_utils.create_device_mesh(config), config.mesh_axes)
    with mesh, partitioning.axis_rules(config.logical_axis_rules):
        start = time.perf_counter()
        model = model_creation_utils.create_model(config, mesh, rngs=nnx.Rngs(0))
        if "lora" in settings:
            model = lora_utils.apply_lora_to_model(model, mesh, config)
        seconds = time.perf_counter() - start
    for index, (_, variable) in enumerate(sorted(nnx.to_flat_state(drawn(model)))):
        rng = np.random.default_rng(index)
        values = rng.normal(size=variable.shape).astype(np.float32) / 6
        variable.set_value(jax.device_put(values))
    return model, config, mesh, seconds


def drawn(model):
    """The adapters."""
    return nnx.state(model, nnx.LoRAParam)


def main():
    """Runs the cases."""
    folder = pathlib.Path(sys.argv[1])
    results = {case: trained(settings) for case, settings in CASES.items()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results))


def trained(settings):
    """Losses, variables and seconds of a case."""
    model, config, mesh, seconds = made(settings)
    kind = nnx.LoRAParam if "lora" in settings else nnx.Param
    optimizer = nnx.Optimizer(model, optax.sgd(0.5), wrt=kind)
    tokens = np.random.default_rng(0).integers(1, 64, (2, 13)).astype(np.int32)
    positions = np.broadcast_to(np.arange(12, dtype=np.int32), (2, 12))

    def loss_of(model):
        logits = model(
            tokens[:, :-1],
            positions,
            jnp.ones((2, 12), jnp.int32),
            enable_dropout=False,
        )
        return optax.softmax_cross_entropy_with_integer_labels(
            logits.astype(jnp.float32), tokens[:, 1:]
        ).mean()

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(loss_of, argnums=nnx.DiffState(0, kind))(model)
        optimizer.update(model, grads)
        nnx.pop(model, nnx.Intermediate)
        return loss

    with mesh, partitioning.axis_rules(config.logical_axis_rules):
        start = time.perf_counter()
        losses = [float(step(model, optimizer)) for _ in range(STEPS)]
        first = time.perf_counter() - start
    return {
        "losses": losses,
        "shapes": shapes(model),
        "seconds": {"made": seconds, "trained": first},
    }


def shapes(model):
    """Each variable's shape and dtype, by path."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(nnx.state(model)))
    return {
        jax.tree_util.keystr(path): [list(leaf.shape), str(leaf.dtype)]
        for path, leaf in leaves
        if hasattr(leaf, "shape") and "rngs" not in jax.tree_util.keystr(path)
    }


if __name__ == "__main__":
    main()
