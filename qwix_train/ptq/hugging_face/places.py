"""Which tensors of a checkpoint are which params of a model."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

from qwix_train.core.errors import located
from qwix_train.planning import table as plan_table
from qwix_train.planning.leaves import Path
from qwix_train.ptq.hugging_face.axes import Axes, positions

_NAME = re.compile(r"\{(\w+)\}")


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the numbers of a tensor stand in a tree of params.

    Attributes:
        param: The path of the param. It may hold names in braces that the name of the
            tensor holds, too.
        axes: How the axes of the tensor become those of the param, in the notation of
            einops: ``"o i -> i o"`` transposes, ``"(heads k) d -> d heads k"`` splits,
            ``"d heads k -> d (heads k)"`` joins. If a name in braces is not in
            ``param``, it is an axis of the param, along which tensors are stacked, such
            as ``layer`` in ``"o i -> layer i o"``. If empty, the axes stay as they are.
        values: The texts that a name in braces stands for, if they are not the numbers
            from 0 on, in the order in which they are stacked, such as
            ``{"part": ("gate", "up")}``.
        optional: Whether the tensor and the param may both be missing.

    Raises:
        ValueError: ``axes`` are not of this form, or ``values`` are not different
            texts.

    >>> from qwix_train.ptq.hugging_face import Place
    >>> place = Place("layers/mlp/kernel", "out in -> layer in out")
    >>> mapping = {"model.layers.{layer}.mlp.weight": place}
    """

    param: str
    axes: str = ""
    values: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    optional: bool = False

    def __post_init__(self) -> None:
        if self.axes:
            Axes.parse(self.axes)
        for name, texts in self.values.items():
            if isinstance(texts, str) or not 0 < len(texts) == len(set(texts)):
                raise ValueError(
                    f"Place({self.param!r}): values of {name!r} are {texts!r}. "
                    "Expected a sequence of one text or more, each another."
                )

    def axes_of(self, ndim: int) -> Axes:
        """Returns the axes of a param of a rank."""
        return Axes.parse(self.axes) if self.axes else Axes.unchanged(ndim)


TensorMapping: TypeAlias = Mapping[str, Place | Sequence[Place] | None]
"""The place or places of each tensor, by its name. None: the tensor is not read."""


@dataclasses.dataclass(frozen=True)
class Assembly:
    """A param, and the tensors that it is made of.

    Attributes:
        path: The path of the param.
        axes: How the axes of the tensors become its axes.
        sizes: The length of each of the axes.
        names: The name of the tensor at each position along the axes that stack them,
            in the order of `Axes.stacked`.
    """

    path: Path
    axes: Axes
    sizes: Mapping[str, int]
    names: Mapping[tuple[int, ...], str]

    def name_at(self, position: Mapping[str, int]) -> str:
        """Returns the name of the tensor at a position."""
        return self.names[tuple(position[name] for name in self.axes.stacked)]

    def tensors(self) -> Iterator[tuple[str, dict[str, int]]]:
        """Gives the name of each tensor, and its position."""
        for place in positions({name: self.sizes[name] for name in self.axes.stacked}):
            yield self.name_at(place), place


def assemblies(
    mapping: TensorMapping,
    params: Mapping[Path, tuple[int, ...]],
    tensors: Mapping[str, tuple[int, ...]] | None,
    where: str,
) -> list[Assembly]:
    """Returns what each param is made of.

    Args:
        mapping: The places of tensors.
        params: The shapes of the params.
        tensors: The shapes of the tensors that are there; None if they are to be made
            of the params.
        where: What holds the tensors, for messages.

    Raises:
        TypeError: The mapping has something else than places.
        ValueError: A param or a tensor is missing, has two places, or has a shape that
            does not fit. The message lists all of these.
    """
    found = _Found(params, tensors)
    for template, place in _places(mapping):
        found.add(template, place)
    found.check(mapping, where)
    return list(found.assemblies.values())


def param_shapes(
    mapping: TensorMapping, tensors: Mapping[str, tuple[int, ...]]
) -> dict[Path, tuple[int, ...]]:
    """Returns the shapes of the params that the tensors of a checkpoint make.

    Args:
        mapping: The places of tensors.
        tensors: The shapes of the tensors.

    Raises:
        TypeError: The mapping has something else than places.
        ValueError: The shape of a tensor does not determine the shape of its param, as
            where heads become an axis.

    >>> place = Place("experts/kernel", "out in -> expert in out")
    >>> sizes = {"0.weight": (2, 3), "1.weight": (2, 3)}
    >>> param_shapes({"{expert}.weight": place}, sizes)
    {('experts', 'kernel'): (2, 3, 2)}
    """
    found: dict[Path, tuple[int, ...]] = {}
    for template, place in _places(mapping):
        pattern = _pattern(template, place.values)
        indices: dict[Path, list[dict[str, str]]] = {}
        shapes: dict[Path, tuple[int, ...]] = {}
        for name, shape in tensors.items():
            if match := pattern.fullmatch(name):
                given = match.groupdict()
                path = tuple(_filled(place.param, given).split("/"))
                indices.setdefault(path, []).append(given)
                shapes.setdefault(path, shape)
        for path, given in indices.items():
            axes = place.axes_of(len(shapes[path]))
            known = {n: len({entry[n] for entry in given}) for n in axes.stacked}
            with located(f"{'/'.join(path)}, of {template}"):
                sizes = axes.sizes(None, shapes[path], known)
            found[path] = axes.param_shape(sizes)
    return found


def name_of(mapping: TensorMapping, path: str) -> str | None:
    """Returns the name of the tensor of a param, or None if there is no place for it.

    If the param stacks tensors, the name has braces.

    >>> name_of({"h.{layer}.weight": Place("h_{layer}/kernel")}, "h_3/kernel")
    'h.3.weight'
    """
    for template, place in _places(mapping):
        if match := _pattern(place.param, place.values).fullmatch(path):
            return _filled(template, match.groupdict())
    return None


def path_of(mapping: TensorMapping, name: str) -> str:
    """Returns the path of the param of a tensor.

    Raises:
        ValueError: No param is made of this tensor alone.

    >>> path_of({"h.{layer}.weight": Place("h_{layer}/kernel")}, "h.3.weight")
    'h_3/kernel'
    >>> path_of({"h.{layer}.weight": Place("h/kernel", "i -> layer i")}, "h.3.weight")
    Traceback (most recent call last):
    ...
    ValueError: The mapping has no param of its own for h.3.weight. ...
    """
    for template, place in _places(mapping):
        if match := _pattern(template, place.values).fullmatch(name):
            given = match.groupdict()
            if given.keys() == {*_NAME.findall(place.param)}:
                return _filled(place.param, given)
    raise ValueError(
        f"The mapping has no param of its own for {name}. Quantized tensors and "
        "adapters are not stacked: give a mapping in which each tensor is a param."
    )


def _places(mapping: TensorMapping) -> Iterator[tuple[str, Place]]:
    for template, places in mapping.items():
        for place in [places] if isinstance(places, Place | str) else places or ():
            if not isinstance(place, Place):
                raise TypeError(
                    f"The mapping has {place!r} for {template!r}. Expected a Place, a "
                    "list of them, or None to pass over the tensor."
                )
            yield template, place


class _Found:
    """The params and tensors that are found, and what is wrong with them."""

    def __init__(
        self,
        params: Mapping[Path, tuple[int, ...]],
        tensors: Mapping[str, tuple[int, ...]] | None,
    ) -> None:
        self.params, self.tensors = params, tensors
        self.assemblies: dict[Path, Assembly] = {}
        self.placed: set[Path] = set()
        # The tensors that are used, each with its entry of the mapping.
        self.used: dict[str, str] = {}
        self.problems: dict[str, list[str]] = {}

    def _note(self, title: str, text: str) -> None:
        self.problems.setdefault(title, []).append(text)

    def add(self, template: str, place: Place) -> None:
        """Takes a place of tensors."""
        names = {*_NAME.findall(place.param), *place.values}
        if unknown := sorted(names - {*_NAME.findall(template)}):
            text = f"{', '.join(unknown)} (of {place.param}, for {template})"
            self._note("Names in braces that the name of the tensor lacks", text)
        pattern = _pattern(place.param, place.values)
        matches = [(path, pattern.fullmatch("/".join(path))) for path in self.params]
        found = [(path, match.groupdict()) for path, match in matches if match]
        for path, given in found:
            if path in self.placed:
                self._note("Params with two places in the mapping", "/".join(path))
            else:
                self.placed.add(path)
                self._assemble(template, place, path, given)
        if found or place.optional:
            return
        if not any(map(_pattern(template, place.values).fullmatch, self.tensors or ())):
            self._note(
                "Entries of the mapping that match neither a tensor nor a param",
                f"{template} ({place.param})",
            )

    def _assemble(
        self, template: str, place: Place, path: Path, given: Mapping[str, str]
    ) -> None:
        shape, where = self.params[path], "/".join(path)
        stacked = {n for n in _NAME.findall(template) if n not in given}
        first = self._named(template, place, given, dict.fromkeys(stacked, 0))
        tensor = None if self.tensors is None else self.tensors.get(first)
        if self.tensors is not None and tensor is None:
            self._note("Missing tensors", f"{first} (for {where})")
            self._use_all(template, place)
            return
        try:
            axes = place.axes_of(len(shape))
            if stacked != set(axes.stacked):
                raise ValueError(
                    f"the axes {place.axes!r} stack {sorted(axes.stacked)}, and the "
                    f"name {template!r} has {sorted(stacked)} beside the path"
                )
            known = {n: len(v) for n, v in place.values.items() if n in stacked}
            if not place.axes and tensor not in (None, shape):
                raise ValueError("no axes are given, such as 'out in -> in out'")
            sizes = axes.sizes(shape, tensor, known)
        except ValueError as error:
            text = f"{first}{_shape_of(self.tensors, first)}: {error}"
            self._note("Different shapes", f"{where} {list(shape)} of {text}")
            self._use_all(template, place)
            return
        wanted, names = axes.tensor_shape(sizes), {}
        for position in positions({name: sizes[name] for name in axes.stacked}):
            name = self._named(template, place, given, position)
            names[tuple(position.values())] = name
            if self.tensors is None:
                continue
            if name not in self.tensors:
                self._note("Missing tensors", f"{name} (for {where})")
            elif self.tensors[name] != wanted:
                text = f"{name}{_shape_of(self.tensors, name)}, not {list(wanted)}"
                self._note("Different shapes", f"{text} (for {where})")
        for name in names.values():
            if self.used.setdefault(name, template) != template:
                self._note("Tensors with two entries in the mapping", name)
        self.assemblies[path] = Assembly(path, axes, sizes, names)

    def _use_all(self, template: str, place: Place) -> None:
        """Takes the tensors of a template as used, where there is an error already."""
        pattern = _pattern(template, place.values)
        for name in self.tensors or ():
            if pattern.fullmatch(name):
                self.used.setdefault(name, template)

    @staticmethod
    def _named(
        template: str, place: Place, given: Mapping[str, str], at: Mapping[str, int]
    ) -> str:
        texts = {
            name: place.values[name][index] if name in place.values else str(index)
            for name, index in at.items()
        }
        return _NAME.sub(lambda match: {**given, **texts}[match[1]], template)

    def check(self, mapping: TensorMapping, where: str) -> None:
        """Complains of all that is wrong.

        Raises:
            ValueError: Something is.
        """
        for path in self.params:
            if path not in self.placed:
                self._note("Params without a place in the mapping", "/".join(path))
        for name in self.tensors or ():
            if name not in self.used and not _passed_over(mapping, name):
                self._note("Tensors left over", name + _reason(mapping, name))
        if self.problems:
            texts = [f"{t}: {plan_table.some(n)}." for t, n in self.problems.items()]
            raise ValueError(
                f"The mapping does not fit the params and {where}. {' '.join(texts)}"
            )


def _passed_over(mapping: TensorMapping, name: str) -> bool:
    return any(
        place is None and _pattern(template, {}).fullmatch(name)
        for template, place in mapping.items()
    )


def _reason(mapping: TensorMapping, name: str) -> str:
    """Why a tensor is not used."""
    for template, place in _places(mapping):
        if _pattern(template, place.values).fullmatch(name):
            return f" (the model has no such {place.param})"
    return " (the mapping has no place for it)"


def _shape_of(tensors: Mapping[str, tuple[int, ...]] | None, name: str) -> str:
    return f" {list(tensors[name])}" if tensors and name in tensors else ""


def _filled(template: str, given: Mapping[str, str]) -> str:
    """A template with what its names in braces stand for, where that is given."""
    return _NAME.sub(lambda match: given.get(match[1], match[0]), template)


def _pattern(template: str, values: Mapping[str, Sequence[str]]) -> re.Pattern[str]:
    """What names of a template look like, with a group for each name in braces."""
    text, end, seen = "", 0, set()
    for match in _NAME.finditer(template):
        name, options = match[1], values.get(match[1])
        inner = "|".join(map(re.escape, options)) if options else "0|[1-9][0-9]*"
        group = f"(?P={name})" if name in seen else f"(?P<{name}>{inner})"
        text += re.escape(template[end : match.start()]) + group
        end = match.end()
        seen.add(name)
    return re.compile(text + re.escape(template[end:]))
