"""Names of a package that are imported when they are first used.

`import qwix_train` then costs what every program needs, and LiteRT export, adapters or
files cost only the programs that use them. See PEP 562 for functions of modules.
"""

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def late_names(
    package: str, names: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Returns what a package uses as its `__getattr__` and `__dir__`.

    A name must not be that of a submodule, other than that submodule itself: importing
    the submodule would put it in the place of the name.

    Args:
      package: the name of the package, which imports none of this itself.
      names: by submodule, the names that the package has from it. The submodules are
        themselves names of the package.

    Example:
      >>> import qwix_train
      >>> "lora" in dir(qwix_train), qwix_train.lora.__name__
      (True, 'qwix_train.lora')
    """
    owners = {name: module for module, of_it in names.items() for name in of_it}

    def get(name: str) -> Any:
        if name == "__all__":  # `from package import *` asks for it.
            return [public for public in list_names() if not public.startswith("_")]
        if name not in names and name not in owners:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = importlib.import_module(f"{package}.{owners.get(name, name)}")
        value = getattr(module, name) if name in owners else module
        setattr(sys.modules[package], name, value)
        return value

    def list_names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *names, *owners})

    return get, list_names
