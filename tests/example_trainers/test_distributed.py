"""The example of several processes, killed and told to stop, ends as if it had not."""

import json
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from example_trainers.distributed import config as configs
from example_trainers.distributed import launch, train
from qwix_train import ptq

STEPS = 24
ROOT = pathlib.Path(__file__).parents[2]


def settings(workdir, processes, devices):
    config = configs.get_quick_config()
    config.processes, config.devices, config.steps = processes, devices, STEPS
    workdir.mkdir(exist_ok=True)
    return config


def run(workdir, processes, devices, after=None):
    """What a run prints; with `after`, of one that gets SIGTERM after such a line."""
    command = [sys.executable, "-m", "example_trainers.distributed", "--quick"]
    flags = [f"--workdir={workdir}", f"--processes={processes}", f"--steps={STEPS}"]
    printed = []
    with subprocess.Popen(
        [*command, *flags, f"--devices={devices}"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        for line in process.stdout:
            printed.append(line)
            if after is not None and after in line:
                process.send_signal(signal.SIGTERM)
                after = None
    printed = "".join(printed)
    assert process.returncode == 0, printed
    return printed


def kill_when(workdir, written, processes, devices):
    """Kills one of the processes as soon as a path is there, then the others."""
    config = settings(workdir, processes, devices)
    children = launch.start(config, workdir)
    try:
        while not (workdir / written).exists():
            assert all(child.poll() is None for child in children)
            time.sleep(0.02)
        children[-1].send_signal(signal.SIGKILL)
        children[-1].wait()
    finally:
        for child in children:
            child.kill()
            child.wait()


@pytest.mark.slow
def test_it_ends_with_the_numbers_of_an_unbroken_run(tmp_path):
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    # In this process, on all its devices.
    whole = train.train_and_evaluate(settings(unbroken, 1, 8), unbroken)
    # A checkpoint is there, and the next steps run.
    kill_when(broken, "checkpoints/4", 2, 2)
    printed = run(broken, 2, 2, after="from step 4")
    assert "told to stop: saved" in printed, printed
    assert not (broken / "results.json").exists()
    # Another number of processes, and another mesh.
    printed = run(broken, 1, 2)
    assert "processes: 1, mesh: 1 data x 2 model, from step " in printed
    losses, again = (
        {each["step"]: each["loss"] for each in results["history"]}
        for results in (whole, json.loads((broken / "results.json").read_text()))
    )
    # One save came early, and the next one has the mean of fewer steps.
    (early,) = again.keys() - losses.keys() or {0}
    same = [step for step in losses if not early < step < early + 4]
    assert len(same) >= 5
    np.testing.assert_allclose(
        [again[step] for step in same], [losses[step] for step in same], rtol=5e-3
    )
    kernels = [
        ptq.restore(x / "exported")["layer_0"]["up"]["kernel"].array
        for x in (unbroken, broken)
    ]
    codes = [np.asarray(x.qvalue, np.int32) for x in kernels]
    # A weight on the border of two codes may have either.
    assert np.mean(codes[0] == codes[1]) > 0.99
    np.testing.assert_allclose(kernels[0].scale, kernels[1].scale, rtol=1e-3)


def test_what_does_not_divide_is_named():
    config = configs.get_quick_config()
    config.devices, config.model_parallel = 3, 2
    with pytest.raises(launch.SettingsError, match="does not divide the 3 devices"):
        launch.launch(config, pathlib.Path("nowhere"))
