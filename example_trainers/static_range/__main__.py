"""Command line of the static-range example."""

import pathlib
import shutil
import sys

from absl import app, flags, logging

from example_trainers.digits_qat.train import SettingsError
from example_trainers.static_range import config as config_lib
from example_trainers.static_range import experiment

_DEFAULTS = config_lib.get_config()

_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Where checkpoints and results go. Default: runs/static_range, with _quick "
    "appended for --quick.",
)
_QUICK = flags.DEFINE_bool(
    "quick", False, "Goes through everything in seconds; the numbers prove nothing."
)
_RESTART = flags.DEFINE_bool(
    "restart", False, "Discards the run that the workdir holds."
)
# None means: as in the configuration.
_OVERRIDES = [
    define(name, None, f"{text} Default: {_DEFAULTS[name]}.")
    for define, name, text in (
        (flags.DEFINE_integer, "seed", "Seed of the weights and the batches."),
        (flags.DEFINE_integer, "features", "Width of the model."),
        (flags.DEFINE_integer, "layers", "Number of its layers."),
        (flags.DEFINE_integer, "float_steps", "Steps of float training."),
        (flags.DEFINE_float, "float_learning_rate", "Its highest learning rate."),
        (flags.DEFINE_integer, "qat_steps", "Steps of QAT."),
        (flags.DEFINE_float, "qat_learning_rate", "Its highest learning rate."),
    )
]


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Not a flag: {argv[1]!r}.")
    if not flags.FLAGS["verbosity"].present:
        # Orbax logs every file it writes; `--verbosity=0` shows it.
        logging.set_verbosity(logging.WARNING)
    config = config_lib.get_quick_config() if _QUICK.value else config_lib.get_config()
    for flag in _OVERRIDES:
        if flag.value is not None:
            config[flag.name] = flag.value
    name = "static_range_quick" if _QUICK.value else "static_range"
    workdir = pathlib.Path(_WORKDIR.value or pathlib.Path("runs") / name)
    if _RESTART.value:
        # Only what a run of this program writes.
        for name in ("config.json", "quant_report.jsonl", "results.json"):
            (workdir / name).unlink(missing_ok=True)
        for name in ("comparison.png", "results.png"):
            (workdir / name).unlink(missing_ok=True)
        for name in ("checkpoints", "exported"):
            shutil.rmtree(workdir / name, ignore_errors=True)
    try:
        experiment.train_and_evaluate(config, workdir)
    except SettingsError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    app.run(main)
