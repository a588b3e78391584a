"""Command line of the QLoRA example."""

import pathlib
import shutil
import sys

from absl import app, flags, logging

from example_trainers.digits_qat.train import SettingsError
from example_trainers.qlora_lm import config as config_lib
from example_trainers.qlora_lm import experiment

_DEFAULTS = config_lib.get_config()

_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Where checkpoints and results go. Default: runs/qlora_lm, with _nnx and _quick "
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
        "framework", None, sorted(experiment.FRAMEWORKS), "The dialect of Flax."
    ),
    _define(flags.DEFINE_list, "methods", "The ways of fine-tuning to compare."),
    _define(flags.DEFINE_integer, "features", "Width of the model."),
    _define(flags.DEFINE_integer, "layers", "Number of its layers."),
    _define(flags.DEFINE_integer, "batch_size", "Sequences in a batch."),
    _define(flags.DEFINE_integer, "pretrain_steps", "Steps of training on prose."),
    _define(flags.DEFINE_float, "pretrain_learning_rate", "Its highest learning rate."),
    _define(flags.DEFINE_integer, "finetune_steps", "Steps of training on code."),
    _define(
        flags.DEFINE_float,
        "full_learning_rate",
        "The highest learning rate of full fine-tuning.",
    ),
    _define(
        flags.DEFINE_float,
        "lora_learning_rate",
        "The highest learning rate of the adapters.",
    ),
    _define(flags.DEFINE_integer, "rank", "Rank of the adapters."),
    _define(flags.DEFINE_float, "alpha", "Their scaling, times the rank."),
]
_SEEDS = _define(flags.DEFINE_list, "seeds", "Seeds of adapters and batches.")


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Not a flag: {argv[1]!r}.")
    if not flags.FLAGS["verbosity"].present:
        # Orbax logs every file it writes; `--verbosity=0` shows it.
        logging.set_verbosity(logging.WARNING)
    config = config_lib.get_quick_config() if _QUICK.value else config_lib.get_config()
    for flag in _OVERRIDES:
        if flag.value is not None:
            value = tuple(flag.value) if isinstance(flag.value, list) else flag.value
            config[flag.name] = value
    if _SEEDS.value is not None:
        config.seeds = tuple(map(int, _SEEDS.value))
    name = "qlora_lm"
    if config.framework != _DEFAULTS.framework:
        name += f"_{config.framework}"
    if _QUICK.value:
        name += "_quick"
    workdir = pathlib.Path(_WORKDIR.value or pathlib.Path("runs") / name)
    if _RESTART.value:
        # Only what a run of this program writes.
        for name in ("config.json", "results.json", "results.png"):
            (workdir / name).unlink(missing_ok=True)
        for name in ("checkpoints", "exported"):
            shutil.rmtree(workdir / name, ignore_errors=True)
    try:
        experiment.train_and_evaluate(config, workdir)
    except SettingsError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    app.run(main)
