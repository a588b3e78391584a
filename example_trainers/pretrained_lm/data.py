"""Text that ships with Python, as tokens."""

import numpy as np

from example_trainers.pretrained_lm.checkpoint import Tokenizer
from example_trainers.qlora_lm import data


def load_prose(tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """The help texts of Python: `train`, `validation` and `test`."""
    return _tokens(tokenizer, data.load_prose())


def load_code(tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """The source of modules of the standard library, in the same splits."""
    return _tokens(tokenizer, data.load_code())


def _tokens(
    tokenizer: Tokenizer, texts: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    return {
        split: np.asarray(tokenizer.encode(text.tobytes().decode()), np.int32)
        for split, text in texts.items()
    }
