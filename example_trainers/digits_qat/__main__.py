"""Command line of the digits example."""

from example_trainers import command_line
from example_trainers.digits_qat import config, train

if __name__ == "__main__":
    command_line.run(
        "digits_qat",
        config,
        train.train_and_evaluate,
        {
            "framework": "The dialect of Flax.",
            "act_qtype": "Type of the activations; 'same' for that of the weights.",
            "batch_size": "Images in a batch.",
            "float_steps": "Steps of float training.",
            "float_learning_rate": "Its initial learning rate.",
            "qat_steps": "Steps of QAT at each width.",
            "qat_learning_rate": "Its initial learning rate.",
            "eval_every": "Steps between two evaluations, each with a checkpoint.",
            "seeds": "Seeds of initialization and batches.",
            "weight_qtypes": "Types of the weights to compare.",
        },
        choices={"framework": sorted(train.FRAMEWORKS)},
    )
