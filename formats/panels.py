"""Panels: rows of bytes side by side, as an integer micro-kernel multiplies them.

In: unpacked codes [N, K], one a byte. Out: bytes [N, row_bytes] in which `lanes` neighbouring rows are woven.

    panels2x2, rows a b c d / e f g h   ->   a b e f  c d g h        two numbers of each row in turn

A convolution's row of I channels times T taps (`panels16x4t9`) is turned first, so that the channels of one
tap lie together, and filled with zeros to whole runs of `each`. Where N is no multiple of `lanes`, the last
panel is narrower. `panels16x4t9r24` cuts panels anew after each 24 rows: those of a group of channels.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from .errors import FormatError
from .layout import Layout

_TEXT = re.compile(r"panels(\d+)x(\d+)(?:t(\d+))?(?:r(\d+))?")


@dataclass(frozen=True)
class Panels(Layout):
    """lanes: rows of a panel; each: numbers of a row that lie together; taps: T, by which K is divided; rows:
    of one group, None for all."""

    lanes: int = 16
    each: int = 4
    taps: int = 1
    rows: int | None = None
    name: str = "panels"
    across: bool = True

    def __post_init__(self) -> None:
        for what in ("lanes", "each", "taps"):
            if getattr(self, what) < 1:
                raise FormatError(f"a layout of panels has 1 or more {what}, not {getattr(self, what)}")
        if self.rows is not None and self.rows < 1:
            raise FormatError(f"a layout of panels has 1 or more rows in a group, not {self.rows}")

    def __str__(self) -> str:
        taps = f"t{self.taps}" if self.taps > 1 else ""
        return f"{self.name}{self.lanes}x{self.each}{taps}{'' if self.rows is None else f'r{self.rows}'}"

    def fields(self, bits: int, run: int | None) -> NoReturn:
        raise FormatError(f"the layout {self} weaves rows, so it has no map of a row alone")

    def period(self, bits: int, run: int | None, length: int) -> NoReturn:
        self.fields(bits, run)

    def row_bytes(self, bits: int, run: int | None, length: int) -> int:
        channels = length // self.taps
        return self.taps * (-(-channels // self.each) * self.each)

    def pack(self, codes: Tensor, bits: int, run: int | None = None) -> Tensor:
        self._check(codes, codes.shape[-1], bits)
        count, length = codes.shape
        channels = length // self.taps
        turned = codes.reshape(count, channels, self.taps).transpose(1, 2)
        filled = torch.nn.functional.pad(turned, (0, -channels % self.each))
        groups = filled.reshape(-1, self._group(count), self.row_bytes(bits, run, length))
        woven = [self._weave(part) for part in self._cut(groups)]
        return torch.cat(woven, 1).reshape(count, groups.shape[-1])

    def unpack(self, packed: Tensor, length: int, bits: int, run: int | None = None) -> Tensor:
        self._check(packed, length, bits)
        count, size = packed.shape
        groups = packed.reshape(-1, self._group(count), size)
        plain = torch.cat([self._unweave(part) for part in self._cut(groups)], 1)
        channels = length // self.taps
        turned = plain.reshape(count, self.taps, size // self.taps)[..., :channels]
        return turned.transpose(1, 2).reshape(count, length)

    def _check(self, codes: Tensor, length: int, bits: int) -> None:
        if bits != 8:
            raise FormatError(f"a layout of panels holds codes of 8 bits, not {bits}")
        if codes.ndim != 2:
            raise FormatError(f"a layout of panels holds a matrix, not {codes.ndim} dimensions")
        if length % self.taps or (self.rows and codes.shape[0] % self.rows):
            raise FormatError(f"{self} does not hold a matrix of {codes.shape[0]} rows of {length} numbers")

    def _group(self, count: int) -> int:
        return self.rows or max(count, 1)

    def _cut(self, groups: Tensor) -> list[Tensor]:
        """[G, rows, bytes] as whole panels [G, P, lanes, bytes], and what is left as narrower ones."""
        rows, size = groups.shape[1:]
        whole = rows // self.lanes * self.lanes
        cuts = ((0, whole, self.lanes), (whole, rows, max(rows - whole, 1)))
        return [
            groups[:, start:stop].reshape(groups.shape[0], (stop - start) // lanes, lanes, size)
            for start, stop, lanes in cuts
        ]

    def _weave(self, panels: Tensor) -> Tensor:
        groups, count, rows, size = panels.shape
        split = panels.reshape(groups, count, rows, size // self.each, self.each).transpose(2, 3)
        return split.reshape(groups, count * rows, size)

    def _unweave(self, panels: Tensor) -> Tensor:
        groups, count, rows, size = panels.shape
        split = panels.reshape(groups, count, size // self.each, rows, self.each).transpose(2, 3)
        return split.reshape(groups, count * rows, size)


def parse(text: str) -> Panels | None:
    """The layout that `text` spells, or None."""
    found = _TEXT.fullmatch(text)
    if found is None:
        return None
    lanes, each, taps, rows = found.groups()
    return Panels(int(lanes), int(each), int(taps or 1), None if rows is None else int(rows))
