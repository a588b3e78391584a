"""The settings that several examples share."""

import ml_collections


def digits() -> ml_collections.ConfigDict:
    """The model of digits, and its training in float."""
    config = ml_collections.ConfigDict()
    config.features = (8, 16, 32)
    config.batch_size = 64
    config.float_steps = 800
    config.float_learning_rate = 5e-3
    return config
