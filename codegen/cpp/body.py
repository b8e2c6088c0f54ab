"""What the pieces of a CPU kernel's text must agree on: how a row is walked over, what is scaled where.

In: a `GemmSpec`. Out: a `Body`.

    linear 1536x576 f32 int4[g64,planar64]   ->   runs of 64 codes, two slices of 32, one scale a run
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

from ...formats import Integer, Scale
from ...formats.group_lanes import GroupLanes
from ...formats.rules import middle
from ..slices import BYTE, Unwalkable, Walk, joined, renumbered, walk
from ..spec import GemmSpec
from .values import Decode, decode

RUN_OF_BYTES = 64  # of codes in order: longer runs of a row of 576 would end in padding
BLOCK = 4096  # codes whose scales are kept ready, on the stack
WOVEN = 512  # codes of a run of groups side by side, at most: of a kernel's text, which has all of a run


@dataclass(frozen=True)
class Body:
    """What a kernel does with the codes of a run."""

    spec: GemmSpec

    @cached_property
    def walk(self) -> Walk:
        found = walk_of(self.spec)
        assert isinstance(found, Walk)
        return found

    @property
    def scale(self) -> Scale | None:
        return self.spec.weight.scale

    @property
    def by_integers(self) -> bool:
        """Whether products of 8-bit integers are added up in int32."""
        return self.spec.activation is not None

    @cached_property
    def decode(self) -> Decode:
        return decode(self.spec.weight.element, renumbered(self.walk.slices[:1])[0][0])

    @property
    def cols(self) -> int | None:
        """Numbers of a row that share a scale of the weight."""
        return self.spec.weight.cols

    @property
    def token_cols(self) -> int | None:
        """Numbers of a row of x that share a scale."""
        return self.spec.activation.cols if self.spec.activation is not None else None

    @property
    def span(self) -> int | None:
        """Codes of eight groups, whose codes lie side by side: lane i of a vector of eight numbers of 32
        bits, integers or floats, belongs to group i of them. None where a stretch is of one group."""
        layout = self.spec.weight.layout
        return layout.span(self.spec.weight.run) if isinstance(layout, GroupLanes) else None

    @property
    def whole_rows(self) -> bool:
        """Whether one scale multiplies all of a row, so that a sum goes over all of it."""
        return self.cols is None and self.token_cols is None

    @property
    def needs_sums(self) -> bool:
        """Whether something is added to scaled values, so that x's sums are needed."""
        zero = self.scale is not None and self.scale.zero != "none"
        return zero or (self.base != 0 if self.by_integers else self.decode.middle != 0)

    @property
    def sum_cols(self) -> int:
        """Numbers of x in an entry of `x_sums`: 0 where none are needed, -1 for the whole row."""
        if not self.needs_sums:
            return 0
        return min(self.spec.groups, default=-1)

    @property
    def base(self) -> int:
        """How much more than the integer the unsigned code is."""
        element = self.spec.weight.element
        return 1 << (element.bits - 1) if isinstance(element, Integer) and element.signed else 0

    @property
    def unit(self) -> float:
        """What an integer is worth before it is scaled."""
        element = self.spec.weight.element
        return 2.0**-element.fraction if isinstance(element, Integer) else 1.0

    @property
    def held(self) -> bool:
        """Whether bytes become floats in registers, in an order of the vectors' own (`place` in
        headers/avx2.h) that x is brought in too."""
        bytes_ = not self.by_integers and self.decode.floats.startswith("of_integers")
        return bytes_ and self.decode.bytes != "b0" and self.walk.length % 32 == 0

    @property
    def factor(self) -> str:
        """What a number that is multiplied is worth before it is scaled, in C++."""
        if self.by_integers:
            return f"{self.unit!r}f"
        return f"{self.decode.factor!r}f" + (" * kHeld" if self.held else "")

    @property
    def block(self) -> int:
        """Codes of a row whose scales are turned into float32 together: whole runs and whole groups."""
        assert self.cols is not None
        least = self.span or math.lcm(self.walk.codes, self.cols)
        return least * max(1, BLOCK // least)

    def added(self) -> str:
        """Per unit of x's sum; sums of integers hold codes that are `base` too high."""
        element = self.spec.weight.element
        middles = float(middle(element)) if isinstance(element, Integer) else 0.0
        over = -self.base * self.unit if self.by_integers else self.decode.middle
        zero = self.scale.zero if self.scale is not None else "none"
        terms = {
            "none": f"{over!r}f * s",
            "int": f"({over!r}f - zero) * s",
            "float": f"zero - {middles - over!r}f * s",
            "min": f"zero + {over!r}f * s",
        }
        return terms[zero]

    def apart(self) -> tuple[str, str]:
        """What is added to a number, in codes, before it is scaled, and to the value behind."""
        element = self.spec.weight.element
        over = self.decode.middle
        middles = float(middle(element)) if isinstance(element, Integer) else 0.0
        terms = {
            "none": (f"{over!r}f", "0.0f"),
            "int": (f"{over!r}f - zero", "0.0f"),
            "float": (f"{over - middles!r}f", "zero"),
            "min": (f"{over!r}f", "zero"),
        }
        return terms[self.scale.zero if self.scale is not None else "none"]

    def stretches(self) -> list[tuple[int, list[int]]]:
        """(first code, slices) of each stretch of a run whose codes share their scales, or lanes of them."""
        if self.span is not None:
            return [(0, list(range(len(self.walk.slices))))]
        found: list[tuple[int, list[int]]] = []
        for i in range(len(self.walk.slices)):
            start = i * self.walk.length
            codes = self.walk.codes
            apart = any(codes % cols and cols % codes for cols in self.spec.groups)
            if not found or apart or any(start % cols == 0 for cols in self.spec.groups if cols < codes):
                found.append((start, []))
            found[-1][1].append(i)
        return found

    def group(self, first: int) -> str:
        """The column of the scales for code k + first; behind the row's end, where x is zero, the last."""
        if self.cols is None:
            return "0"
        run, codes = "k / kCodes", self.walk.codes
        if codes % self.cols == 0:
            found = f"({run}) * {codes // self.cols} + {first // self.cols}"
        elif self.cols % codes == 0:
            found = f"({run}) / {self.cols // codes}"
        else:
            found = f"(k + {first}) / {self.cols}"
        return f"std::min<int64_t>({found}, call.groups - 1)"

    @property
    def cut_short(self) -> bool:
        """Whether a row may end within a run: its last loads would go on into the next row."""
        return self.spec.weight.layout.name == "bytes"


def walk_of(spec: GemmSpec) -> Walk | Unwalkable:
    """How the kernel walks over a row: in bytes."""
    if isinstance(spec.weight.layout, GroupLanes):
        return _woven(spec, spec.weight.layout)
    return walk(spec.weight, spec.k, BYTE, math.gcd(*spec.groups), RUN_OF_BYTES)


def _woven(spec: GemmSpec, layout: GroupLanes) -> Walk | Unwalkable:
    """Over a row of groups side by side, in the order in which codes lie."""
    weight = spec.weight
    span = layout.span(weight.run)
    inner = walk(weight.with_layout(layout.inner), span, BYTE)
    if isinstance(inner, Unwalkable):
        return inner
    if span % inner.codes:
        return Unwalkable(f"runs of {inner.codes} codes of {layout.inner} do not divide groups side by side")
    times = max(t for t in range(1, max(1, WOVEN // inner.codes) + 1) if span % (t * inner.codes) == 0)
    each = joined(inner, times)
    runs = -(-spec.k // span) * span // each.codes
    return replace(each, runs=runs, stride=layout.row_bytes(weight.element.bits, weight.run, spec.k))
