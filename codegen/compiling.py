"""Kernels compiled by many processes into the cache that they share.

In: (spec, schedule) as texts. Out: a future each, of None or why it failed; kernels are in Triton's cache.

    with compiling(jobs, workers=15) as made:
        made["linear 4096x4096 ...", "m8 n64 w2 s3 k4 sum"].result()   ->   None
    compile_all(jobs, workers=15, seconds=200)                         ->   {job: why it failed}

Processes are spawned, not forked: a CUDA context does not survive a fork. A script that calls this keeps what
it does behind `if __name__ == "__main__"`.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from contextlib import contextmanager

import torch
from torch import Tensor

from ..formats import Format
from .pipelined import parsed
from .spec import GemmSpec

Job = tuple[str, str]  # a spec and a schedule
Made = Mapping[Job, "Future[str | None]"]


def shaped_parts(fmt: Format, n: int, k: int, experts: int = 0) -> list[Tensor]:
    """What the compiler asks of a weight [n, k]: dtypes and strides, on `meta`."""
    granularity = fmt.scale.granularity if fmt.scale is not None else None
    rows = max(16, (granularity.rows or 1) if granularity is not None else 1)
    lead = [1] if experts else []
    # Which dimension counts rows is the format's to say: it is the one that doubles with them.
    few, many = (fmt.quantize(torch.randn(*lead, count, k)).parts for count in (rows, 2 * rows))
    return [_grown(a, b, rows, n) for a, b in zip(few, many, strict=True)]


def _grown(few: Tensor, many: Tensor, rows: int, n: int) -> Tensor:
    """A part of n rows on `meta`, from those of `rows` and twice as many; what lies side by side stays so."""
    size = [a + (b - a) * (n - rows) // rows for a, b in zip(few.shape, many.shape, strict=True)]
    strides, step = [0] * few.ndim, 1
    for i in sorted(range(few.ndim), key=lambda i: (many.stride(i), -i)):
        strides[i] = step
        step *= size[i]
    return torch.empty_strided(size, strides, dtype=few.dtype, device="meta")


def compile_one(job: Job) -> str | None:
    """Compiles into the cache that all processes share; why not, if not."""
    from .triton.run import warm

    spec, schedule = GemmSpec.parse(job[0]), parsed(job[1])
    obstacle = schedule.obstacle(spec)
    if obstacle is None:
        warm(spec, schedule, shaped_parts(spec.weight, spec.n, spec.k, spec.experts))
    return obstacle


def _niced() -> None:
    os.nice(5)
    torch.set_num_threads(1)


def default_workers() -> int:
    """All cores but the one of the process that measures."""
    return max(1, len(os.sched_getaffinity(0)) - 1 if hasattr(os, "sched_getaffinity") else 1)


@contextmanager
def compiling(jobs: Sequence[Job], workers: int) -> Iterator[Made]:
    """Futures of the jobs, begun in their order; what is not begun when the block ends is left."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, max(len(jobs), 1)), mp_context=context, initializer=_niced)
    try:
        yield {job: pool.submit(compile_one, job) for job in dict.fromkeys(jobs)}
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def compile_all(jobs: Sequence[Job], workers: int, seconds: float) -> dict[Job, str]:
    """Why each job failed, of those that did; those not begun after so many seconds are left."""
    with compiling(jobs, workers) as made:
        wait(made.values(), timeout=seconds)
        reasons = {job: reason_of(future) for job, future in made.items()}
    return {job: reason for job, reason in reasons.items() if reason is not None}


def reason_of(future: Future[str | None]) -> str | None:
    """Why a job failed, None if it did not."""
    if not future.done():
        return "not compiled in time"
    error = future.exception()
    return future.result() if error is None else repr(error)[:300]
