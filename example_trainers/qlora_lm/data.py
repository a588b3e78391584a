"""Two kinds of text that ship with Python: its help texts, and its source code."""

import pathlib
import sysconfig

import numpy as np

from example_trainers import byte_text
from example_trainers.static_range import data as help_texts

# Modules that are one file in each supported version of Python.
TRAIN_MODULES = (
    "argparse ast base64 bdb calendar cmd code codecs colorsys compileall configparser "
    "contextlib copy csv dataclasses difflib dis doctest enum filecmp fileinput "
    "fnmatch fractions functools getopt gettext heapq hmac imaplib inspect ipaddress "
    "linecache mailbox mimetypes modulefinder netrc numbers operator optparse pickle "
    "pickletools plistlib poplib pprint profile pstats pty pyclbr pydoc queue quopri "
    "random reprlib runpy sched shelve shlex shutil smtplib socket socketserver ssl "
    "statistics string subprocess symtable tarfile threading timeit trace traceback "
    "tracemalloc types typing uuid warnings wave weakref webbrowser"
).split()
VALIDATION_MODULES = ("bz2", "ftplib", "gzip", "selectors", "tempfile")
TEST_MODULES = ("copyreg", "lzma", "pkgutil", "textwrap", "tokenize", "zipapp")


def load_prose() -> dict[str, np.ndarray]:
    """The help texts: `train`, `validation` and `test`, as bytes."""
    return help_texts.load_splits()


def load_code() -> dict[str, np.ndarray]:
    """The source of modules of the standard library, split by module, as bytes."""
    return byte_text.without_repetitions(
        {
            "test": [_source(name) for name in TEST_MODULES],
            "validation": [_source(name) for name in VALIDATION_MODULES],
            "train": [_source(name) for name in TRAIN_MODULES],
        }
    )


def _source(module: str) -> str:
    path = pathlib.Path(sysconfig.get_path("stdlib"), f"{module}.py")
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: this Python was installed without the source code "
            "of its standard library, which is what the example trains on."
        )
    return path.read_text(encoding="utf-8")
