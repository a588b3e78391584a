"""The settings."""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The settings of the table in the documentation."""
    config = ml_collections.ConfigDict()

    # Which dialect of Flax: "linen" or "nnx".
    config.framework = "linen"
    # "smollm2", or a tiny "random" one, which needs no package.
    config.model = "smollm2"
    # What is done, in this order, see `experiment.PARTS`.
    config.parts = ("ptq", "static", "methods", "qlora", "qat", "export")

    # Perplexity: of so many sequences of held-out prose, of so many tokens each.
    config.sequence_length = 512
    config.test_batches = 2
    # What ranges, and the inputs of weights, are collected from: other prose.
    config.calibration_length = 512
    config.calibration_batches = 8

    config.train_length = 256
    config.train_batch_size = 1
    # Every so many steps: evaluate, and save a checkpoint.
    config.eval_every = 10
    config.seed = 0
    # QLoRA, on source code.
    config.qlora_steps = 20
    config.qlora_learning_rate = 1e-3
    config.rank = 16
    config.alpha = 16.0
    config.tile_size = 64
    # QAT with distillation, on prose.
    config.qat_steps = 40
    config.qat_learning_rate = 5e-4
    config.qat_tile_size = 32

    config.prompt = "Explain in one sentence what a Python generator is."
    config.generated_tokens = 32
    return config


def get_quick_config() -> ml_collections.ConfigDict:
    """A run of a tiny random model that goes through everything and proves nothing."""
    config = get_config()
    config.model = "random"
    config.sequence_length = 32
    config.calibration_length = 32
    config.calibration_batches = 4
    config.train_length = 32
    config.eval_every = 2
    config.qlora_steps = 4
    config.qat_steps = 4
    config.rank = 4
    config.generated_tokens = 4
    return config
