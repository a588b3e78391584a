"""Adapters written, and read, by Hugging Face's PEFT.

It needs PyTorch, so it runs in an environment of its own, without JAX and without this
package:

    python peft_reference.py FOLDER

The folder has the weights of `Net` in `base.npz`, with its input, and adapters of this
package in folders of `ours`. Outputs of `Net` with each are written beside them, as
`outputs.npz`; and adapters of PEFT's own, with outputs, into folders of `theirs`.
"""

import pathlib
import sys

TARGETS = ["embed", "split", "join", "layers.0.proj", "layers.1.proj", "conv", "head"]
# Settings of a `LoraConfig`, beside the targets.
CASES = {
    "plain": {"r": 2, "lora_alpha": 3},
    "patterns": {
        "r": 2,
        "lora_alpha": 4,
        "rank_pattern": {"head": 3, "layers.*proj": 1},
        "alpha_pattern": {"conv": 1.5, "layers.*proj": 2},
    },
    "rslora": {"r": 3, "lora_alpha": 3, "use_rslora": True},
    "dora": {"r": 2, "lora_alpha": 3, "use_dora": True},
}


def build(weights):
    """The model, with weights by their names."""
    import torch
    from torch import nn

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(8, 8)

        def forward(self, x):
            return torch.tanh(self.proj(x))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(11, 8)
            self.split = nn.Linear(8, 6)
            self.join = nn.Linear(6, 8)
            self.layers = nn.ModuleList([Layer(), Layer()])
            self.conv = nn.Conv2d(4, 5, (2, 2))
            self.head = nn.Linear(25, 3)

        def get_input_embeddings(self):
            return self.embed

        def get_output_embeddings(self):
            return None

        def forward(self, tokens):
            x = torch.tanh(self.split(self.embed(tokens)))
            x = torch.tanh(self.join(x))
            for layer in self.layers:
                x = layer(x)
            x = x.reshape(len(x), 6, 2, 4).permute(0, 3, 1, 2)
            x = self.conv(x).permute(0, 2, 3, 1)
            return self.head(torch.tanh(x.reshape(len(x), -1)))

    net = Net()
    state = {name: torch.tensor(x) for name, x in weights.items()}
    net.load_state_dict(state, strict=True)
    return net


def run(model, tokens, folder):
    """Writes what a model with adapters computes, and what it does when merged."""
    import numpy as np
    import torch

    model.eval()
    with torch.no_grad():
        adapted = model(torch.tensor(tokens)).numpy()
        merged = model.merge_and_unload()(torch.tensor(tokens)).numpy()
    np.savez(folder / "outputs.npz", adapted=adapted, merged=merged)


def main(folder):
    import numpy as np
    import peft
    import torch

    weights = dict(np.load(folder / "base.npz"))
    tokens = weights.pop("tokens")
    for path in sorted((folder / "ours").iterdir()):
        model = peft.PeftModel.from_pretrained(build(weights), path)
        state = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
        held = peft.utils.load_peft_weights(path, device="cpu")
        assert sorted(state) == sorted(held), set(state) ^ set(held)
        run(model, tokens, path)
    for seed, (name, settings) in enumerate(CASES.items()):
        torch.manual_seed(seed)
        config = peft.LoraConfig(target_modules=TARGETS, **settings)
        model = peft.get_peft_model(build(weights), config)
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.data.uniform_(0.1, 0.6)
        path = folder / "theirs" / name
        # What "auto" is for a table called `embed_tokens`: the file holds it, too.
        model.save_pretrained(path, save_embedding_layers=True)
        run(model, tokens, path)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
