"""Checkpoints of adapters alone, on Orbax.

It is a checkpoint of `ptq.save`, with arrays and a manifest with checksums, and
`ptq.restore` can read it. An `AdapterManifest`, in the metadata of the manifest under
``lora``, holds what only adapters have.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from etils import epath

from qwix_train.core.errors import located
from qwix_train.files import processes, writing
from qwix_train.lora import parts
from qwix_train.lora.layout import AdapterLayout
from qwix_train.lora.manifest import AdapterManifest
from qwix_train.lora.train_state import LoraTrainState, by_path
from qwix_train.planning import table as plan_table
from qwix_train.planning.rules import QuantizationRule, check_rules
from qwix_train.ptq import checkpoint

KEY = "lora"


def save(
    path: epath.PathLike,
    adapters: Any,
    *layouts: parts.Layouts,
    rules: Sequence[QuantizationRule] | None = None,
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Saves adapters without their base.

    Args:
      path: the folder to make. If a save is killed, nothing is there, or what was there
        before.
      adapters: a `LoraTrainState`; or adapters, with their layouts after them.
      *layouts: the layout of each adapter, unless there is a state.
      rules: the rules that the adapters were made by, for the manifest; those of the
        state if None.
      metadata: anything that JSON can hold, for the manifest.
      overwrite: whether to replace the adapters at the path, once all is written.

    Raises:
      FileExistsError: if adapters are at the path, and `overwrite` is not set; or if
        something else is there, such as a checkpoint of a base.
      TypeError: if layouts are missing, or `metadata` cannot be stored.
      ValueError: if the adapters do not fit the layouts.

    Example:
      >>> import jax
      >>> import pathlib, tempfile
      >>> from jax import numpy as jnp
      >>> from qwix_train.lora import LoraRule, init, read_manifest, restore, save
      >>> adapters, frozen, layouts = init(
      ...     {"kernel": jnp.ones((4, 2))}, lambda p, x: x @ p["kernel"],
      ...     [LoraRule(rank=1, alpha=2.0)], jax.random.key(0), jnp.ones((1, 4)),
      ... )
      >>> folder = pathlib.Path(tempfile.mkdtemp()) / "adapters"
      >>> save(folder, adapters, layouts, metadata={"step": 100})
      >>> restored = restore(folder, layouts)
      >>> (restored["kernel_lora_a"] == adapters["kernel_lora_a"]).all().item()
      True
      >>> read_manifest(folder).metadata
      {'step': 100}
    """
    parts.check_path(path, "lora.save(path, state)")
    if rules is None:
        is_state = isinstance(adapters, LoraTrainState)
        rules = adapters.provider.rules if is_state else ()
    adapters, known = parts.of_state(adapters, layouts, "lora.save")
    processes.check_same("The layouts of adapters", map(str, known.values()))
    target = writing.followed(epath.Path(path))
    processes.once(
        lambda: writing.check_target(
            target,
            what="a checkpoint of adapters",
            is_one=lambda: _is_one(target),
            overwrite=overwrite,
        )
    )
    manifest = AdapterManifest(known, check_rules(rules), {}, metadata)
    checkpoint.save(
        path, adapters, metadata={KEY: manifest.to_json()}, overwrite=overwrite
    )


def restore(path: epath.PathLike, target: Any = None, *, shardings: Any = None) -> Any:
    """Restores adapters, bit for bit.

    Args:
      path: the folder that `save` made.
      target: what the adapters are for: a `LoraTrainState`, or layouts. If None, all
        adapters are read as they are. Their layouts are in `read_manifest`.
      shardings: a `jax.sharding.Sharding` for all arrays, or nested dictionaries of
        shardings, where one is for all below it. Without it those of the adapters of
        the state count; where there are none, arrays go where JAX puts new ones.

    Returns:
      The adapters; for a state the state with them, its optimizer state as it is.

    Raises:
      FileNotFoundError: if nothing is at the path.
      TypeError: if `path` is not a path, or `target` is neither a state nor layouts.
      ValueError: if there is no checkpoint of adapters, or it is damaged, or the
        adapters are of another model, rank or scaling. The message names the params.
    """
    parts.check_path(path, "lora.restore(path, state)")
    manifest = read_manifest(path)
    if target is None:
        return checkpoint.restore(path, shardings=shardings)
    is_state = isinstance(target, LoraTrainState)
    layouts = parts.layouts_of(target)
    _check_same(epath.Path(path), manifest.layouts, layouts)
    if not is_state:
        return checkpoint.restore(path, shardings=shardings)
    if shardings is None:
        shardings = jax.tree.map(
            lambda x: getattr(x, "sharding", None),
            target.params,
            is_leaf=lambda x: not isinstance(x, Mapping),
        )
    found = by_path(checkpoint.restore(path, shardings=shardings))
    wanted = [key for layout in layouts.values() for key in layout.shapes]
    return target.replace(params=parts.tree_of({key: found[key] for key in wanted}))


def read_manifest(path: epath.PathLike) -> AdapterManifest:
    """Reads what a checkpoint of adapters says about them, and no arrays.

    Args:
      path: the folder that `save` made.

    Raises:
      FileNotFoundError: if nothing is at the path.
      ValueError: if there is no manifest of adapters, or it was changed.
    """
    parts.check_path(path, "lora.read_manifest(path)")
    whole = checkpoint.read_manifest(path)
    record = (whole.metadata or {}).get(KEY)
    if record is None:
        raise ValueError(
            f"{path} holds params, and no adapters that lora.save wrote. Read them "
            "with ptq.restore."
        )
    with located(f"The manifest of {path} is refused", "."):
        return AdapterManifest.from_json(record, whole.versions)


def _is_one(path: epath.Path) -> bool:
    try:
        read_manifest(path)
    except ValueError:
        return False
    return True


def _check_same(path: epath.Path, have: parts.Layouts, want: parts.Layouts) -> None:
    """Complains of layouts in a checkpoint that are not the model's."""
    problems = {
        "Without adapter in the checkpoint": parts.without(want, have),
        "Without adapter in the model": parts.without(have, want),
        "Of other shapes": [
            f"{'/'.join(param)} {have[param].shape}, and {layout.shape} in the model"
            for param, layout in want.items()
            if param in have and have[param].shape != layout.shape
        ],
    }
    if said := parts.listed(problems):
        raise ValueError(
            f"The adapters at {path} are for another model, or were made by rules that "
            f"match other weights. {said}"
        )
    different = [
        f"{'/'.join(param)}: {_different(have[param], layout)}"
        for param, layout in want.items()
        if _comparable(have[param]) != _comparable(layout)
    ]
    if different:
        raise ValueError(
            f"The adapters at {path} are of another kind than the model's: "
            f"{plan_table.some(different, 3)}. Make the model with the rules that "
            "they were made by, lora.read_manifest(path).rules; or restore them "
            "without a target, and fit them to a larger rank with lora.AdapterSet."
        )


def _comparable(layout: AdapterLayout) -> AdapterLayout:
    # Which ops read the param does not matter where the axes are the same.
    return dataclasses.replace(layout, op="", particulars=())


def _different(have: AdapterLayout, want: AdapterLayout) -> str:
    """The fields in which two layouts differ."""
    pairs = {
        name: (getattr(have, name), getattr(want, name))
        for name in ("rank", "alpha", "scaling", "dora", "a_shape", "b_shape")
    }
    found = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    found = found or {"axes": (have.a_axes + have.b_axes, want.a_axes + want.b_axes)}
    return ", ".join(f"{k} {a} and {b} in the model" for k, (a, b) in found.items())
