"""Schedules worth a try: the search space for a spec and a number of rows, as data.

In: a spec, a number of rows of x, a device. Out: every schedule that can run there and is not hopeless.

    candidates(spec, 1, device("NVIDIA H200"))   ->   m8 n16 w1 s2 k1 sum, m8 n16 w1 s2 k2 sum, ...
    bucket(100)                                  ->   128: M from 65 to 128 shares a schedule

No M needs a kernel of its own: all of a bucket run the same one, which covers x with blocks of rows.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache

from .cost import evaluate, ranked
from .device import Device
from .schedule import Schedule, scales
from .slices import Walk
from .spec import GemmSpec

SMALLEST = 8
# Rows of x in a program, for M up to the key; past the last, as for the last.
BLOCK_M = {
    8: (8, 16), 16: (16,), 32: (16, 32), 64: (32, 64), 128: (64, 128), 256: (64, 128, 256), 512: (128, 256),
}  # fmt: skip
BLOCK_N = (16, 32, 64, 128, 256)
WARPS = (1, 2, 4, 8)
STAGES = (2, 3, 4, 5, 6)
SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)
# Short runs (64 codes of nvfp4) joined up to so many codes a turn: longer ones fill a thread's registers.
JOINS = (1, 2, 4)
MOST_JOINED = 256
# Sums of a thread: more than half of its registers leave none for decoding.
MOST_SUMS = 128
# Of the registers that there are; what is over spills, but the model's count is rough.
REGISTERS = 255 * 1.2
# Programs a multiprocessor: a split past the most adds parts of sums and no parallelism.
MOST_PROGRAMS = 12
# Of a shortlist: of one tile and warps, and of those with one split too, which differ in stages alone.
MOST_OF_TILE, MOST_OF_PIPELINE = 3, 2


def bucket(m: int) -> int:
    """The largest M that shares a schedule with this one: 8, 16, 32, ..."""
    return SMALLEST if m <= SMALLEST else 1 << (m - 1).bit_length()


def rows_of(size: int) -> int:
    """The M that stands for a bucket: one token of one sequence, or the whole bucket."""
    return 1 if size == SMALLEST else size


def rows_each(spec: GemmSpec, m: int) -> int:
    """The rows of x that one weight multiplies: with experts their share, as if all had the same."""
    return -(-m // spec.experts) if spec.experts else m


@lru_cache(maxsize=64)
def candidates(spec: GemmSpec, m: int, card: Device) -> tuple[Schedule, ...]:
    """Schedules for m rows of x to each weight."""
    modes = [mode for mode in scales(spec) if mode != "float"] or list(scales(spec))
    blocks = BLOCK_M[min(bucket(m), max(BLOCK_M))]
    codes = spec.walk.codes if isinstance(spec.walk, Walk) else MOST_JOINED
    joins = [many for many in JOINS if many == 1 or many * codes <= MOST_JOINED]
    tried = itertools.product(blocks, BLOCK_N, WARPS, STAGES, SPLITS, modes, joins)
    found = [
        Schedule(block_m, block_n, warps, stages, split, mode, joined=many)
        for block_m, block_n, warps, stages, split, mode, many in tried
        if _shaped(spec, m, block_m, block_n, warps, split, card)
    ]
    # What can stand in the way is where a scale multiplies, how often a row is split, and runs joined.
    ways = {(one.split, one.scale, one.joined): one for one in found}
    barred = {way for way, one in ways.items() if one.obstacle(spec) is not None}
    found = [one for one in found if (one.split, one.scale, one.joined) not in barred]
    if not found:
        return ()
    terms = evaluate(spec, m, found, card)
    fits = (terms["room"] <= card.shared_of_program) & (terms["registers"] <= REGISTERS)
    return tuple(schedule for schedule, fit in zip(found, fits, strict=True) if fit)


def _shaped(spec: GemmSpec, m: int, block_m: int, block_n: int, warps: int, split: int, card: Device) -> bool:
    """Whether every warp has rows of the weight, every thread room for its sums, and a split brings programs
    that would else be missing."""
    if warps * 16 > block_n or block_m * block_n > MOST_SUMS * 32 * warps:
        return False
    unsplit = -(-spec.n // block_n) * -(-m // block_m) * max(1, spec.experts)
    return split == 1 or unsplit * split <= MOST_PROGRAMS * card.multiprocessors


def shortlist(
    spec: GemmSpec, m: int, card: Device, count: int, first: Schedule | None = None
) -> list[Schedule]:
    """The few that are worth measuring: `first`, then by turns the likeliest by the model, not one tile in
    all its variants, and the likeliest next to `first`: the model was fitted to little that is far off."""
    order = ranked(spec, m, candidates(spec, m, card), card)
    found = [] if first is None else [first]
    far = _varied(one for one in order if one != first)
    near = (one for one in order if first is not None and one != first and _apart(one, first) == 1)
    turns = itertools.chain.from_iterable(itertools.zip_longest(far, near))
    found += dict.fromkeys(one for one in turns if one is not None)
    return found[:count]


def _varied(order: Iterable[Schedule]) -> list[Schedule]:
    """The same without most variants of each tile."""
    found = []
    tiles: Counter[tuple[object, ...]] = Counter()
    pipelines: Counter[tuple[object, ...]] = Counter()
    for one in order:
        tile = (one.block_m, one.block_n, one.warps)
        pipeline = (*tile, one.split, one.scale, one.joined)
        if tiles[tile] < MOST_OF_TILE and pipelines[pipeline] < MOST_OF_PIPELINE:
            found.append(one)
            tiles[tile] += 1
            pipelines[pipeline] += 1
    return found


def _apart(one: Schedule, other: Schedule) -> int:
    """In how many of tile, stages, split, place of the scale and joined runs two schedules differ."""
    first, second = (
        ((s.block_m, s.block_n, s.warps), s.stages, s.split, s.scale, s.joined) for s in (one, other)
    )
    return sum(a != b for a, b in zip(first, second, strict=True))
