"""Restores exported models and runs them: what a server would do.

    python -m example_trainers.digits_qat.serve runs/digits_qat

It knows the settings of the run and the exported files, and prints JSON: for each model
its predictions on the test images, its size, and the time of a forward pass. Models
take turns, so that their times can be compared.
"""

import json
import pathlib
import statistics
import sys
import time

import jax
import ml_collections
import numpy as np

from example_trainers.digits_qat import data, train

ROUNDS = 30


def main(workdir: pathlib.Path) -> None:
    settings = json.loads((workdir / "config.json").read_text())
    config = ml_collections.ConfigDict(settings)
    framework = train.FRAMEWORKS[config.framework]
    _, test = data.load_split()
    images = test["image"]
    records, models = [], []
    for name in ("float", *config.weight_qtypes):
        path = workdir / "exported" / name
        rules = [] if name == "float" else train.make_rules(config, name)
        model, param_bytes = framework.restore(config, rules, path)
        files = [file for file in path.rglob("*") if file.is_file()]
        records.append(
            {
                "weights": name,
                "predictions": np.argmax(model(images), -1).tolist(),
                "param_bytes": param_bytes,
                "disk_bytes": sum(file.stat().st_size for file in files),
            }
        )
        models.append(model)
    times: list[list[float]] = [[] for _ in models]
    for _ in range(ROUNDS):
        for model, taken in zip(models, times, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(model(images))
            taken.append(1000 * (time.perf_counter() - start))
    for record, taken in zip(records, times, strict=True):
        record["milliseconds"] = statistics.median(taken)
    print(json.dumps(records))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
