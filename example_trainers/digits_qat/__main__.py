"""Command line of the digits example."""

import pathlib
import shutil
import sys

from absl import app, flags, logging

from example_trainers.digits_qat import config as config_lib
from example_trainers.digits_qat import train

_DEFAULTS = config_lib.get_config()

_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Where checkpoints and results go. Default: runs/digits_qat, with _nnx and _quick "
    "appended for these.",
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
    flags.DEFINE_enum(
        "framework", None, sorted(train.FRAMEWORKS), "The dialect of Flax."
    ),
    _define(
        flags.DEFINE_string,
        "act_qtype",
        "Type of the activations; 'same' for that of the weights.",
    ),
    _define(flags.DEFINE_integer, "batch_size", "Images in a batch."),
    _define(flags.DEFINE_integer, "float_steps", "Steps of float training."),
    _define(flags.DEFINE_float, "float_learning_rate", "Its initial learning rate."),
    _define(flags.DEFINE_integer, "qat_steps", "Steps of QAT at each width."),
    _define(flags.DEFINE_float, "qat_learning_rate", "Its initial learning rate."),
    _define(
        flags.DEFINE_integer,
        "eval_every",
        "Steps between two evaluations, each with a checkpoint.",
    ),
]
_SEEDS = _define(flags.DEFINE_list, "seeds", "Seeds of initialization and batches.")
_WEIGHT_QTYPES = _define(
    flags.DEFINE_list, "weight_qtypes", "Types of the weights to compare."
)


def _config():
    config = config_lib.get_quick_config() if _QUICK.value else config_lib.get_config()
    for flag in _OVERRIDES:
        if flag.value is not None:
            config[flag.name] = flag.value
    if _SEEDS.value:
        config.seeds = tuple(int(seed) for seed in _SEEDS.value)
    if _WEIGHT_QTYPES.value:
        config.weight_qtypes = tuple(_WEIGHT_QTYPES.value)
    return config


def _workdir(config) -> pathlib.Path:
    if _WORKDIR.value is not None:
        return pathlib.Path(_WORKDIR.value)
    name = "digits_qat"
    if config.framework != "linen":
        name += f"_{config.framework}"
    if _QUICK.value:
        name += "_quick"
    return pathlib.Path("runs") / name


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Not a flag: {argv[1]!r}.")
    if not flags.FLAGS["verbosity"].present:
        # Orbax logs every file it writes; `--verbosity=0` shows it.
        logging.set_verbosity(logging.WARNING)
    config = _config()
    workdir = _workdir(config)
    if _RESTART.value:
        # Only what a run of this program writes.
        for name in ("config.json", "results.json", "results.png"):
            (workdir / name).unlink(missing_ok=True)
        shutil.rmtree(workdir / "checkpoints", ignore_errors=True)
    try:
        train.train_and_evaluate(config, workdir)
    except train.SettingsError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    app.run(main)
