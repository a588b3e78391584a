"""Models with adapters: Linen, NNX and functions behind one door."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from qwix_train import ops
from qwix_train.lora.adapter_stages import Adapted, Adapter, DropOut, MergeAdapter
from qwix_train.lora.layout import AdapterLayout, find_layouts, rules_without_weight
from qwix_train.lora.plan import LoraPlan, unmatched_message, with_adapters
from qwix_train.lora.rules import LoraRule
from qwix_train.lora.start import started
from qwix_train.planning import provider, static_range, weights
from qwix_train.planning.plan import OpPlan, Path, Plan
from qwix_train.planning.rules import QuantizationRule
from qwix_train.ptq.provider import PtqProvider, check_params, on_codes
from qwix_train.qat.qt_rule import refuse_backward
from qwix_train.stages.fake_quantize import FakeQuantize
from qwix_train.stages.rotate import in_basis
from qwix_train.stages.run import CallStages
from qwix_train.trace import session
from qwix_train.trace.analyze import Op
from qwix_train.trace.function import TracedCall
from qwix_train.values import stored


class LoraProvider(PtqProvider):
    """Gives weights adapters: LoRA, and QLoRA where their base is quantized.

    Next to a param `kernel` stand `kernel_lora_a` and `kernel_lora_b`, and with DoRA
    `kernel_lora_magnitude`. In NNX models they are `nnx.LoRAParam`s. Wherever the model
    reads the param, it gets ``W + scaling * A @ B`` (arXiv 2106.09685, section 4.1).
    Products compute ``x @ W + scaling * (x @ A) @ B``. Params that the rules quantize
    without adapters are quantized as by a `PtqProvider`.

    Example:
      >>> import jax
      >>> from flax import linen as nn
      >>> from jax import numpy as jnp
      >>> from qwix_train import LoraProvider, quantize_model
      >>> provider = LoraProvider(module_path=".*", rank=2, alpha=4.0)
      >>> model = quantize_model(nn.Dense(8), provider)
      >>> params = model.init(jax.random.key(0), jnp.ones((1, 4)))["params"]
      >>> {name: array.shape for name, array in sorted(params.items())}
      {'bias': (8,), 'kernel': (4, 8), 'kernel_lora_a': (4, 2), 'kernel_lora_b': (2, 8)}
    """

    adds_params = True

    def __init__(
        self,
        rules: Sequence[QuantizationRule] | None = None,
        *,
        deterministic: bool | None = None,
        allow_unmatched: bool = False,
        **kwargs: Any,
    ):
        """Checks the rules.

        Args:
          rules: `LoraRule`s, and `QuantizationRule`s, in order of precedence.
          deterministic: whether dropout is off. If None, the call of the model says it:
            by an argument, or an attribute of the model, that is called
            `deterministic`, `train`, `training` or `is_training`; for an NNX model, by
            `model.eval()` and `model.train()`.
          allow_unmatched: whether a `LoraRule` may match no weight. An error otherwise.
          **kwargs: the fields of one `LoraRule`, instead of `rules`.

        Raises:
          ValueError: if both rules and fields are given, or neither; if no rule is a
            `LoraRule`; or if a rule sets `bwd_qtype` or trains scales.
        """
        if rules is None:
            if not kwargs:
                raise ValueError(
                    "LoraProvider needs rules, or the fields of one: "
                    "LoraProvider(module_path='.*', rank=8, alpha=16.0)."
                )
            rules = [LoraRule(**kwargs)]
        elif kwargs:
            raise ValueError(
                f"LoraProvider got rules, and also {sorted(kwargs)}, which are fields "
                "of a rule. Put them into a LoraRule of the list."
            )
        super().__init__(rules, allow_unmatched=allow_unmatched)
        if not any(isinstance(rule, LoraRule) for rule in self.rules):
            raise ValueError(
                "None of the rules is a LoraRule, so nothing would get an adapter. Use "
                "PtqProvider to quantize without adapters."
            )
        refuse_backward(self.rules, type(self).__name__)
        learned = [i for i, rule in enumerate(self.rules) if rule.learns_scales]
        if learned:
            raise ValueError(
                f"Rule {learned[0]} trains scales, and those of a base with adapters "
                "are frozen with it. Choose another weight_calibration_method and "
                "act_calibration_method, such as 'absmax'."
            )
        self.deterministic = deterministic
        if any(isinstance(rule, LoraRule) and rule.dropout for rule in self.rules):
            self.random_stream = "dropout"

    def __eq__(self, other: object) -> bool:
        # So that two states with the same rules are trees of the same structure, and a
        # step is compiled once for both.
        if not isinstance(other, LoraProvider):
            return NotImplemented
        return self._settings == other._settings

    @property
    def _settings(self) -> tuple[Any, ...]:
        return type(self), self.rules, self.deterministic, self.allow_unmatched

    def __hash__(self) -> int:
        return hash((type(self), len(self.rules)))

    def plan(self, traced: TracedCall) -> LoraPlan:
        """See `QuantizationProvider.plan`."""
        return with_adapters(super().plan(traced))

    def store_params(self, traced: TracedCall, plan: Plan) -> dict[Path, Any]:
        """See `QuantizationProvider.store_params`: bases and adapters.

        Raises:
          ValueError: if a `LoraRule` matches no weight.
        """
        self.check_rules_matched(plan)
        starter = started(traced, plan)
        named = traced.named
        params = {
            param.path: base
            for param in traced.params
            if param is not None
            and (base := starter.base(param.path, param.value)) is not param.value
        }
        added = starter.adapters | static_range.initial(plan)
        return params | {path: x for path, x in added.items() if path not in named}

    def within(self, rewrite: session.Rewrite) -> session.Rewrite:
        """See `QuantizationProvider.within`: another mode runs the base."""

        def rewrite_adapted(traced):
            plan = self.plan(traced)
            out = rewrite(self.adapt(traced, plan))
            if out is session.UNCHANGED:
                return provider.rewrite(self, traced, plan)
            return out

        return rewrite_adapted

    def transform(self, traced: TracedCall, plan: Plan) -> Any:
        """The result of a traced call with adapters.

        Raises:
          ValueError: if an adapter is missing, or is of another model or rank; or if
            the base is not quantized as the rules say.
        """
        if traced.own_stages is None:
            traced = self.adapt(traced, plan)
        return super().transform(traced, plan)

    def stages(self, traced: TracedCall, plan: Plan) -> CallStages:
        """See `QuantizationProvider.stages`: those of the base."""
        check_params(traced, self._stored_plan(plan))
        return on_codes(traced, plan)

    def adapt(
        self,
        traced: TracedCall,
        plan: Plan,
        adapters: Mapping[Path, Any] | None = None,
    ) -> TracedCall:
        """A traced call with adapters.

        Args:
          traced: the call.
          plan: what the rules do to it.
          adapters: the adapters, by path. If None, those among the params of the call.
        """
        named = traced.named if adapters is None else adapters
        in_float = {
            param.path
            for param in traced.params
            if param is not None and not stored.is_quantized(param.value)
        }
        added, merged = {}, {}
        for path, (layout, rule) in find_layouts(plan).items():
            adapter, how = _adapter(layout, named), plan.params[path].how
            if rule.qat and how is not None and path in in_float:
                stages = in_basis(how, FakeQuantize(how.in_basis))
                merged[path] = MergeAdapter(adapter), *stages
            else:
                added[path] = adapter
        own = Adapted(added, merged, self._dropouts(traced, plan))
        return dataclasses.replace(traced, own_stages=own)

    def check_rules_matched(self, plan: Plan) -> None:
        """Complains of a `LoraRule` that matches no weight.

        Raises:
          ValueError: if there is such a rule, unless `allow_unmatched`.
        """
        for index in rules_without_weight(plan):
            if self.allow_unmatched:
                continue
            raise ValueError(unmatched_message(plan, index))

    def _stored_plan(self, plan: Plan) -> Plan:
        """The plan without the params that stay in float for fake quantization."""
        in_float = {path for path, (_, rule) in find_layouts(plan).items() if rule.qat}
        params = {
            path: dataclasses.replace(param, how=None) if path in in_float else param
            for path, param in plan.params.items()
        }
        return dataclasses.replace(plan, params=params)

    def _dropouts(self, traced: TracedCall, plan: Plan) -> list[tuple[Op, DropOut]]:
        found: list[tuple[Op, DropOut]] = []
        switch = self.deterministic
        off = traced.deterministic if switch is None else switch
        if off:
            return found
        key = None
        for index, op in enumerate(plan.ops):
            rate = _dropout_rate(op, plan)
            if not rate:
                continue
            key = traced.make_rng("dropout") if key is None else key
            if key is None:
                raise ValueError(_no_key(op, rate, traced.deterministic))
            if op.op.opaque:
                raise ValueError(
                    f"{op.op.where}: dropout={rate} cannot be applied inside of "
                    f"{op.op.opaque}. Give it a LoraRule without dropout."
                )
            own = jax.random.fold_in(key, index)
            layers = op.op.layers
            key_of_layers = jax.random.split(own, layers) if layers else own
            found.append((op.op, DropOut(rate, key_of_layers)))
        return found


def _adapter(layout: AdapterLayout, named: Mapping[Path, Any]) -> Adapter:
    """The adapter of a param, from arrays by path."""
    where = "/".join(layout.path)
    arrays = []
    for path, shape in layout.shapes.items():
        array = stored.unbox(named.get(path))
        if array is None:
            raise ValueError(
                f"Param {where!r} has no adapter: there is no {'/'.join(path)!r} among "
                "the params. Initialize adapters with model.init, attach or lora.init, "
                "with these rules."
            )
        if tuple(array.shape) != shape:
            raise ValueError(
                f"Param {'/'.join(path)!r} has shape {tuple(array.shape)}, and the "
                f"adapter of {where!r}, of shape {layout.shape}, has shape {shape} "
                f"with rank={layout.rank}: it was made for another model, or by a rule "
                "with another rank."
            )
        arrays.append(array)
    a, b, *rest = arrays
    return Adapter(layout, a, b, rest[0] if rest else None)


def _dropout_rate(op: OpPlan, plan: Plan) -> float:
    rule = None if op.rule_index is None else plan.rules[op.rule_index]
    if not isinstance(rule, LoraRule) or rule.qat:
        return 0.0
    is_product = ops.is_product(op.op.primitive)
    return rule.dropout if is_product and weights.weights_of(op.op) else 0.0


def _no_key(op: OpPlan, rate: float, deterministic: bool | None) -> str:
    said = (
        "the call says that it trains the model"
        if deterministic is False
        else "nothing says whether the call trains the model or evaluates it"
    )
    return (
        f"{op.op.where}: its adapter has dropout={rate}, {said}, and there is no "
        "random key. To train, pass rngs={'dropout': key}. To evaluate, switch "
        "dropout off: with the argument of the model that does (deterministic=True, "
        "train=False), or, for a model that has none, with "
        "LoraProvider(rules, deterministic=True), or state.deterministic()."
    )
