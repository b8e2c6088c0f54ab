"""Which schedule: what was measured on this card, else what experience and the cost model say.

In: a spec and a number of rows of x. Out: a `Schedule` or a `Pipelined`, or None where decoding the weight
once and calling the library is faster.

    choose(spec, 1)                             ->   m8 n64 w2 s3 k4 sum

First the user's table, then the shipped one (`table.py`). Without an entry a rule up to 16 rows: 64 rows of
weights to two warps and three stages, and as many programs to a sum as give every multiprocessor four. Past
that a pipelined kernel where one can run (`plans.py`), else the fastest by the cost model. Which of the two
is better where was measured (one H200, see `tests/codegen/test_cost.py`). What the rule says starts before
its predecessor has ended, where a GPU can, and is split further then: a program more fills the gap between
two kernels (`docs/notes/gpu.md`).

What runs depends on the card that is current when a spec is first seen there, and on nothing after.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache

import torch

from .candidates import bucket, candidates, rows_each
from .cost import facts, ranked
from .device import Device, present
from .epilogue import Epilogue
from .library import has_library, multiplies_codes
from .pipelined import Pipelined
from .plans import untuned_plan
from .schedule import OVERLAP_FROM, Schedule, scales
from .spec import GemmSpec
from .table import LIBRARY, lookup, tables

# Past this many rows the tensor cores are the limit, and a plain product on decoded weights is faster.
MOST_ROWS = 256
# Up to this many the loads of the weight are all that counts.
SKINNY = 16
# Programs wanted at least, a multiprocessor.
PROGRAMS = 4
# Overlapped launches want so many, in so many parts of a sum at most.
OVERLAPPED_PROGRAMS, MOST_OVERLAPPED = 6, 6
# What the model may choose unmeasured: what was measured somewhere.
TRIED_N, TRIED_STAGES, TRIED_SPLIT = 128, 4, 8


def choose(spec: GemmSpec, m: int) -> Schedule | Pipelined | None:
    """The schedule for m rows of x; None where products first and the rest after them are faster: products of
    the library on decoded weights, or pipelined ones, which have no epilogue of their own."""
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
    return _chosen(spec, bucket(rows_each(spec, m)), device)


def alone(spec: GemmSpec) -> GemmSpec:
    """One of its products, with nothing behind it."""
    return replace(spec, bias=False, weights=1, epilogue=Epilogue())


def forget() -> None:
    """Reads the tables anew, for what was tuned since."""
    tables.cache_clear()
    _chosen.cache_clear()


@lru_cache(maxsize=4096)
def _chosen(spec: GemmSpec, size: int, device: int | None) -> Schedule | Pipelined | None:
    """`device`: of the schedules that are kept, those of this card."""
    if not spec.walk or not scales(spec):
        return None
    if not spec.epilogue.plain and not spec.experts:
        product = alone(spec)
        if isinstance(_chosen(product, size, device), Pipelined):
            return None
    card = present()
    measured = lookup(spec, size, card)
    if isinstance(measured, Schedule | Pipelined):
        return measured
    if measured == LIBRARY and has_library(spec):
        return None
    if (plan := untuned_plan(spec, size, card)) is not None:
        return plan
    return None if has_library(spec) and size > _most_rows(spec, card) else unmeasured(spec, size, card)


def _most_rows(spec: GemmSpec, card: Device) -> int:
    """Rows past which the library is faster; of codes as they lie already where tiles of ours leave
    multiprocessors idle: float8, 28672 x 4096, M = 256: 52 us and 55; 4096 x 4096, M = 128: 20 and 14."""
    fills = -(-spec.n // TRIED_N) >= card.multiprocessors
    return MOST_ROWS if fills or not multiplies_codes(spec) else SKINNY


def unmeasured(spec: GemmSpec, size: int, card: Device) -> Schedule | None:
    """What runs where no table has an entry: `untuned`, overlapped where that was faster."""
    found = untuned(spec, size, card)
    return found if found is None or size > SKINNY else overlapped(spec, found, size, card)


def overlapped(spec: GemmSpec, schedule: Schedule, m: int, card: Device) -> Schedule:
    """The same overlapping its predecessor, in as many programs as was best so; as it is where no GPU can.
    Each part of the sum keeps two runs, so that loads of one run beside the products of the other."""
    if card.arch < OVERLAP_FROM:
        return schedule
    # Of all weights: two in a program are twice the work, and want no parts that one would.
    tiles = -(-spec.n // schedule.block_n) * spec.weights
    programs = tiles * -(-m // schedule.block_m) * max(1, spec.experts)
    parts = round(OVERLAPPED_PROGRAMS * card.multiprocessors / programs)
    split = max(1, min(parts, int(facts(spec)["runs"]) // 2, MOST_OVERLAPPED))
    return replace(schedule, split=split, overlap=1)


def untuned(spec: GemmSpec, size: int, card: Device) -> Schedule | None:
    """Without measurements, for the rows of a bucket, in an ordinary launch."""
    if size <= SKINNY:
        return rule(spec, size, card)
    tried = [
        schedule
        for schedule in candidates(spec, size, card)
        if schedule.block_n <= TRIED_N
        and schedule.stages <= TRIED_STAGES
        and schedule.split <= TRIED_SPLIT
        and schedule.joined == 1  # the model was not fitted to others
    ]
    return next(iter(ranked(spec, size, tried, card)), None) or rule(spec, size, card)


def rule(spec: GemmSpec, m: int, card: Device) -> Schedule | None:
    """What served well before anybody tuned."""
    wanted = scales(spec)
    if not spec.walk or not wanted:
        return None
    known = facts(spec)
    block_m = next(size for size in (8, 16, 32, 64, 128) if m <= size or size == 128)
    block_n, warps = (64, 2) if block_m <= SKINNY else (64, 4)
    programs = -(-spec.n // block_n) * -(-m // block_m) * spec.weights
    split = max(1, min(round(PROGRAMS * card.multiprocessors / programs), int(known["runs"]) // 4, 8))
    return Schedule(block_m, block_n, warps, _stages(known, block_m, block_n), split, _placed(wanted))


def _placed(wanted: tuple[str, ...]) -> str:
    """Scaling sums was cheaper than scaling values, or within 1 %, at every group from 16 to 128."""
    return "sum" if "sum" in wanted else wanted[0]


def _stages(known: Mapping[str, float], block_m: int, block_n: int) -> int:
    """Three where they fit: Triton keeps one fewer than that in shared memory, of codes and of x."""
    stage = block_n * known["weights"] * known["run_bytes"] + block_m * known["run"] * known["x_bytes"]
    return 3 if 2 * stage <= 96 * 1024 else 2
