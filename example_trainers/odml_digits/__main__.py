"""Command line of the LiteRT example."""

import os

import jax

from example_trainers import command_line
from example_trainers.odml_digits import config, experiment

if __name__ == "__main__":
    # JAX is timed as LiteRT is: on one thread of the CPU. Both are read at first use.
    jax.config.update("jax_platforms", "cpu")
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false"
    )
    command_line.run(
        "odml_digits",
        config,
        experiment.train_and_evaluate,
        {
            "float_steps": "Steps of float training.",
            "float_learning_rate": "Its initial learning rate.",
            "qat_steps": "Steps of QAT at each width.",
            "qat_learning_rate": "Its initial learning rate.",
            "seeds": "Seeds of initialization and batches.",
            "weight_qtypes": "Types of the weights to compare.",
        },
        written=("exported",),
    )
