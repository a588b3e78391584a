"""The help texts of Python, in three splits."""

from pydoc_data import topics

import numpy as np

from example_trainers import byte_text

# The split is part of the task: it stays the same when the seed of a run changes.
SPLIT_SEED = 0
# The most that each of the held-out splits takes of the text.
HELD_OUT = 0.1


def load_splits() -> dict[str, np.ndarray]:
    """Returns the text of each split, `train`, `validation` and `test`, as bytes.

    Topics are split, not sentences. Some of them quote others at length, so that a
    paragraph counts where it comes first: in test, then in validation, then in train.
    """
    texts: dict[str, str] = topics.topics
    names = np.random.default_rng(SPLIT_SEED).permutation(sorted(texts)).tolist()
    budget = HELD_OUT * sum(map(len, texts.values()))
    splits: dict[str, list[str]] = {"test": [], "validation": [], "train": []}
    for split in ("test", "validation"):
        taken = 0
        for name in tuple(names):
            if taken + len(texts[name]) <= budget:
                taken += len(texts[name])
                splits[split].append(texts[name])
                names.remove(name)
    splits["train"] = [texts[name] for name in names]
    return byte_text.without_repetitions(splits)
