"""How the ranges of several batches are combined into one.

An averaging keeps a flat dict of arrays: ``count``, an int32 scalar, and one float32
array for each end of the range, in the shape of the scale.

==============  ========================  =====================  ==================
name            keeps                     range of the batches   merging a, then b
==============  ========================  =====================  ==================
``mean``        ``sum_of_*``,             the mean, weighed by   adds
                ``mean_size``             what batches hold
``ema,decay``   ``ema_of_*``              exponential mean       a decays by b's count
``minmax``      ``extreme_of_*``          the widest range       the wider one
``last``        ``last_of_*``             that of the last       b, if it has any
``amax_``       ``window_of_*``, and      the widest of the      the latest of both
``history,n``   ``history_*``             latest n
==============  ========================  =====================  ==================

The layout of ``mean`` is that of `qwix`: its statistics go into its `quantize_params`,
and into ours. A sum over batches of several sizes is the weighed mean times ``count``.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, TypeAlias

import jax
import jax.numpy as jnp

from qwix_train.observers import State

Calibration: TypeAlias = Mapping[str, Any]
"""``{'absmax': ...}``, or ``{'min': ..., 'max': ...}`` with ``min <= 0 <= max``."""

AVERAGINGS = {
    "mean": "mean",
    "ema": "ema,decay",
    "minmax": "minmax",
    "last": "last",
    "amax_history": "amax_history,length",
}
"""Each averaging and how it is written."""


class Averaging(Protocol):
    """What an averaging has to offer; a class of yours with these methods will do.

    It is hashable, and its methods are pure functions that may be traced. If it has an
    attribute ``delayed`` that is true, training quantizes a batch by the range of the
    batches before it; else by one that has the batch itself in it. If it has an
    attribute ``by_size`` that is true, `update` is also given the number of values that
    the batch has in each range: ``update(state, calibration, size)``.
    """

    def init(self, calibration: Calibration) -> State:
        """Returns the state before any batch, with an int32 scalar ``count`` of 0.

        Args:
            calibration: The range of a batch, or its shapes and dtypes.
        """
        ...

    def update(self, state: State, calibration: Calibration) -> State:
        """Adds the range of one batch, which is finite."""
        ...

    def merge(self, a: State, b: State) -> State:
        """Returns the state after the batches of ``a`` and then those of ``b``."""
        ...

    def calibration(self, state: State) -> dict[str, jax.Array]:
        """Returns the range of all batches, for a state that has some."""
        ...


def parse_averaging(text: str) -> Averaging:
    """Makes the averaging that a text names.

    Args:
        text: As `AVERAGINGS` writes it, in any case.

    Raises:
        ValueError: The name is unknown, or the decay is not in ``[0, 1)``.

    >>> parse_averaging('ema,0.99')
    Ema(decay=0.99)
    """
    name, *parts = (part.strip() for part in text.lower().split(","))
    if name not in AVERAGINGS:
        forms = "; ".join(AVERAGINGS.values())
        raise ValueError(f"Unknown averaging {text!r}; choose from: {forms}.")
    numbered = {
        "ema": (Ema, float, "number"),
        "amax_history": (AmaxHistory, int, "integer"),
    }
    if name in numbered:
        make, kind, said = numbered[name]
        try:
            (number,) = map(kind, parts)
        except ValueError:
            raise ValueError(
                f"Bad averaging {text!r}: it takes one {said}. Write "
                f"{AVERAGINGS[name]}."
            ) from None
        return make(number)
    if parts:
        raise ValueError(f"Bad averaging {text!r}: {name} takes no arguments.")
    return {"mean": Mean, "minmax": MinMax, "last": Last}[name]()


class _Ends:
    """An averaging that keeps an array for each end of the range, under a prefix."""

    prefix: ClassVar[str]

    def init(self, calibration: Calibration) -> State:
        """Returns the state before any batch: zeros, which every range holds."""
        # float32: in bfloat16, sums stop growing after some hundred batches.
        ends = {
            self.prefix + key: jnp.zeros(v.shape, jnp.float32)
            for key, v in calibration.items()
        }
        return {"count": jnp.zeros((), jnp.int32), **ends}

    def update(self, state: State, calibration: Calibration) -> State:
        """Adds the range of one batch."""
        one = self._latest(state, calibration)
        return self.merge(state, {**one, "count": jnp.ones_like(state["count"])})

    def merge(self, a: State, b: State) -> State:
        """Returns the state after the batches of ``a`` and then those of ``b``."""
        ends = {k: self._merged(a[k], b[k], b["count"]) for k in self._ends(a)}
        return {"count": a["count"] + b["count"], **ends}

    def calibration(self, state: State) -> dict[str, jax.Array]:
        """Returns the range of all batches."""
        return {key.removeprefix(self.prefix): state[key] for key in self._ends(state)}

    def _ends(self, state: State) -> list[str]:
        return [key for key in state if key.startswith(self.prefix)]

    def _latest(self, state: State, calibration: Calibration) -> State:
        """The ends of the range of one batch, as the state names them."""
        ends = {}
        for key, new in calibration.items():
            if self.prefix + key not in state:
                raise ValueError(
                    f"The statistics have {', '.join(state)}, and {self} needs "
                    f"{self.prefix + key}: another rule has made them. Make room for "
                    "those of this one with attach(state, rules, *inputs)."
                )
            old = state[self.prefix + key]
            if old.shape != new.shape:
                raise ValueError(
                    f"A batch has ranges of shape {new.shape}, but the statistics have "
                    f"{old.shape}: the size of a channelwise or tiled axis changed."
                )
            ends[self.prefix + key] = jnp.asarray(new, jnp.float32)
        return ends

    def _merged(self, a: jax.Array, b: jax.Array, count: jax.Array) -> jax.Array:
        """An end of the range of some batches and of so many after them."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Mean(_Ends):
    """The mean of the ranges, each batch counting by the number of its values.

    A state without ``mean_size``, as `qwix` has it, counts each batch the same.

    >>> mean = Mean()
    >>> state = mean.init({'absmax': jnp.zeros((1, 1))})
    >>> for absmax in 2., 4.:
    ...     state = mean.update(state, {'absmax': jnp.full((1, 1), absmax)})
    >>> sorted(state), mean.calibration(state)['absmax'].item()
    (['count', 'mean_size', 'sum_of_absmax'], 3.0)
    """

    prefix = "sum_of_"
    by_size = True

    def init(self, calibration: Calibration) -> State:
        """Returns the state before any batch: zeros."""
        end = next(iter(calibration.values()))
        size = jnp.zeros(end.shape, jnp.float32)
        return {**super().init(calibration), "mean_size": size}

    def update(self, state: State, calibration: Calibration, size: Any = 1.0) -> State:
        """Adds the range of one batch, which holds so many values."""
        one = self._latest(state, calibration)
        one["count"] = jnp.ones_like(state["count"])
        if "mean_size" in state:
            one["mean_size"] = jnp.broadcast_to(size, state["mean_size"].shape)
        return self.merge(state, one)

    def merge(self, a: State, b: State) -> State:
        """Returns the state of the batches of both."""
        if "mean_size" not in a:
            return {key: a[key] + b[key] for key in a}
        ours, theirs = (x["count"].astype(jnp.float32) for x in (a, b))
        count = ours + theirs
        of_a, of_b = a["mean_size"], b["mean_size"]
        held = jnp.where(of_a > 0, of_a, of_b)
        ratio = jnp.where(of_a > 0, of_b / jnp.where(of_a > 0, of_a, 1), 1)
        share = jnp.where(of_a > 0, ours, 0) + ratio * theirs
        # 1 where all sizes are equal, so that sums are then exactly that.
        factor = count / jnp.where(share > 0, share, 1)
        sums = {key: (a[key] + ratio * b[key]) * factor for key in self._ends(a)}
        size = held * share / jnp.maximum(count, 1)
        return {"count": a["count"] + b["count"], **sums, "mean_size": size}

    def calibration(self, state: State) -> dict[str, jax.Array]:
        """Returns the mean range."""
        sums = super().calibration(state)
        return {key: v / state["count"].astype(v.dtype) for key, v in sums.items()}


@dataclasses.dataclass(frozen=True)
class Ema(_Ends):
    """An exponential moving average, the bias of its start at zero taken out.

    With the decay ``d`` and the range ``r[t]`` of batch ``t`` of ``n``,

        m[t] = d * m[t - 1] + (1 - d) * r[t],  m[0] = 0
        range = m[n] / (1 - d**n)

    What is kept is the range itself.

    Attributes:
        decay: From 0 (the last batch only) to below 1.

    Raises:
        ValueError: The decay is out of its bounds.

    References:
        Kingma and Ba, "Adam", section 3, https://arxiv.org/abs/1412.6980

    >>> ema = Ema(0.5)
    >>> state = ema.init({'absmax': jnp.zeros(1)})
    >>> for absmax in 3., 6.:
    ...     state = ema.update(state, {'absmax': jnp.full(1, absmax)})
    >>> ema.calibration(state)['absmax'].tolist()  # (3 + 2 * 6) / 3
    [5.0]
    """

    decay: float

    prefix = "ema_of_"

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(
                f"The decay of an exponential moving average is {self.decay!r}, but "
                "must be at least 0 and below 1, such as in 'ema,0.99'."
            )

    def update(self, state: State, calibration: Calibration) -> State:
        """Adds the range of one batch."""
        before, after = self._weight(state["count"]), self._weight(state["count"] + 1)

        ends = {
            key: (state[key] * (self.decay * before) + new * (1 - self.decay)) / after
            for key, new in self._latest(state, calibration).items()
        }
        return {"count": state["count"] + 1, **ends}

    def merge(self, a: State, b: State) -> State:
        """Returns the state after the batches of ``a`` and then those of ``b``."""
        count = a["count"] + b["count"]
        of_a = self.decay ** b["count"].astype(jnp.float32) * self._weight(a["count"])
        of_b = self._weight(b["count"])
        total = self._weight(jnp.maximum(count, 1))
        merged = {
            key: (a[key] * of_a + b[key] * of_b) / total for key in a if key != "count"
        }
        return {"count": count, **merged}

    def _weight(self, count: jax.Array) -> jax.Array:
        """Returns ``1 - decay**count``, which cancels where the decay is close to 1."""
        log_decay = math.log(self.decay) if self.decay else -math.inf
        batches = jnp.maximum(count, 1).astype(jnp.float32)
        return jnp.where(count > 0, -jnp.expm1(batches * log_decay), 0)


@dataclasses.dataclass(frozen=True)
class MinMax(_Ends):
    """The widest range: the smallest ``min``, the largest ``max`` or ``absmax``.

    >>> widest = MinMax()
    >>> state = widest.init({'min': jnp.zeros(1), 'max': jnp.zeros(1)})
    >>> for low, high in (-1., 5.), (-3., 2.):
    ...     batch = {'min': jnp.full(1, low), 'max': jnp.full(1, high)}
    ...     state = widest.update(state, batch)
    >>> {key: end.item() for key, end in widest.calibration(state).items()}
    {'min': -3.0, 'max': 5.0}
    """

    prefix = "extreme_of_"

    def _merged(self, a: jax.Array, b: jax.Array, count: jax.Array) -> jax.Array:
        # The end that is farther from 0, which lies in every range.
        return jnp.where(jnp.abs(b) > jnp.abs(a), b, a)


@dataclasses.dataclass(frozen=True)
class Last(_Ends):
    """The range of the last batch.

    >>> last = Last()
    >>> state = last.init({'absmax': jnp.zeros(1)})
    >>> for absmax in 3., 2.:
    ...     state = last.update(state, {'absmax': jnp.full(1, absmax)})
    >>> last.calibration(state)['absmax'].tolist(), state['count'].item()
    ([2.0], 2)
    """

    prefix = "last_of_"

    def _merged(self, a: jax.Array, b: jax.Array, count: jax.Array) -> jax.Array:
        return jnp.where(count > 0, b, a)


@dataclasses.dataclass(frozen=True)
class AmaxHistory(_Ends):
    """The widest range of the latest batches, for delayed scaling.

    With the range ``r[t]`` of batch ``t``, in training batch ``t`` is quantized by

        max(r[t - n], ..., r[t - 1])

    which is known before the batch is. Values beyond it saturate. The first batch has
    its own range.

    Attributes:
        length: The number of batches, ``n``.

    Raises:
        ValueError: The length is not a positive integer.

    References:
        NVIDIA, "Transformer Engine", recipe ``DelayedScaling`` with a margin of 0 and
        the algorithm ``max``; Micikevicius et al., "FP8 Formats for Deep Learning",
        section 3, https://arxiv.org/abs/2209.05433

    >>> history = AmaxHistory(2)
    >>> state = history.init({'absmax': jnp.zeros(1)})
    >>> for absmax in 9., 3., 2.:
    ...     state = history.update(state, {'absmax': jnp.full(1, absmax)})
    >>> history.calibration(state)['absmax'].tolist(), state['history_absmax'].tolist()
    ([3.0], [[2.0], [3.0]])
    """

    length: int

    prefix = "window_of_"
    delayed = True

    def __post_init__(self) -> None:
        if not isinstance(self.length, int) or self.length < 1:
            raise ValueError(
                f"The length of an amax history is {self.length!r}, but must be an "
                "integer of at least 1, such as in 'amax_history,16'."
            )

    def init(self, calibration: Calibration) -> State:
        """Returns the state before any batch: zeros, which every range holds."""
        history = {
            f"history_{key}": jnp.zeros((self.length, *v.shape), jnp.float32)
            for key, v in calibration.items()
        }
        return {**super().init(calibration), **history}

    def update(self, state: State, calibration: Calibration) -> State:
        """Puts the range of one batch in front, and drops the oldest."""
        latest = self._latest(state, calibration)
        for key in calibration:
            if len(state[f"history_{key}"]) != self.length:
                raise ValueError(
                    f"The statistics are those of {len(state[f'history_{key}'])} "
                    f"batches, and {self} needs those of {self.length}. Make room for "
                    "them with attach(state, rules, *inputs)."
                )
        history = {
            f"history_{key}": jnp.concatenate(
                [latest[f"window_of_{key}"][None], state[f"history_{key}"][:-1]]
            )
            for key in calibration
        }
        return self._with_window(state["count"] + 1, history)

    def merge(self, a: State, b: State) -> State:
        """Returns the state after the batches of ``a`` and then those of ``b``."""
        place = jnp.arange(self.length)
        of_b = place < b["count"]
        older = jnp.maximum(place - b["count"], 0)

        def latest(key: str) -> jax.Array:
            shape = (self.length,) + (1,) * (a[key].ndim - 1)
            return jnp.where(of_b.reshape(shape), b[key], a[key][older])

        history = {key: latest(key) for key in a if key.startswith("history_")}
        return self._with_window(a["count"] + b["count"], history)

    def _with_window(self, count: jax.Array, history: State) -> State:
        def widest(of_batches: jax.Array) -> jax.Array:
            farthest = jnp.argmax(jnp.abs(of_batches), axis=0, keepdims=True)
            return jnp.take_along_axis(of_batches, farthest, axis=0)[0]

        windows = {
            f"window_of_{key.removeprefix('history_')}": widest(of_batches)
            for key, of_batches in history.items()
        }
        return {"count": count, **windows, **history}
