"""Checkpoints of quantized params, on Orbax.

A checkpoint is a folder that Orbax writes and commits at once, with two items:
``arrays``, nested dicts as the params are, each param a dict of its arrays
(``qvalue``, ``scale``, ``zero_point``, or ``value``), codes packed; and ``manifest``,
the JSON of a `Manifest`. Any Orbax reader can read both.

Orbax's own checkpointers, such as `StandardCheckpointer`, take quantized params, too,
but without packing, checks and manifest. They do not take ``nf4``, whose codes are
uint4, a type that TensorStore lacks.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
from etils import epath
from flax import nnx, traverse_util

from qwix_train.core import numerics
from qwix_train.core.errors import located
from qwix_train.core.records import to_record
from qwix_train.files import json_text, processes, writing
from qwix_train.planning import table as plan_table
from qwix_train.planning.leaves import Leaf
from qwix_train.planning.plan import Plan
from qwix_train.planning.rules import QuantizationRule, check_rules
from qwix_train.ptq import given_shardings, stored_arrays, trees
from qwix_train.ptq.manifest import (
    Manifest,
    StoredParam,
    param_to_json,
    rule_to_json,
)

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

MANIFEST = "manifest"
ITEMS = (stored_arrays.ITEM, MANIFEST)
"""The folders in a checkpoint."""


def save(
    path: epath.PathLike,
    params: Any,
    *,
    rules: Sequence[QuantizationRule] = (),
    plan: Plan | None = None,
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Saves quantized params.

    Codes of fewer than 8 bits are packed, on the devices that hold them. If a save is
    killed, nothing is at the path, or what was there before.

    Args:
        path: The folder to make.
        params: Nested dicts whose leaves are arrays, sharded or not, `QArray` or
            `WithAux`; or an NNX module, of which all but the random state is saved.
            Of boxes such as `flax.linen.Partitioned`, only the contents are stored.
            Empty dicts, and the ``noise_fn`` of a ``how``, are not stored.
        rules: The rules that the params were quantized by, for the manifest.
        plan: The plan of the quantized model, for the manifest.
        metadata: Anything that JSON can hold, for the manifest.
        overwrite: Whether to replace the checkpoint at the path, once all is written.

    Raises:
        FileExistsError: A checkpoint is at the path, and ``overwrite`` is not set; or
            something else is there.
        TypeError: A leaf, or ``metadata``, cannot be stored.
        ValueError: Codes are not of their type, or of a type that neither the rules nor
            the plan ask for; scales are negative or not finite; or two paths are equal
            when their keys are written as text. The message names the params. Or
            ``metadata`` is nested too deeply.

    >>> import jax.numpy as jnp
    >>> import pathlib, tempfile
    >>> from qwix_train import QuantizationRule
    >>> from qwix_train.core import qarray
    >>> from qwix_train.ptq import restore, save
    >>> how = qarray.HowToQuantize(qtype='int4', channelwise_axes=(1,))
    >>> kernel = qarray.quantize_array(jnp.ones((16, 64)), how)
    >>> params = {'Dense_0': {'kernel': qarray.WithAux(kernel, how)}}
    >>> folder = pathlib.Path(tempfile.mkdtemp()) / 'int4'
    >>> save(folder, params, rules=[QuantizationRule(weight_qtype='int4')])
    >>> restored = restore(folder)['Dense_0']['kernel']
    >>> restored.how == how, (restored.array.qvalue == kernel.qvalue).all().item()
    (True, True)
    """
    save_async(
        path,
        params,
        rules=rules,
        plan=plan,
        metadata=metadata,
        overwrite=overwrite,
    ).wait_until_finished()


def save_async(
    path: epath.PathLike,
    params: Any,
    *,
    rules: Sequence[QuantizationRule] = (),
    plan: Plan | None = None,
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> PendingSave:
    """Saves quantized params in the background.

    It returns when the arrays are packed and copied to the host. Then you may donate or
    change the params. Wait for the save before the process ends: otherwise Python stops
    the threads that write, and there is no checkpoint.

    Args:
        path: As in `save`.
        params: As in `save`.
        rules: As in `save`.
        plan: As in `save`.
        metadata: As in `save`.
        overwrite: As in `save`.

    Returns:
        The save. Its ``wait_until_finished()`` raises the error of the writer, if any.

    Raises:
        FileExistsError, TypeError, ValueError: As in `save`.

    >>> import jax.numpy as jnp
    >>> import pathlib, tempfile
    >>> from qwix_train.ptq import restore, save_async
    >>> folder = pathlib.Path(tempfile.mkdtemp()) / 'step_10'
    >>> pending = save_async(folder, {'bias': jnp.ones(3)})
    >>> pending.wait_until_finished()
    >>> restore(folder)['bias'].tolist()
    [1.0, 1.0, 1.0]
    """
    # Late, as the import takes long, and models in memory do not need it.
    import orbax.checkpoint as ocp

    path = writing.followed(epath.Path(path))
    # All processes have to find the same there.
    processes.once(lambda: _check_target(path, overwrite))
    exists = processes.agreed(path.exists())
    held, rules = processes.together(lambda: _checked(params, rules, plan))
    check_same_rules(rules)
    _check_same_params(map(stored_arrays.described, held))
    arrays, records = processes.together(lambda: stored_arrays.to_arrays(held))
    # What is not sharded may differ, and one process writes it.
    _check_same_params(records)
    manifest = Manifest(
        params=records,
        rules=rules,
        plan=None if plan is None else plan.records(),
        metadata=metadata,
    )
    record = manifest.to_json()
    # Orbax removes what is there before it writes. Here that stays until the end.
    target = writing.beside(path) if exists else path
    checkpointer = ocp.AsyncCheckpointer(
        ocp.CompositeCheckpointHandler(),
        # A folder that cannot be made is an error here, not a timeout of the writers.
        async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
    )
    items = {
        stored_arrays.ITEM: ocp.args.PyTreeSave(arrays),
        MANIFEST: ocp.args.JsonSave(record),
    }
    checkpointer.save(target, args=ocp.args.Composite(**items), force=exists)
    executor = concurrent.futures.ThreadPoolExecutor(1)
    future = executor.submit(_finish, checkpointer, target, path)
    executor.shutdown(wait=False)
    return PendingSave(path, future)


def restore(
    path: epath.PathLike, abstract: Any = None, *, shardings: Any = None
) -> Any:
    """Restores quantized params, bit for bit.

    Args:
        path: The folder that `save` made.
        abstract: The params of the model that will use them, as `abstract_params`
            gives them, or concrete ones. The result has their structure, boxes
            included. For an NNX module, which may be abstract, the result is a copy of
            the module with the params. With None the result has the structure of the
            checkpoint, as nested dicts.
        shardings: A `jax.sharding.Sharding` for all params, or nested dicts of
            shardings. Each is for all params below its path. Scales and zero
            points are sharded as their codes are, except along axes where they have 1
            entry, or that the mesh does not divide. If None, the shardings of
            ``abstract`` count. An array without a sharding goes where JAX puts new
            arrays: to the default device or, under ``jax.set_mesh``, to all.

    Returns:
        The params.

    Raises:
        FileNotFoundError: Nothing is at the path.
        ValueError: The path holds no such checkpoint, or one that is incomplete, was
            changed, or is for another model; or a sharding does not divide its param,
            or has none. The message names the path and the params.
        TypeError: ``shardings`` holds something else, such as a `PartitionSpec`.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import pathlib, tempfile
    >>> from qwix_train.core import qarray
    >>> from qwix_train.ptq import restore, save
    >>> folder = pathlib.Path(tempfile.mkdtemp()) / 'int8'
    >>> params = {'kernel': qarray.quantize(jnp.ones((16, 64)), 'int8')}
    >>> save(folder, params)
    >>> restore(folder, jax.eval_shape(lambda: params))['kernel'].shape
    (16, 64)
    >>> restore(folder, {'bias': jnp.zeros(64)})
    Traceback (most recent call last):
    ...
    ValueError: ... Missing in the checkpoint: bias. Not in the model: kernel.
    """
    if isinstance(abstract, nnx.Module):
        tree = restore(path, trees.to_tree(abstract), shardings=shardings)
        return trees.with_tree(abstract, tree)
    path = writing.followed(epath.Path(path))
    manifest = read_manifest(path)
    wanted = {}
    if abstract is not None:
        wanted = {p.path: p for p in stored_arrays.params_of(abstract)}
        model = [stored_arrays.described(param) for param in wanted.values()]
        _check_same_model(path, manifest.params, model)
    names = [param.path for param in manifest.params]
    given_shardings.check(shardings, names, f"the checkpoint at {path}")
    targets = {}
    for param in manifest.params:
        given = given_shardings.at(shardings, param.path)
        if given is None and param.path in wanted:
            given = stored_arrays.value_of(wanted[param.path])
        targets[param.path] = stored_arrays.shardings_of(param, given)
    params = stored_arrays.read(path, manifest.params, targets)
    tree = traverse_util.unflatten_dict(
        {param.path: stored_arrays.value_of(param) for param in params}
    )
    if abstract is None:
        return tree
    return jax.tree.unflatten(jax.tree.structure(abstract), jax.tree.leaves(tree))


def read_manifest(path: epath.PathLike) -> Manifest:
    """Reads what a checkpoint says about itself, and no arrays.

    Raises:
        FileNotFoundError: Nothing is at the path.
        ValueError: There is no manifest, or it was changed.

    >>> import jax.numpy as jnp
    >>> import pathlib, tempfile
    >>> from qwix_train import QuantizationRule
    >>> from qwix_train.ptq import read_manifest, save
    >>> folder = pathlib.Path(tempfile.mkdtemp()) / 'a'
    >>> rules = [QuantizationRule(weight_qtype='int4')]
    >>> save(folder, {'bias': jnp.ones(3)}, rules=rules, metadata={'step': 10})
    >>> manifest = read_manifest(folder)
    >>> list(manifest.rules) == rules, manifest.metadata['step']
    (True, 10)
    """
    import orbax.checkpoint as ocp  # late, as in `save_async`

    path = writing.followed(epath.Path(path))
    writing.finish_folder(path)
    if not path.exists():
        raise FileNotFoundError(f"There is no checkpoint at {path}.")
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
        try:
            record = checkpointer.restore(path / MANIFEST)
        except (OSError, RecursionError, ValueError) as error:
            raise ValueError(
                f"{path} is not a complete checkpoint of ptq.save or lora.save: its "
                f"manifest cannot be read ({error})."
            ) from error
    with located(f"The manifest of {path} is refused", "."):
        return Manifest.from_json(record)


@dataclasses.dataclass(frozen=True)
class PendingSave:
    """A save in the background.

    Attributes:
        path: The folder that it makes.
    """

    path: epath.Path
    _future: concurrent.futures.Future[None] = dataclasses.field(repr=False)

    def wait_until_finished(self) -> None:
        """Waits for the save, and raises what went wrong."""
        processes.together(self._future.result)

    def done(self) -> bool:
        """Whether the save has finished, or failed."""
        return self._future.done()


def _check_target(path: epath.Path, overwrite: bool) -> None:
    """Checks that a checkpoint may be written at a path."""
    writing.finish_folder(path)

    def is_one() -> bool:
        names = {file.name for file in path.iterdir()} if path.is_dir() else {""}
        return not names or set(ITEMS) <= names

    writing.check_target(
        path,
        what="a checkpoint of quantized params",
        is_one=is_one,
        overwrite=overwrite,
    )


def check_same_rules(rules: Sequence[QuantizationRule]) -> None:
    """Complains in all processes of rules that are not the same in all of them.

    Raises:
        ValueError, RuntimeError: See `processes.check_same`.
    """
    lines = (json_text.dump(rule_to_json(rule), "a rule") for rule in rules)
    processes.check_same("The rules", lines)


def _check_same_params(params: Iterable[StoredParam]) -> None:
    lines = (json_text.dump(param_to_json(param), param.name) for param in params)
    processes.check_same("The params", lines)


def _checked(
    params: Any, rules: Sequence[QuantizationRule], plan: Plan | None
) -> tuple[list[StoredParam], tuple[QuantizationRule, ...]]:
    """The params of a tree and the rules, if they can be saved together."""
    held, rules = stored_arrays.params_of(trees.to_tree(params)), check_rules(rules)
    stored_arrays.check_values(held)
    _check_types(held, rules, plan)
    return held, rules


def _check_types(
    params: Sequence[StoredParam], rules: Sequence[QuantizationRule], plan: Plan | None
) -> None:
    """Complains of codes that the rules or the plan of a manifest did not make."""
    asked = {rule.weight_qtype for rule in rules} - {None}
    by_rules = set(map(numerics.qtype_name, asked))
    wrong = []
    for param in params:
        types = by_rules if rules else {param.qtype}
        path = tuple(map(str, param.path))
        for planned in () if plan is None else map(plan.params.get, (path, path[1:])):
            if planned is not None and planned.how is not None:
                types = {numerics.qtype_name(planned.how.qtype)}
        if param.qtype is not None and param.qtype not in types:
            says = " or ".join(sorted(map(str, types))) or "float"
            wrong.append(f"{param.name} has codes of {param.qtype}, not {says}")
    if wrong:
        raise ValueError(
            "The params were not quantized by the rules or the plan that they would be "
            f"saved with: {plan_table.some(wrong, 3)}. Give those that they were "
            "quantized by, or none."
        )


def _finish(
    checkpointer: ocp.AsyncCheckpointer, target: epath.Path, path: epath.Path
) -> None:
    try:
        checkpointer.wait_until_finished()
    finally:
        checkpointer.close()
    if target != path and jax.process_index() == 0:
        writing.replace_folder(path)


def _check_same_model(
    path: epath.Path, have: Sequence[StoredParam], want: Sequence[StoredParam]
) -> None:
    checkpoint = {param.path: param for param in have}
    model = {param.path: param for param in want}
    missing = [p.name for p in want if p.path not in checkpoint]
    unexpected = [p.name for p in have if p.path not in model]
    in_float = [
        p.name for p in have if (q := model.get(p.path)) and p.qtype and not q.qtype
    ]
    different = [
        f"{p.name} ({text}, but in the model {other})"
        for p in have
        if p.name not in in_float
        and (q := model.get(p.path))
        and (text := _text(p, q)) != (other := _text(q, p))
    ]
    problems = [
        f"{title}: {plan_table.some(names, 3)}."
        for title, names in (
            ("Missing in the checkpoint", missing),
            ("Not in the model", unexpected),
            ("Quantized in the checkpoint, and in float in the model", in_float),
            ("Different", different),
        )
        if names
    ]
    names = [tuple(map(str, p.path)) for p in have if p.path not in model]
    found = [leaf.part for name in names if (leaf := Leaf.parse(name)) is not None]
    if in_float:
        problems.append(
            "Give the params of the quantized model, or their shapes: "
            "ptq.abstract_params(model, params, rules, *inputs). The rules are in "
            f"ptq.read_manifest({str(path)!r}).rules."
        )
    if "pre_quant_scale" in found:
        problems.append(
            "Awq and SmoothQuant give scales of input channels, for which a model of "
            "PtqProvider(rules, pre_quant_scale=True) has a place."
        )
    if problems:
        raise ValueError(
            f"The checkpoint at {path} is for another model. {' '.join(problems)}"
        )


def _text(param: StoredParam, other: StoredParam) -> str:
    """All of a param that has to agree; of how it was quantized only what does not."""
    arrays = [f"{k} {a.dtype}{list(a.shape)}" for k, a in param.arrays.items()]
    how = ["no how"]
    if param.how is not None:
        others = {} if other.how is None else to_record(other.how)
        fields = to_record(param.how).items()
        how = [f"{k}={v!r}" for k, v in fields if k not in others or others[k] != v]
    layout = [] if param.layout is None else [str(param.layout)]
    return ", ".join([param.qtype or "not quantized", *arrays, *how, *layout])
