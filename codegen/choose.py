"""Which layout and which schedule: what a spec gets when nobody has tuned it.

In: a format and the length of a row; a spec and a number of rows of x. Out: a format laid out for kernels; a
`Schedule`, or None where decoding the weight once and calling the library is faster.

    kernel_layout(format("int4[g128]"), 4096)   ->   int4[g128,halves256]
    choose(spec, 1)                             ->   m8 n64 w2 s3 k4 sum

Measured on one H200 (torch 2.11, Triton 3.6; see docs/notes/gpu.md): 64 rows of weights to two warps and
three stages was best or within 3 % of it on four shapes at M = 1 and 16; what is left is how many programs
share the sum, so that every multiprocessor has about as much to do.
"""

from __future__ import annotations

from functools import lru_cache

from ..formats import Format, Layout
from ..formats.layout import Halfwords
from ..formats.sparsity import Dense
from .schedule import Schedule, scales
from .slices import Walk, walk
from .spec import GemmSpec

# Codes of a slice: longer ones leave fewer runs to share, shorter ones load less than 128 bytes a row.
LONGEST = 64
SHORTEST = 16
# Longer runs leave too few of them to share between programs (a row of 4096 is sixteen), and their loads do
# not fit the registers of two warps where a code lies in several planes: three bits spilled with 512.
MOST_CODES = 256
# Past this many rows the tensor cores are the limit, and a plain product on decoded weights is faster.
MOST_ROWS = 256
# Programs wanted at least: four for each of 132 multiprocessors.
PROGRAMS = 528


@lru_cache(maxsize=1024)
def kernel_layout(format: Format, k: int) -> Format | None:
    """`format` in the layout that kernels walk over, None if there is none: groups of no multiple of 16, a
    stored sparsity, arithmetic that is not float32's."""
    scale = format.scale
    if not isinstance(format.sparsity, Dense) or (scale is not None and scale.native):
        return None
    cols = scale.granularity.cols if scale is not None else None
    bits = format.element.bits
    narrowest = bits & -bits
    best: Format | None = None
    padding = 0.0
    for length in (LONGEST, 32, SHORTEST):
        if cols is not None and cols % length:
            continue
        span = length * 16 // narrowest
        if span > MOST_CODES and length > SHORTEST:
            continue
        waste = -(-k // span) * span / k
        if best is None or waste < padding - 0.05:
            best, padding = format.with_layout(Halfwords(span)), waste
    return best


def runs_on_kernels(layout: Layout) -> bool:
    """Whether codes in this layout were put there for these kernels."""
    return isinstance(layout, Halfwords)


@lru_cache(maxsize=4096)
def choose(spec: GemmSpec, m: int) -> Schedule | None:
    """The schedule for m rows of x; None for so many that decoding first is faster."""
    if m > MOST_ROWS:
        return None
    found = walk(spec.weight, spec.k)
    wanted = scales(spec)
    if not isinstance(found, Walk) or not wanted:
        return None
    block_m = next(size for size in (8, 16, 32, 64, 128) if m <= size or size == 128)
    block_n, warps = (64, 2) if block_m <= 16 else (64, 4)
    scale = _placed(wanted)
    programs = -(-spec.n // block_n) * -(-m // block_m)
    split = max(1, min(round(PROGRAMS / programs), found.runs // 4, 8))
    return Schedule(block_m, block_n, warps, _stages(found, block_m, block_n), split, scale)


def _placed(wanted: tuple[str, ...]) -> str:
    """Scaling sums was cheaper than scaling values, or within 1 %, at every group from 16 to 128."""
    return "sum" if "sum" in wanted else wanted[0]


def _stages(found: Walk, block_m: int, block_n: int) -> int:
    """Three where they fit: Triton keeps one fewer than that in shared memory, of codes and of x."""
    stage = block_n * found.units * 2 + block_m * found.codes * 2
    return 3 if 2 * stage <= 96 * 1024 else 2
