"""Command line of the QLoRA example."""

from example_trainers import command_line
from example_trainers.qlora_lm import config, experiment

if __name__ == "__main__":
    command_line.run(
        "qlora_lm",
        config,
        experiment.train_and_evaluate,
        {
            "framework": "The dialect of Flax.",
            "methods": "The ways of fine-tuning to compare.",
            "features": "Width of the model.",
            "layers": "Number of its layers.",
            "batch_size": "Sequences in a batch.",
            "pretrain_steps": "Steps of training on prose.",
            "pretrain_learning_rate": "Its highest learning rate.",
            "finetune_steps": "Steps of training on code.",
            "full_learning_rate": "The highest learning rate of full fine-tuning.",
            "lora_learning_rate": "The highest learning rate of the adapters.",
            "rank": "Rank of the adapters.",
            "alpha": "Their scaling, times the rank.",
            "seeds": "Seeds of adapters and batches.",
        },
        choices={"framework": sorted(experiment.FRAMEWORKS)},
        written=("exported",),
    )
