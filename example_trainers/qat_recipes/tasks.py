"""The two tasks: a model, its data, and its steps. Nothing in here knows of QAT."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import grain
import jax
import ml_collections
import numpy as np
import optax
from flax.training import train_state

from example_trainers import byte_text
from example_trainers.digits_qat import data as digits_data
from example_trainers.digits_qat import model_linen as digits_model
from example_trainers.static_range import data as text_data
from example_trainers.static_range import model as text_model

# Training images that are held out, to choose learning rates by.
_VALIDATION_IMAGES = 270


@dataclasses.dataclass(frozen=True)
class Task:
    """A model, its data, and the steps that train and evaluate it.

    Attributes:
        name: Its name in files and in the configuration.
        label: Its name in tables.
        metric: Which of the metrics of the eval step is compared.
        config: The settings of the task.
        model: The model.
        inputs: What its call takes, abstract arrays.
        options: The keyword arguments of its call.
        train_step: Takes a state and a batch; returns the state and metrics.
        eval_step: Takes a state and a batch; returns metrics.
        create_state: Takes a seed and an optimizer; returns a train state.
        train_iterator: Takes a seed; returns an endless iterator over batches.
        validation: The batches to look at while training.
        test: The batches of the table.
    """

    name: str
    label: str
    metric: str
    config: ml_collections.ConfigDict
    model: nn.Module
    inputs: tuple[Any, ...]
    options: Mapping[str, Any]
    train_step: Callable[..., Any]
    eval_step: Callable[..., Any]
    create_state: Callable[[int, optax.GradientTransformation], train_state.TrainState]
    train_iterator: Callable[[int], grain.DatasetIterator[Any]]
    validation: Sequence[Any]
    test: Sequence[Any]

    def train_batches(self, seed: int, steps: int) -> grain.IterDataset[Any]:
        """The batches of a number of steps, drawn once and kept for all methods."""
        batches = list(itertools.islice(self.train_iterator(seed), steps))
        # Batches that are there already need no thread that gets them ready.
        options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
        return grain.MapDataset.source(batches).to_iter_dataset(options)


def make_task(name: str, config: ml_collections.ConfigDict) -> Task:
    """Returns the task of a name, `digits` or `text`, from the whole configuration."""
    if name == "digits":
        return _digits(config.digits)
    if name == "text":
        return _text(config.text)
    raise ValueError(f"There is no task {name!r}. Choose from digits, text.")


def _digits(config: ml_collections.ConfigDict) -> Task:
    """The convolutional network of `digits_qat`, on images of handwritten digits."""
    images, test = digits_data.load_split()
    train, validation = (
        {name: column[chosen] for name, column in images.items()}
        for chosen in (
            slice(_VALIDATION_IMAGES, None),
            slice(None, _VALIDATION_IMAGES),
        )
    )
    return Task(
        name="digits",
        label="digits, convolutional network",
        metric="accuracy",
        config=config,
        model=digits_model.create_model(tuple(config.features)),
        inputs=(digits_model.IMAGE,),
        options={"train": False},
        train_step=digits_model.train_step,
        eval_step=digits_model.eval_step,
        create_state=lambda seed, tx: digits_model.create_train_state(config, tx, seed),
        train_iterator=lambda seed: digits_data.train_iterator(
            train, batch_size=config.batch_size, seed=seed
        ),
        validation=[validation],
        test=[test],
    )


def _text(config: ml_collections.ConfigDict) -> Task:
    """The language model of `static_range`, on the help texts of Python."""
    splits = text_data.load_splits()
    model = text_model.create_model(config)
    example = text_model.example_input(config)
    init = jax.jit(model.init)

    def create_state(seed: int, tx: optax.GradientTransformation) -> Any:
        tokens = np.zeros(example.shape, example.dtype)
        return train_state.TrainState.create(
            apply_fn=model.apply,
            params=init(jax.random.key(seed), tokens)["params"],
            tx=tx,
        )

    def held_out(split: str) -> list[Any]:
        return list(
            byte_text.eval_batches(
                splits[split],
                length=config.sequence_length,
                batch_size=config.eval_batch_size,
                batches=config.eval_batches,
            )
        )

    return Task(
        name="text",
        label="help texts, language model",
        metric="loss",
        config=config,
        model=model,
        inputs=(example,),
        options={},
        train_step=text_model.train_step,
        eval_step=text_model.eval_step,
        create_state=create_state,
        train_iterator=lambda seed: byte_text.train_iterator(
            splits["train"],
            length=config.sequence_length,
            batch_size=config.batch_size,
            seed=seed,
        ),
        validation=held_out("validation"),
        test=held_out("test"),
    )
