"""Which modules of `qwix` there are, and how Python finds ours in their place."""

from __future__ import annotations

import importlib
import importlib.abc
import sys
from types import ModuleType

_OURS = "qwix_train.like_qwix"

MODULES = {
    "qwix": f"{_OURS}.names",
    "qwix.contrib": f"{_OURS}.contrib",
    "qwix.contrib.awq": f"{_OURS}.contrib.awq",
    "qwix.contrib.calibration": f"{_OURS}.contrib.calibration",
    "qwix.contrib.gptq": f"{_OURS}.contrib.gptq",
    "qwix.contrib.hadamard_rot": f"{_OURS}.contrib.hadamard_rot",
    "qwix.contrib.padded_ptq": f"{_OURS}.contrib.padded_ptq",
    "qwix.contrib.smooth_quant": f"{_OURS}.contrib.smooth_quant",
    "qwix.pallas": f"{_OURS}.pallas",
}
"""The modules of `qwix`, and ours in their place."""

PRIVATE = {
    "qwix._src": f"{_OURS}.private",
    "qwix._src.core": f"{_OURS}.private",
    "qwix._src.core.dot_general_qt": f"{_OURS}.private",
    "qwix._src.core.numerics": f"{_OURS}.private",
    "qwix._src.core.sparsity": f"{_OURS}.private",
    "qwix._src.interception": f"{_OURS}.private",
    "qwix._src.utils": f"{_OURS}.private",
    "qwix._src.utils.flax_util": f"{_OURS}.flax_util",
    "qwix.contrib.sparsity": f"{_OURS}.private",
    "qwix.contrib.sparsity.sparsity_module": f"{_OURS}.private",
    "qwix.flax_util": f"{_OURS}.flax_util",
}
"""Private modules of `qwix` that clients import from, and ours; see `private`."""

NEAREST = {
    "qwix._src": "the public names of qwix",
    "qwix.contrib.awq_core": "qwix_train.ptq.Awq",
    "qwix.contrib.gptq_core": "qwix_train.ptq.Gptq",
    "qwix.contrib.hijax": "qwix_train.quantize_fn",
    "qwix.contrib.kernels": "qwix_train.dot_general, or qwix.pallas",
    "qwix.contrib.qep": "qwix_train.ptq.Gptq",
    "qwix.contrib.qep_core": "qwix_train.ptq.Gptq",
    "qwix.contrib.sparsity": "nothing: there is no structured sparsity",
    "qwix.version": "qwix.__version__",
}
"""What is nearest to other modules of `qwix`."""


def install() -> None:
    """Puts the modules where Python looks for those of `qwix`.

    Raises:
      ImportError: if `qwix` itself was imported already.
    """
    other = sys.modules.get("qwix")
    if other is not None and other.__name__ != MODULES["qwix"]:
        where = getattr(other, "__file__", None) or "an unknown file"
        raise ImportError(
            f"qwix was imported already, from {where}, and what imported it has kept "
            "it. Import qwix_train.as_qwix first, at the top of the program."
        )
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    modules = {**MODULES, **PRIVATE}
    ours = {name: importlib.import_module(target) for name, target in modules.items()}
    for name, module in ours.items():
        sys.modules[name] = module
        # So that an import of what is not there asks the finder, which explains.
        if not hasattr(module, "__path__"):
            module.__path__ = []
        owner, _, attribute = name.rpartition(".")
        if owner:
            setattr(ours[owner], attribute, module)


class _Finder(importlib.abc.MetaPathFinder):
    """Says of modules of `qwix` that are not here which of ours are nearest."""

    def find_spec(
        self, fullname: str, path: object = None, target: ModuleType | None = None
    ) -> None:
        """See `importlib.abc.MetaPathFinder.find_spec`.

        Raises:
          ModuleNotFoundError: for what is in `qwix`.
        """
        del path, target
        if fullname.startswith("qwix."):
            raise ModuleNotFoundError(explained(fullname), name=fullname)


def explained(name: str) -> str:
    """Says why a module of `qwix` is not here, and what is nearest.

    Args:
      name: its name.

    Example:
      >>> explained("qwix.contrib.qep")
      "qwix_train.as_qwix has no 'qwix.contrib.qep'. Nearest is qwix_train.ptq.Gptq."
    """
    owner = name
    while owner not in NEAREST and "." in owner:
        owner = owner.rpartition(".")[0]
    nearest = NEAREST.get(owner, f"one of {', '.join(MODULES)}")
    return f"qwix_train.as_qwix has no {name!r}. Nearest is {nearest}."
