"""The hyperparameters."""

import ml_collections

from example_trainers import settings


def get_config() -> ml_collections.ConfigDict:
    """The settings of the table in the documentation."""
    config = ml_collections.ConfigDict()

    config.seeds = (0, 1, 2)
    config.tasks = ("digits", "text")
    config.weight_qtypes = ("int4", "int3", "int2")
    config.act_qtype = "int8"
    config.methods = (
        "QAT",
        "QAT: schedule",
        "QAT: clipped",
        "QAT: LSQ",
        "QAT: freezing",
        "QAT: mixed bits",
        "proximal",
    )

    config.digits = settings.digits()
    config.digits.qat_steps = 400
    config.digits.qat_learning_rate = 2e-2

    config.text = ml_collections.ConfigDict()
    config.text.sequence_length = 64
    config.text.features = 64
    config.text.heads = 4
    config.text.layers = 2
    config.text.batch_size = 8
    config.text.eval_batch_size = 64
    config.text.eval_batches = 4
    config.text.float_steps = 1000
    config.text.float_learning_rate = 6e-3
    config.text.qat_steps = 300
    config.text.qat_learning_rate = 3e-3
    return config


def get_quick_config() -> ml_collections.ConfigDict:
    """A run of seconds that goes through all recipes and proves nothing."""
    config = get_config()
    config.seeds = (0,)
    config.tasks = ("digits",)
    config.weight_qtypes = ("int3",)

    config.digits.features = (4,)
    config.digits.float_steps = 40
    config.digits.qat_steps = 16

    config.text.sequence_length = 16
    config.text.features = 16
    config.text.layers = 1
    config.text.batch_size = 4
    config.text.eval_batch_size = 8
    config.text.eval_batches = 1
    config.text.float_steps = 40
    config.text.qat_steps = 16
    return config
