"""The hyperparameters."""

import ml_collections

from example_trainers import settings

WEIGHT_QTYPES = ("int8", "int4", "int3", "int2")


def get_config() -> ml_collections.ConfigDict:
    """The settings of `make demo`."""
    config = settings.digits()

    config.framework = "linen"
    config.seeds = (0, 1, 2)

    # Only the width of the weights varies, so that a row differs from its neighbors in
    # one thing. `act_qtype = "same"` quantizes the activations to the weights' width.
    config.weight_qtypes = WEIGHT_QTYPES
    config.act_qtype = "int8"

    config.qat_steps = 500
    config.qat_learning_rate = 2e-3

    # Every so many steps: evaluate, report, and save a checkpoint.
    config.eval_every = 100
    return config


def get_quick_config() -> ml_collections.ConfigDict:
    """A run of seconds that goes through everything and proves nothing."""
    config = get_config()
    config.seeds = (0,)
    config.features = (16,)
    config.weight_qtypes = ("int4", "int2")
    config.float_steps = 60
    config.qat_steps = 40
    config.eval_every = 20
    return config
