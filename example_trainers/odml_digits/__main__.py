"""Command line of the LiteRT example."""

import os
import pathlib
import shutil
import sys

import jax
from absl import app, flags, logging

from example_trainers.digits_qat.train import SettingsError
from example_trainers.odml_digits import config as config_lib
from example_trainers.odml_digits import experiment

_DEFAULTS = config_lib.get_config()

_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Where checkpoints, files and results go. Default: runs/odml_digits, with _quick "
    "appended for --quick.",
)
_QUICK = flags.DEFINE_bool(
    "quick", False, "Goes through everything in seconds; the numbers prove nothing."
)
_RESTART = flags.DEFINE_bool(
    "restart", False, "Discards the run that the workdir holds."
)


def _define(define, name: str, text: str):
    default = _DEFAULTS[name]
    if isinstance(default, tuple):
        default = ",".join(map(str, default))
    return define(name, None, f"{text} Default: {default}.")


# None means: as in the configuration.
_OVERRIDES = [
    _define(flags.DEFINE_integer, "float_steps", "Steps of float training."),
    _define(flags.DEFINE_float, "float_learning_rate", "Its initial learning rate."),
    _define(flags.DEFINE_integer, "qat_steps", "Steps of QAT at each width."),
    _define(flags.DEFINE_float, "qat_learning_rate", "Its initial learning rate."),
]
_SEEDS = _define(flags.DEFINE_list, "seeds", "Seeds of initialization and batches.")
_WEIGHT_QTYPES = _define(
    flags.DEFINE_list, "weight_qtypes", "Types of the weights to compare."
)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Not a flag: {argv[1]!r}.")
    if not flags.FLAGS["verbosity"].present:
        # Orbax logs every file it writes; `--verbosity=0` shows it.
        logging.set_verbosity(logging.WARNING)
    # JAX is timed as LiteRT is: on one thread of the CPU. Both are read at first use.
    jax.config.update("jax_platforms", "cpu")
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false"
    )
    config = config_lib.get_quick_config() if _QUICK.value else config_lib.get_config()
    for flag in _OVERRIDES:
        if flag.value is not None:
            config[flag.name] = flag.value
    if _SEEDS.value:
        config.seeds = tuple(int(seed) for seed in _SEEDS.value)
    if _WEIGHT_QTYPES.value:
        config.weight_qtypes = tuple(_WEIGHT_QTYPES.value)
    name = "odml_digits_quick" if _QUICK.value else "odml_digits"
    workdir = pathlib.Path(_WORKDIR.value or pathlib.Path("runs") / name)
    if _RESTART.value:
        # Only what a run of this program writes.
        for name in ("config.json", "results.json", "results.png"):
            (workdir / name).unlink(missing_ok=True)
        for name in ("checkpoints", "exported"):
            shutil.rmtree(workdir / name, ignore_errors=True)
    try:
        results = experiment.train_and_evaluate(config, workdir)
    except SettingsError as error:
        sys.exit(str(error))
    if results["broken"] and not _QUICK.value:
        sys.exit("\n".join(results["broken"]))


if __name__ == "__main__":
    app.run(main)
