"""Eight groups of a row side by side, four codes of each in turn: a lane of eight 32-bit sums is a group.

In: unpacked codes, uint8 [..., K]. Out: bytes [..., row_bytes], as another layout packs them once woven.

    groups of 8, codes a0 .. a7 of the first, b0 .. of the second, .. h0 .. h7 of the eighth
    ->  a0 a1 a2 a3 b0 b1 b2 b3 .. h0 h1 h2 h3   a4 a5 a6 a7 b4 b5 b6 b7 .. h4 h5 h6 h7

What a kernel does at the end of a group (sums of bytes to sums of 32 bits, to floats, times the scale) it
does once for eight groups, and their scales are a vector as they lie. K may end within eight groups: zeros
follow.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy
import torch
from torch import Tensor

from . import spare
from .errors import FormatError
from .layout import Layout
from .layout import parse as plain
from .mover import Field, k

GROUPS = 8
TOGETHER = 4  # codes of a group


@dataclass(frozen=True)
class GroupLanes(Layout):
    """inner: how woven codes lie, in runs that divide eight groups: `planar64` in `lanes.planar64`."""

    inner: Layout
    name: str = "lanes"

    def __str__(self) -> str:
        return f"{self.name}.{self.inner}"

    def span(self, run: int | None) -> int:
        """Codes of eight groups of `run` codes. FormatError if `run` is none or no multiple of four."""
        if run is None or run % TOGETHER:
            given = "whole rows" if run is None else run
            raise FormatError(
                f"the layout {self} weaves groups of a multiple of {TOGETHER} codes, not {given}"
            )
        return GROUPS * run

    def fields(self, bits: int, run: int | None) -> tuple[Field, ...]:
        span = self.span(run)
        assert run is not None
        in_span = sympy.Mod(k, span)
        group, place = sympy.floor(in_span / run), sympy.Mod(in_span, run)
        woven = (
            sympy.floor(k / span) * span
            + sympy.floor(place / TOGETHER) * (GROUPS * TOGETHER)
            + group * TOGETHER
            + sympy.Mod(place, TOGETHER)
        )
        return tuple(
            Field(f.low, f.width, f.byte.subs(k, woven), f.bit.subs(k, woven))
            for f in self.inner.fields(bits, None)
        )

    def period(self, bits: int, run: int | None, length: int) -> tuple[int, int]:
        """FormatError if runs of `inner` do not divide eight groups, or as `span` says."""
        span = self.span(run)
        codes, size = self.inner.period(bits, None, span)
        if span % codes:
            raise FormatError(f"runs of {codes} codes of {self.inner} do not divide eight groups of {run}")
        return span, span // codes * size

    def row_bytes(self, bits: int, run: int | None, length: int) -> int:
        codes, size = self.period(bits, run, length)
        return -(-length // codes) * size

    def pack(self, codes: Tensor, bits: int, run: int | None = None) -> Tensor:
        self.period(bits, run, codes.shape[-1])  # FormatError for groups that `inner` has no runs for
        return self.inner.pack(self.weave(codes, run), bits)

    def unpack(self, packed: Tensor, length: int, bits: int, run: int | None = None) -> Tensor:
        span = self.span(run)
        self.period(bits, run, length)  # as in `pack`
        filled = -(-length // span) * span
        woven = self.inner.unpack(packed, filled, bits)
        split = (*woven.shape[:-1], filled // span, span // (GROUPS * TOGETHER), GROUPS, TOGETHER)
        return woven.reshape(split).transpose(-3, -2).reshape(*woven.shape)[..., :length]

    def weave(self, numbers: Tensor, run: int | None) -> Tensor:
        """[..., K] -> [..., K up to whole spans] in the order in which codes lie, zeros behind the K-th.
        FormatError as `span` says."""
        span, length = self.span(run), numbers.shape[-1]
        if missing := -length % span:
            numbers = torch.cat([numbers, numbers.new_zeros((*numbers.shape[:-1], missing))], -1)
        spans = numbers.shape[-1] // span
        split = (*numbers.shape[:-1], spans, GROUPS, span // (GROUPS * TOGETHER), TOGETHER)
        return numbers.reshape(split).transpose(-3, -2).reshape(numbers.shape)


def parse(text: str) -> GroupLanes | None:
    """The layout that `text` spells (`lanes.planar64`, `lanes.spare256`), or None."""
    if not text.startswith("lanes."):
        return None
    word = text.removeprefix("lanes.")
    inner = plain(word) or spare.parse(word)
    return None if inner is None else GroupLanes(inner)
