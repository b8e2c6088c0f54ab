"""Search for the fastest schedules on the GPU that is there, pruned by the cost model.

In: specs and numbers of rows. Out: a row each schedule that was tried, and the best of them in the table.

    tune([(spec, m) for m in (1, 16, 64)])
    ->  [{"spec": "linear 4096x4096 ...", "m": 1, "schedule": "m8 n64 w2 s3 k4 sum", "us": 7.1, ...}, ...]

Of all candidates the model's best few and what runs untuned are compiled by all cores, in the order in which
they are measured, which goes on meanwhile. A kernel's result is checked before its time counts. The table is
written after each spec, so that a search that is stopped loses nothing but its end.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from .candidates import bucket, rows_each, shortlist
from .choose import SKINNY, forget, unmeasured, untuned
from .compiling import Job, Made, compiling, default_workers
from .cost import microseconds as predicted
from .device import Device, present
from .library import has_library
from .pipelined import ARCH, Pipelined
from .plans import plans
from .schedule import OVERLAP_FROM, Schedule
from .spec import CodegenError, GemmSpec
from .table import LIBRARY, LIBRARY_FROM, best_of, update, user_file
from .timing import microseconds

Row = dict[str, Any]
TOP = 8
# A schedule so much slower than the best in a short measurement gets no long one.
HOPELESS = 1.15
SHORT, LONG = 3, 9  # replays


class Tried(Protocol):
    """What `trial.Trial` is: calls of a schedule, and whether their results are right."""

    def calls(self, schedule: str) -> Sequence[Callable[[], Any]]: ...
    def error(self, calls: Sequence[Callable[[], Any]]) -> float: ...
    def problem(self, error: float, calls: Sequence[Callable[[], Any]]) -> str | None: ...


Open = Callable[[GemmSpec], Callable[[int], Tried]]
Timer = Callable[[Sequence[Callable[[], Any]], int], float]
Choices = Callable[[GemmSpec, int, int], Sequence[Schedule | Pipelined]]


@dataclass(frozen=True)
class Plan:
    """Schedules to try for m rows, the likeliest first; `model_us`: what the model thinks of each."""

    spec: GemmSpec
    m: int
    schedules: tuple[str, ...]
    model_us: tuple[float | None, ...]


def tune(
    wanted: Iterable[tuple[GemmSpec, int]],
    *,
    top: int = TOP,
    seconds: float = 600.0,
    workers: int | None = None,
    table: Path | None = None,
    card: Device | None = None,
    known: Sequence[Row] = (),
    report: Callable[[Row], None] | None = None,
    choices: Choices | None = None,
    open: Open | None = None,
    timer: Timer = microseconds,
    compiler: Callable[[Sequence[Job], int], AbstractContextManager[Made]] = compiling,
) -> list[Row]:
    """Tries schedules of each spec and M for so many seconds in all, and keeps the best in a table.

    top: schedules tried of each; workers: processes that compile; table: the file, the user's by default;
    known: rows of an earlier search on this card, which are not tried again; report: called with each row;
    choices: which schedules are tried, given a spec, rows and a count, if not the shortlist; open, timer,
    compiler: what the GPU does, for who has another way to do it. Raises CodegenError without a CUDA GPU.
    """
    if open is None and not torch.cuda.is_available():
        raise CodegenError("tuning measures kernels on a CUDA GPU, and there is none here")
    card = present() if card is None else card
    table = user_file(card) if table is None else table
    until = time.monotonic() + seconds
    plans = [plan(spec, m, card, top, choices) for spec, m in dict.fromkeys(wanted)]
    rows = list(known)
    done = {(row["spec"], row["m"], row["schedule"]) for row in known}
    jobs = [job for one in plans for job in _jobs(one, done)]
    with compiler(jobs, default_workers() if workers is None else workers) as made:
        for group in _by_spec(plans):
            found = _measure(group, made, done, until, open or on_gpu, timer, report)
            rows += found
            if any("us" in row for row in found):
                text = {str(one.spec) for one in group}
                best = best_of(card.name, [row for row in rows if row["spec"] in text], "tuned here")
                update(table, best)
            if time.monotonic() > until:
                break
    forget()
    return rows


def plan(spec: GemmSpec, m: int, card: Device, top: int = TOP, choices: Choices | None = None) -> Plan:
    """What is worth trying for m rows. CodegenError if m is no number of rows, or no kernel runs the spec."""
    if m < 1:
        raise CodegenError(f"kernels are tuned for 1 row of x or more, not {m}")
    each = rows_each(spec, m)
    first = untuned(spec, bucket(each), card)
    if first is None:
        raise CodegenError(f"no schedule runs {spec}, so there is nothing to tune")
    found: Sequence[Schedule | Pipelined] = (
        _likely(spec, each, card, top, first) if choices is None else choices(spec, each, top)
    )
    texts = [str(schedule) for schedule in found]
    # The model knows nothing of pipelined kernels.
    plain = [schedule for schedule in found if isinstance(schedule, Schedule)]
    times = iter(predicted(spec, each, plain, card))
    told: list[float | None] = [
        round(next(times), 2) if isinstance(schedule, Schedule) else None for schedule in found
    ]
    if card.arch == ARCH and bucket(each) > SKINNY and choices is None:
        piped = [str(one) for one in plans(spec, each)]
        texts, told = [*texts, *piped], [*told, *[None] * len(piped)]
    # An epilogue after the library's product is others' to time: the entry serves with and without.
    if bucket(each) >= LIBRARY_FROM and has_library(spec) and " -> " not in str(spec):
        texts, told = [*texts, LIBRARY], [*told, None]
    return Plan(spec, m, tuple(texts), tuple(told))


def _likely(spec: GemmSpec, m: int, card: Device, top: int, first: Schedule) -> list[Schedule]:
    """The shortlist; for few rows also what runs unmeasured, and the model's first, in overlapped launches,
    of which the model knows nothing."""
    found = shortlist(spec, m, card, top, first)
    if bucket(m) > SKINNY or card.arch < OVERLAP_FROM:
        return found
    likely = [unmeasured(spec, bucket(m), card), *(replace(one, overlap=1) for one in found[:2])]
    tried = [*found[:1], *(one for one in likely if one is not None), *found[1:]]
    return list(dict.fromkeys(tried))[:top]


def on_gpu(spec: GemmSpec) -> Callable[[int], Tried]:
    """The weights of a spec on the current GPU, and trials of them for any number of rows."""
    from .trial import Trial, Weights

    torch.cuda.empty_cache()
    weights = Weights.of(spec)
    return lambda m: Trial.of(weights, m)


def _jobs(one: Plan, done: set[tuple[str, int, str]]) -> list[Job]:
    spec = str(one.spec)
    return [(spec, s) for s in one.schedules if s != LIBRARY and (spec, one.m, s) not in done]


def _by_spec(plans: Sequence[Plan]) -> list[list[Plan]]:
    """Plans of one spec together: its weights are made once."""
    found: dict[GemmSpec, list[Plan]] = {}
    for one in plans:
        found.setdefault(one.spec, []).append(one)
    return list(found.values())


def _measure(
    plans: Sequence[Plan],
    made: Made,
    done: set[tuple[str, int, str]],
    until: float,
    open: Open,
    timer: Timer,
    report: Callable[[Row], None] | None,
) -> list[Row]:
    """Rows of one spec."""
    rows: list[Row] = []
    trial_of: Callable[[int], Tried] | None = None
    for one in plans:
        trial: Tried | None = None
        best = math.inf
        for schedule, told in zip(one.schedules, one.model_us, strict=True):
            row: Row = {"spec": str(one.spec), "m": one.m, "schedule": schedule, "model_us": told}
            if (row["spec"], one.m, schedule) in done:
                continue
            if time.monotonic() > until:
                return rows
            failed = None if schedule == LIBRARY else _compiled(made[row["spec"], schedule], until)
            if failed is None:
                trial_of = open(one.spec) if trial_of is None else trial_of
                trial = trial_of(one.m) if trial is None else trial
                row |= _tried(trial, schedule, best, timer)
            else:
                row["failed"] = failed
            best = min(best, row.get("us", math.inf))
            rows.append(row)
            if report is not None:
                report(row)
    return rows


def _compiled(future: Future[str | None], until: float) -> str | None:
    """Why a kernel did not compile, None if it did."""
    try:
        return future.result(timeout=max(until - time.monotonic(), 0.0))
    except TimeoutError:
        return "not compiled in time"
    except Exception as error:  # a compiler's errors have no base of their own; the row says it
        return repr(error)[:300]


def _tried(trial: Tried, schedule: str, best: float, timer: Timer) -> Row:
    """The error and the time of one schedule, or why it has none."""
    try:
        calls = trial.calls(schedule)
        error = trial.error(calls)
        failed = trial.problem(error, calls)
        if failed is not None:
            return {"error": error, "failed": failed}
        us = timer(calls, SHORT)
        if us < HOPELESS * best:
            us = timer(calls, LONG)
        return {"error": error, "us": us}
    except Exception as refused:  # a kernel that does not fit the card is a row that says so
        return {"failed": repr(refused)[:300]}


def best_rows(rows: Iterable[Row]) -> list[Row]:
    """The fastest row of each spec and M, in the order in which they were measured."""
    found: dict[tuple[str, int], Row] = {}
    for row in rows:
        place = row["spec"], row["m"]
        if "us" in row and row["us"] < found.get(place, {"us": math.inf})["us"]:
            found[place] = row
    return list(found.values())
