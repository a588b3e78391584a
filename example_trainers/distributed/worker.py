"""One of the processes: `python -m example_trainers.distributed.worker`."""

import json
import pathlib
import sys

import jax
import ml_collections
from absl import logging

from example_trainers.distributed import train


def main(config: str, workdir: str, port: str, index: str) -> None:
    settings = ml_collections.ConfigDict(json.loads(config))
    logging.set_verbosity(logging.ERROR)
    # Between machines, this is the address of one that all of them reach. On TPUs and
    # under Slurm no argument is needed.
    jax.distributed.initialize(f"localhost:{port}", settings.processes, int(index))
    path = pathlib.Path(workdir)
    results = train.train_and_evaluate(settings, path)
    if results is not None:
        train.write_results(path, results)


if __name__ == "__main__":
    main(*sys.argv[1:])
