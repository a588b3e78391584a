"""What the devices of a mesh send one another in a compiled program."""

import collections
import math
import re
from typing import NamedTuple

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s4": 1, "u4": 1, "bf16": 2, "f16": 2}
_KINDS = "all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute"


class Collective(NamedTuple):
    """One array that a collective gives."""

    kind: str
    dtype: str
    size: int  # elements

    @property
    def bytes(self):
        return self.size * _BYTES.get(self.dtype, 4)


def collectives(compiled):
    """What the collectives of a compiled function give."""
    found = []
    for line in compiled.as_text().splitlines():
        match = re.match(rf".* = (.*?) ({_KINDS})(?:-start)?\(", line)
        for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", match[1] if match else ""):
            size = math.prod(int(n) for n in shape.split(",") if n)
            found.append(Collective(match[2], dtype, size))
    return found


def bytes_by(field, found):
    """The bytes of collectives by a field of them."""
    sums = collections.Counter()
    for each in found:
        sums[getattr(each, field)] += each.bytes
    return sums


def assert_sends_no_more(found, in_float, weight, extra=0):
    """At most 1 % more, by kind, and no weight that the float step does not gather."""
    one_percent = 0.01 * sum(each.bytes for each in in_float)
    wanted = bytes_by("kind", in_float)
    for kind, sent in bytes_by("kind", found).items():
        assert sent <= wanted[kind] + one_percent + extra, kind

    def gathers(of):
        return sum(x.kind == "all-gather" and x.size >= weight for x in of)

    assert gathers(found) <= gathers(in_float)
