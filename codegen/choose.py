"""Which schedule: what a spec gets when nobody has tuned it.

In: a spec and a number of rows of x. Out: a `Schedule`, or None where decoding the weight once and calling
the library is faster.

    choose(spec, 1)                             ->   m8 n64 w2 s3 k4 sum

Measured on one H200 (torch 2.11, Triton 3.6; see docs/notes/gpu.md): 64 rows of weights to two warps and
three stages was best or within 3 % of it on four shapes at M = 1 and 16; what is left is how many programs
share the sum, so that every multiprocessor has about as much to do.
"""

from __future__ import annotations

from functools import lru_cache

from .schedule import Schedule, scales
from .slices import Walk, walk
from .spec import GemmSpec

# Past this many rows the tensor cores are the limit, and a plain product on decoded weights is faster.
MOST_ROWS = 256
# Programs wanted at least: four for each of 132 multiprocessors.
PROGRAMS = 528


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
