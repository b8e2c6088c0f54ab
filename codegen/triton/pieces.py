"""Who computes what in a pipelined kernel: the same walk over pieces of work for all warps of a program.

In: a schedule. Out: lines of Gluon. Work is counted in runs of codes: tile i is the runs i * RUNS and on, and
a piece is the runs of one tile that one program adds up.

    132 programs, 224 tiles of 16 runs, streamk ->  program 0: runs 0 .. 26: tile 0 and most of tile 1
                                                    program 1: runs 27 .. 53: the rest of tile 1, ...
"""

from __future__ import annotations

from ..pipelined import Pipelined
from .lines import Lines

BEGIN = (
    "blocks = (m + BLOCK_M - 1) // BLOCK_M",
    "program, programs, tiles = tl.program_id(0), tl.num_programs(0), TILES_N * blocks",
    "at, stop, tile = first_piece(program, programs, tiles)",
)
# Blocks of x that multiply the same codes come one after another.
PLACE = (
    "n, m0 = at // RUNS // blocks * BLOCK_N, at // RUNS % blocks * BLOCK_M",
    "begin = at % RUNS",
    "end = tl.minimum(begin + (stop - at), RUNS)",
)
ADVANCE = "at, stop, tile = next_piece(at, stop, at + (end - begin), tile, programs, tiles)"


def functions(out: Lines, schedule: Pipelined) -> None:
    """The two that the loops call."""
    out.add("", "", "@gluon.jit")
    with out.indent("def first_piece(program, programs, tiles):"):
        if schedule.streamk:
            out.add(
                '"""Whole waves of tiles are dealt out; the rest, up to two waves, is cut evenly."""',
                "waves = tl.maximum(tiles // programs - 1, 0)",
                "rest = tl.where(tiles % programs == 0, 0, tiles - waves * programs)",
                "at = program * (rest * RUNS) // programs",
                "stop = (program + 1) * (rest * RUNS) // programs",
                "return next_piece(at, stop, at, rest + program, programs, tiles)",
            )
        else:
            out.add("return program * RUNS, tl.minimum(program + 1, tiles) * RUNS, program + programs")
    out.add("", "", "@gluon.jit")
    with out.indent("def next_piece(at, stop, end, tile, programs, tiles):"):
        out.add(
            '"""What follows the runs before `end`: the rest of this piece, or the next whole tile."""',
            "over = end == stop",
            "at = tl.where(over, tile * RUNS, end)",
            "stop = tl.where(over, tl.minimum(tile + 1, tiles) * RUNS, stop)",
            "return at, stop, tl.where(over, tile + programs, tile)",
        )


def add_parts(out: Lines, store: str) -> None:
    """A piece that begins within a tile is a part, left in memory for the program that began the tile. That
    one adds all parts up in the order of k, the same sum in every run. They came first in their programs, so
    it waits for nothing but these programs' start."""
    out.add(
        # The compiler does not know that it is zero, or it would hold all these addresses during the
        # products.
        "zero = tl.minimum(begin, 0)",
        "r = group * ROWS + zero + tl.arange(0, ROWS, tl.SliceLayout(1, SUMS))[:, None]",
        "mine = partial + (r * BLOCK_M + tl.arange(0, BLOCK_M, tl.SliceLayout(0, SUMS))[None, :])",
        "flag = flags + group",
    )
    with out.indent("if begin > 0:"):
        out.add(
            "tl.store(mine + program * (BLOCK_N * BLOCK_M), total)",
            "barrier()",
            'tl.atomic_xchg(flag + program * GROUPS, 1, sem="release")',
        )
    with out.indent("else:"):
        out.add("other, done = program + 1, end")
        with out.indent("while done < RUNS:"):
            with out.indent('while tl.atomic_add(flag + other * GROUPS, 0, sem="acquire") == 0:'):
                out.add("pass")
            out.add(
                "barrier()",
                'total += tl.load(mine + other * (BLOCK_N * BLOCK_M), cache_modifier=".cg")',
                "barrier()",
                'tl.atomic_xchg(flag + other * GROUPS, 0, sem="relaxed")',
                "start, until, _ = first_piece(other, programs, tiles)",
                "done += tl.minimum(until - start, RUNS - done)",
                "other += 1",
            )
        out.add(store)
