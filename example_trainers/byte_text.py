"""Text, byte by byte, behind a Grain pipeline; what the language models share."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from example_trainers import loop

Batch = dict[str, np.ndarray]

VOCABULARY = 256
# The evaluated batches are part of the task: they stay the same when the seed of a run
# changes.
EVAL_SEED = 0


def without_repetitions(splits: Mapping[str, Sequence[str]]) -> dict[str, np.ndarray]:
    """Returns the texts of each split as bytes, each paragraph where it comes first.

    Texts quote others at length, so that a paragraph would be in several splits.

    Args:
        splits: The texts of each split; those that are to be held out come first.
    """
    seen: set[str] = set()
    tokens = {}
    for split, texts in splits.items():
        paragraphs = dict.fromkeys(p for text in texts for p in split_paragraphs(text))
        kept = [p for p in paragraphs if p not in seen]
        seen.update(kept)
        tokens[split] = np.frombuffer("\n\n".join(kept).encode(), np.uint8)
    return tokens


def split_paragraphs(text: str) -> list[str]:
    """Returns the parts of a text that have empty lines between them."""
    return re.split(r"\n{2,}", text.strip("\n"))


class _Sequences:
    """Random access to a text, one sequence and the byte after it at a time."""

    def __init__(self, text: np.ndarray, length: int):
        self._text = text
        self._length = length

    def __len__(self) -> int:
        return (len(self._text) - 1) // self._length

    def __getitem__(self, index: int) -> Batch:
        start = index * self._length
        tokens = self._text[start : start + self._length + 1].astype(np.int32)
        return {"input": tokens[:-1], "target": tokens[1:]}


class _Shift(grain.transforms.RandomMap):
    """Starts a sequence of twice the length somewhere in its first half."""

    def random_map(self, element: Batch, rng: np.random.Generator) -> Batch:
        length = len(element["input"]) // 2
        start = rng.integers(0, length + 1)
        return {name: x[start : start + length] for name, x in element.items()}


def train_dataset(
    text: np.ndarray, *, length: int, seed: int
) -> grain.MapDataset[Batch]:
    """Returns the endless sequence of what to train on, each element by its index."""
    return loop.train_dataset(_Sequences(text, 2 * length), _Shift(), seed=seed)


def train_iterator(
    text: np.ndarray, *, length: int, batch_size: int, seed: int
) -> grain.DatasetIterator[Batch]:
    """Returns an endless iterator over batches, whose position can be saved."""
    return loop.train_iterator(
        _Sequences(text, 2 * length), _Shift(), batch_size=batch_size, seed=seed
    )


def eval_batches(
    text: np.ndarray, *, length: int, batch_size: int, batches: int
) -> Iterator[Any]:
    """Returns the first batches of a shuffled text, the same at every call."""
    dataset = (
        grain.MapDataset.source(_Sequences(text, length))
        .seed(EVAL_SEED)
        .shuffle()
        .batch(batch_size, drop_remainder=True)
    )
    return iter(dataset[:batches])
