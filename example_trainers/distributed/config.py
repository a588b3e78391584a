"""The hyperparameters."""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The settings of the run in the documentation."""
    config = ml_collections.ConfigDict()
    # How many processes, and how many devices each of them has. A run may go on with
    # other numbers.
    config.processes = 2
    config.devices = 2
    # Along how many devices layers are cut (tensor parallelism). Batches, and the
    # other axis of each weight (FSDP), are cut along all others.
    config.model_parallel = 2

    config.seed = 0
    config.features = 128
    config.heads = 4
    config.layers = 2
    config.sequence_length = 64
    config.batch_size = 8
    config.steps = 200
    config.learning_rate = 2e-3
    config.weight_qtype = "int4"
    config.quantize_from_step = 50
    # Every so many steps: print, and save a checkpoint.
    config.save_every = 50
    return config


def get_quick_config() -> ml_collections.ConfigDict:
    """A run of seconds that goes through everything and proves nothing."""
    config = get_config()
    config.features = 32
    config.layers = 1
    config.sequence_length = 16
    config.steps = 12
    config.quantize_from_step = 3
    config.save_every = 4
    return config
