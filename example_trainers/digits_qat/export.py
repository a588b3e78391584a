"""Exports the best models, and reports what a fresh process makes of the files."""

import json
import pathlib
import shutil
import subprocess
import sys
from types import ModuleType
from typing import Any

import ml_collections
import numpy as np

import qwix_train
from example_trainers import reports
from example_trainers.digits_qat import data
from qwix_train.files import json_text

ROOT = pathlib.Path(__file__).parents[2]


def export_and_serve(
    framework: ModuleType,
    config: ml_collections.ConfigDict,
    best: dict[str, Any],
    rules: dict[str, list[qwix_train.QuantizationRule]],
    test: data.Batch,
    workdir: pathlib.Path,
) -> list[dict[str, Any]]:
    """Exports models, serves them in a fresh process, and compares.

    Args:
        framework: The dialect of Flax.
        config: The settings.
        best: The train state to export, by the type of its weights or "float".
        rules: The rules that it was trained under.
        test: The test images.
        workdir: The models go into its folder `exported`.

    Returns:
        One record for each model, as `serving.json` holds them.
    """
    folder = workdir / "exported"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    trained = {}
    for name, state in best.items():
        framework.export(config, state, rules[name], folder / name)
        logits = framework.predict(config, state, rules[name], test["image"])
        trained[name] = np.argmax(np.asarray(logits), -1)
    records = serve(workdir)
    for record in records:
        predictions = np.array(record.pop("predictions"))
        expected = trained[record["weights"]]
        record["trained_accuracy"] = float(np.mean(expected == test["label"]))
        record["accuracy"] = float(np.mean(predictions == test["label"]))
        record["same_predictions"] = int(np.sum(predictions == expected))
        record["images"] = len(expected)
    json_text.write(workdir / "serving.json", records, overwrite=True)
    print(f"\n{format_table(records)}\n\n{workdir / 'serving.json'}")
    return records


def serve(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """What `serve.py` prints, run in a process of its own."""
    command = [sys.executable, "-m", "example_trainers.digits_qat.serve", str(workdir)]
    done = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout)


def format_table(records: list[dict[str, Any]]) -> str:
    """The records as a table for the terminal."""
    images = records[0]["images"]
    floating = records[0]["milliseconds"]
    lines = [
        (
            "weights",
            "trained",
            "restored",
            "same predictions",
            "params",
            "on disk",
            f"ms for {images} images",
        )
    ]
    for record in records:
        ratio = record["milliseconds"] / floating
        lines.append(
            (
                record["weights"],
                f"{100 * record['trained_accuracy']:.1f}",
                f"{100 * record['accuracy']:.1f}",
                f"{record['same_predictions']} of {images}",
                f"{record['param_bytes'] / 1024:.1f} KiB",
                f"{record['disk_bytes'] / 1024:.1f} KiB",
                f"{record['milliseconds']:.2f} ({ratio:.2f}x)",
            )
        )
    title = "Exported models, restored in a fresh process (accuracy in %)"
    return "\n".join([title, *reports.align(lines, left=1)])
