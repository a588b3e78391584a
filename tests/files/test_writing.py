"""Files and folders are replaced as a whole or not at all."""

import errno
import os
import pathlib
import subprocess
import sys

import pytest

from qwix_train.files import writing

# Has a child killed at every call by which Python opens, renames or removes a file.
KILLED = """
import importlib.util, os, pathlib, shutil, signal, sys

spec = importlib.util.spec_from_file_location("writing", sys.argv[1])
writing = importlib.util.module_from_spec(spec)
sys.modules["writing"] = writing
spec.loader.exec_module(writing)
os.fsync = lambda descriptor: None  # What is written outlives a process without it.
EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod")

def killed_at(count, action):
    "Whether the action was killed before it ended."
    child = os.fork()
    if child == 0:
        left = count
        def hook(event, args):
            nonlocal left
            if event in EVENTS:
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        action()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0

def cases(folder, prepare, action):
    for count in range(1000):
        here = folder / str(count)
        here.mkdir()
        prepare(here)
        killed = killed_at(count, lambda: action(here))
        yield here
        if not killed:
            return

"""


def run_killed(code, tmp_path):
    done = subprocess.run(
        [sys.executable, "-S", "-c", KILLED + code, writing.__file__, tmp_path],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def write(path, content, overwrite=True):
    signature = slice(0, 1)
    writing.write_file(
        path, content, what="a report", signature=signature, overwrite=overwrite
    )


def test_a_file_is_old_or_new_after_a_kill(tmp_path):
    run_killed(
        """
def write(here, content=b"new" * 1000):
    writing.write_file(
        here / "a", content, what="a", signature=slice(0, 0), overwrite=True
    )

states = set()
for here in cases(pathlib.Path(sys.argv[2]), lambda h: write(h, b"old"), write):
    states.add((here / "a").read_bytes()[:3])
    write(here)
    assert sorted(os.listdir(here)) == ["a"], os.listdir(here)
assert states == {b"old", b"new"}, states
""",
        tmp_path,
    )


def test_files_that_belong_together_never_mix_after_a_kill(tmp_path):
    run_killed(
        """
def write(here, text="new"):
    writing.write_together(here, {"data": text.encode(), "config": text.encode()})

def prepare(here):
    (here / "other").write_text("theirs")
    write(here, "old")

def seen(here):
    config = (here / "config").read_text()
    return (here / "data").read_text() if (here / "data").exists() else None, config

found, repaired = set(), set()
for here in cases(pathlib.Path(sys.argv[2]), prepare, write):
    found.add(seen(here))
    writing.finish(here)
    repaired.add(seen(here))
    write(here)
    assert sorted(os.listdir(here)) == ["config", "data", "other"], os.listdir(here)
# Where the data are missing, every reader finds nothing to read.
together = {("old", "old"), ("new", "new")}
assert found == together | {(None, "old"), (None, "new")}, found
assert repaired == together, repaired
""",
        tmp_path,
    )


def test_a_folder_is_old_or_new_after_a_kill(tmp_path):
    run_killed(
        """
def make(path, text):
    path.mkdir()
    (path / "data").write_text(text)

def prepare(here):
    make(here / "a", "old")
    make(writing.beside(here / "a"), "new")
    pathlib.Path.rmtree = shutil.rmtree

found, repaired = set(), set()
for here in cases(
    pathlib.Path(sys.argv[2]), prepare, lambda h: writing.replace_folder(h / "a")
):
    found.add((here / "a").exists())
    writing.finish_folder(here / "a")
    repaired.add((here / "a" / "data").read_text())
assert found == {True, False} and repaired == {"old", "new"}, (found, repaired)
""",
        tmp_path,
    )


def test_processes_that_finish_the_same_files_agree(tmp_path):
    run_killed(
        """
folder = pathlib.Path(sys.argv[2])
for count in range(30):
    here = folder / str(count)
    writing.write_together(here, {"data": b"old", "config": b"old"})
    # As a kill leaves it: all is written, and nothing is moved.
    move, writing.finish = writing.finish, lambda folder: None
    writing.write_together(here, {"data": b"new", "config": b"new"})
    writing.finish = move
    children = []
    for _ in range(4):
        children.append(os.fork())
        if children[-1] == 0:
            writing.finish(here)
            os._exit(0 if (here / "data").read_bytes() == b"new" else 1)
    codes = [os.waitpid(child, 0)[1] for child in children]
    assert codes == [0] * 4, codes
    assert sorted(os.listdir(here)) == ["config", "data"]
""",
        tmp_path,
    )


@pytest.fixture
def full_disk(monkeypatch):
    def fsync(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)


def test_a_full_disk_leaves_the_old_file(tmp_path, full_disk):
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "a", b"o" * 99)
    assert (tmp_path / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_full_disk_leaves_the_old_files_of_a_folder(tmp_path, full_disk):
    for name in ("data", "config"):
        (tmp_path / name).write_bytes(b"old")
    for folder in (tmp_path, tmp_path / "new" / "folder"):
        with pytest.raises(OSError, match="No space left"):
            writing.write_together(folder, {"data": b"new", "config": b"new"})
    assert sorted(os.listdir(tmp_path)) == ["config", "data"]
    assert (tmp_path / "data").read_bytes() == b"old"


def test_what_is_there_is_replaced_if_that_was_said_and_it_is_of_the_kind(tmp_path):
    path = tmp_path / "a"
    write(path, b"{1}", overwrite=False)
    with pytest.raises(FileExistsError, match="a exists. Pass overwrite=True"):
        write(path, b"{2}", overwrite=False)
    write(path, b"{2}")
    assert path.read_bytes() == b"{2}"
    for other in (b"import os", b"\x89PNG"):
        path.write_bytes(other)
        with pytest.raises(FileExistsError, match="is not a report"):
            write(path, b"{3}")
        assert path.read_bytes() == other
    path.write_bytes(b"")
    write(path, b"{4}")
    with pytest.raises(FileExistsError, match="is not a report"):
        write(tmp_path, b"{5}")
    assert os.listdir(tmp_path) == ["a"] and path.read_bytes() == b"{4}"


def test_the_mode_of_a_file_stays(tmp_path):
    path = tmp_path / "a"
    write(path, b"{1}")
    path.chmod(0o640)
    write(path, b"{2}")
    assert path.stat().st_mode & 0o777 == 0o640


def test_symbolic_links_are_followed(tmp_path):
    (tmp_path / "disk").mkdir()
    write(tmp_path / "disk" / "a", b"{1}")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "disk" / "a")
    write(link, b"{2}")
    assert link.is_symlink() and (tmp_path / "disk" / "a").read_bytes() == b"{2}"

    folder = tmp_path / "folder"
    folder.symlink_to(tmp_path / "disk", target_is_directory=True)
    (tmp_path / "disk" / "config").symlink_to(tmp_path / "shared")
    writing.write_together(folder, {"data": b"new", "config": b"new"})
    assert folder.is_symlink() and (folder / "config").is_symlink()
    assert (tmp_path / "shared").read_bytes() == b"new"
    assert sorted(os.listdir(folder)) == ["a", "config", "data"]


def test_two_writers_of_one_file_at_once_do_not_mix(tmp_path, monkeypatch):
    path, flush = tmp_path / "a", os.fsync

    def interrupted(descriptor):
        flush(descriptor)
        monkeypatch.setattr(os, "fsync", flush)
        write(path, b"{second}")

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(OSError, match="at the same time"):
        write(path, b"{first}")
    assert path.read_bytes() == b"{second}" and os.listdir(tmp_path) == ["a"]


def test_a_name_as_long_as_a_file_system_takes(tmp_path):
    path = pathlib.Path(tmp_path, "n" * 255)
    write(path, b"{1}")
    write(path, b"{2}")
    assert path.read_bytes() == b"{2}" and len(os.listdir(tmp_path)) == 1
