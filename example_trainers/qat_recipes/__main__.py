"""Command line of the example that compares recipes of QAT."""

from example_trainers import command_line
from example_trainers.qat_recipes import config, experiment

if __name__ == "__main__":
    command_line.run(
        "qat_recipes",
        config,
        experiment.train_and_evaluate,
        {
            "tasks": "What is trained.",
            "weight_qtypes": "Types of the weights to compare.",
            "methods": "Ways of training them.",
            "seeds": "Seeds of initialization and batches.",
        },
    )
