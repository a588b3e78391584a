"""The hyperparameters."""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The settings of the table in the documentation."""
    config = ml_collections.ConfigDict()

    config.seed = 0
    config.sequence_length = 128
    config.features = 96
    config.heads = 4
    config.layers = 2

    config.batch_size = 16
    config.float_steps = 800
    config.float_learning_rate = 6e-3
    config.qat_steps = 100
    config.qat_learning_rate = 5e-4

    # Every so many steps: evaluate, report, and save a checkpoint.
    config.eval_every = 200
    config.eval_batch_size = 16
    # Batches of the eval loops, of which the first is where ranges are collected.
    config.validation_batches = 16
    config.test_batches = 16

    # What is measured of an activation, how the ranges of batches combine (the last
    # four collect all data, and find one range for it), and what is measured of
    # attention's probabilities, if that differs.
    config.observers = (
        ("absmax", "mean"),
        ("absmax", "minmax"),
        ("minmax", "mean"),
        ("percentile,99.99", "mean"),
        ("mse", "mean"),
        ("entropy", "mean"),
        # Most of attention's probabilities are near zero, and the others matter.
        ("entropy", "mean", "absmax"),
    )
    # What is compared on each activation, to give each op the best one.
    config.compared_observers = (
        "absmax",
        "percentile,99.9",
        "percentile,99.99",
        "mse",
        "entropy",
    )
    # How int4 weights are chosen, activations in float.
    config.int4_methods = ("GPTQ", "AWQ")
    # The types of weights of which static-range models are made with SmoothQuant, and
    # with QAT.
    config.weight_qtypes = ("int8", "int4")
    # Observer and averaging of QAT, which collects ranges as it trains.
    config.qat_observer = ("absmax", "ema,0.99")
    return config


def get_quick_config() -> ml_collections.ConfigDict:
    """A run of seconds that goes through everything and proves nothing."""
    config = get_config()
    config.sequence_length = 32
    config.features = 32
    config.layers = 2
    config.batch_size = 8
    config.float_steps = 40
    config.qat_steps = 10
    config.eval_every = 20
    config.eval_batch_size = 8
    config.validation_batches = 2
    config.test_batches = 2
    config.observers = (("minmax", "mean"),)
    config.compared_observers = ("absmax", "absmax,0.9")
    config.int4_methods = ("GPTQ",)
    config.weight_qtypes = ("int4",)
    return config
