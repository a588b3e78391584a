"""What one format of saved params is."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Literal

from qwix_train.ptq.hugging_face.places import TensorMapping
from qwix_train.saved.contents import Contents


@dataclasses.dataclass(frozen=True)
class Format:
    """A format of saved params, as `inspect` and `convert` know it.

    Attributes:
      name: its name on the command line.
      what: what it is, for a sentence: "a folder of PEFT".
      holds: the kind of what is in it. Formats that hold the same are converted to each
        other.
      known_by: what is there if a path has this format, for a sentence: "*.tflite".
      is_one: whether something is at a path that has this format.
      describe: what is at a path, as text.
      read: reads what is at a path. The mapping is that of the caller, or None. None if
        there is nothing that another format could hold.
      write: writes that to a path; the last argument is whether it replaces what is
        there. None if it is not made of saved params.
      advice: what to call where `convert` cannot read or write it.
    """

    name: str
    what: str
    holds: Literal["params", "adapters", "a program"]
    known_by: str
    is_one: Callable[[pathlib.Path], bool]
    describe: Callable[[pathlib.Path], str]
    read: Callable[[pathlib.Path, TensorMapping | None], Contents] | None = None
    write: Callable[[pathlib.Path, Contents, bool], None] | None = None
    advice: str = ""
