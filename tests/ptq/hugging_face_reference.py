"""Tiny models of the library transformers, with what they compute.

It needs PyTorch, so it runs in an environment of its own, without JAX and without this
package:

    python hugging_face_reference.py write FOLDER
    python hugging_face_reference.py read FOLDER

`write` makes a checkpoint for each of `MODELS`, with the tokens that it read and what
it computed in `reference.npz` beside it. `read` does the latter for the checkpoints in
a folder, which others wrote.
"""

import pathlib
import sys

SIZES = dict(
    vocab_size=37,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=32,
)
DECODER = dict(**SIZES, num_key_value_heads=2, head_dim=8)
WINDOWS = dict(sliding_window=4, query_pre_attn_scalar=16)
CAPS = dict(attn_logit_softcapping=2.0, final_logit_softcapping=3.0)
EXPERTS = dict(num_experts_per_tok=2, moe_intermediate_size=12)
# For each checkpoint the class, and what its config has beside the sizes.
MODELS = {
    "llama": ("LlamaForCausalLM", DECODER),
    "mistral": ("MistralForCausalLM", DECODER),
    "qwen2": ("Qwen2ForCausalLM", dict(**SIZES, num_key_value_heads=2)),
    "qwen3": ("Qwen3ForCausalLM", dict(**DECODER, tie_word_embeddings=True)),
    "gemma": ("GemmaForCausalLM", DECODER),
    "gemma2": ("Gemma2ForCausalLM", dict(**DECODER, **WINDOWS, **CAPS)),
    "gemma3_text": (
        "Gemma3ForCausalLM",
        dict(**DECODER, **WINDOWS, sliding_window_pattern=2),
    ),
    "mixtral": ("MixtralForCausalLM", dict(**DECODER, num_local_experts=4)),
    "qwen3_moe": ("Qwen3MoeForCausalLM", dict(**DECODER, **EXPERTS, num_experts=4)),
    "bert": ("BertModel", SIZES),
}


def computed(model, tokens):
    import torch

    with torch.no_grad():
        result = model.eval()(torch.tensor(tokens))
    logits = getattr(result, "logits", None)
    return (result.last_hidden_state if logits is None else logits).numpy()


def main(command, folder):
    import numpy as np
    import torch
    import transformers

    tokens = np.random.default_rng(0).integers(0, 37, (2, 7))
    for name, (cls, sizes) in MODELS.items():
        here = pathlib.Path(folder) / name
        if command == "write":
            torch.manual_seed(0)
            config = transformers.AutoConfig.for_model(name, **sizes)
            model = getattr(transformers, cls)(config)
            for parameter in model.parameters():
                # Norms and biases do not begin with random numbers.
                torch.nn.init.normal_(parameter, 0.0, 0.3)
            model.save_pretrained(here, max_shard_size="12KB")
        elif here.exists():
            model = getattr(transformers, cls).from_pretrained(here)
        else:
            continue
        np.savez(here / "reference.npz", tokens=tokens, output=computed(model, tokens))


if __name__ == "__main__":
    main(*sys.argv[1:])
