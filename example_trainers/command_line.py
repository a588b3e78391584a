"""The command line that all examples have: a workdir, a quick run, and settings."""

import pathlib
import resource
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import ml_collections
from absl import app, flags, logging

from example_trainers.workdirs import SettingsError

# The flags count as those of the example that calls `run`, so that --help shows them.
flags.disclaim_key_flags()

# What a run of every example writes.
_CHILDREN = resource.RUSAGE_CHILDREN
_WRITTEN = ("config.json", "results.json", "results.png", "checkpoints")


def run(
    name: str,
    configs: ModuleType,
    train_and_evaluate: Callable[[ml_collections.ConfigDict, pathlib.Path], Any],
    settings: Mapping[str, str],
    *,
    choices: Mapping[str, Sequence[str]] | None = None,
    written: Sequence[str] = (),
) -> None:
    """Runs an example with the flags that it was called with.

    Where its results list what is `broken` of what must hold, the program fails with
    that, unless the run was a quick one.

    Args:
        name: The name of the example, and of its folder in `runs`.
        configs: The module with its `get_config` and `get_quick_config`.
        train_and_evaluate: The example; takes the configuration and the workdir.
        settings: The settings that are flags, too, of the type that they have in the
            configuration, each with its help.
        choices: What is to choose from, for some of the settings.
        written: The files and folders that a run writes besides its configuration,
            checkpoints, results and their plot, for --restart to delete.
    """
    defaults, choices = configs.get_config(), choices or {}
    workdir = flags.DEFINE_string(
        "workdir",
        None,
        f"Where checkpoints and results go. Default: runs/{name}, with the framework "
        "(if it is not the default one) and _quick appended.",
    )
    quick = flags.DEFINE_bool(
        "quick", False, "Goes through everything in seconds; the numbers prove nothing."
    )
    restart = flags.DEFINE_bool(
        "restart", False, "Discards the run that the workdir holds."
    )
    given = {
        setting: _define(setting, defaults[setting], text, choices.get(setting))
        for setting, text in settings.items()
    }

    def main(argv: Sequence[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(f"Not a flag: {argv[1]!r}.")
        if not flags.FLAGS["verbosity"].present:
            # Orbax logs every file it writes; `--verbosity=0` shows it.
            logging.set_verbosity(logging.WARNING)
        config = configs.get_quick_config() if quick.value else configs.get_config()
        for setting, flag in given.items():
            if flag.value is not None:
                config[setting] = _value(flag.value, defaults[setting])
        folder = name
        if config.get("framework") != defaults.get("framework"):
            folder += f"_{config.framework}"
        if quick.value:
            folder += "_quick"
        path = pathlib.Path(workdir.value or pathlib.Path("runs") / folder)
        if restart.value:
            # Only what a run of this program writes.
            for part in (*_WRITTEN, *written):
                if (path / part).is_dir():
                    shutil.rmtree(path / part, ignore_errors=True)
                else:
                    (path / part).unlink(missing_ok=True)
        started = time.perf_counter()
        try:
            results = train_and_evaluate(config, path)
        except SettingsError as error:
            sys.exit(str(error))
        print(f"It took {_cost(started)}.", flush=True)
        if results.get("broken") and not quick.value:
            sys.exit("\n".join(results["broken"]))

    app.run(main)


def _cost(started: float) -> str:
    """What a run took, with the processes that it started."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, _CHILDREN)]
    processor = sum(x.ru_utime + x.ru_stime for x in used)
    # In KiB, but on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    memory = max(x.ru_maxrss for x in used) * unit / 2**20
    return (
        f"{time.perf_counter() - started:.0f} s, {processor:.0f} s of processor time, "
        f"and {memory:.0f} MiB of memory in its largest process"
    )


def _define(
    name: str, default: Any, text: str, choices: Sequence[str] | None
) -> flags.FlagHolder[Any]:
    """Defines the flag of a setting. Its default, None, is the configuration's."""
    if choices:
        return flags.DEFINE_enum(name, None, choices, text)
    if isinstance(default, tuple):
        shown = ",".join(map(str, default))
        return flags.DEFINE_list(name, None, f"{text} Default: {shown}.")
    define = {
        int: flags.DEFINE_integer,
        float: flags.DEFINE_float,
        str: flags.DEFINE_string,
    }[type(default)]
    return define(name, None, f"{text} Default: {default}.")


def _value(value: Any, default: Any) -> Any:
    if isinstance(default, tuple):
        return tuple(type(default[0])(item) for item in value)
    return value
