"""What a schedule costs: a roofline of five limits, formulas in sympy that print and are evaluated by numpy.

In: a spec, rows of x, schedules, a device. Out: microseconds of each, good for ranking them.

    microseconds(spec, 1, [Schedule(8, 64, 2, 3, 4, "sum")], device("NVIDIA H200"))   ->   [7.7]
    ranked(spec, 16, candidates(spec, 16, card), card)[:8]                            ->   worth measuring
    print(page())                                                                    ->   the formulas

    time = waves * (WAVE + FILL * ahead) + merge + (memory^P + l2^P + issue^P + tensor^P + latency^P)^(1/P)

A sum of powers is the largest of the five where one is far ahead, and more where several limits are near,
since a program waits for its loads, decodes and multiplies by turns.

The constants were fitted to 2,054 measurements on one H200 (torch 2.11, Triton 3.6; committed beside the
benchmarks, see `tests/codegen/test_cost.py`): int4 at 28672 x 4096, 4096 x 4096, 8192 x 8192, 4096 x 14336,
M from 1 to 1024; fourteen other formats at M of 1 and 16. They rank: a time is off by 13 % in the median.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import sympy as sp

from .byte_lanes import byte_decoder
from .decode import decoder
from .device import Device
from .schedule import Schedule
from .slices import Take, Unwalkable, Walk
from .spec import CodegenError, GemmSpec

# Fitted: seconds, warp instructions, bytes; each is a symbol of its own in the formulas.
CONSTANTS = {
    "WAVE": 1.24e-6,  # seconds: start and end of a wave of programs
    "FILL": 0.174e-6,  # seconds: a stage's first loads
    "BARRIER": 0.0805e-6,  # seconds: a warp more that a turn waits for
    "LATENCY": 0.617e-6,  # seconds: from a load's issue to its data, with the memory busy
    "MERGE": 1.80e-6,  # seconds: of programs that wait for one another to add up
    "L2": 38.7,  # bytes a multiprocessor and cycle
    "LOAD_X": 29.9,  # instructions for 512 bytes of x, to shared memory and from there to the tensor cores
    "SLICE": 29.4,  # a slice's and warp's own: addresses, barriers, the loop
    "CLOSE": 35.4,  # a group's and warp's end of a sum
    "SCALE_SUM": 2.60,  # a thread's number of it
    "LANE": 5.50,  # 64 values scaled in the lanes
    "LANE_GROUP": 3.15,  # and more where the tensor cores take them from shared memory
    "FEW": 0.748,  # how much longer instructions take with one warp a scheduler than with many
    "POWER": 2.546,
    "DENSE": 0.95,  # of the rate of dense products
    "REGISTERS": 74.3,  # a thread's, but for what is counted
    "HELD": 0.429,  # of a run's decoded values at a time
    "SPILL": 3.75,  # times as long with twice the registers that there are
}
# Not measured: instructions that Triton makes of decoding two values where no program of registers exists.
PLAIN = 24.0
_NAMES = (
    "n k m weights bits x_bytes rate run run_bytes runs length closes decode lane sum warp_group "
    "block_n block_m warps stages split SMs read flops shared clock"
)


@dataclass(frozen=True)
class Term:
    """One line of the model: a quantity, its formula in symbols and in terms before it, and what it means."""

    name: str
    formula: sp.Expr
    meaning: str


@lru_cache(maxsize=1)
def terms() -> tuple[Term, ...]:
    """The model, in the order of evaluation."""
    names = [*_NAMES.split(), *CONSTANTS]
    s, made = {name: sp.Symbol(name, positive=True) for name in names}, []

    def term(name: str, meaning: str, formula: sp.Expr) -> sp.Symbol:
        made.append(Term(name, formula, meaning))
        s[name] = sp.Symbol(name, positive=True)
        return s[name]

    up, most, least = sp.ceiling, sp.Max, sp.Min
    n, k, m, run, x_bytes = (s[name] for name in ("n", "k", "m", "run", "x_bytes"))
    bn, bm, warps, split = (s[name] for name in ("block_n", "block_m", "warps", "split"))
    programs = term("programs", "of the whole grid", up(n / bn) * up(m / bm) * split)
    turns = term("turns", "of the loop over runs, a program", up(s["runs"] / split))
    values = term("values", "of the weights, a turn", bn * run * s["weights"])
    codes = term("codes", "bytes that they are stored in", bn * s["run_bytes"] * s["weights"])
    tile = term("tile", "bytes of x, a turn", bm * run * x_bytes)
    sums = term("sums", "float32 sums of a thread", bn * bm * s["weights"] / (32 * warps))
    ahead = term("ahead", "turns whose loads are under way", most(s["stages"] - 1, 1))
    room = term(
        "room",
        "bytes of shared memory of a program; a warp group's products still read the last tile of x",
        ahead * (codes + tile) + s["warp_group"] * (tile + 2 * s["lane"] * bn * s["length"]),
    )
    registers = term(
        "registers",
        "of a thread: sums (twice where each group has its own), units, decoded values",
        s["REGISTERS"] + sums * (1 + s["sum"]) + codes / (128 * warps) + s["HELD"] * values / (64 * warps),
    )
    by_registers = 65536 / (least(registers, 255) * 32 * warps)
    fit = term(
        "fit",
        "programs that a multiprocessor holds: by shared memory, warps and registers",
        most(1, sp.floor(least(s["shared"] / room, 64 / warps, by_registers))),
    )
    each = term("each", "programs of the busiest multiprocessor", up(programs / s["SMs"]))
    resident = term("resident", "of them at a time", least(fit, each))
    waves = term("waves", "one after another", up(each / resident))
    memory = term(
        "memory",
        "seconds: weights, x and the result through the memory, once",
        (n * k * s["weights"] * s["bits"] / 8 + m * k * x_bytes + 2 * n * m) / s["read"],
    )
    l2 = term(
        "l2",
        "seconds: codes and x from the second cache into each program",
        each * turns * (codes + least(m, bm) * run * x_bytes) / (s["L2"] * s["clock"]),
    )
    work = term(
        "work",
        "warp instructions of a turn: decode and scale values, load x, slices, ends of groups",
        values / 64 * (s["decode"] + s["lane"] * (s["LANE"] + s["LANE_GROUP"] * s["warp_group"]))
        + s["LOAD_X"] * tile / 512
        + s["SLICE"] * warps * run / s["length"]
        + s["sum"] * s["closes"] * warps * (s["CLOSE"] + s["SCALE_SUM"] * sums),
    )
    slow = term(
        "slow",
        "times as long: registers spilled; too few warps to hide what waits",
        (1 + s["SPILL"] * most(registers / 255 - 1, 0)) * (1 + s["FEW"] * 4 / (resident * warps)),
    )
    issue = term(
        "issue", "seconds: instructions, four a cycle", each * turns * work * slow / (4 * s["clock"])
    )
    tensor = term(
        "tensor",
        "seconds: products in the tensor cores, of eight rows of x at least",
        each * turns * 2 * values * most(bm, 8) * s["SMs"] / (s["flops"] * s["rate"] * s["DENSE"]),
    )
    latency = term(
        "latency",
        "seconds: loads and warps that a turn waits for",
        waves * turns * (s["LATENCY"] / ahead + s["BARRIER"] * warps),
    )
    merge = term(
        "merge",
        "seconds: parts of a sum to the second cache and back",
        sp.Piecewise(
            (s["MERGE"] + 8 * split * n * m / (s["L2"] * s["clock"] * s["SMs"]), split > 1), (0, True)
        ),
    )
    limits = sum(limit ** s["POWER"] for limit in (memory, l2, issue, tensor, latency))
    term(
        "time", "seconds in all", waves * (s["WAVE"] + s["FILL"] * ahead) + limits ** (1 / s["POWER"]) + merge
    )
    return tuple(made)


@lru_cache(maxsize=1)
def _compiled() -> tuple[tuple[str, tuple[str, ...], Callable[..., Any]], ...]:
    """(name, arguments, numpy function) of each term."""
    made = []
    for term in terms():
        used = sorted(term.formula.free_symbols, key=str)
        function = sp.lambdify(used, term.formula, "numpy", cse=True)
        made.append((term.name, tuple(str(symbol) for symbol in used), function))
    return tuple(made)


def evaluate(
    spec: GemmSpec, m: int, schedules: Sequence[Schedule], card: Device
) -> dict[str, np.ndarray[Any, np.dtype[np.float64]]]:
    """Every term for each schedule; m: rows of x, of each expert if there are experts."""
    given = CONSTANTS | facts(spec) | _facts_of_card(card)
    values: dict[str, Any] = {name: np.float64(value) for name, value in given.items()}
    values["m"] = np.float64(m)
    for name in ("block_n", "block_m", "warps", "stages", "split"):
        values[name] = np.array([getattr(schedule, name) for schedule in schedules], dtype=np.float64)
    many = np.array([schedule.joined for schedule in schedules], dtype=np.float64)
    values |= {name: values[name] * many for name in ("run", "run_bytes", "closes")}
    values["runs"] = np.ceil(values["runs"] / many)
    values["lane"] = np.array([schedule.scale == "lane" for schedule in schedules], dtype=np.float64)
    values["sum"] = np.array([schedule.scale == "sum" for schedule in schedules], dtype=np.float64)
    # A warp group's product takes four warps and 64 rows, from compute capability 9.0 on.
    values["warp_group"] = (card.arch >= 90) * (values["warps"] >= 4) * (values["block_n"] >= 64) * 1.0
    values["decode"] = np.where(
        [schedule.scale == "float" for schedule in schedules], max(PLAIN, values["decode"]), values["decode"]
    )
    for name, needed, function in _compiled():
        values[name] = function(*(values[one] for one in needed))
    return {term.name: np.broadcast_to(values[term.name], (len(schedules),)) for term in terms()}


def microseconds(spec: GemmSpec, m: int, schedules: Sequence[Schedule], card: Device) -> list[float]:
    """What each schedule is thought to take for m rows of x."""
    return [] if not schedules else [float(t) * 1e6 for t in evaluate(spec, m, schedules, card)["time"]]


def ranked(spec: GemmSpec, m: int, schedules: Sequence[Schedule], card: Device) -> list[Schedule]:
    """The same schedules, the fastest first."""
    times = microseconds(spec, m, schedules, card)
    return [schedules[i] for i in np.argsort(times, kind="stable")]


def _facts_of_card(card: Device) -> dict[str, float]:
    return {
        "SMs": card.multiprocessors,
        "read": card.read,
        "flops": card.flops,
        "shared": card.shared,
        "clock": card.clock,
    }


@lru_cache(maxsize=512)
def facts(spec: GemmSpec) -> dict[str, float]:
    """What the formulas need to know of a spec. CodegenError if no kernel can walk over its rows."""
    found, scale = spec.walk, spec.weight.scale
    if isinstance(found, Unwalkable):
        raise CodegenError(found.reason)
    quantized = spec.activation is not None
    cols = spec.weight.cols
    tensors = 1 + (scale is not None and scale.zero != "none")
    return {
        "n": spec.n * max(1, spec.experts),
        "k": spec.k,
        "weights": spec.weights,
        "bits": spec.weight.bits_per_element((spec.n, spec.k)),
        "x_bytes": 1 if quantized else 2,
        "run": found.codes,
        "run_bytes": found.units * (1 if quantized else 2),
        "runs": found.runs,
        "length": found.length,
        "closes": tensors * max(1, round(found.codes / cols)) if cols else 1,
        # Tensor cores multiply 8-bit numbers twice as fast.
        "rate": 2 if quantized else 1,
        "decode": _steps_of_bytes(spec, found) if quantized else _steps(spec, found),
    }


def _steps(spec: GemmSpec, found: Walk) -> float:
    """Instructions that decode two values of a slice."""
    element = spec.weight.element
    # A table of sixteen entries is decoded for a whole run in one program.
    fours = element.bits == 4 and hasattr(element, "table")
    slices = _numbered(found.slices if fours else found.slices[:1])
    made = decoder(element, slices, spec.x)
    return PLAIN if made is None else len(made.program.steps) / len(slices)


def _steps_of_bytes(spec: GemmSpec, found: Walk) -> float:
    """The same where four values share a register."""
    made = byte_decoder(spec.weight.element, _numbered(found.slices[:1])[0], spec.lane)
    return PLAIN if made is None else len(made.program.steps) / 2


def _numbered(slices: Sequence[Sequence[Take]]) -> list[list[Take]]:
    """Slices with the loads that they read numbered from 0."""
    loads = sorted({take.load for takes in slices for take in takes})
    return [[Take(loads.index(t.load), t.low, t.width, t.bit) for t in takes] for takes in slices]


def page() -> str:
    """The model as text: one line a term, and what it means."""
    lines = []
    for term in terms():
        lines += [f"{term.name} = {term.formula}", f"    {term.meaning}"]
    return "\n".join(lines) + "\n"
