"""The folder of a run: it goes on with the settings that it was started with."""

import json
import pathlib

import ml_collections

from qwix_train.files import json_text


class SettingsError(ValueError):
    """The workdir holds a run that was started with other settings."""


def claim_workdir(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    """Refuses to resume a run that was started with other settings."""
    settings = json.loads(config.to_json())
    path = workdir / "config.json"
    if path.exists():
        found = json.loads(path.read_text())
        if found != settings:
            names = sorted(settings.keys() | found.keys())
            changed = "\n".join(
                f"  {name}: {found.get(name)} there, {settings.get(name)} here"
                for name in names
                if found.get(name) != settings.get(name)
            )
            raise SettingsError(
                f"{workdir} holds a run with other settings:\n{changed}\n"
                "Pass its settings to resume it, --restart to discard it, or another "
                "--workdir."
            )
    else:
        workdir.mkdir(parents=True, exist_ok=True)
        json_text.write(path, settings, overwrite=True)
