"""Adapters in the files of Hugging Face's PEFT.

They are a folder with ``adapter_model.safetensors`` and ``adapter_config.json``, as
``PeftModel.save_pretrained`` writes it and ``PeftModel.from_pretrained`` reads it, for
LoRA on Linear, Conv and Embedding layers. See `peft_tensors` for the tensors.

Names: by default, the adapter of the param ``decoder/proj/kernel`` is that of the
PyTorch module ``decoder.proj``. A last ``kernel`` or ``embedding`` is left out. Layers
that are stacked in one param, as under `nn.scan`, are separate modules, with their
number behind the first part of the path: ``layers/proj/kernel`` is ``layers.0.proj``,
``layers.1.proj`` and so on. `names` gives other names, with ``{layer}`` for the number.

An adapter is refused if PEFT would compute something else with it: the adapter of a
table which is also the head of the model (PEFT adapts only the lookup), of a
convolution with groups or dilation, or of a stack of experts.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
import pathlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jax import numpy as jnp

from qwix_train.core.errors import located
from qwix_train.files import json_text, processes, writing
from qwix_train.lora import parts, peft_config, peft_tensors
from qwix_train.lora.adapter_set import fitted
from qwix_train.lora.layout import AdapterLayout
from qwix_train.lora.train_state import LoraTrainState, by_path
from qwix_train.planning import table as plan_table
from qwix_train.planning.plan import Path
from qwix_train.ptq import safetensors_files
from qwix_train.values import stored

Names = Callable[[str], str] | Mapping[str, str]
"""The name of the module of a param, from its path, such as ``"head/kernel"``."""

FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_OTHER = "adapter_model.bin"
# The tuner of a `PeftModel`, and the model of the tuner.
_PREFIX = "base_model.model."
_LAYER = "{layer}"
_PART = ".lora_"
_AGAIN = f"{peft_tensors.MAGNITUDE}.weight"


def save_peft(
    directory: str | pathlib.Path,
    adapters: Any,
    *layouts: parts.Layouts,
    names: Names | None = None,
    config: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes adapters as PEFT does.

    If a save is killed, the files that were there stay, or nothing is left that readers
    take for adapters. With several processes, all call this, and the first writes.

    The adapters fit the base that they were trained with. With `init="pissa"` or
    `"loftq"` this is `LoraTrainState.frozen`, not the original model.

    Args:
      directory: the folder, made if it does not exist.
      adapters: a `LoraTrainState`; or adapters, with their layouts after them.
      *layouts: the layout of each adapter, unless there is a state.
      names: the name of the PyTorch module of each param, by the path of the param, or
        a function of the path. By default `a/kernel` belongs to the module `a`; see
        `qwix_train.lora.peft`.
      config: more entries for `adapter_config.json`, such as `task_type`,
        `lora_dropout` or `base_model_name_or_path`.
      overwrite: whether to replace the adapters that are there.

    Raises:
      FileExistsError: if there are adapters and `overwrite` is not set, or other files
        that readers would take for adapters.
      ImportError: if `safetensors` is not installed.
      TypeError: if layouts are missing.
      ValueError: if PEFT cannot hold an adapter, or computes something else with it; if
        two have one name. The message has the path of the param.

    Example:
      >>> import jax
      >>> import tempfile
      >>> from jax import numpy as jnp
      >>> from qwix_train.lora import LoraRule, init, load_peft, save_peft
      >>> adapters, frozen, layouts = init(
      ...     {"proj": {"kernel": jnp.ones((4, 2))}},
      ...     lambda params, x: x @ params["proj"]["kernel"],
      ...     [LoraRule(rank=1, alpha=2.0)], jax.random.key(0), jnp.ones((1, 4)),
      ... )
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_peft(folder, adapters, layouts, config={"task_type": "CAUSAL_LM"})
      ...     again = load_peft(folder, layouts)
      >>> jax.tree.map(lambda x, y: bool((x == y).all()), again, adapters)
      {'proj': {'kernel_lora_a': True, 'kernel_lora_b': True}}
    """
    parts.check_path(directory, "lora.save_peft(directory, state)")
    adapters, known = parts.of_state(adapters, layouts, "lora.save_peft")
    processes.check_same("The layouts of adapters", map(str, known.values()))
    held = parts.checked(adapters, known)
    modules: dict[str, AdapterLayout] = {}
    tensors: dict[str, np.ndarray] = {}
    for layout in known.values():
        peft_tensors.check(layout)
        arrays = processes.whole(parts.arrays_of(layout, held))
        encode = functools.partial(peft_tensors.encode, layout, arrays)
        entries = processes.together(encode)
        for module, entry in zip(_modules(layout, names), entries, strict=True):
            _add_module(modules, module, layout)
            tensors |= {f"{_PREFIX}{module}.{name}": x for name, x in entry.items()}
    if not modules:
        raise ValueError("There are no adapters to save.")
    record = {**peft_config.make(modules), **(config or {})}
    text = json_text.dump(record, "config", indent=2, sort_keys=True) + "\n"
    meaning = peft_config.meaning(json_text.parse(text, "config"))
    metadata = {"format": "pt", **safetensors_files.config_metadata(meaning)}
    folder = pathlib.Path(directory)

    def write() -> None:
        writing.finish(folder)
        _check_folder(folder, overwrite)
        contents: dict[str, writing.Content] = {
            FILE: lambda file: safetensors_files.write_file(file, tensors, metadata),
            CONFIG: text.encode(),
        }
        writing.write_together(folder, contents)

    processes.once(write)


def load_peft(
    directory: str | pathlib.Path,
    target: Any,
    *,
    names: Names | None = None,
    pad: bool = False,
) -> Any:
    """Reads adapters that PEFT, or `save_peft`, wrote.

    PEFT puts tables that it adapts, and the head of a model, into its files, as they
    are in its base. These are not read. Those of params with an adapter must equal the
    base of the state, and there is a warning of the others.

    Args:
      directory: the folder.
      target: what the adapters are for: a `LoraTrainState`, or layouts.
      names: see `save_peft`.
      pad: whether adapters of a smaller rank, or of another scaling, are fitted to the
        target, as in an `AdapterSet`. An error otherwise.

    Returns:
      The adapters, in the dtype of the file; for a state the state with them, its
      optimizer state as it is.

    Raises:
      FileNotFoundError: if there are no such files.
      ImportError: if `safetensors` is not installed.
      TypeError: if `target` is neither.
      ValueError: if the config has an option that is not supported; if adapters are
        missing, belong to no param, or have another shape, rank or scaling; or if
        weights of the base in the file differ from the state's. The message names them.
    """
    is_state = isinstance(target, LoraTrainState)
    parts.check_path(directory, "lora.load_peft(directory, state)")
    layouts = parts.layouts_of(target)
    directory = pathlib.Path(directory)
    config, tensors = _read(directory)
    own: dict[Path, AdapterLayout] = {}
    found: dict[Path, Any] = {}
    problems: list[str] = []
    for path, layout in layouts.items():
        peft_tensors.check(layout)
        modules = _modules(layout, names)
        entries = [_take(tensors, module, layout, problems) for module in modules]
        if not all(entries):
            continue
        own[path] = _own_layout(layout, modules, entries, config)
        if wrong := _of_other_shapes(own[path], modules, entries):
            problems.append(wrong)
            continue
        arrays = peft_tensors.decode(own[path], entries)
        found |= dict(zip(own[path].shapes, arrays, strict=True))
    unread = _check_base(tensors, layouts, names, target if is_state else None)
    if tensors:
        problems.append(
            f"Of no adapter of the model: {plan_table.some(sorted(tensors), 3)}."
        )
    if problems:
        raise ValueError(
            f"The adapters in {directory} are not the model's. "
            f"{' '.join(problems[:4])} Modules are named by `names`, and get adapters "
            "by the rules of the model."
        )
    if unread:
        warnings.warn(
            f"{directory / FILE} holds weights of the base, too, which are not read, "
            f"and could not be held against the model's: {plan_table.some(unread, 3)}.",
            stacklevel=2,
        )
    if not pad:
        _check_same(directory, own, layouts)
    adapters = (
        fitted(parts.tree_of(found), own, layouts) if pad else parts.tree_of(found)
    )
    return target.replace(params=adapters) if is_state else adapters


def read_layouts(
    directory: str | pathlib.Path, path_of: Callable[[str], str | None]
) -> dict[str, AdapterLayout]:
    """The layouts of the adapters in a folder, by the name of their module.

    Args:
      directory: the folder.
      path_of: gives the path of the param of a module. If it gives None, a module
        ``decoder.proj`` has the param ``decoder/proj/kernel``, or, if it is a table,
        ``decoder/proj/embedding``.

    Raises:
      FileNotFoundError: if there are no such files.
      ImportError: if `safetensors` is not installed.
      ValueError: if the config has an option that is not supported, two modules have
        the same param, or a module lacks a tensor.
    """
    config, tensors = _read(pathlib.Path(directory))
    modules: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in tensors.items():
        module, of_adapter, part = name.rpartition(_PART)
        if of_adapter:
            # PEFT has the magnitude of a table by another name, too.
            part = f"{_PART[1:]}{part}"
            part = peft_tensors.MAGNITUDE if part == _AGAIN else part
            modules.setdefault(module, {})[part] = tensor
    layouts: dict[str, AdapterLayout] = {}
    for module, found in modules.items():
        path = path_of(module)
        names = None if path is None else tuple(path.split("/"))
        layouts[module] = peft_tensors.layout_of(names, module, found, config)
    by_param = {layout.path for layout in layouts.values()}
    if len(by_param) < len(layouts):
        raise ValueError(
            f"Several modules in {directory} would have the adapter of one param: "
            f"{plan_table.some(sorted(layouts), 3)}. Pass `names` that tell them apart."
        )
    return layouts


def _check_folder(folder: pathlib.Path, overwrite: bool) -> None:
    """Checks that adapters may be written to a folder."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file, and a folder is to be written.")
    if (folder / _OTHER).exists():
        raise FileExistsError(
            f"{folder} holds adapters in {_OTHER}, which this package does not write. "
            "Remove it, or pass another folder."
        )

    def is_one() -> bool:
        file = folder / CONFIG
        return file.exists() and "peft_type" in json_text.read(file)

    for name in (FILE, CONFIG):
        writing.check_target(
            folder / name, what="of adapters", is_one=is_one, overwrite=overwrite
        )


def _read(directory: pathlib.Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    writing.finish(directory)
    for name in (CONFIG, FILE):
        if not (directory / name).exists():
            raise FileNotFoundError(f"There is no {name} in {directory}.")
    config = json_text.read(directory / CONFIG)
    with located(str(directory / CONFIG), "."):
        peft_config.check(config)
    tensors, metadata = safetensors_files.read_file(directory / FILE)
    meaning = peft_config.meaning(config)
    safetensors_files.check_config(metadata, meaning, directory / CONFIG)
    return config, {name.removeprefix(_PREFIX): x for name, x in tensors.items()}


def _modules(layout: AdapterLayout, names: Names | None) -> list[str]:
    """The names of the modules of a param, one for each of its stacked layers."""
    path = "/".join(layout.path)
    if names is None:
        name = _default_name(layout)
    elif callable(names):
        name = names(path)
    else:
        if path not in names:
            raise ValueError(
                f"`names` has no module for {path!r}. Give one for each param that has "
                "an adapter."
            )
        name = names[path]
    if not isinstance(name, str) or not name:
        raise ValueError(
            f"The module of {path!r} has no name: {name!r}. Pass `names`, since PEFT "
            "adapts modules within a model."
        )
    if layout.layers and _LAYER not in name:
        raise ValueError(
            f"{path!r} holds {len(peft_tensors.indices(layout))} stacked layers, and "
            f"its module is named {name!r}. Put {_LAYER} where the number of the layer "
            "is."
        )
    if not layout.layers:
        return [name]
    return [
        name.replace(_LAYER, ".".join(map(str, index)))
        for index in peft_tensors.indices(layout)
    ]


def _default_name(layout: AdapterLayout) -> str:
    names = list(layout.path)
    if names[-1] in ("kernel", "embedding"):
        names.pop()
    if layout.layers and names:
        names.insert(1, _LAYER)
    return ".".join(names)


def _add_module(
    modules: dict[str, AdapterLayout], module: str, layout: AdapterLayout
) -> None:
    if module in modules:
        both = (modules[module].path, layout.path)
        one, other = ("/".join(path) for path in both)
        raise ValueError(
            f"The adapters of {one!r} and {other!r} would both be those of the module "
            f"{module!r}. Pass `names`."
        )
    modules[module] = layout


def _take(
    tensors: dict[str, np.ndarray],
    module: str,
    layout: AdapterLayout,
    problems: list[str],
) -> dict[str, np.ndarray]:
    """Takes the tensors of a module out of those of a file."""
    plain = peft_tensors.names_of(layout)[:2]
    missing = [name for name in plain if f"{module}.{name}" not in tensors]
    if missing:
        problems.append(
            f"For {'/'.join(layout.path)} there is no {module}.{missing[0]}."
        )
        return {}
    held = [*plain, peft_tensors.MAGNITUDE]
    keys = {name: f"{module}.{name}" for name in held}
    # PEFT writes a table with all below it, and so its magnitude by both of its names.
    magnitude = keys[peft_tensors.MAGNITUDE]
    if (again := tensors.pop(f"{magnitude}.weight", None)) is not None:
        tensors.setdefault(magnitude, again)
    return {name: tensors.pop(key) for name, key in keys.items() if key in tensors}


def _check_base(
    tensors: dict[str, np.ndarray],
    layouts: parts.Layouts,
    names: Names | None,
    state: LoraTrainState | None,
) -> list[str]:
    """Takes weights of the base out of the tensors of a file.

    Args:
      tensors: what is left of a file.
      layouts: the layouts of the model.
      names: see `save_peft`.
      state: where the weights of the base are, if anywhere.

    Returns:
      The names of those that were not compared.

    Raises:
      ValueError: if one is another than the state's.
    """
    base = {} if state is None else by_path(state.frozen)
    for path, layout in layouts.items():
        for index, module in enumerate(_modules(layout, names)):
            key, param = f"{module}.base_layer.weight", base.get(path)
            if key not in tensors or param is None or stored.is_quantized(param):
                continue
            theirs, ours = tensors.pop(key), peft_tensors.weights(layout, param)[index]
            kinds = (theirs.dtype, ours.dtype)
            rounding = max(float(jnp.finfo(kind).eps) for kind in kinds)
            if theirs.shape != ours.shape or not np.allclose(
                np.float32(theirs), np.float32(ours), rtol=rounding, atol=1e-6
            ):
                raise ValueError(
                    f"The file holds {key} of shape {theirs.shape}, which is not "
                    f"{'/'.join(path)} {layout.shape} of state.frozen: the adapters "
                    "were trained with another base. Make the state with that."
                )
    unread = [name for name in tensors if name.endswith((".weight", ".bias"))]
    unread = [name for name in unread if ".lora_" not in name]
    for name in unread:
        del tensors[name]
    return sorted(unread)


def _own_layout(
    layout: AdapterLayout,
    modules: list[str],
    entries: list[dict[str, np.ndarray]],
    config: Mapping[str, Any],
) -> AdapterLayout:
    """The layout that an adapter in a file has."""
    first, *_ = peft_tensors.names_of(layout)
    settings = {
        (len(x[first]), peft_config.alpha_of(config, module), len(x) > 2)
        for module, x in zip(modules, entries, strict=True)
    }
    if len(settings) > 1:
        raise ValueError(
            f"The layers of {'/'.join(layout.path)!r} are stacked, and their adapters "
            f"differ in rank, alpha or magnitude: {sorted(settings)}. Load them into a "
            "model whose layers are not stacked."
        )
    ((rank, alpha, dora),) = settings
    scaling = peft_config.scaling_of(config, alpha, rank)
    if math.isclose(scaling, layout.scaling):
        scaling = layout.scaling
    return dataclasses.replace(
        layout, rank=rank, alpha=alpha, scaling=scaling, dora=dora
    )


def _of_other_shapes(
    layout: AdapterLayout, modules: list[str], entries: list[dict[str, np.ndarray]]
) -> str:
    """Says which tensors of a param do not have the shapes of its layout."""
    shapes = peft_tensors.shapes_of(layout)
    for module, entry in zip(modules, entries, strict=True):
        for name, array in entry.items():
            if array.shape != shapes[name]:
                return (
                    f"{module}.{name} has shape {array.shape}, and {shapes[name]} fits "
                    f"{'/'.join(layout.path)} {layout.shape}."
                )
    return ""


def _check_same(
    directory: pathlib.Path, own: parts.Layouts, layouts: parts.Layouts
) -> None:
    def said(layout):
        dora = ", DoRA" if layout.dora else ""
        return f"rank {layout.rank}, scaling {layout.scaling:g}{dora}"

    settings = operator.attrgetter("rank", "scaling", "dora")
    different = [
        f"{'/'.join(path)}: {said(own[path])}, and {said(layout)} in the model"
        for path, layout in layouts.items()
        if settings(own[path]) != settings(layout)
    ]
    if different:
        raise ValueError(
            f"The adapters in {directory} are of another kind than the model's: "
            f"{plan_table.some(different, 3)}. Make the model with rules of that rank "
            "and alpha; or pass pad=True, which fits them to a larger rank."
        )
