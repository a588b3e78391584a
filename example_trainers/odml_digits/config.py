"""The hyperparameters."""

import ml_collections

from example_trainers import settings


def get_config() -> ml_collections.ConfigDict:
    """The settings of `make example-odml`."""
    config = settings.digits()
    config.seeds = (0, 1, 2)
    config.weight_qtypes = ("int8", "int4")

    config.qat_steps = 300
    config.qat_learning_rate = 2e-3
    # Ranges follow the weights, and are used once they stand on this many batches.
    config.averaging = "ema,0.99"
    config.warmup_batches = 20

    # Every so many steps: evaluate, report, and save a checkpoint.
    config.eval_every = 100
    # How often each model is timed, in turns.
    config.timing_rounds = 300
    return config


def get_quick_config() -> ml_collections.ConfigDict:
    """A run of seconds that goes through everything and proves nothing."""
    config = get_config()
    config.seeds = (0,)
    config.float_steps = 60
    config.qat_steps = 40
    config.warmup_batches = 5
    config.eval_every = 20
    config.timing_rounds = 20
    return config
