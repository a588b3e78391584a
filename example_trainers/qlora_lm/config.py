"""The hyperparameters."""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """The settings of the table in the documentation."""
    config = ml_collections.ConfigDict()

    # Which dialect of Flax: "linen" or "nnx".
    config.framework = "linen"
    # Seeds of the adapters and of the batches of fine-tuning; all start from one base.
    config.seeds = (0, 1)
    config.features = 256
    config.heads = 4
    config.layers = 3
    config.sequence_length = 128
    config.batch_size = 4

    config.pretrain_seed = 0
    config.pretrain_steps = 800
    config.pretrain_learning_rate = 2e-3
    config.finetune_steps = 150

    # What is compared, see `methods.py`.
    config.methods = ("full", "lora", "qlora_nf4", "qlora_int4")
    config.full_learning_rate = 1e-3
    config.lora_learning_rate = 5e-3
    config.rank = 16
    config.alpha = 16.0
    # Weights in a row that share a scale, where the base is quantized.
    config.tile_size = 64

    # Every so many steps: evaluate, and save a checkpoint.
    config.pretrain_eval_every = 200
    config.finetune_eval_every = 50
    config.eval_batch_size = 16
    config.validation_batches = 4
    config.test_batches = 16
    # Rounds in which the methods take turns at a step, for its time.
    config.timing_rounds = 7
    # Which method writes a sample once it is restored, and how many bytes.
    config.sample_method = "qlora_nf4"
    config.sample_length = 300
    config.sample_temperature = 0.5
    return config


def get_quick_config() -> ml_collections.ConfigDict:
    """A run of seconds that goes through everything and proves nothing."""
    config = get_config()
    config.seeds = (0,)
    config.features = 64
    config.layers = 1
    config.sequence_length = 32
    config.pretrain_steps = 60
    config.finetune_steps = 20
    config.rank = 4
    config.pretrain_eval_every = 30
    config.finetune_eval_every = 10
    config.eval_batch_size = 8
    config.validation_batches = 2
    config.test_batches = 2
    config.timing_rounds = 2
    config.sample_length = 40
    return config
