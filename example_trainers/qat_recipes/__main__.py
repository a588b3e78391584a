"""Command line of the example that compares recipes of QAT."""

import pathlib
import shutil
import sys

from absl import app, flags, logging

from example_trainers.digits_qat.train import SettingsError
from example_trainers.qat_recipes import config as config_lib
from example_trainers.qat_recipes import experiment

_DEFAULTS = config_lib.get_config()

_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Where checkpoints and results go. Default: runs/qat_recipes, with _quick appended "
    "for --quick.",
)
_QUICK = flags.DEFINE_bool(
    "quick", False, "Goes through all recipes in seconds; the numbers prove nothing."
)
_RESTART = flags.DEFINE_bool(
    "restart", False, "Discards the run that the workdir holds."
)
# None means: as in the configuration.
_OVERRIDES = [
    flags.DEFINE_list(name, None, f"{text} Default: {','.join(default)}.")
    for name, text, default in (
        ("tasks", "What is trained.", _DEFAULTS.tasks),
        ("weight_qtypes", "Types of the weights to compare.", _DEFAULTS.weight_qtypes),
        ("methods", "Ways of training them.", _DEFAULTS.methods),
    )
]
_SEEDS = flags.DEFINE_list(
    "seeds",
    None,
    "Seeds of initialization and batches. "
    f"Default: {','.join(map(str, _DEFAULTS.seeds))}.",
)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Not a flag: {argv[1]!r}.")
    if not flags.FLAGS["verbosity"].present:
        # Orbax logs every file it writes; `--verbosity=0` shows it.
        logging.set_verbosity(logging.WARNING)
    config = config_lib.get_quick_config() if _QUICK.value else config_lib.get_config()
    for flag in _OVERRIDES:
        if flag.value:
            config[flag.name] = tuple(flag.value)
    if _SEEDS.value:
        config.seeds = tuple(int(seed) for seed in _SEEDS.value)
    name = "qat_recipes_quick" if _QUICK.value else "qat_recipes"
    workdir = pathlib.Path(_WORKDIR.value or pathlib.Path("runs") / name)
    if _RESTART.value:
        # Only what a run of this program writes.
        for name in ("config.json", "results.json", "results.png"):
            (workdir / name).unlink(missing_ok=True)
        shutil.rmtree(workdir / "checkpoints", ignore_errors=True)
    try:
        results = experiment.train_and_evaluate(config, workdir)
    except SettingsError as error:
        sys.exit(str(error))
    if results["broken"] and not _QUICK.value:
        sys.exit("\n".join(results["broken"]))


if __name__ == "__main__":
    app.run(main)
