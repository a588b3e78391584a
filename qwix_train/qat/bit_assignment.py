"""Which op gets how many bits: the best types within a size."""

from __future__ import annotations

import functools
import math
import numbers

import numpy as np

from qwix_train.planning.rules import QuantizationRule
from qwix_train.qat.sensitivity_report import OpSensitivity, Sensitivity


def assign_bits(
    sensitivity: Sensitivity,
    budget: int | float | None = None,
    *,
    average_bits: float | None = None,
) -> list[QuantizationRule]:
    r"""Chooses the type of each op that a sensitivity lists, within a budget.

    Let :math:`c_{it}` be the increase of the loss (or :math:`|\Omega|`) that op
    :math:`i` alone causes with type :math:`t`, and :math:`s_{it}` the size of its
    params. The choice :math:`x_{it}` solves

    .. math::
        \min_x \sum_{i,t} c_{it} x_{it} \quad \text{such that} \quad
        \sum_{i,t} s_{it} x_{it} \le B, \qquad \sum_t x_{it} = 1, \qquad
        x_{it} \in \{0, 1\}.

    This multiple-choice knapsack problem is solved exactly, as an integer linear
    program. It assumes that increases add up, so check the loss with the rules.

    Args:
        sensitivity: What `sensitivity` found.
        budget: :math:`B` in bytes, for the params that the table lists: their packed
            codes, scales and zero points, as ``QArray.nbytes`` counts them. Params
            that stay in float do not count.
        average_bits: Instead of ``budget``, the mean bits of a code, over all elements
            of these params. Scales do not count.

    Returns:
        Ordinary rules. There is one for each op of the table, with its module path and
        id. The rules that the sensitivity was measured with follow, for everything
        else.

    Raises:
        TypeError: ``sensitivity`` is not a sensitivity, or both budgets are given, or
            neither.
        ValueError: No choice meets the budget; the message says what the smallest
            choice takes. Or the budget, or a loss in the table, is not finite.

    >>> import numpy as np
    >>> from qwix_train import QuantizationRule, as_model
    >>> from qwix_train.qat import assign_bits
    >>> from qwix_train.qat.op_sensitivity import sensitivity
    >>> forward = as_model(lambda params, x: (x @ params['a']) @ params['b'])
    >>> params = {'a': np.eye(4), 'b': np.eye(4) + 0.3}
    >>> x = np.eye(4)
    >>> y = forward(params, x)
    >>> found = sensitivity(
    ...     lambda params, x: ((forward(params, x) - y) ** 2).mean(),
    ...     params,
    ...     [QuantizationRule(weight_qtype='int8')],
    ...     [x],
    ... )
    >>> rules = assign_bits(found, average_bits=3.5)
    >>> [(rule.op_names, rule.weight_qtype) for rule in rules]
    [(('dot_general0',), 'int3'), (('dot_general1',), 'int4'), ((), 'int8')]

    References:
        Kellerer et al., `Knapsack Problems
        <https://doi.org/10.1007/978-3-540-24777-7>`_, 2004, chapter 11
    """
    if not isinstance(sensitivity, Sensitivity):
        raise TypeError(
            f"Expected the result of qat.sensitivity, got {type(sensitivity).__name__}."
        )
    if (budget is None) == (average_bits is None):
        raise TypeError(
            "Give one budget: assign_bits(sensitivity, 100_000) in bytes, or "
            "assign_bits(sensitivity, average_bits=3.0)."
        )
    given = budget if average_bits is None else average_bits
    if not isinstance(given, numbers.Real) or not math.isfinite(given):
        name = "budget" if average_bits is None else "average_bits"
        raise ValueError(f"{name}={given!r}: it must be a finite number.")
    groups = sensitivity.groups
    for row in sensitivity.rows:
        if not math.isfinite(row.cost):
            raise ValueError(
                f"{', '.join(row.ops)} with {row.qtype}: the loss is not finite. Leave "
                "that type out of the qtypes of the sensitivity."
            )
    if average_bits is None:
        assert budget is not None
        sizes = [[row.bytes for row in rows] for rows in groups]
        limit = math.floor(budget)
    else:
        sizes = [[row.size * row.bits for row in rows] for rows in groups]
        elements = sum(rows[0].size for rows in groups)
        # The product of a decimal fraction may come out just below a whole number.
        limit = math.floor(average_bits * elements * (1 + 1e-12))
    if sum(map(min, sizes)) > limit:
        asked = f"budget={budget} bytes" if average_bits is None else f"{average_bits=}"
        raise ValueError(f"{asked} cannot be met {_smallest(groups)}")
    costs = [[row.cost for row in rows] for rows in groups]
    chosen = _solve(costs, sizes, limit)
    rules = [
        rule
        for rows, choice in zip(groups, chosen, strict=True)
        for rule in rows[choice].rules
    ]
    return [*rules, *sensitivity.rules]


def _solve(costs: list[list[float]], sizes: list[list[int]], limit: int) -> list[int]:
    """The index of the choice of each group."""
    # Late, as the import takes as long as that of JAX.
    from scipy import optimize, sparse

    counts = [len(group) for group in costs]
    starts = np.cumsum([0, *counts[:-1]])
    cost = np.concatenate([np.subtract(group, min(group)) for group in costs])
    # HiGHS stops within 1e-6 of the optimum, and takes what is within 1e-6 of a whole
    # number for one. In these units that is far below any cost, and any size.
    if cost.max():
        cost = cost / cost.max() * 1e6
    unit = functools.reduce(math.gcd, (size for group in sizes for size in group))
    size = np.concatenate(sizes) // unit
    one_of_each = sparse.csr_array(
        (np.ones(cost.size), np.arange(cost.size), [*starts, cost.size])
    )
    found = optimize.milp(
        cost,
        integrality=np.ones(cost.size),
        bounds=optimize.Bounds(0, 1),
        constraints=[
            optimize.LinearConstraint(one_of_each, 1, 1),
            optimize.LinearConstraint(size[None], ub=limit // unit),
        ],
        options={"mip_rel_gap": 0},
    )
    if not found.success:
        raise RuntimeError(f"The types could not be assigned: {found.message}")
    groups = np.split(found.x, starts[1:])
    return [int(np.argmax(group)) for group in groups]


def _smallest(groups: list[tuple[OpSensitivity, ...]]) -> str:
    """Says what the smallest budgets are that can be met."""
    smallest = sum(min(row.bytes for row in rows) for rows in groups)
    elements = sum(rows[0].size for rows in groups)
    bits = sum(min(row.bits for row in rows) * rows[0].size for rows in groups)
    types = ", ".join(row.qtype for row in groups[0])
    return (
        f"with the types {types}: the weights of these {len(groups)} ops take at least "
        f"{smallest} bytes, or {bits / elements:.4g} bits on average. Give a larger "
        "budget, or measure the sensitivity of smaller types."
    )
