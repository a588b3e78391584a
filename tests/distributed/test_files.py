"""Several processes write once, whole or not at all, and fail together."""

import time

import numpy as np
import pytest

from qwix_train import ptq
from tests.compare import assert_same
from tests.distributed import files, several

# What the error says, in the process that is to blame.
ERRORS = {
    "types": "kernel has codes of int8, not int4",
    "rules": "The rules have to be the same in all processes. In process 1 there is",
    "a shard with NaN": "Scales are not finite, or negative, in: kernel",
    "a copy with NaN": "Scales are not finite, or negative, in: kernel",
    "other values": "The params have to be the same",
    "no params": "There is no param to save",
    "ct: NaN": "kernel cannot be written: it has a scale of nan",
    "ct: other shapes": "The params have to be the same",
    "lora: rank": "The layouts of adapters have to be the same",
    "peft: rank": "The layouts of adapters have to be the same",
    "export": "The rules have to be the same",
    "ranges: empty": "In process 1 no batch counts for any",
    "ranges: NaN": "In process 1 no batch counts for 'dot_general0_lhs'",
    "ranges: rules": "The ranges have to be the same",
}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes returned, and the folder that they wrote into."""
    folder = tmp_path_factory.mktemp("two")
    results = several.run(files.everything, 2, str(folder))
    return folder, *zip(*results, strict=True)


@pytest.mark.slow
def test_two_processes_write_once(two):
    folder, (first, second), *_ = two
    assert "exists" in first["again"]
    assert second["again"].startswith("RuntimeError: Process 0 failed: FileExistsError")
    kernels, adapters = files.read(folder / "a")
    for kernel in kernels:
        np.testing.assert_allclose(kernel, files.X, atol=0.15)
    for adapter in adapters:
        np.testing.assert_array_equal(adapter, files.X[:, :2])
    names = {x.name for x in (folder / "a").iterdir()}
    assert names == {"ptq", "ct", "lora", "peft", "exports"}
    exports = sorted(x.name for x in (folder / "a/exports").iterdir())
    assert exports == ["step_000001", "step_000002"]
    exported = ptq.restore(folder / "a/exports/step_000002")["kernel"]
    wanted = files.on_host()["kernel"].array.qvalue
    np.testing.assert_array_equal(exported.array.qvalue, wanted)


@pytest.mark.slow
def test_all_fail_where_one_does(two):
    _, _, ((first, left), (second, _)), *_ = two
    assert first.keys() == second.keys() == ERRORS.keys()
    for name, said in ERRORS.items():
        assert said in second[name], name
        assert said in first[name], name
        in_both = name == "a shard with NaN"
        assert in_both or "Process 1 failed: ValueError" in first[name], name
    assert left in ([], ["export"])


@pytest.mark.slow
def test_the_clock_of_the_first_process_decides(two):
    *_, reports, _ = two
    for index, (due, written) in enumerate(reports):
        assert due == [False, False, True, False, True]
        assert written == ([] if index else [2, 4])


@pytest.mark.slow
def test_statistics_of_all_processes_are_those_of_one_pass(two):
    *_, merged = two
    for of_processes, of_one in merged:
        assert_same(of_processes, of_one)


@pytest.mark.slow
@pytest.mark.parametrize("victim, delay", [(0, 0.1), (1, 0.4)])
def test_a_process_is_killed_while_it_writes(tmp_path, victim, delay):
    logs, written = tmp_path / "logs", tmp_path / "written"
    logs.mkdir(), written.mkdir()
    children = several.start(logs, files.write_on, 2, str(written))
    try:
        end = time.monotonic() + 120
        while not (written / "version").exists():
            assert time.monotonic() < end and children[0].poll() is None
            time.sleep(0.02)
        time.sleep(delay)
        children[victim].kill()
        time.sleep(0.5)
    finally:
        for child in children:
            child.kill()
            child.wait()
    kernels, adapters = files.read(written)
    for kernel in kernels:
        ratio = 1 + (kernel.max() > 40)
        np.testing.assert_allclose(kernel, ratio * files.X, atol=0.3)
    for adapter in adapters:
        ratio = 1 + (adapter.max() > 30)
        np.testing.assert_array_equal(adapter, ratio * files.X[:, :2])
