"""The cost model: it ranks what was measured, says what it should of simple cases, and prints.

The measurements are committed (one H200, torch 2.11, Triton 3.6), and the constants were fitted to them:
these tests say how well the model ranks what it has seen.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from bitfold.codegen import GemmSpec, Schedule
from bitfold.codegen.choose import rule
from bitfold.codegen.cost import microseconds, ranked
from bitfold.codegen.device import device
from bitfold.formats import format

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
H200 = device("NVIDIA H200")
# Groups of fewer schedules say little about a rank.
LEAST = 9
Group = tuple[str, str, int, int, int]


def measured() -> dict[Group, dict[str, float]]:
    """(sweep, format, n, k, m) -> schedule -> microseconds; without overlapped launches."""
    found: dict[Group, dict[str, float]] = defaultdict(dict)
    for file in ("schedules-nvidia-h200.json", "schedules-nvidia-h200-to-1024.json"):
        for row in json.loads((RESULTS / file).read_text(encoding="utf-8"))["rows"]:
            if "us" in row:
                found[file, row["format"], row["n"], row["k"], row["m"]][row["schedule"]] = row["us"]
    sweeps = json.loads((RESULTS / "schedules-nvidia-h200-first-sweeps.json").read_text(encoding="utf-8"))
    for name in ("schedules at random, overlap and split", "rows contiguous"):
        for n, k, m, us, text, schedule in sweeps["sweeps"][name]:
            found["first", text, n, k, m][schedule] = us
    for _, m, us, _, text, schedule in sweeps["sweeps"]["formats"]:
        found["formats", text, 28672, 4096, m][schedule] = us
    return {
        group: {text: us for text, us in times.items() if " o" not in text} for group, times in found.items()
    }


def spec_of(group: Group) -> GemmSpec:
    return GemmSpec(format(group[1]), group[2], group[3])


@pytest.fixture(scope="module")
def groups() -> dict[Group, dict[str, float]]:
    return measured()


def best_of_first(times: dict[str, float], order: list[Schedule], count: int) -> float:
    """How much slower than the best the best of the first few is."""
    return min(times[str(one)] for one in order[:count]) / min(times.values())


def test_the_model_ranks_what_was_measured(groups: dict[Group, dict[str, float]]) -> None:
    first, eighth, off = [], [], []
    for group, times in groups.items():
        spec, schedules = spec_of(group), [Schedule.parse(text) for text in times]
        told = microseconds(spec, group[4], schedules, H200)
        off += [abs(np.log(t / us)) for t, us in zip(told, times.values(), strict=True)]
        if len(times) >= LEAST:
            order = ranked(spec, group[4], schedules, H200)
            first.append(best_of_first(times, order, 1))
            eighth.append(best_of_first(times, order, 8))
    print(
        len(off), len(eighth), np.median(off), np.mean(first), np.mean(np.array(eighth) <= 1.05), max(eighth)
    )
    assert len(eighth) > 60
    assert np.mean(np.array(eighth) <= 1.05) >= 0.95
    assert max(eighth) < 1.2
    assert np.mean(first) < 1.09
    assert np.median(off) < 0.13


def test_up_to_16_rows_the_rule_comes_before_the_model(groups: dict[Group, dict[str, float]]) -> None:
    """And past that the model before the rule: why `choose` takes each where it does."""
    ratios: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for group, times in groups.items():
        spec, m = spec_of(group), group[4]
        schedules = [Schedule.parse(text) for text in times]
        old = rule(spec, m, H200)
        if old in schedules and len(times) >= 4:
            told = best_of_first(times, ranked(spec, m, schedules, H200), 1)
            ratios[m <= 16].append((best_of_first(times, [old], 1), told))
    skinny, wide = np.array(ratios[True]).mean(0), np.array(ratios[False]).mean(0)
    print(len(ratios[True]), skinny, len(ratios[False]), wide)
    assert len(ratios[True]) > 40 and len(ratios[False]) >= 7
    assert skinny[0] < 1.05 and skinny[0] < skinny[1]
    assert wide[1] < 1.1 and wide[1] < wide[0]
