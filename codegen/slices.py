"""A layout's index map seen as a GPU kernel walks it: tiles of 16-bit units, and the slices of K inside them.

In: a format and the length of a row. Out: a `Walk`, or a Miss that says why its layout cannot be walked.

    int4[g128,halves512]  ->  runs of 512 codes in 128 units; one load of 128 units; four slices of 128 codes,
                              slice j at bits 4j of the units (j = 0: bit 0, 1: bit 8, 2: bit 4, 3: bit 12)
    int3[...,halves1024]  ->  the 2-bit plane as two loads of 64 units, the 1-bit plane as one; 16 slices

A slice is a stretch of codes that one shift and one mask take out of contiguous units, so that a kernel never
moves a code from one thread to another. Where the tensor cores multiply 8-bit numbers, units are bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np

from ..formats import Format, mover

UNIT = 16
BYTE = 8
# Codes that lie in order, a byte each, are walked over in runs of this many: 128 bytes of a row at a time.
RUN_OF_BYTES = 128


@dataclass(frozen=True)
class Take:
    """Bits low .. low + width - 1 of a slice's codes lie in the units of load `load`, from bit `bit` on."""

    load: int
    low: int
    width: int
    bit: int


@dataclass(frozen=True)
class Walk:
    """A row is `runs` runs of `codes` codes in `units` units; rows are `stride` units apart, which is less
    than all runs where the last one is cut short.

    loads: first unit, within the run, of each load of `length` units; slices: how slice i, the codes from
    i * length on, is taken out.
    """

    codes: int
    units: int
    runs: int
    stride: int
    length: int
    loads: tuple[int, ...]
    slices: tuple[tuple[Take, ...], ...]


@dataclass(frozen=True)
class Unwalkable:
    """Why a layout cannot be walked; falsy."""

    reason: str

    def __bool__(self) -> bool:
        return False


@lru_cache(maxsize=512)
def walk(
    format: Format, k: int, width: int = UNIT, cut: int = 0, run_of_bytes: int = RUN_OF_BYTES
) -> Walk | Unwalkable:
    """How a kernel walks over rows of `k` codes, in units of `width` bits, in slices that `cut` (if any) is a
    multiple of; in runs of so many where codes lie in order, a byte each."""
    bits, run = format.element.bits, format.run
    codes, size = format.layout.period(bits, run, k)
    if (codes, size, width) == (1, 1, BYTE):
        codes = size = run_of_bytes
    if k == 0 or codes > 1 << 14:
        return Unwalkable(f"the layout {format.layout} repeats after {codes} codes; lay it out as halves")
    if size % (width // 8):
        return Unwalkable(
            f"a run of {codes} codes of {format} takes {size} bytes, no whole {width}-bit units"
        )
    byte, bit, low = mover.evaluate(format.layout, bits, run, codes)
    place = byte * 8 + bit
    unit, inside = place // width, place % width
    length = math.gcd(_length(unit, inside), cut)
    starts = unit[:, ::length]
    loads = tuple(int(u) for u in np.unique(starts))
    if length < 16 or length & (length - 1):
        return Unwalkable(
            f"the layout {format.layout} of {format} leaves slices of {length} codes; a kernel needs a "
            "power of two from 16 on"
        )
    if any(b - a < length for a, b in pairwise(loads)):
        return Unwalkable(f"the layout {format.layout} of {format} takes codes from overlapping units")
    slices = []
    for i in range(codes // length):
        takes: list[Take] = []
        for row in sorted(range(bits), key=lambda r: low[r]):
            load, at = loads.index(int(starts[row, i])), int(inside[row, i * length])
            last = takes[-1] if takes else None
            if (
                last
                and last.load == load
                and at == last.bit + last.width
                and low[row] == last.low + last.width
            ):
                takes[-1] = Take(load, last.low, last.width + 1, last.bit)
            else:
                takes.append(Take(load, low[row], 1, at))
        slices.append(tuple(takes))
    stride = format.layout.row_bytes(bits, run, k) * 8 // width
    return Walk(codes, size * 8 // width, -(-k // codes), stride, length, loads, tuple(slices))


def _length(unit: np.ndarray, inside: np.ndarray) -> int:
    """The longest stretch, the same for all, in which units advance by one and the place inside stays."""
    codes = unit.shape[1]
    breaks = ((np.diff(unit, axis=1) != 1) | (np.diff(inside, axis=1) != 0)).any(0)
    edges = np.flatnonzero(breaks) + 1
    return int(np.gcd.reduce(np.append(edges, codes)))


def joined(walk: Walk, times: int) -> Walk:
    """The same row in runs of `times` as many codes, so that what a run costs beside its codes is paid less
    often. The last run may reach past the row."""
    if times == 1:
        return walk
    each = len(walk.loads)
    loads = tuple(start + i * walk.units for i in range(times) for start in walk.loads)
    slices = tuple(
        tuple(Take(take.load + i * each, take.low, take.width, take.bit) for take in takes)
        for i in range(times)
        for takes in walk.slices
    )
    runs = -(-walk.runs // times)
    return Walk(walk.codes * times, walk.units * times, runs, walk.stride, walk.length, loads, slices)


def renumbered(slices: Sequence[Sequence[Take]]) -> tuple[list[list[Take]], list[int]]:
    """The slices with the loads that they read numbered from 0, and which loads these are."""
    loads = sorted({take.load for takes in slices for take in takes})
    return [[Take(loads.index(t.load), t.low, t.width, t.bit) for t in takes] for takes in slices], loads
