"""How the axes of a tensor become those of a param: ``"(heads k) d -> d heads k"``.

The notation is that of einops (https://einops.rocks). Names on the left are axes of the
tensor, and names on the right are axes of the param. Names in parentheses are one axis
together, and the first of them varies slowest. A name that is only on the right
stacks tensors, such as ``layer`` in ``"o i -> layer i o"``.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

Groups = tuple[tuple[str, ...], ...]
"""For each axis of an array, the names that it consists of."""

_AXIS = re.compile(r"\s*(?:\(([^()]*)\)|([A-Za-z_]\w*))\s*")


@dataclasses.dataclass(frozen=True)
class Axes:
    """The axes of a tensor and of a param, by name.

    Attributes:
        tensor: The axes of the tensor.
        param: The axes of the param.
        stacked: The axes of the param along which tensors are stacked.
    """

    tensor: Groups
    param: Groups
    stacked: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Axes:
        """Reads the notation.

        Raises:
            ValueError: The text is not of this form, or an axis gets lost.

        >>> Axes.parse("o i -> layer i o").stacked
        ('layer',)
        """
        left, arrow, right = text.partition("->")
        if not arrow:
            raise ValueError(f"axes {text!r} have no '->'")
        tensor, param = _groups(left, text), _groups(right, text)
        names = [list(itertools.chain(*groups)) for groups in (tensor, param)]
        for side in names:
            if len(side) != len(set(side)):
                raise ValueError(f"axes {text!r} name an axis twice")
        if lost := [name for name in names[0] if name not in names[1]]:
            raise ValueError(f"axes {text!r} lose {', '.join(lost)}")
        return cls(tensor, param, tuple(n for n in names[1] if n not in names[0]))

    @classmethod
    def unchanged(cls, ndim: int) -> Axes:
        """The axes of a tensor that is the param as it is."""
        groups = tuple((f"axis{axis}",) for axis in range(ndim))
        return cls(groups, groups, ())

    @property
    def slots(self) -> tuple[int, ...]:
        """The axes of the param along which each index is tensors of its own."""
        groups = enumerate(self.param)
        return tuple(axis for axis, names in groups if self._is_slot(names))

    def _is_slot(self, names: Sequence[str]) -> bool:
        return len(names) == 1 and names[0] in self.stacked

    def sizes(
        self,
        param: Sequence[int] | None,
        tensor: Sequence[int] | None,
        known: Mapping[str, int],
    ) -> dict[str, int]:
        """Returns the length of each axis, by name.

        Args:
            param: The shape of the param, if it is known.
            tensor: The shape of the tensor, if there is one.
            known: Lengths that are known.

        Raises:
            ValueError: The shapes do not fit, or do not say all lengths.
        """
        both = [(self.param, param), (self.tensor, tensor)]
        sides = [(groups, shape) for groups, shape in both if shape is not None]
        for groups, shape in sides:
            if len(groups) != len(shape):
                raise ValueError(f"{len(groups)} axes are named of {list(shape)}")
        pairs = [pair for side in sides for pair in zip(*side, strict=True)]
        sizes, open_ = dict(known), list(pairs)
        while open_:
            later = []
            for names, length in open_:
                unknown = [name for name in names if name not in sizes]
                rest = math.prod(sizes[n] for n in names if n in sizes)
                if len(unknown) > 1:
                    later.append((names, length))
                elif rest * (length // rest if unknown and rest else 1) != length:
                    text = " ".join(names)
                    raise ValueError(f"an axis ({text}) cannot have length {length}")
                elif unknown:
                    sizes[unknown[0]] = length // rest
            if len(later) == len(open_):
                names = " ".join(later[0][0])
                raise ValueError(f"the lengths of ({names}) are not known")
            open_ = later
        return sizes

    def tensor_shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Returns the shape of one tensor."""
        return tuple(math.prod(sizes[n] for n in names) for names in self.tensor)

    def param_shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Returns the shape of the param."""
        return tuple(math.prod(sizes[n] for n in names) for names in self.param)

    def read(
        self,
        tensors: Callable[[Mapping[str, int]], np.ndarray],
        sizes: Mapping[str, int],
        at: Mapping[str, int],
        index: Sequence[slice],
        dtype: np.dtype,
    ) -> np.ndarray:
        """Returns a part of a param.

        Args:
            tensors: Gives the tensor at a position along each of the `stacked` axes.
            sizes: The length of each axis.
            at: The position along each of the `slots`. Only this entry is read.
            index: The part of the param, along each of its axes.
            dtype: The dtype of the result.
        """
        # Where tensors are joined in an axis, they are put together there first.
        joined = [name for name in self.stacked if name not in at]
        order = [name for names in self.param for name in names]
        own = [name for name in order if name not in self.stacked]
        lengths = [1 if name in at else sizes[name] for name in order]
        flat = [name for names in self.tensor for name in names]
        whole: np.ndarray | None = None
        if joined:
            whole = np.empty(lengths, dtype)
        for place in positions({name: sizes[name] for name in joined}):
            split = tensors({**at, **place}).reshape([sizes[name] for name in flat])
            view = split.transpose([flat.index(name) for name in own])
            if whole is None:
                whole = view.reshape(lengths)  # a view still: axes of length 1 alone
            else:
                entry = {**dict.fromkeys(at, 0), **place}
                whole[tuple(entry.get(name, slice(None)) for name in order)] = view
        assert whole is not None
        return _part(whole, [len(names) for names in self.param], index, dtype)

    def tensor_at(
        self, param: Any, sizes: Mapping[str, int], at: Mapping[str, int]
    ) -> Any:
        """Returns the tensor that a param has at a position along `stacked` axes.

        Args:
            param: A NumPy array, which is not copied, or a `QArray`.
            sizes: The length of each axis.
            at: The position.

        Raises:
            ValueError: Elements of a `QArray` that share a scale would be separated.
        """
        order = [name for names in self.param for name in names]
        split = param.reshape([sizes[name] for name in order])
        view = split[tuple(at.get(name, slice(None)) for name in order)]
        own = [name for name in order if name not in at]
        flat = [name for names in self.tensor for name in names]
        moved = view.transpose([own.index(name) for name in flat])
        return moved.reshape(self.tensor_shape(sizes))

    def param_at(self, tensor: Any, sizes: Mapping[str, int]) -> Any:
        """Returns the part of a param that a tensor is: one entry along `slots`.

        Args:
            tensor: A `QArray`.
            sizes: The length of each axis.

        Raises:
            ValueError: Elements would be separated from their scale, or tensors are
                joined in an axis.
        """
        inner = [
            name for i, g in enumerate(self.param) if i not in self.slots for name in g
        ]
        if any(name in self.stacked for name in inner):
            raise ValueError("quantized tensors cannot be joined in an axis")
        flat = [name for names in self.tensor for name in names]
        split = tensor.reshape([sizes[name] for name in flat])
        moved = split.transpose([flat.index(name) for name in inner])
        return moved.reshape(
            [
                1 if axis in self.slots else math.prod(sizes[n] for n in names)
                for axis, names in enumerate(self.param)
            ]
        )


def positions(sizes: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """Gives each position along axes of such lengths.

    >>> list(positions({'layer': 2}))
    [{'layer': 0}, {'layer': 1}]
    """
    for place in itertools.product(*map(range, sizes.values())):
        yield dict(zip(sizes, place, strict=True))


def aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Returns an array whose memory JAX uses as it is on a CPU, without a copy."""
    size = math.prod(shape) * dtype.itemsize
    held = np.empty(size + 64, np.uint8)
    start = -held.ctypes.data % 64
    return held[start : start + size].view(dtype).reshape(shape)


def _groups(side: str, text: str) -> Groups:
    groups, end = [], 0
    side = side.strip()
    while end < len(side):
        match = _AXIS.match(side, end)
        if match is None:
            raise ValueError(f"axes {text!r} are not like '(heads k) d -> d heads k'")
        groups.append(tuple((match[1] or match[2] or "").split()))
        end = match.end()
    return tuple(groups)


def _part(
    split: np.ndarray, counts: Sequence[int], index: Sequence[slice], dtype: np.dtype
) -> np.ndarray:
    """A part of an array whose axes are split, in memory of its own.

    Args:
        split: The array, which may be a view into a file: no more of it is read than
            is needed.
        counts: How many axes of it are one axis of the whole.
        index: The part, along the axes of the whole.
        dtype: The dtype of the result.
    """
    first, outer, inner, shape = 0, [], [], []
    for count, part in zip(counts, index, strict=True):
        sizes = split.shape[first : first + count]
        start, stop, _ = part.indices(math.prod(sizes))
        minor = max(math.prod(sizes[1:]), 1)
        if count:
            # Whole entries of the slowest axis, and then what is wanted of them.
            outer.append(slice(start // minor, -(-stop // minor)))
            outer += [slice(None)] * (count - 1)
        skipped = start // minor * minor
        inner.append(slice(start - skipped, stop - skipped))
        shape.append(stop - start)
        first += count
    found = split[tuple(outer)]
    merged, first = [], 0
    for count in counts:
        merged.append(math.prod(found.shape[first : first + count]))
        first += count
    result = aligned(shape, dtype)
    if merged == shape:
        # One copy, which casts and transposes.
        result.reshape(found.shape)[...] = found
    else:
        result[...] = found.reshape(merged)[tuple(inner)]
    return result
