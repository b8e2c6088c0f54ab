"""How attention over a quantized cache is computed: `AttentionSchedule`, and what is chosen without tuning.

In: a spec, how many entries, queries and tokens. Out: the sizes of a program, and how many share a context.

    AttentionSchedule(rows=8, block=64, warps=4, stages=3)     r8 b64 w4 s3
    choose_attention(spec, queries=1), choose_splits(spec, schedule, batch=1, queries=1, tokens=8192)

The number of splits follows from the cache's size, which the host knows, never from the lengths, which only
the device knows: no call waits for a value.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .attention import AttentionSpec
from .spec import CodegenError

# Programs wanted: four for each of 132 multiprocessors.
PROGRAMS = 528
_TEXT = re.compile(r"r(\d+) b(\d+) w(\d+) s(\d+)( overlap)?")


@dataclass(frozen=True)
class AttentionSchedule:
    """rows: queries of a program, over all heads that share one of the cache; block: tokens of a step;
    warps, stages: Triton's; overlap: the combination of the splits is launched while they still run
    (programmatic dependent launch, compute capability 9.0 on)."""

    rows: int = 8
    block: int = 64
    warps: int = 4
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
    """The schedule for this many queries of each head."""
    rows = spec.group * queries
    width = next(size for size in (8, 16, 32, 64) if rows <= size or size == 64)
    return AttentionSchedule(width, 64, 4, 3 if width <= 16 else 2)


def choose_splits(
    spec: AttentionSpec, schedule: AttentionSchedule, batch: int, queries: int, tokens: int
) -> int:
    """How many programs share the context of an entry and head: enough to fill the GPU, each with a block."""
    programs = batch * spec.kv_heads * -(-spec.group * queries // schedule.rows)
    blocks = -(-tokens // schedule.block)
    return max(1, min(-(-PROGRAMS // max(programs, 1)), blocks))
