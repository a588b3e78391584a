"""Command line of the static-range example."""

from example_trainers import command_line
from example_trainers.static_range import config, experiment

if __name__ == "__main__":
    command_line.run(
        "static_range",
        config,
        experiment.train_and_evaluate,
        {
            "seed": "Seed of the weights and the batches.",
            "features": "Width of the model.",
            "layers": "Number of its layers.",
            "float_steps": "Steps of float training.",
            "float_learning_rate": "Its highest learning rate.",
            "qat_steps": "Steps of QAT.",
            "qat_learning_rate": "Its highest learning rate.",
        },
        written=("quant_report.jsonl", "comparison.png", "exported"),
    )
