"""Command line of the example of several processes."""

from example_trainers import command_line
from example_trainers.distributed import config, launch

if __name__ == "__main__":
    command_line.run(
        "distributed",
        config,
        launch.launch,
        {
            "processes": "The number of processes.",
            "devices": "Devices of each process.",
            "model_parallel": "Devices that layers are cut along.",
            "features": "Width of the model.",
            "layers": "Number of its layers.",
            "batch_size": "Sequences in a batch.",
            "steps": "Steps of training.",
            "weight_qtype": "Type of the weights.",
        },
        written=("exported",),
    )
