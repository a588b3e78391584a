"""The handwritten digits of scikit-learn, behind a Grain pipeline."""

from typing import Any

import grain
import numpy as np

from example_trainers import loop

Batch = dict[str, np.ndarray]

TEST_SIZE = 450
# The split is part of the task: it stays the same when the seed of a run changes.
SPLIT_SEED = 0


def load_split() -> tuple[Batch, Batch]:
    """Returns 1,347 training images and 450 test images, 8x8x1 in [0, 1]."""
    # It takes a second to import, and most of what imports this module loads nothing.
    from sklearn import datasets, model_selection

    digits: Any = datasets.load_digits()
    images = (digits.images / 16.0).astype(np.float32)[..., np.newaxis]
    labels = digits.target.astype(np.int32)
    train, test = model_selection.train_test_split(
        np.arange(len(labels)),
        test_size=TEST_SIZE,
        stratify=labels,
        random_state=SPLIT_SEED,
    )
    return (
        {"image": images[train], "label": labels[train]},
        {"image": images[test], "label": labels[test]},
    )


class _Records:
    """Random access to a split, one image at a time."""

    def __init__(self, split: Batch):
        self._split = split

    def __len__(self) -> int:
        return len(self._split["label"])

    def __getitem__(self, index: int) -> Batch:
        return {name: column[index] for name, column in self._split.items()}


class _Shift(grain.transforms.RandomMap):
    """Moves the image by up to one pixel in each direction."""

    def random_map(self, element: Batch, rng: np.random.Generator) -> Batch:
        row, column = rng.integers(0, 3, size=2)
        image = element["image"]
        height, width, channels = image.shape
        # np.pad takes ten times as long as this, for an image this small.
        padded = np.zeros((height + 2, width + 2, channels), image.dtype)
        padded[1:-1, 1:-1] = image
        return {**element, "image": padded[row : row + height, column : column + width]}


def train_iterator(
    split: Batch, *, batch_size: int, seed: int
) -> grain.DatasetIterator[Batch]:
    """Returns an endless iterator over batches, whose position can be saved."""
    return loop.train_iterator(
        _Records(split), _Shift(), batch_size=batch_size, seed=seed
    )
