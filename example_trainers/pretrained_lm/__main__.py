"""Command line of the example with a pretrained model."""

from example_trainers import command_line
from example_trainers.pretrained_lm import config, experiment

if __name__ == "__main__":
    command_line.run(
        "pretrained_lm",
        config,
        experiment.train_and_evaluate,
        {
            "framework": "The dialect of Flax.",
            "model": "smollm2 (pretrained), or random (tiny, and needs no package).",
            "parts": "What is done. qat takes most memory, see docs/examples.md.",
            "sequence_length": "Tokens of each sequence that is evaluated.",
            "test_batches": "The number of these sequences.",
            "calibration_batches": "Sequences that ranges are collected from.",
            "qlora_steps": "Steps of fine-tuning on code.",
            "qlora_learning_rate": "Its highest learning rate.",
            "rank": "Rank of the adapters.",
            "qat_steps": "Steps of QAT.",
            "qat_learning_rate": "Its highest learning rate.",
        },
        choices={"framework": sorted(experiment.FRAMEWORKS)},
        written=("rows.json", "exported", "adapters"),
    )
