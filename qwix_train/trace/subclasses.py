"""Subclasses that pass for the class of a user's module."""

from __future__ import annotations

from typing import Any

ORIGINAL = "_qwix_train_original"
"""The attribute in which the class of a quantized model keeps the user's."""


WITHIN = "_qwix_train_within"
"""The method by which a quantized model says what another mode does to its calls."""


MODE = "_qwix_train_mode"
"""The attribute in which the class of a quantized model keeps its provider, and the
names of the methods that it runs."""


IN_FLOAT = "_qwix_train_in_float"
"""The attribute that marks the class of a model whose calls stay in float."""


def in_float(model: Any) -> bool:
    """Whether the calls of a model stay in float."""
    return getattr(type(model), IN_FLOAT, False)


def mode(model: Any) -> tuple[Any, tuple[str, ...]] | None:
    """The provider of a quantized model and the methods that it runs, or None."""
    return getattr(type(model), MODE, None)


def within(model: Any, rewrite: Any) -> Any:
    """What a mode does to a call of a model, which may be quantized itself.

    Args:
      model: the model.
      rewrite: what the mode does to a call of a model that is not.
    """
    # From the class, since a model may have a `__getattr__` of its own.
    of_model = getattr(type(model), WITHIN, None)
    return rewrite if of_model is None else of_model(model, rewrite)


def original(cls: type) -> type:
    """The user's own class of a model, which may be quantized."""
    return getattr(cls, ORIGINAL, cls)


def subclass(cls: type, root: type, fields: dict[str, Any], **keywords: Any) -> type:
    """A subclass of a module's class, under the same name.

    The author's own `__init_subclass__` is not called: it may want arguments, or keep
    a register of models, in which this class has no place.

    Args:
      cls: the class.
      root: the class of the library that `cls` descends from, whose
        `__init_subclass__` is called.
      fields: the attributes of the subclass.
      **keywords: arguments for the `__init_subclass__` of `root`.
    """
    names = ("__doc__", "__module__", "__qualname__")
    namespace = {name: getattr(cls, name) for name in names} | fields
    bases: tuple[type, ...] = (cls,)
    inherited = _function(root)
    if _function(cls) is not inherited:
        # Derived from `root`, so that an object of `cls` can change to the new class:
        # both then have the same layout in memory.
        class Quiet(root):
            def __init_subclass__(cls, **kwargs):
                inherited(cls, **kwargs)

        bases = (Quiet, cls)
    return type(cls)(cls.__name__, bases, namespace, **keywords)


def _function(cls: type) -> Any:
    return getattr(cls.__init_subclass__, "__func__", None)
