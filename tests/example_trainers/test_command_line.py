import types

import ml_collections
import pytest
from absl import app, flags

from example_trainers import command_line
from example_trainers.workdirs import SettingsError


def get_config():
    settings = {"framework": "linen", "steps": 8, "rate": 0.5, "seeds": (0, 1)}
    return ml_collections.ConfigDict({**settings, "names": ("a", "b")})


def get_quick_config():
    config = get_config()
    config.steps = 2
    return config


CONFIGS = types.SimpleNamespace(
    get_config=get_config, get_quick_config=get_quick_config
)


@pytest.fixture
def call(monkeypatch, tmp_path):
    """Calls an example with flags, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*argv, results=None, error=None, **options):
        seen = []

        def train_and_evaluate(config, workdir):
            seen.append((config, str(workdir)))
            if error is not None:
                raise error
            return results or {}

        def parsed(main):
            main(flags.FLAGS(["example", *argv]))

        monkeypatch.setattr(app, "run", parsed)
        others = set(flags.FLAGS)
        settings = dict.fromkeys(get_config(), "A setting.")
        choices = {"framework": ["linen", "nnx"]}
        try:
            command_line.run(
                "some",
                CONFIGS,  # pyright: ignore[reportArgumentType]
                train_and_evaluate,
                settings,
                choices=choices,
                **options,
            )
        finally:
            for name in set(flags.FLAGS) - others:
                delattr(flags.FLAGS, name)
        return seen[0]

    return call


def test_settings_are_flags_of_their_types(call):
    assert call() == (get_config(), "runs/some")
    config, workdir = call(
        "--steps=0", "--rate=1", "--seeds=3,4", "--names=c", "--workdir=there"
    )
    changed = {"steps": 0, "rate": 1.0, "seeds": (3, 4), "names": ("c",)}
    assert config.to_dict() == {**get_config().to_dict(), **changed}
    assert workdir == "there"
    config, workdir = call("--quick", "--framework=nnx", "--rate=2")
    assert (config.steps, config.rate, workdir) == (2, 2.0, "runs/some_nnx_quick")


def test_restart_deletes_what_a_run_writes(call, tmp_path):
    for name in ("checkpoints", "exported"):
        (tmp_path / name).mkdir()
    for name in ("config.json", "report.jsonl", "checkpoints/1", "notes.txt"):
        (tmp_path / name).write_text("")
    call(f"--workdir={tmp_path}", written=("report.jsonl",))
    assert len(list(tmp_path.iterdir())) == 5
    call(f"--workdir={tmp_path}", "--restart", written=("report.jsonl",))
    assert {path.name for path in tmp_path.iterdir()} == {"exported", "notes.txt"}


def test_says_what_went_wrong(call):
    with pytest.raises(app.UsageError, match="Not a flag: 'quick'"):
        call("quick")
    with pytest.raises(SystemExit, match="Pass its settings"):
        call(error=SettingsError("Pass its settings."))
    broken = {"broken": ["a is not", "b is not"]}
    with pytest.raises(SystemExit, match="a is not\nb is not"):
        call(results=broken)
    call("--quick", results=broken)
