"""Exports the quantized model while the float one trains."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
from etils import epath
from flax import linen as nn
from flax import nnx

from qwix_train import ptq
from qwix_train.frontends.linen import abstract_variables
from qwix_train.hooks import state as states
from qwix_train.hooks.periodic import PeriodicAction
from qwix_train.planning.rules import QuantizationRule, check_rules
from qwix_train.ptq.checkpoint import PendingSave, check_same_rules

_DELETED = ".qwix_train-deleted"


class Export(PeriodicAction):
    """Quantizes the model, and saves it as `path/step_000100` with `ptq.save`.

    Give the state to each call, `hook(step, state=state)`: a train state, params, or
    variables of a Linen model. Or give a function that returns it once, as `state`
    below. An NNX model is exported as it is at that time.

    `ptq.restore` reads an export into the quantized model. An export is the quantized
    params. If a Linen model has other collections, such as `batch_stats`, it is the
    variables with all collections, which the variables or attributes of the train state
    hold.

    A folder appears when all of it is written. If a step is exported again, as after a
    restart from an earlier checkpoint, the new export replaces the old one.

    Example:
      >>> import jax
      >>> import tempfile
      >>> from flax import linen as nn
      >>> from jax import numpy as jnp
      >>> from qwix_train import QuantizationRule, ptq
      >>> from qwix_train.hooks import Export
      >>> model, x = nn.Dense(2), jnp.ones((1, 4))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> rules = [QuantizationRule(weight_qtype="int8")]
      >>> folder = tempfile.mkdtemp()
      >>> export = Export(folder, model, rules, x, every_steps=2, max_to_keep=2)
      >>> for step in range(1, 9):
      ...     _ = export(step, state=params)
      >>> export.steps()
      [6, 8]
      >>> ptq.restore(export.folder(8))["kernel"].array.qvalue.dtype
      dtype('int8')
    """

    def __init__(
        self,
        path: epath.PathLike,
        model: Any,
        rules: Sequence[QuantizationRule],
        *inputs: Any,
        state: states.Source = None,
        quant_stats: states.QuantStats = None,
        max_to_keep: int | None = None,
        execute_async: bool = False,
        metadata: Mapping[str, Any] | None = None,
        every_steps: int | None = None,
        every_secs: float | None = None,
        on_steps: Iterable[int] | None = None,
        **kwargs: Any,
    ):
        """Sets up the exports.

        Args:
          path: the folder of all exports. It is made with the first.
          model: a Linen module, an NNX module, or a function whose first argument is
            a tree of params.
          rules: the rules.
          *inputs: inputs of the model. Shapes (`jax.ShapeDtypeStruct`) will do.
          state: a function without arguments that returns the state of the loop, for
            calls of the hook that are not given one.
          quant_stats: for rules with `act_static_scale=True`, the ranges of
            activations, or a function that returns them, such as
            `lambda: calibrate.quant_stats` of a `Calibrate` hook that is called before
            this one. If None, the ranges that the state holds, as a state of QAT does
            (`attach`).
          max_to_keep: how many exports to keep. Older ones are deleted. All if None.
          execute_async: whether files are written while the loop goes on. Then call
            `wait_until_finished` before the process ends.
          metadata: for the manifests, next to the `step`; see `ptq.save`.
          every_steps: see `PeriodicAction`.
          every_secs: see `PeriodicAction`.
          on_steps: see `PeriodicAction`.
          **kwargs: keyword inputs, such as `train=False`.

        Raises:
          ValueError: if `max_to_keep` is below 1.
        """
        super().__init__(
            every_steps=every_steps, every_secs=every_secs, on_steps=on_steps
        )
        if max_to_keep is not None and max_to_keep < 1:
            raise ValueError(f"max_to_keep={max_to_keep}: it must be 1 or more.")
        self.path: epath.Path = epath.Path(path).expanduser().absolute()
        self._model = model
        self._rules = check_rules(rules)
        self._inputs = inputs
        self._kwargs = kwargs
        self._state = model if isinstance(model, nnx.Module) else state
        self._quant_stats = quant_stats
        self._max_to_keep = max_to_keep
        self._execute_async = execute_async
        self._metadata = dict(metadata or {})
        self._pending: PendingSave | None = None
        self._collections: tuple[str, ...] | None = None

    def folder(self, step: int) -> epath.Path:
        """The folder of a step, whether it exists or not."""
        return self.path / f"step_{step:06d}"

    def steps(self) -> list[int]:
        """The steps that are exported and complete, in order."""
        # Late, as the import takes long, and other hooks do not need it.
        import orbax.checkpoint as ocp

        if not self.path.exists():
            return []
        found = []
        for folder in self.path.iterdir():
            match = re.fullmatch(r"step_(\d{6,})", folder.name)
            if match and ocp.utils.is_checkpoint_finalized(folder):
                found.append(int(match[1]))
        return sorted(found)

    def wait_until_finished(self) -> None:
        """Waits for an export in the background, and raises what went wrong in it."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.wait_until_finished()
            self._delete_old()

    def _apply(self, step: int, t: float, state: Any = None) -> None:
        """Exports.

        Raises:
          ValueError: if there is no state, or it lacks a collection of the model; see
            also `ptq.quantize`.
        """
        self.wait_until_finished()
        state = states.current(state, self._state, type(self).__name__)
        self.path.mkdir(parents=True, exist_ok=True)
        # Checked before anything is computed: processes with different rules would wait
        # for one another.
        check_same_rules(self._rules)
        self._pending = ptq.save_async(
            self.folder(step),
            self._quantized(state),
            rules=self._rules,
            metadata={**self._metadata, "step": step},
            overwrite=True,
        )
        if not self._execute_async:
            self.wait_until_finished()

    def _quantized(self, state: Any) -> Any:
        """What to save."""
        quant_stats = states.quant_stats_of(self._quant_stats, state, self._rules)
        if isinstance(self._model, nnx.Module):
            model, _ = ptq.quantize(
                states.module_of(state),
                None,
                self._rules,
                *self._inputs,
                quant_stats=quant_stats,
                **self._kwargs,
            )
            return model
        others = self._others(state)
        _, params = ptq.quantize(
            self._model,
            states.params_of(state),
            self._rules,
            *self._inputs,
            quant_stats=quant_stats,
            **({"variables": others} if others else {}),
            **self._kwargs,
        )
        return {"params": params, **others} if others else params

    def _others(self, state: Any) -> dict[str, Any]:
        """The collections that a Linen model has next to the params."""
        if not isinstance(self._model, nn.Module):
            return {}
        if self._collections is None:
            given = dict(self._kwargs)
            rngs = given.pop("rngs", None)
            shapes = abstract_variables(self._model, self._inputs, given, rngs)
            self._collections = tuple(name for name in shapes if name != "params")
        others = {}
        for name in self._collections:
            held = isinstance(state, Mapping) and name in state
            found = state[name] if held else getattr(state, name, None)
            if found is None:
                raise ValueError(
                    f"The model has a collection {name!r}, and the state has none. "
                    "Give the variables: hook(step, state={'params': params, "
                    f"{name!r}: ...}})."
                )
            others[name] = found
        return others

    def _delete_old(self) -> None:
        if self._max_to_keep is None or jax.process_index() != 0:
            return
        for step in self.steps()[: -self._max_to_keep]:
            folder = self.folder(step)
            # A folder that is deleted in part must not look like an export.
            folder.rename(self.path / f"{folder.name}{_DELETED}")
        for folder in self.path.glob(f"*{_DELETED}"):
            folder.rmtree()
