"""Pipelined kernels: schedules as text, what they cannot run, how work is shared, values of whole kernels.

    linear 136x960 bf16 int4[g64,halves256] bias, "tma m16 n64 g1 w4 x2 j2 c1 p1 lane streamk", M = 29
    ->  y within `tolerance` of float64, run by the machine of `gluon_machine.py`

y and what programs leave for each other hold NaN before.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gluon_machine as machine
import pytest
import torch
from torch import Tensor

from bitfold.codegen import CodegenError, GemmSpec, kernel_layout
from bitfold.codegen.device import device
from bitfold.codegen.pipelined import Pipelined, modes, parsed
from bitfold.codegen.plans import plans, untuned_plan
from bitfold.codegen.triton.arguments import reads_bytes
from bitfold.codegen.triton.pipelined import pipelined_source
from bitfold.formats import Quantized, format

SNAPSHOT = Path(__file__).with_name("snapshots") / "pipelined_int4.txt"
SHOWN = "linear 28672x4096 bf16 int4[g128,halves256] bias", "tma m128 n128 g2 w4 x4 j2 c2 p1 lane streamk"
INT4 = GemmSpec(format("int4[g128,halves256]"), 28672, 4096)
PLAN = Pipelined(256, 128)


# --- schedules ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "tma m256 n128 g1 w8 x4 j1 c2 p1 lane",
        "tma m8 n128 g2 w4 x3 j4 c1 p2 end streamk",
        "tma m8 n64 g1 w4 x3 j4 c4 p2 lane streamk u2 o1",
    ],
)
def test_a_schedule_prints_and_parses(text: str) -> None:
    assert str(Pipelined.parse(text)) == text


def test_texts_that_are_no_schedule() -> None:
    good = "tma m16 n64 g1 w4 x2 j1 c1 p1 lane"
    for text in ("m16 n64 w4 s3 k2 sum", good.removesuffix(" lane"), f"{good} k"):
        with pytest.raises(CodegenError, match="is no pipelined schedule; one reads: tma m256"):
            Pipelined.parse(text)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"block_m": 24}, "block_m is a power of two, not 24"),
        ({"block_m": 512}, "takes 8 to 256 rows of x, not 512"),
        ({"groups": 2, "warps": 8}, "or two of 4, not 2 of 8 warps"),
        ({"block_n": 64}, "8 warps take 128 to 256 rows of the weight, not 64"),
        ({"x_stages": 1}, "two stages of x"),
        ({"overlap": 3}, "overlap is 0, 1 or 2, not 3"),
        ({"unroll": 3}, "unroll is a power of two, not 3"),
        ({"scale": "value"}, "scale is one of end, lane, float, sum, not 'value'"),
    ],
)
def test_schedules_that_are_none(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(CodegenError, match=said):
        replace(PLAN, **changed)


@pytest.mark.parametrize(
    ("text", "plan", "said"),
    [
        (str(INT4).replace("28672", "28676"), PLAN, "units of 16 bytes; 28676 and 4096 are no multiples"),
        (str(INT4), replace(PLAN, x_stages=8), "bytes of shared memory, of 232448"),
        (str(INT4), Pipelined(256, 128, 2, 4, 3), "registers a thread, of 168"),
        (str(INT4), replace(PLAN, scale="end"), "is not scaled by 'end' here, but by lane, float"),
        (str(INT4), Pipelined(64, 128, joined=8), "4 slices of a run are not joined by 8"),
        ("linear 64x512 bf16 int4[halves512]", replace(PLAN, scale="end"), "slices of 128 codes are wider"),
        ("linear 64x512 bf16 int4[g32,halves256]", PLAN, "slices of 64 codes straddle groups of 32"),
        (str(INT4) + " -> relu(y0)", PLAN, "no epilogue but bias"),
        ("linear 64x512 bf16 uint8[bytes,zero] x:int8[row]", replace(PLAN, scale="end"), "no second sum"),
        ("linear 64x512 bf16 int8[bytes] x:int8[row]", replace(PLAN, joined=2, scale="end"), "not joined"),
        (
            "linear 64x512 bf16 int8[bytes] x:int8[row]",
            replace(PLAN, code_stages=1, scale="end"),
            "two stages",
        ),
    ],
)
def test_what_stands_in_the_way(text: str, plan: Pipelined, said: str) -> None:
    spec = GemmSpec.parse(text)
    assert said in str(plan.obstacle(spec))
    with pytest.raises(CodegenError, match=said.replace("(", r"\(")):
        pipelined_source(spec, plan)


def test_where_a_scale_multiplies() -> None:
    assert modes(INT4) == ("lane", "float")
    assert modes(GemmSpec(format("int8[halves128]"), 64, 512)) == ("end", "float")
    assert modes(GemmSpec(format("uint4[g64,zero,halves256]"), 64, 512)) == ("float",)
    assert modes(GemmSpec(format("int4[g128,f32,halves256]"), 64, 512)) == ("float",)


# --- choice ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "m", "said"),
    [
        (28672, 32, None),
        (28672, 64, "tma m64 n128 g2 w4 x4 j2 c4 p1 lane"),
        (12288, 64, "tma m64 n128 g2 w4 x4 j2 c4 p1 lane streamk"),  # 96 tiles for 132 programs
        (28672, 100, "tma m128 n128 g2 w4 x3 j2 c3 p1 lane"),
        (8192, 100, "tma m64 n128 g2 w4 x4 j2 c3 p1 lane"),  # 128 tiles instead of 64
        (4096, 100, None),  # four runs a program, if tiles were shared
        (28672, 1024, "tma m256 n128 g1 w8 x4 j1 c2 p1 lane"),
        (28672, 4096, None),
    ],
)
def test_what_runs_untuned(n: int, m: int, said: str | None) -> None:
    found = untuned_plan(replace(INT4, n=n), m, device("NVIDIA H200"))
    assert (None if found is None else str(found)) == said
    assert untuned_plan(replace(INT4, n=n), m, device("NVIDIA A100-SXM4-80GB")) is None


def test_plans_run_what_they_are_for() -> None:
    for m in (20, 64, 128, 256, 2048):
        found = plans(INT4, m)
        assert len(found) > 3 and all(one.obstacle(INT4) is None for one in found)
        assert all(parsed(str(one)) == one for one in found)
    of_bytes = GemmSpec.parse("linear 512x512 bf16 int8[bytes] x:int8[row]")
    assert all(one.obstacle(of_bytes) is None for m in (64, 128, 4096) for one in plans(of_bytes, m))
    assert plans(of_bytes, 4096)
    with pytest.raises(CodegenError, match=r"is for compute capability 9.0, not 8.0"):
        plans(INT4, 64)[0].check_arch(80)


# --- work -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streamk", [False, True])
@pytest.mark.parametrize(("tiles", "runs"), [(1, 7), (3, 4), (5, 3), (10, 2), (11, 5), (23, 3)])
@pytest.mark.parametrize("programs", [1, 2, 5, 7])
def test_every_run_is_somebody_s(tiles: int, runs: int, programs: int, streamk: bool) -> None:
    """Once; and whoever does not begin a tile does so with its first piece, so that nobody waits in a
    circle."""
    source = pipelined_source(INT4, replace(PLAN, streamk=streamk))
    start = source.index("@gluon.jit\ndef first_piece")
    text = source[start : source.index("@gluon.jit\ndef load")]
    language = machine.language(machine.Machine())
    held: dict[str, Any] = {"gluon": machine.jit_namespace(), "tl": language, "RUNS": runs}
    exec(text, held)
    programs = min(programs, tiles * runs if streamk else tiles)
    done: list[int] = []
    for program in range(programs):
        at, stop, tile = held["first_piece"](program, programs, tiles)
        first = True
        while at < stop:
            end = min(at % runs + (stop - at), runs)
            assert first or at % runs == 0
            done += range(at, at + end - at % runs)
            at, stop, tile = held["next_piece"](at, stop, at + end - at % runs, tile, programs, tiles)
            first = False
    assert sorted(done) == list(range(tiles * runs))


# --- values ---------------------------------------------------------------------------------------------

# Text of the spec without a layout, schedule without its mode, rows of x, programs.
CASES = [
    ("linear 128x512 bf16 int4[g128]", "m16 n64 g1 w4 x3 j1 c2", 13, 2),
    ("linear 136x960 bf16 int4[g64] bias", "m16 n64 g1 w4 x2 j2 c1 streamk", 29, 5),
    ("linear 264x960 bf16 int4[g64] bias", "m16 n128 g2 w4 x3 j1 c2 streamk", 29, 5),
    ("linear 264x960 f16 int4[g64,f16]", "m16 n256 g1 w8 x2 j4 c1", 17, 3),
    ("linear 200x1024 f16 uint4[g32,zero]", "m8 n128 g2 w4 x2 j1 c2 streamk", 20, 7),
    ("linear 72x512 bf16 nf4[g64]", "m8 n64 g1 w4 x2 j1 c2 streamk", 20, 3),
    ("linear 72x768 bf16 nvfp4", "m8 n64 g1 w4 x2 j4 c2 streamk", 9, 4),
    ("linear 72x768 bf16 mxfp4 bias", "m32 n64 g1 w4 x2 j2 c1", 33, 2),
    ("linear 72x768 bf16 int3", "m8 n64 g1 w4 x2 j4 c2 streamk", 9, 4),
    ("linear 64x512 bf16 int5[g64]", "m8 n64 g1 w4 x2 j2 c1", 5, 1),
    ("linear 136x768 bf16 int8 bias", "m8 n128 g1 w8 x2 j2 c2 streamk", 9, 4),
    ("linear 64x512 bf16 int8f6[g32,e8m0]", "m8 n64 g1 w4 x4 j1 c2", 1, 1),
    ("linear 128x256 f16 float8_e5m2[g32]", "m8 n128 g2 w4 x3 j1 c2", 3, 1),
    ("linear 128x512 bf16 float8_e4m3fn", "m64 n128 g2 w4 x2 j1 c1 streamk", 70, 3),
    ("linear 72x576 bf16 uint2[g64,f16,zero:min]", "m8 n64 g1 w4 x2 j1 c2", 2, 2),
    ("linear 72x512 bf16 uint4[g128,zero:float]", "m8 n64 g1 w4 x2 j1 c2 streamk", 4, 3),
    ("linear 256x256 f16 int6[128x128,f32]", "m8 n64 g1 w4 x2 j1 c2", 4, 3),
    # Runs of several of the layout's, rows that end within one, codes and x that come ahead.
    ("linear 72x960 bf16 int4[g64] bias", "m8 n64 g1 w4 x2 j4 c2 streamk u2 o1", 9, 4),
    ("linear 72x576 bf16 nvfp4", "m8 n64 g1 w4 x2 j4 c2 streamk u4 o2", 9, 4),
    ("linear 72x416 bf16 mxfp4", "m8 n64 g1 w4 x2 j2 c1 u2", 1, 2),
    ("linear 72x512 bf16 nf4[g64]", "m8 n64 g1 w4 x2 j1 c2 streamk u2", 20, 3),
    ("linear 136x416 bf16 int8 bias", "m16 n128 g2 w4 x2 j2 c2 u2 o1", 9, 2),
]


def drawn(spec: GemmSpec, m: int) -> tuple[Tensor, Quantized, Tensor | None]:
    """x, the weight with the scales of neighbouring rows side by side, a bias."""
    torch.manual_seed(m + spec.n)
    q = spec.weight.quantize(torch.randn(spec.n, spec.k) * 0.05)
    parts = [q.parts[0], *(p.mT.contiguous().mT if p.ndim == 2 else p for p in q.parts[1:])]
    bias = torch.randn(spec.n).to(spec.dtype) if spec.bias else None
    return torch.randn(m, spec.k).to(spec.dtype), Quantized.from_parts(spec.weight, parts, spec.k), bias


def tolerance(spec: GemmSpec, x: Tensor, weight: Tensor, want: Tensor) -> Tensor:
    """One rounding of y, one or two of each weight to x's dtype, and float32 sums."""
    lane = torch.finfo(spec.dtype).eps
    magnitude = x.double().abs() @ weight.double().abs().T
    return lane * want.abs() + (lane + spec.k * 2.0**-23) * magnitude + 1e-30


@pytest.mark.parametrize(("text", "plan", "m", "programs"), CASES)
def test_values(text: str, plan: str, m: int, programs: int) -> None:
    given = GemmSpec.parse(text)
    layout = kernel_layout(given.weight, given.k)
    assert layout is not None
    spec = replace(given, weight=layout)
    x, q, bias = drawn(spec, m)
    weight = spec.weight.dequantize(q)
    want = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    for mode in modes(spec):
        words = plan.split()
        schedule = Pipelined.parse(" ".join(["tma", *words[:7], "p1", mode, *words[7:]]))
        if mode == "float" and schedule.obstacle(spec) is not None:
            continue
        y, flags = ran(spec, schedule, x, q, bias, programs)
        assert not y.isnan().any() and not flags.any()
        assert ((y.double() - want).abs() <= tolerance(spec, x, weight, want)).all(), mode


# The weight's format and x's, without layouts: as the tensor cores take them, or decoded to bytes.
OF_BYTES = [
    ("linear 128x512 bf16 float8_e4m3fn[row] x:float8_e4m3fn[row]", "m16 n64 g1 w4 x3 j1 c2", 13, 2),
    ("linear 264x1024 bf16 float8_e4m3fn[row] x:float8_e4m3fn bias", "m8 n128 g2 w4 x2 j1 c2 streamk", 29, 5),
    ("linear 256x1024 bf16 float8_e4m3fn[128x128] x:float8_e4m3fn[g128]", "m16 n128 g2 w4 x2 j1 c3", 21, 3),
    ("linear 136x768 f16 float8_e4m3fn[g256] x:float8_e4m3fn[g128]", "m16 n64 g1 w4 x2 j1 c1 u2", 21, 3),
    ("linear 136x768 bf16 float8_e4m3fn[row] x:float8_e4m3fn[row]", "m16 n64 g1 w4 x4 j1 c1 u2", 21, 3),
    ("linear 264x1024 bf16 int8[row] x:int8[row] bias", "m16 n128 g2 w4 x3 j1 c2", 29, 5),
    ("linear 72x512 bf16 int8 x:int8", "m8 n64 g1 w4 x2 j1 c2 u2", 9, 1),
    ("linear 136x1024 bf16 int8[g64,f32] x:int8[row]", "m16 n64 g1 w4 x2 j1 c2 streamk", 12, 4),
    ("linear 136x1024 bf16 int4[g128] x:float8_e4m3fn[row] bias", "m16 n64 g1 w4 x2 j1 c2 streamk", 12, 4),
    ("linear 264x1024 f16 int4[g32] x:int8[row]", "m16 n128 g2 w4 x3 j1 c2", 33, 3),
    ("linear 136x1024 bf16 int4[row] x:int8[row]", "m16 n64 g1 w4 x2 j1 c2", 12, 4),
    ("linear 136x1024 bf16 mxfp4 x:float8_e4m3fn[g128]", "m16 n64 g1 w4 x8 j1 c2", 12, 4),
    ("linear 72x512 bf16 nvfp4[g64] x:float8_e4m3fn[row]", "m16 n64 g1 w4 x4 j1 c2", 12, 2),
    # Rows that end within a run.
    ("linear 136x960 bf16 float8_e4m3fn[row] x:float8_e4m3fn[row]", "m16 n64 g1 w4 x3 j1 c2 streamk", 9, 4),
    ("linear 136x960 bf16 int8 x:int8[row]", "m8 n64 g1 w4 x3 j1 c2", 9, 4),
    ("linear 136x960 bf16 int4[g64] x:int8[row]", "m8 n64 g1 w4 x4 j1 c2", 9, 4),
    ("linear 136x1088 bf16 float8_e4m3fn[g64] x:float8_e4m3fn[g64]", "m8 n64 g1 w4 x4 j1 c2", 9, 4),
]  # fmt: skip


@pytest.mark.parametrize(("text", "plan", "m", "programs"), OF_BYTES)
def test_values_of_bytes(text: str, plan: str, m: int, programs: int) -> None:
    """Activations in codes: the same as float64 on what codes and scales mean."""
    given = GemmSpec.parse(text)
    assert given.activation is not None
    activation = given.activation.with_layout("bytes")
    layout = kernel_layout(given.weight, given.k, activation)
    assert layout is not None
    spec = replace(given, weight=layout, activation=activation)
    x, q, bias = drawn(spec, m)
    of_x = activation.quantize(x.float())
    weight = spec.weight.dequantize(q)
    meant = activation.dequantize(of_x)
    want = meant.double() @ weight.double().T + (0 if bias is None else bias.double())
    codes, x_scales, *_ = of_x.parts
    for mode in modes(spec):
        words = plan.split()
        schedule = Pipelined.parse(" ".join(["tma", *words[:7], "p1", mode, *words[7:]]))
        if mode == "end":
            schedule = replace(schedule, streamk=False)
        y, flags = ran(spec, schedule, codes, q, bias, programs, x_scales)
        assert not y.isnan().any() and not flags.any()
        assert ((y.double() - want).abs() <= tolerance(spec, meant, weight, want)).all(), mode


def ran(
    spec: GemmSpec,
    schedule: Pipelined,
    x: Tensor,
    q: Quantized,
    bias: Tensor | None,
    programs: int,
    x_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y and the flags after a run."""
    y = torch.full((x.shape[0], spec.n), float("nan"), dtype=spec.dtype)
    scales = y if q.scales is None else q.scales
    strides = scales.stride() if q.scales is not None and scales.ndim == 2 else (0, 0)
    scales = scales.view(torch.uint8) if scales.dtype == torch.float8_e4m3fn else scales
    partial = torch.full((programs * schedule.block_n * schedule.block_m,), float("nan"))
    flags = torch.zeros(programs * schedule.groups, dtype=torch.int32)
    rest = [
        scales,
        y if x_scales is None else x_scales,
        y if q.zeros is None else q.zeros,
        y if q.tensor_scale is None else q.tensor_scale,
        y if bias is None else bias,
        partial,
        flags,
        x.shape[0],
        *strides,
    ]
    source = pipelined_source(spec, schedule)
    codes = q.codes.view(torch.int16)
    if spec.activation is not None:
        lanes = torch.int8 if spec.lane == "int8" else torch.float8_e4m3fn
        x, codes = x.view(lanes), q.codes.view(lanes if reads_bytes(spec) else torch.int8).view(spec.n, -1)
    machine.run(source, maps=[x, codes, y], rest=rest, programs=programs)
    return y, flags


@pytest.mark.parametrize(
    ("line", "other"),
    [
        ("% X_STAGES), pred=run > begin)", "% X_STAGES))"),  # a tile freed that nobody took
        ("warpgroup_mma_wait(0, [total, held])", "warpgroup_mma_wait(1, [total, held])"),
        (
            "total, a0, u0 = warpgroup_mma_wait(1,",
            "total, a0, u0 = warpgroup_mma_wait(2,",
        ),  # freed before it is read
        ("(step // X_STAGES & 1) ^ 1", "step // X_STAGES & 1"),  # the first copy waits for ever
        ("mbarrier.expect(x_full.index(b), 1024)", "mbarrier.expect(x_full.index(b), 2048)"),
        ("fence_async_shared()\n            mbarrier.arrive(codes", "mbarrier.arrive(codes"),
        ("fence_async_shared()\n    tma.async_copy", "tma.async_copy"),  # y is copied before it is there
        ("fence_async_shared()\n    computing", "computing"),
        ("gdc_wait()", "pass"),
        ('1, sem="release"', '1, sem="relaxed"'),
        ("total)\n            barrier()", "total)"),  # a flag ahead of its part
        ("count=GROUPS", "count=1"),  # freed by the first of two groups
        ('flag + other * GROUPS, 0, sem="relaxed"', 'flag + other * GROUPS, 1, sem="relaxed"'),
        ("total += tl.load(mine", "total = tl.load(mine"),
        ("tma.store_wait(0)\n\n", "\n\n"),
    ],
)
def test_the_machine_notices(line: str, other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutations of a kernel that is right."""
    spec = GemmSpec.parse("linear 264x768 bf16 int4[g64,halves256]")
    schedule = Pipelined.parse("tma m8 n128 g2 w4 x2 j1 c1 p1 lane streamk o1")
    x, q, _ = drawn(spec, 9)
    want = x.double() @ spec.weight.dequantize(q).double().T
    source = pipelined_source(spec, schedule)
    assert source.count(line) >= 1
    monkeypatch.setattr(sys.modules[__name__], "pipelined_source", lambda *_: source.replace(line, other))
    try:
        y, flags = ran(spec, schedule, x, q, None, 4)
    except (machine.Stuck, AssertionError, AttributeError, TypeError):
        return
    assert flags.any() or not ((y.double() - want).abs() <= 0.02 * want.abs().max()).all()


# --- text -----------------------------------------------------------------------------------------------


def shown() -> str:
    return pipelined_source(GemmSpec.parse(SHOWN[0]), Pipelined.parse(SHOWN[1]))


def test_a_module_reads_as_before() -> None:
    assert shown() == SNAPSHOT.read_text("utf-8")


if __name__ == "__main__":
    SNAPSHOT.write_text(shown(), "utf-8")
