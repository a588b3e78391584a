"""Measures how much a loss grows when one op alone is quantized."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import numpy as jnp

from qwix_train.calib.quantization_error import decibels
from qwix_train.core import numerics
from qwix_train.files.progress import tracked
from qwix_train.frontends.compiled import Compiled
from qwix_train.frontends.nnx import tracing_step
from qwix_train.frontends.wrapping import check_step, wrap
from qwix_train.planning.plan import Path
from qwix_train.planning.provider import QuantizationProvider
from qwix_train.planning.rules import QuantizationRule
from qwix_train.qat.sensitivity_passes import (
    DiscoveryProvider,
    OffsetProvider,
    OutputErrorProvider,
    SwitchedProvider,
    weight_tags,
)
from qwix_train.qat.sensitivity_report import OpSensitivity, Sensitivity
from qwix_train.qat.shared_params import OpGroup, TypedPlans
from qwix_train.trace import harvest

QTYPES = ("int2", "int3", "int4", "int8")
"""The types that are tried if no others are asked for."""

METHODS = ("loss", "hutchinson")


def sensitivity(
    loss_fn: Callable[..., Any],
    state: Any,
    rules: Sequence[QuantizationRule],
    batches: Iterable[Any],
    *,
    qtypes: Sequence[Any] = QTYPES,
    method: str = "loss",
    probes: int = 8,
    key: jax.Array | None = None,
    quant_stats: Mapping[str, Any] | None = None,
) -> Sensitivity:
    r"""Measures which ops a model can least afford to quantize, and to which types.

    Each op that the rules quantize, and that reads a weight, is tried alone, with each
    type for its weight. Its activations are quantized as its rule says, and all other
    ops stay in float. Ops that share a param are quantized together.
    Let :math:`L` be the mean of the loss over the batches, :math:`y` the output of the
    op in the float model, and :math:`\hat y` the output of the op when the same
    operands are quantized. Then

    .. math::
        \Delta L = L(\hat W) - L(W), \qquad
        \mathrm{SQNR} = 10 \log_{10}
        \frac{\sum y^2}{\sum (\hat y - y)^2} \,\mathrm{dB}.

    ``method='loss'`` measures :math:`\Delta L`. Each batch is evaluated (ops times
    types) + 1 times, by one compiled program that takes the op and the type as inputs.
    ``method='hutchinson'`` is for models with many ops. It estimates curvature instead,
    and its cost does not grow with the number of ops. With :math:`H` the Hessian of the
    float loss by a param of :math:`n` elements,

    .. math::
        \mathrm{tr}\, H \approx \frac{1}{m} \sum_{i=1}^m v_i^T H v_i, \qquad
        \Omega = \frac{\mathrm{tr}\, H}{n} \, \lVert \hat W - W \rVert_2^2,

    with :math:`m` random vectors :math:`v` of plus and minus 1 for each batch, each
    for all params at once. :math:`\Omega`, summed over the params of an op, ranks the
    ops. Half of it estimates :math:`\Delta L` if the gradient vanishes and errors are
    not correlated. It does not depend on activations.

    Args:
        loss_fn: ``loss_fn(state, *batch)``, which calls a Linen or NNX model, or a
            function marked with `as_model`, and returns a scalar. It should evaluate
            the model: if dropout is on, each evaluation needs the same keys.
        state: The first argument: params, variables, a train state, an NNX model. It
            holds float params, and does not change.
        rules: What may be quantized: which ops, and with which activations, tiles and
            calibration. Each type replaces the ``weight_qtype`` of the rules. Scales
            that are to be learned have the values at which learning begins.
        batches: The other arguments of each call: a tuple, or a single argument that is
            not a tuple. They are read once. Each shape is compiled.
        qtypes: The weight types, as for a rule.
        method: ``'loss'`` or ``'hutchinson'``.
        probes: :math:`m`, for ``'hutchinson'``.
        key: The random key of the probes; ``jax.random.key(0)`` if None.
        quant_stats: Ranges of activations, for rules with ``act_static_scale=True``;
            see `QtProvider`.

    Returns:
        A row for each op and type. Print it, plot it, or give it to `assign_bits`.

    Raises:
        TypeError: ``loss_fn`` is not a function, or does not return a scalar; or
            ``batches`` is an array or a mapping: one batch instead of many.
        ValueError: There is no batch, the rules quantize no weight, a loss is not
            finite, or an argument is not one of the choices.

    >>> from jax import numpy as jnp
    >>> from qwix_train import QuantizationRule, as_model
    >>> from qwix_train.qat import sensitivity
    >>> forward = as_model(lambda params, x: (x @ params['a']) @ params['b'])
    >>> params = {'a': jnp.array([[1.0, 0.3], [0.2, -1.0]]), 'b': jnp.eye(2)}
    >>> found = sensitivity(
    ...     lambda params, x: jnp.mean((forward(params, x) - 1) ** 2),
    ...     params,
    ...     [QuantizationRule(weight_qtype='int8')],
    ...     [jnp.array([[1.0, 2.0]]), jnp.array([[3.0, -1.0]])],
    ...     qtypes=['int2', 'int4'],
    ... )
    >>> [(row.ops, row.qtype, row.bytes) for row in found.rows][:2]
    [(('dot_general0',), 'int2', 9), (('dot_general0',), 'int4', 10)]

    References:
        Dong et al., `HAWQ-V2: Hessian Aware trace-Weighted Quantization of Neural
        Networks <https://arxiv.org/abs/1911.03852>`_, 2019, section 3
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r}: choose from {', '.join(METHODS)}.")
    if isinstance(probes, bool) or not isinstance(probes, int) or probes < 1:
        raise ValueError(f"probes={probes!r}: it must be a positive integer.")
    check_step(loss_fn)
    if isinstance(batches, Mapping | str) or hasattr(batches, "dtype"):
        raise TypeError(
            f"batches is a {type(batches).__name__}, which looks like one batch: give "
            "an iterable of batches, such as [batch]."
        )
    typed = TypedPlans(rules, qtypes)
    measured = _Measurement(loss_fn, state, typed, quant_stats)
    key = jax.random.key(0) if key is None else key
    for count, batch in enumerate(tracked("sensitivity of batches", batches)):
        args = batch if isinstance(batch, tuple) else (batch,)
        if not count:
            measured.discover(args)
        measured.add_errors(args)
        if method == "loss":
            measured.add_losses(args)
        else:
            measured.add_curvature(args, jax.random.fold_in(key, count), probes)
    if not measured.losses:
        raise ValueError("There is no batch to measure the loss on.")
    return Sensitivity(
        rows=tuple(measured.rows()),
        rules=typed.rules,
        method=method,
        loss=float(np.mean(measured.losses)),
        batches=len(measured.losses),
    )


class _Measurement:
    """What was measured so far."""

    def __init__(
        self,
        loss_fn: Callable[..., Any],
        state: Any,
        typed: TypedPlans,
        quant_stats: Mapping[str, Any] | None,
    ):
        self._loss = _PureLoss(loss_fn, state)
        self._typed = typed
        self._quant_stats = quant_stats
        self._groups: list[OpGroup] = []
        self._run_losses = Compiled(self._switched_loss)
        self._run_errors = Compiled(self._loss_and_errors)
        self._run_curvature = Compiled(self._curvature)
        # The float loss of each batch, and the losses of each group and type.
        self.losses: list[float] = []
        self._switched: list[np.ndarray] = []
        self._errors: dict[str, float] = {}
        # Of each probe, the estimate for each param.
        self._probed: list[dict[Path, float]] = []

    def discover(self, args: tuple[Any, ...]) -> None:
        """Finds the ops, by tracing a call."""
        step = functools.partial(self._loss.run, DiscoveryProvider(self._typed))
        with tracing_step(step, (self._loss.held, args), {}):
            self._groups = self._typed.groups()

    def add_errors(self, args: tuple[Any, ...]) -> None:
        """Adds the errors of the outputs, and takes the float loss, of a batch."""
        loss, errors = jax.device_get(self._run_errors(self._loss.held, args))
        self.losses.append(_finite(loss, "of the float model"))
        for name, energy in errors.items():
            before = self._errors.get(name, 0.0) if name.startswith("output") else 0.0
            self._errors[name] = before + float(energy)

    def add_losses(self, args: tuple[Any, ...]) -> None:
        """Adds the losses of a batch: of each group and type, alone."""
        shape = len(self._groups), len(self._typed.qtypes)

        def loss(choices):
            return self._run_losses(choices, self._loss.held, args)

        waiting = [loss(np.zeros(shape[0], np.int32))]
        passes = list(np.ndindex(*shape))
        for group, qtype in tracked("sensitivity of layers", passes):
            choices = np.zeros(shape[0], np.int32)
            choices[group] = 1 + qtype
            waiting.append(loss(choices))
        exact, *others = jax.device_get(waiting)
        # The same program as for the others, so that they differ only in quantization.
        self.losses[-1] = float(exact)
        self._switched.append(np.array(others, np.float64).reshape(shape))

    def add_curvature(self, args: tuple[Any, ...], key: jax.Array, probes: int) -> None:
        """Adds estimates of the trace of the Hessian."""
        waiting = [
            self._run_curvature(jax.random.fold_in(key, i), self._loss.held, args)
            for i in range(probes)
        ]
        for found in jax.device_get(waiting):
            self._probed.append({path: float(x) for path, x in found.items()})

    def rows(self) -> list[OpSensitivity]:
        """What was found of each group and type."""
        rows, tags = [], weight_tags(self._groups)
        for index, group in enumerate(self._groups):
            curvature = self._trace_of(group) if self._probed else {}
            signal = self._errors[f"output {index} 0"]
            for at, qtype in enumerate(self._typed.qtypes):
                increase = None
                if self._switched:
                    losses = [losses[index, at] for losses in self._switched]
                    increase = float(np.mean(losses) - np.mean(self.losses))
                errors = {p: self._errors[f"{tags[p]} {1 + at}"] for p in group.params}
                omega = self._omega(group, errors) if self._probed else None
                row = OpSensitivity(
                    ops=tuple("/".join(filter(None, op)) for op in group.ops),
                    params=tuple(map("/".join, group.params)),
                    size=group.size,
                    qtype=qtype,
                    bits=numerics.qtype_bits(qtype),
                    bytes=group.quantized_bytes[at],
                    sqnr_db=decibels(signal, self._errors[f"output {index} {1 + at}"]),
                    weight_error=sum(errors.values()),
                    loss_increase=increase,
                    omega=omega,
                    rules=group.rules[at],
                    **curvature,
                )
                rows.append(row)
        return rows

    def _omega(self, group: OpGroup, errors: Mapping[Path, float]) -> float:
        """The mean eigenvalues times the squared errors, summed over the params."""
        sizes = [math.prod(plan.shape) for plan in group.plans[0]]
        pairs = zip(group.params, sizes, strict=True)
        return sum(float(self._samples(p).mean()) / n * errors[p] for p, n in pairs)

    def _samples(self, path: Path) -> np.ndarray:
        return np.array([probe[path] for probe in self._probed])

    def _trace_of(self, group: OpGroup) -> dict[str, float]:
        """The trace of the Hessian by the params of a group, and its standard error."""
        samples = sum(self._samples(path) for path in group.params)
        samples = np.asarray(samples, np.float64)
        error = math.nan
        if samples.size > 1:
            error = float(samples.std(ddof=1) / math.sqrt(samples.size))
        return {"trace": float(samples.mean()), "trace_error": error}

    def _switched_loss(self, choices, held, args):
        provider = SwitchedProvider(
            self._typed, self._groups, self._quant_stats, choices
        )
        return self._loss.run(provider, held, args)

    def _loss_and_errors(self, held, args):
        provider = OutputErrorProvider(self._typed, self._groups, self._quant_stats)
        step = functools.partial(self._loss.run, provider)

        def update(name, value, state):
            # Under the `vmap` of a loss function, there are sums for each example. A
            # param is the same in each call.
            return value.sum() + (state if name.startswith("output") else 0)

        with tracing_step(step, (held, args), {}) as (traced, finish):
            names = harvest.names_in(traced.body)
            states = {name: jnp.zeros((), jnp.float32) for name in names}
            outs, errors = harvest.harvest(traced.body, traced.inputs, states, update)
            return finish(traced.rebuild(outs)), errors

    def _curvature(self, key, held, args):
        """For each param, the product of a random vector, the Hessian, and the vector.

        The vectors of two params are independent, so the part of the Hessian that
        belongs to both is 0 on average.
        """
        shapes = {
            path: plan.shape
            for group in self._groups
            for path, plan in zip(group.params, group.plans[0], strict=True)
        }
        vectors = {
            path: jax.random.rademacher(jax.random.fold_in(key, i), shape, jnp.float32)
            for i, (path, shape) in enumerate(shapes.items())
        }

        def loss(offsets):
            provider = OffsetProvider(self._typed, offsets)
            return self._loss.run(provider, held, args).astype(jnp.float32)

        zeros = jax.tree.map(jnp.zeros_like, vectors)
        _, products = jax.jvp(jax.grad(loss), (zeros,), (vectors,))
        return {path: jnp.sum(v * products[path]) for path, v in vectors.items()}


class _PureLoss:
    """A loss function whose first argument is fixed, and does not change.

    Attributes:
      held: the leaves of the first argument. An NNX object in it stands here as the
        arrays of its state, and is made again for each call.
    """

    def __init__(self, loss_fn: Callable[..., Any], state: Any):
        self._loss_fn = loss_fn
        leaves, self._structure = jax.tree.flatten(state, is_leaf=_is_object)
        self._rebuild: list[Callable[[Any], Any]] = []
        self.held: list[Any] = []
        for leaf in leaves:
            rebuild = _unchanged
            if _is_object(leaf):
                graphdef, variables = nnx.split(leaf)
                leaf, structure = jax.tree.flatten(variables)
                rebuild = functools.partial(_merged, graphdef, structure)
            self._rebuild.append(rebuild)
            self.held.append(leaf)

    def run(self, provider: QuantizationProvider, held: Any, args: Any) -> Any:
        """The loss, with the model calls in it rewritten by a provider."""
        leaves = [f(leaf) for f, leaf in zip(self._rebuild, held, strict=True)]
        state = jax.tree.unflatten(self._structure, leaves)
        # What the provider holds belongs to this trace alone, so each has a session.
        loss = wrap(self._loss_fn, provider)(state, *args)
        if not isinstance(loss, jax.Array) or loss.shape != ():
            found = f"a {type(loss).__name__}"
            if isinstance(loss, jax.Array):
                found = f"an array of shape {loss.shape}"
            raise TypeError(
                f"The loss function returned {found}. It must return a scalar, without "
                "auxiliary values: lambda *args: loss_fn(*args)[0]."
            )
        return loss


def _unchanged(leaf: Any) -> Any:
    return leaf


def _merged(graphdef: Any, structure: Any, arrays: Any) -> Any:
    return nnx.merge(graphdef, jax.tree.unflatten(structure, arrays))


def _is_object(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Pytree)


def _finite(loss: Any, where: str) -> float:
    loss = float(loss)
    if not math.isfinite(loss):
        raise ValueError(f"The loss {where} is {loss}: there is nothing to compare.")
    return loss
