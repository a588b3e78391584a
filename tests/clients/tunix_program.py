"""Trains and samples a tiny model of Tunix, with its own code, on what `qwix` is.

Its arguments are the cases, with commas between them, a folder and, if there is one,
that of a run on another library. It writes what came out into `results.json`: for each
case of training the losses of six steps and the shapes of all variables, and, if there
was another run, the losses after a checkpoint of the third step was restored, its own
and that of the other library; for each case of sampling the tokens and logits; and the
completions and losses of GRPO.
"""

import json
import pathlib
import sys

import jax
import numpy as np
import optax
import qwix
from flax import nnx
from jax import numpy as jnp
from orbax import checkpoint as ocp
from tunix.cli.utils import model as cli
from tunix.generate import sampler
from tunix.models.llama3 import model as llama3
from tunix.models.qwen3 import model as qwen3
from tunix.rl import rl_cluster
from tunix.rl.grpo import grpo_learner
from tunix.rl.rollout import base_rollout
from tunix.sft import hooks, peft_trainer

CASES, FOLDER, *OTHER = sys.argv[1:]
LORA = {"module_path": ".*(proj|mlp).*", "rank": 4, "alpha": 8.0}
ADAPTED = {
    "lora": LORA,
    "qlora nf4": {**LORA, "weight_qtype": "nf4", "tile_size": 16},
}
# Fixed ranges have no ties at their ends, which compiled programs of `qwix` round to
# either side. Gradients are those at quantized operands, as here by default.
QUANTIZED = {
    "qat": {
        "weight_qtype": "int8",
        "act_qtype": "int8",
        "weight_calibration_method": "fixed,-0.5,0.5",
        "act_calibration_method": "fixed,-4,4",
        "additional_qt_config": {"use_original_residuals": False},
    }
}
QUANTIZED["qat static"] = {
    **QUANTIZED["qat"],
    "act_calibration_method": "absmax",
    "act_static_scale": True,
    "act_batch_axes": (0, 1),
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


def quantized(case, provider):
    """A new model whose projections are quantized."""
    rules = [qwix.QtRule(module_path=LORA["module_path"], **QUANTIZED[case])]
    model = llama()
    return qwix.quantize_model(model, provider(rules), **model.get_model_input())


def trained(case):
    """The model of a case of training."""
    return adapted(case) if case in ADAPTED else quantized(case, qwix.QtProvider)


def adapted(case, make=llama):
    """A new model with adapters, the same whatever the library draws."""
    model = make()
    model = cli.apply_lora_to_model(model, None, ADAPTED[case])
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


def train(model, folder, steps, optimizer):
    """The losses of the steps that were still to be done."""
    config = peft_trainer.TrainingConfig(
        eval_every_n_steps=100,
        max_steps=steps,
        checkpoint_root_directory=str(folder),
        checkpointing_options=ocp.CheckpointManagerOptions(save_interval_steps=3),
        pbar_description=None,
    )
    trainer = peft_trainer.PeftTrainer(model, optimizer, config)
    trainer = trainer.with_gen_model_input_fn(model_input)
    seen = Losses()
    trainer.with_training_hooks(seen)
    trainer.train(batches())
    trainer.close()
    return seen.losses


class Tokenizer:
    """Words that are numbers."""

    def encode(self, text):
        return [int(word) for word in text.split()]

    def decode(self, tokens):
        return " ".join(str(token) for token in tokens)

    def pad_id(self):
        return 0

    def bos_id(self):
        return 1

    def eos_id(self):
        return 2


PROMPTS = ["5 9 13 40", "33 7"]


def sampled(model):
    """The tokens after the prompts and their logarithms of probability."""
    size = sampler.CacheConfig(
        cache_size=24,
        num_layers=SIZES["num_layers"],
        num_kv_heads=SIZES["num_kv_heads"],
        head_dim=SIZES["head_dim"],
    )
    generate = sampler.Sampler(model, Tokenizer(), size)
    best = generate(PROMPTS, 8, return_logprobs=True)
    drawn = generate(PROMPTS, 8, temperature=1.0, top_p=0.95, top_k=20, seed=3)
    return {
        "best": [np.asarray(tokens).tolist() for tokens in best.tokens],
        "drawn": [np.asarray(tokens).tolist() for tokens in drawn.tokens],
        "log probability": np.asarray(best.logprobs).tolist(),
    }


def grpo():
    """What was completed, and the losses of the steps that learned from it."""
    completed = []

    def reward(prompts, completions, **kwargs):
        completed.append(list(completions))
        return [
            sum(int(word) % 2 for word in text.split()) / 8.0 for text in completions
        ]

    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    roles = rl_cluster.Role
    config = rl_cluster.ClusterConfig(
        role_to_mesh={
            roles.ACTOR: mesh,
            roles.REFERENCE: mesh,
            roles.ROLLOUT: mesh,
        },
        training_config=rl_cluster.RLTrainingConfig(
            actor_optimizer=optax.adamw(0.05), eval_every_n_steps=100, max_steps=3
        ),
        rollout_config=base_rollout.RolloutConfig(
            max_prompt_length=8,
            max_tokens_to_generate=8,
            kv_cache_size=24,
            seed=7,
        ),
    )
    cluster = rl_cluster.RLCluster(
        actor=adapted("lora"),
        reference=llama(),
        tokenizer=Tokenizer(),
        cluster_config=config,
    )
    seen = Losses()
    cluster.actor_trainer.with_training_hooks(seen)
    learner = grpo_learner.GRPOLearner(
        cluster, grpo_learner.GRPOConfig(num_generations=4), [reward]
    )
    learner.train([{"prompts": np.array(PROMPTS)}] * 3)
    return {"completed": completed, "losses": seen.losses}


def shapes(model):
    """Each variable's type, shape and dtype, by path."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(nnx.state(model)))
    return {
        jax.tree_util.keystr(path): [list(leaf.shape), str(leaf.dtype)]
        for path, leaf in leaves
        if hasattr(leaf, "shape") and "rngs" not in jax.tree_util.keystr(path)
    }


def trains(case):
    """Trains a model whole, and half with a checkpoint that is restored."""
    model = trained(case)
    found = {"shapes": shapes(model)}
    folder = pathlib.Path(FOLDER).absolute() / case
    # The first step of Adam is the sign of a gradient, and so are its errors.
    optimizer = optax.adamw(0.05) if case in ADAPTED else optax.sgd(0.3)
    found["losses"] = train(model, folder / "whole", STEPS, optimizer)
    train(trained(case), folder / "half", 3, optimizer)
    for other in OTHER:
        half = pathlib.Path(other).absolute() / case / "half"
        for name, restored in ("resumed", folder / "half"), ("from the other", half):
            found[name] = train(trained(case), restored, STEPS, optimizer)
    return found


def qwen3_losses():
    """Those of a model that casts its weights by `jnp.astype`, as `qwix` cannot."""
    if qwix.__name__ == "qwix":
        return None
    model = adapted("qlora nf4", qwen)
    return train(model, pathlib.Path(FOLDER).absolute() / "qwen3", 3, optax.sgd(0.3))


RUNS = {
    **{case: lambda case=case: trains(case) for case in [*ADAPTED, *QUANTIZED]},
    "grpo": grpo,
    "sampled qlora": lambda: sampled(adapted("qlora nf4")),
    "sampled ptq": lambda: sampled(quantized("qat", qwix.PtqProvider)),
    "qwen3": qwen3_losses,
}


def main():
    """Runs the cases."""
    results = {case: RUNS[case]() for case in CASES.split(",")}
    folder = pathlib.Path(FOLDER)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
