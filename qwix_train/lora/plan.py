"""What rules do to a model whose weights get adapters."""

from __future__ import annotations

import dataclasses
import functools

from qwix_train.lora.layout import (
    AdapterLayout,
    find_layouts,
    rules_without_weight,
    too_large,
)
from qwix_train.planning import weights
from qwix_train.planning.plan import OpPlan, Path, Plan


class LoraPlan(Plan):
    """What rules do to every op and param of a traced call, with its adapters."""

    @functools.cached_property
    def layouts(self) -> dict[Path, AdapterLayout]:
        """The adapters that the rules ask for, by the path of the param."""
        return {path: layout for path, (layout, _) in find_layouts(self).items()}

    @property
    def has_effect(self) -> bool:
        """See `Plan.has_effect`."""
        return bool(self.layouts) or super().has_effect

    def complaints(self) -> list[str]:
        """See `Plan.complaints`: adds ranks that are too large."""
        return super().complaints() + [
            f"{problem}: what is above that costs memory and adds nothing. To avoid "
            f"it, put LoraRule(module_path={'/'.join(path[:-1])!r}, "
            f"rank={min(self.layouts[path].matrix_shape)}, ...) before the rule that "
            "matches it now."
            for path, problem in too_large(self.layouts).items()
        ]

    def no_match_message(self) -> str:
        """See `Plan.no_match_message`."""
        return unmatched_message(self, rules_without_weight(self)[0])


def with_adapters(plan: Plan) -> LoraPlan:
    """A plan with the adapters that its rules give, and which ops read them."""
    found = find_layouts(plan)

    def annotated(op: OpPlan) -> OpPlan:
        ranks = {
            "/".join(view.path): found[view.path][0].rank
            for _, view in weights.weights_of(op.op)
            if view.path in found
        }
        notes = [f"adapter of rank {rank} on {name}" for name, rank in ranks.items()]
        if op.reason and (op.quantized or op.unsupported or not notes):
            notes.append(op.reason)
        return dataclasses.replace(op, reason="; ".join(notes))

    return LoraPlan(**{**vars(plan), "ops": tuple(map(annotated, plan.ops))})


def unmatched_message(plan: Plan, index: int) -> str:
    """Says that a `LoraRule` matches no weight, and which module paths exist."""
    rule = plan.rules[index]
    near = plan.near_misses(index)
    lines = [
        f"Rule {index}, LoraRule(module_path={rule.module_path!r}, "
        f"op_names={tuple(rule.op_names)!r}), matches no op that reads a weight. Ops "
        "exist at these module paths:",
        *(f"  {path!r}" for path in plan.module_paths),
    ]
    if near:
        lines.append(f"Near misses: {', '.join(map(repr, near))}.")
    if shadowed := plan.shadowed_by(index):
        lines.append(f"Earlier rules decided for what it matches: {shadowed}.")
    lines.append(
        "A rule's module_path is a regular expression that must match the whole path; "
        "lookups in tables need op_names=('gather',)."
    )
    return "\n".join(lines)
