"""Fine-tunes a tiny model of Tunix, with its own functions, on what `qwix` is.

Its arguments are a folder and, if there is one, that of a run on another library. It
writes what came out into `results.json`: for each case the losses of six steps, those
after a checkpoint of the third was restored, the shapes of all variables, and the
losses after the checkpoint of the other library was restored.
"""

import json
import pathlib
import shutil
import sys

import jax
import numpy as np
import optax
import qwix
from flax import nnx
from jax import numpy as jnp
from orbax import checkpoint as ocp
from tunix.cli.utils import model as cli
from tunix.models.llama3 import model as llama3
from tunix.models.qwen3 import model as qwen3
from tunix.sft import hooks, peft_trainer

FOLDER, *OTHER = sys.argv[1:]
LORA = {"module_path": ".*(proj|mlp).*", "rank": 4, "alpha": 8.0}
CASES = {
    "lora": LORA,
    "qlora nf4": {**LORA, "weight_qtype": "nf4", "tile_size": 16},
}
SIZES = {
    "num_layers": 1,
    "vocab_size": 64,
    "embed_dim": 32,
    "hidden_dim": 64,
    "num_heads": 4,
    "head_dim": 16,
    "num_kv_heads": 2,
    "rope_theta": 10_000,
    "norm_eps": 1e-6,
}
STEPS = 6


class Losses(hooks.TrainingHooks):
    """Takes down the loss of each step."""

    def __init__(self):
        self.losses = []

    def on_train_step_end(self, train_ctx, train_step, train_loss):
        self.losses.append(float(train_loss))

    def _nothing(self, *args, **kwargs):
        pass

    on_train_start = on_train_end = on_train_step_start = _nothing
    on_eval_step_start = on_eval_step_end = _nothing


Losses.__abstractmethods__ = frozenset()


def llama():
    return llama3.Llama3(llama3.ModelConfig(**SIZES), rngs=nnx.Rngs(0))


def qwen():
    return qwen3.Qwen3(qwen3.ModelConfig(**SIZES), rngs=nnx.Rngs(0))


def adapted(case, make=llama):
    """A new model with adapters, the same whatever the library draws."""
    model = make()
    model = cli.apply_lora_to_model(model, None, CASES[case])
    state = nnx.state(model, nnx.LoRAParam)
    for index, (_, variable) in enumerate(sorted(nnx.to_flat_state(state))):
        rng = np.random.default_rng(index)
        values = rng.normal(size=variable.shape).astype(np.float32) / 10
        variable.set_value(jax.device_put(values))
    nnx.update(model, state)
    return model


def batches():
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        tokens = rng.integers(1, SIZES["vocab_size"], (4, 12)).astype(np.int32)
        yield peft_trainer.TrainingInput(
            input_tokens=tokens, input_mask=np.ones_like(tokens, bool)
        )


def model_input(given):
    length = given.input_tokens.shape[1]
    causal = jnp.tril(jnp.ones((1, length, length), bool))
    return {
        "input_tokens": given.input_tokens,
        "input_mask": given.input_mask,
        "positions": jnp.broadcast_to(jnp.arange(length), given.input_tokens.shape),
        "attention_mask": jnp.tile(causal, (len(given.input_tokens), 1, 1)),
    }


def train(model, folder, steps):
    """The losses of the steps that were still to be done."""
    config = peft_trainer.TrainingConfig(
        eval_every_n_steps=100,
        max_steps=steps,
        checkpoint_root_directory=str(folder),
        checkpointing_options=ocp.CheckpointManagerOptions(save_interval_steps=3),
        pbar_description=None,
    )
    trainer = peft_trainer.PeftTrainer(model, optax.adamw(0.05), config)
    trainer = trainer.with_gen_model_input_fn(model_input)
    seen = Losses()
    trainer.with_training_hooks(seen)
    trainer.train(batches())
    trainer.close()
    return seen.losses


def shapes(model):
    """Each variable's type, shape and dtype, by path."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(nnx.state(model)))
    return {
        jax.tree_util.keystr(path): [list(leaf.shape), str(leaf.dtype)]
        for path, leaf in leaves
        if hasattr(leaf, "shape") and "rngs" not in jax.tree_util.keystr(path)
    }


def main():
    """Runs the cases."""
    folder, results = pathlib.Path(FOLDER).absolute(), {}
    for case in CASES:
        model = adapted(case)
        found = results[case] = {"shapes": shapes(model)}
        found["losses"] = train(model, folder / case / "whole", STEPS)
        train(adapted(case), folder / case / "half", 3)
        shutil.copytree(folder / case / "half", folder / case / "kept")
        found["resumed"] = train(adapted(case), folder / case / "half", STEPS)
        if OTHER:
            other = pathlib.Path(OTHER[0]).absolute() / case / "kept"
            found["from the other"] = train(adapted(case), other, STEPS)
    if qwix.__name__ != "qwix":
        # `qwix` cannot: this model casts its weights by `jnp.astype`.
        model = adapted("qlora nf4", qwen)
        results["qwen3"] = {"losses": train(model, folder / "qwen3", 3)}
    (folder / "results.json").write_text(json.dumps(results))


main()
