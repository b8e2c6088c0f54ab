"""How attention over a quantized cache is computed: `AttentionSchedule`, and what is chosen without tuning.

In: a spec, how many entries, queries and tokens. Out: the sizes of a program, and how many share a context.

    AttentionSchedule(rows=8, block=64, warps=2, stages=3)     r8 b64 w2 s3
    choose_attention(spec, queries=1), choose_splits(spec, schedule, batch=1, queries=1, tokens=8192)

The number of splits follows from the cache's size, which the host knows, never from the lengths, which only
the device knows: no call waits for a value.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from .attention import AttentionSpec
from .spec import CodegenError

PROCESSORS = 132
# Warps of a multiprocessor that registers and shared memory have room for, for every format looked at.
RESIDENT = 12
# Steps of a program at least, where its context has so many: shorter ones cost more in combining than they
# save (8,192 tokens of one entry: 32 splits instead of 64 take 9 % less, H200).
STEPS = 4
# Rows -> tokens of a step, warps, stages.
_TILES = {8: (64, 2, 3), 16: (64, 4, 3), 32: (32, 4, 3), 64: (32, 4, 2)}
_TEXT = re.compile(r"r(\d+) b(\d+) w(\d+) s(\d+)( overlap)?")


@dataclass(frozen=True)
class AttentionSchedule:
    """rows: queries of a program, over all heads that share one of the cache; block: tokens of a step;
    warps, stages: Triton's; overlap: the combination of the splits is launched while they still run
    (programmatic dependent launch, compute capability 9.0 on)."""

    rows: int = 8
    block: int = 64
    warps: int = 2
    stages: int = 3
    overlap: bool = False

    def __post_init__(self) -> None:
        for name in ("rows", "block", "warps"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise CodegenError(f"a schedule's {name} is a power of two, not {value}")
        if self.rows < 8 or self.block < 16:
            raise CodegenError("a program takes at least 8 rows and 16 tokens, the tensor cores' smallest")
        if self.stages < 1:
            raise CodegenError("a schedule has at least one stage")

    def __str__(self) -> str:
        return f"r{self.rows} b{self.block} w{self.warps} s{self.stages}" + (
            " overlap" if self.overlap else ""
        )

    @classmethod
    def parse(cls, text: str) -> AttentionSchedule:
        """The inverse of `str`; CodegenError if the text says something else."""
        found = _TEXT.fullmatch(text)
        if found is None:
            raise CodegenError(f"{text!r} is no schedule of attention; one reads: r8 b64 w4 s3")
        *numbers, overlap = found.groups()
        rows, block, warps, stages = (int(number) for number in numbers)
        return cls(rows, block, warps, stages, overlap is not None)


def choose_attention(spec: AttentionSpec, queries: int) -> AttentionSchedule:
    """The schedule for this many queries of each head.

    Two warps: what they issue for a token, counted in the machine code for 9.0, takes 0.55 (int8), 0.66
    (int4) and 0.77 (int4[g32]) of the time in which an H200 reads it. With four, int4's slices of 32 numbers
    give only two of them rows of the second product, and the others repeat it: 0.60, 0.98 and 1.13. More rows
    take the largest tiles that leave no register in memory.
    """
    rows = spec.group * queries
    width = next(size for size in (8, 16, 32, 64) if rows <= size or size == 64)
    return AttentionSchedule(width, *_TILES[width])


@lru_cache(maxsize=4096)
def choose_splits(
    spec: AttentionSpec, schedule: AttentionSchedule, batch: int, queries: int, tokens: int
) -> int:
    """How many programs share the context of an entry and head.

    Of the numbers that fill the GPU once, the one that leaves its busiest multiprocessor the least to do; the
    largest of equals, whose programs wait for memory beside each other.
    """
    pairs = max(batch * spec.kv_heads * -(-spec.group * queries // schedule.rows), 1)
    blocks = max(-(-tokens // schedule.block), 1)
    most = min(max(RESIDENT // schedule.warps * PROCESSORS // pairs, 1), max(blocks // STEPS, 1))

    def load(splits: int) -> int:
        """Blocks of the multiprocessor that has the most."""
        each = -(-blocks // splits)
        return -(-pairs * -(-blocks // each) // PROCESSORS) * each

    best = min(range(most // 2 + 1, most + 1), key=lambda splits: (load(splits), -splits))
    return -(-blocks // -(-blocks // best))
