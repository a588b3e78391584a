"""Files that are written as a whole or not at all.

Whatever interrupts a writer (a kill, a full disk, an error), readers find what was
there before, or all of what is new:

* `write_file` writes a file beside the target, and renames it onto the target.
* `write_together` does so for files of one folder that belong together. The new files
  wait in a folder within theirs, the journal; renaming that is the moment from which on
  they count. While they are moved into place the first of them is missing, so that no
  reader takes old and new ones for a whole. `finish` moves what a kill left in the
  journal, and every reader and writer of such a folder calls it.
* `replace_folder` puts a folder in the place of another, which takes two renames;
  `finish_folder` does the second one if a kill came between them.

`check_target` says what may be replaced. Symbolic links are followed: the file changes
that a link points to, and the link stays.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import pathlib
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

if sys.platform != "win32":
    import fcntl

if TYPE_CHECKING:
    from etils import epath

Content = bytes | Callable[[pathlib.Path], None]
"""What a file holds, or a function that writes a file at a path."""

_NEW, _OLD = ".qwix_train-new", ".qwix_train-old"
_JOURNAL, _NAMES, _LOCK = ".qwix_train-journal", ".names", ".lock"


def check_target(
    path: pathlib.Path | epath.Path,
    *,
    what: str,
    is_one: Callable[[], bool],
    overwrite: bool,
    option: str = "overwrite=True",
) -> None:
    """Checks that something may be written at a path.

    Args:
      path: the path.
      what: the kind of what is to be written, such as "a LiteRT model".
      is_one: whether what is at the path is of this kind.
      overwrite: whether to replace what is of this kind.
      option: how the user says so.

    Raises:
      FileExistsError: if something is there that may not be replaced.

    Example:
      >>> path = pathlib.Path(__file__)
      >>> check_target(path, what="a plot", is_one=lambda: False, overwrite=True)
      Traceback (most recent call last):
      ...
      FileExistsError: ...writing.py is not a plot, and overwrite=True replaces ...
    """
    if not path.exists():
        return
    if not overwrite:
        raise FileExistsError(
            f"{path} exists. Pass {option} to replace it, or another path."
        )
    if not is_one():
        raise FileExistsError(
            f"{path} is not {what}, and {option} replaces nothing else. Remove "
            "it, or pass another path."
        )


def write_file(
    path: str | os.PathLike[str],
    content: bytes,
    *,
    what: str,
    signature: slice,
    overwrite: bool,
) -> None:
    """Writes a file.

    Args:
      path: the path. Its folder must exist.
      content: all that the file holds.
      what: the kind of the file, such as "a LiteRT model".
      signature: the bytes that tell the kind. A file may be overwritten if these are
        the same in it and in `content`, or if it is empty.
      overwrite: whether to replace a file of this kind.

    Raises:
      FileExistsError: if something is there that may not be replaced.
      OSError: if the file cannot be written; what was there stays.

    Example:
      >>> import tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "losses.json"
      >>> kind = dict(what="a report", signature=slice(0, 1))
      >>> write_file(path, b"{}", **kind, overwrite=False)
      >>> write_file(path, b'{"loss": 0.5}', **kind, overwrite=True)
      >>> path.read_text()
      '{"loss": 0.5}'
    """
    path = pathlib.Path(path)

    def is_one() -> bool:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            old = file.read(signature.stop)
        return not old or old[signature] == content[signature]

    check_target(path, what=what, is_one=is_one, overwrite=overwrite)
    target = _real(path)
    new = target.parent / f"{_NEW}-{_digest(target.name)}"
    with _removed_on_error(new):
        new.unlink(missing_ok=True)  # of a writer that was killed
        with new.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            _check_ours(new, os.fstat(file.fileno()))
        if target.exists():
            shutil.copymode(target, new)
        new.replace(target)
    _flush(target.parent)


def write_together(folder: pathlib.Path, contents: Mapping[str, Content]) -> None:
    """Writes files of one folder that belong together, over those that are there.

    Args:
      folder: the folder. It is made if it does not exist.
      contents: what the files hold, by name. Readers must find nothing to read where
        the first one is missing.

    Raises:
      OSError: if a file cannot be written; those that were there stay.
    """
    folder = _real(folder)
    new = folder / _NEW
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    with _removed_on_error(new, *made):
        folder.mkdir(parents=True, exist_ok=True)
        finish(folder)
        shutil.rmtree(new, ignore_errors=True)  # of a writer that was killed
        new.mkdir()
        status = new.stat()
        for name in contents:
            target = _real(folder / name)
            if target.parent.stat().st_dev != status.st_dev:
                raise OSError(
                    errno.EXDEV, "The file is a link to another file system", target
                )
        for name, content in contents.items():
            if callable(content):
                content(new / name)
            else:
                (new / name).write_bytes(content)
            _flush(new / name)
        (new / _NAMES).write_text("\n".join(contents))
        _flush(new / _NAMES)
        _flush(new)
        _check_ours(new, status)
        new.rename(folder / f"{_JOURNAL}-{uuid.uuid4().hex}")
    finish(folder)


def finish(folder: pathlib.Path) -> None:
    """Moves files into place that `write_together` was killed over.

    Raises:
      OSError: if they cannot be moved, as in a folder that is read-only.
    """
    folder = _real(folder)
    for journal in sorted(folder.glob(f"{_JOURNAL}-*")):
        with _locked(journal) as is_there:
            if is_there:
                if (journal / _NAMES).exists():
                    first, *others = (journal / _NAMES).read_text().split("\n")
                    _move_from(journal, folder, first, others)
                _remove_locked(journal)


def beside(path: epath.Path) -> epath.Path:
    """Where to write the folder that `replace_folder` puts at a path."""
    return path.parent / f"{_NEW}-{_digest(path.name)}"


def replace_folder(path: epath.Path) -> None:
    """Puts the folder that was written `beside` a path into the place of that there."""
    old = _old(path)
    # What was left by a kill.
    if old.exists():
        old.rmtree()
    # A folder cannot be replaced at once. Between the two steps nothing is at the
    # path, and both folders are beside it.
    path.rename(old)
    finish_folder(path)


def finish_folder(path: epath.Path) -> None:
    """Puts the new folder into place if `replace_folder` was killed over it."""
    old, new = _old(path), beside(path)
    # A reader may do the same at this moment.
    with contextlib.suppress(FileNotFoundError):
        if not path.exists() and old.exists() and new.exists():
            new.rename(path)
            old.rmtree()


def _move_from(
    journal: pathlib.Path, folder: pathlib.Path, first: str, others: list[str]
) -> None:
    """Moves files out of a journal into a folder, the first one last."""
    old = journal / f"{_OLD}-{first}"
    if not (journal / first).exists():
        return
    target = _real(folder / first)
    if target.exists() and not old.exists():
        target.rename(old)
        _flush(folder)
    for name in (*others, first):
        if (journal / name).exists():
            (journal / name).replace(_real(folder / name))
    _flush(folder)


@contextlib.contextmanager
def _locked(journal: pathlib.Path) -> Iterator[bool]:
    """Keeps other processes from a journal; whether it is still there.

    Renaming the journal would not do: a call that had found it under its old name goes
    on within it.
    """
    try:
        descriptor = os.open(journal / _LOCK, os.O_RDWR | os.O_CREAT)
    except FileNotFoundError:
        yield False  # Another process has moved all of it.
        return
    try:
        if sys.platform != "win32":  # which has no such lock
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        # The process that had the lock before may have removed it.
        yield _is_at(journal / _LOCK, os.fstat(descriptor))
    finally:
        os.close(descriptor)


def _remove_locked(journal: pathlib.Path) -> None:
    """Removes a journal, its lock last, so that no other process takes up the rest."""
    for path in journal.iterdir():
        if path.name != _LOCK:
            path.unlink()
    (journal / _LOCK).unlink()
    # A process that comes at this moment has a lock of its own, and removes the folder.
    with contextlib.suppress(OSError):
        journal.rmdir()


def followed(path: epath.Path) -> epath.Path:
    """The absolute path of a folder, with symbolic links followed."""
    path = path.expanduser().absolute()
    # Buckets have no links.
    return path if "://" in str(path) else type(path)(os.path.realpath(path))


def _old(path: epath.Path) -> epath.Path:
    return path.parent / f"{_OLD}-{_digest(path.name)}"


def _digest(name: str) -> str:
    # The name with an ending might be longer than a file system takes.
    return hashlib.sha256(name.encode()).hexdigest()[:16]


def _real(path: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(os.path.realpath(path))


def _flush(path: pathlib.Path) -> None:
    """Has the system write what it holds in memory of a file or folder."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders, and needs no flushing of them.
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_ours(path: pathlib.Path, status: os.stat_result) -> None:
    """Checks that no other process has put something else at a path."""
    if not _is_at(path, status):
        raise OSError(
            errno.EBUSY, "Another process writes to this place at the same time", path
        )


def _is_at(path: pathlib.Path, status: os.stat_result) -> bool:
    try:
        return os.path.samestat(path.stat(), status)
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _removed_on_error(*paths: pathlib.Path) -> Iterator[None]:
    """Removes a file or folder, and then folders if they are empty, on an error."""
    try:
        yield
    except BaseException:
        new, *folders = paths
        with contextlib.suppress(OSError):
            if new.is_dir():
                shutil.rmtree(new)
            else:
                new.unlink(missing_ok=True)
            for folder in folders:
                folder.rmdir()
        raise
