"""What a method did to each weight, as records and as a table."""

from __future__ import annotations

import dataclasses
from typing import Any

from qwix_train.files import text_table


@dataclasses.dataclass(frozen=True)
class WeightRecord:
    """What a method did to one quantized param.

    Attributes:
      param: its path.
      ops: the ops that read it.
      applied: whether the method was applied. Otherwise the param is rounded to
        nearest.
      reason: why the method was not applied.
      rounding_error: the squared error of the outputs if the param is rounded to
        nearest, relative to the outputs squared, on the inputs that were collected.
        None if the method does not collect what this takes. For `SmoothQuant`
        without `rounding`, activations are quantized, too, as the rule says; for all
        others they are not.
      error: the same error with what the method made of the param.
      note: what else the method has to say.
    """

    param: str
    ops: tuple[str, ...]
    applied: bool
    reason: str = ""
    rounding_error: float | None = None
    error: float | None = None
    note: str = ""


@dataclasses.dataclass(frozen=True)
class WeightReport:
    """What a method did to the weights of a model. It prints as a table.

    Attributes:
      method: the name of the method.
      weights: a record for each quantized param.

    Example:
      >>> record = WeightRecord('Dense_0/kernel', ('Dense_0/dot_general0',), True,
      ...                       rounding_error=0.02, error=0.005)
      >>> print(WeightReport('GPTQ', (record,)))
      param           method  error of outputs  note
      ----------------------------------------------
      Dense_0/kernel  GPTQ    2.00% -> 0.50%
    """

    method: str
    weights: tuple[WeightRecord, ...]

    def records(self) -> list[dict[str, Any]]:
        """The records as dictionaries."""
        return [dataclasses.asdict(weight) for weight in self.weights]

    def __str__(self) -> str:
        rows = [["param", "method", "error of outputs", "note"]]
        for weight in self.weights:
            method = self.method if weight.applied else "rounding"
            errors = _percent(weight.rounding_error)
            if weight.applied and errors:
                errors += f" -> {_percent(weight.error)}"
            notes = filter(None, (weight.reason, weight.note))
            rows.append([weight.param, method, errors or "-", "; ".join(notes)])
        return text_table.aligned(rows)


def _percent(error: float | None) -> str:
    if error is None:
        return ""
    # Of 8 bits, say, two decimals would show nothing but zeros.
    return f"{100 * error:.2f}%" if error >= 0.001 else f"{100 * error:.2g}%"
