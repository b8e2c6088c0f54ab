"""Specs and schedules: their texts, and one sentence for everything that they refuse."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitfold.codegen import CodegenError, GemmSpec, Schedule, scales
from bitfold.codegen.triton import source
from bitfold.codegen.triton.arguments import arguments
from bitfold.formats import BitfoldError, Codebook, Format, FormatError, Scale, format
from bitfold.formats.granularity import Granularity

FORMATS = [
    "int4[g128,halves512]",
    "uint3[g64,f32,zero,halves1024]",
    "uint4[zero:float,g32,halves128]",
    "mxfp4[halves128]",
    "nvfp4[halves64]",
    "float6_e3m2[halves256]",
    "nf4[g64,halves256]",
    "ternary[tensor,halves512]",
    "int8[128x128,halves128]",
    "int4[unscaled,halves256]",
]
POWERS = [1, 2, 4, 8, 16, 32, 64, 128, 256]


@given(
    text=st.sampled_from(FORMATS),
    n=st.integers(1, 64),
    k=st.integers(1, 64),
    x=st.sampled_from(["bf16", "f16"]),
    bias=st.booleans(),
)
def test_a_spec_parses_from_its_text(text: str, n: int, k: int, x: str, bias: bool) -> None:
    spec = GemmSpec(format(text), n * 128, k * 128, x, bias)
    assert GemmSpec.parse(str(spec)) == spec
    assert "\n" not in str(spec)


@given(
    block_m=st.sampled_from(POWERS),
    block_n=st.sampled_from(POWERS),
    warps=st.sampled_from(POWERS[:5]),
    stages=st.integers(1, 9),
    split=st.integers(1, 100),
    scale=st.sampled_from(["end", "sum", "lane", "float"]),
    overlap=st.integers(0, 1),
    joined=st.sampled_from(POWERS[:5]),
)
def test_a_schedule_parses_from_its_text(
    block_m: int, block_n: int, warps: int, stages: int, split: int, scale: str, overlap: int, joined: int
) -> None:
    schedule = Schedule(block_m, block_n, warps, stages, split, scale, overlap, joined)
    assert Schedule.parse(str(schedule)) == schedule


def test_texts_by_hand() -> None:
    spec = GemmSpec(format("int4[g128,bf16,halves512]"), 4096, 2048, bias=True)
    assert str(spec) == "linear 4096x2048 bf16 int4[g128,halves512] bias"
    assert str(Schedule(16, 64, split=2, scale="sum")) == "m16 n64 w4 s3 k2 sum"
    assert str(Schedule(16, 64, overlap=1)) == "m16 n64 w4 s3 k1 end o1"
    assert str(Schedule(8, 64, 2, scale="sum", joined=2)) == "m8 n64 w2 s3 k1 sum j2"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "linear",
        "linear 4096x4096",
        "linear 4096x4096 bf16",
        "conv 4096x4096 bf16 int8",
        "linear 4096 bf16 int8",
        "linear 1x2x3 bf16 int8",
        "linear -1x4096 bf16 int8",
        "linear 4096x4096 bf16 int8 gelu",
        "linear 4096x4096 bf16 int8 bias bias",
        "linear 4096x4096  bf16 int8",
    ],
)
def test_what_is_no_spec(text: str) -> None:
    with pytest.raises(CodegenError, match="is no kernel's text; one reads: linear 4096x4096 bf16 int8 bias"):
        GemmSpec.parse(text)


def test_a_spec_in_an_unknown_format_or_type() -> None:
    with pytest.raises(FormatError, match="int9"):
        GemmSpec.parse("linear 64x64 bf16 int9")
    with pytest.raises(CodegenError, match="fused kernels take activations in bf16 or f16 or f32, not 'f64'"):
        GemmSpec.parse("linear 64x64 f64 int8")


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (-1, 4)])
def test_a_spec_of_nothing(shape: tuple[int, int]) -> None:
    with pytest.raises(CodegenError, match="has nothing to multiply"):
        GemmSpec(format("int8"), *shape)


def test_a_spec_past_32_bits() -> None:
    assert GemmSpec(format("int8"), 2**16, 2**15 - 1).n
    with pytest.raises(CodegenError, match=r"has 2\*\*31 elements or more, past 32-bit addresses"):
        GemmSpec(format("int8"), 2**16, 2**15)


def test_a_spec_that_the_format_refuses() -> None:
    with pytest.raises(FormatError, match="a group of 128 does not divide"):
        GemmSpec(format("int4[g128]"), 64, 100)
    with pytest.raises(FormatError, match="128 rows a block do not divide"):
        GemmSpec(format("int4[128x128]"), 100, 128)


@pytest.mark.parametrize(
    "text", ["", "m16", "m16 n64 w4 s3 k2", "m16 n64 w4 s3 k2 sum o", "m16 n64 w4 s3 k2 sum o1 x", "M16 n1"]
)
def test_what_is_no_schedule(text: str) -> None:
    with pytest.raises(CodegenError, match="is no schedule; one reads: m16 n64 w4 s3 k1 sum"):
        Schedule.parse(text)


@pytest.mark.parametrize("field", ["block_m", "block_n", "warps", "joined"])
@pytest.mark.parametrize("value", [0, 3, 24, -8])
def test_blocks_and_warps_are_powers_of_two(field: str, value: int) -> None:
    given = {"block_m": 16, "block_n": 16, "warps": 4} | {field: value}
    with pytest.raises(CodegenError, match=f"a schedule's {field} is a power of two, not {value}"):
        Schedule(**given)


def test_other_fields_of_a_schedule() -> None:
    with pytest.raises(CodegenError, match="scale is one of end, sum, lane, float, not 'later'"):
        Schedule(16, 16, scale="later")
    for field in ("stages", "split"):
        with pytest.raises(CodegenError, match="at least one stage and one split"):
            Schedule(16, 16, **{field: 0})
    with pytest.raises(CodegenError, match="overlap is 0 or 1, not 2"):
        Schedule(16, 16, overlap=2)
    assert issubclass(CodegenError, BitfoldError)


@pytest.mark.parametrize(
    ("text", "schedule", "reason"),
    [
        ("int4", Schedule(16, 16), "takes 1 bytes, no whole 16-bit units"),
        ("int4[halves256]", Schedule(16, 16, split=3), "3 splits of 2 runs of codes leave some without work"),
        (
            "int4[halves256]",
            Schedule(16, 16, joined=4),
            "a row of 512 has 2 runs of codes, of which no 4 are",
        ),
        ("int4[halves256]", Schedule(16, 16, split=2, joined=2), "2 splits of 1 runs of codes leave some"),
        ("int4[halves256]", Schedule(16, 16, scale="sum"), "is not scaled by 'sum', but by end, float"),
        ("int4[g128,halves256]", Schedule(16, 16, scale="end"), "is not scaled by 'end', but by lane, sum"),
        ("uint4[g128,zero,halves256]", Schedule(16, 16, scale="lane"), "not scaled by 'lane', but by sum"),
        ("int4[g32,halves256]", Schedule(16, 16, scale="sum"), "slices of 64 codes straddle groups of 32"),
        ("int4[row,bf16,native,halves256]", Schedule(16, 16), "arithmetic"),
        ("int4[g64,2:4,halves256]", Schedule(16, 16, scale="sum"), "2:4"),
    ],
)
def test_what_a_schedule_cannot_run(text: str, schedule: Schedule, reason: str) -> None:
    spec = GemmSpec(format(text), 64, 512)
    obstacle = schedule.obstacle(spec)
    assert obstacle is not None and reason in obstacle
    with pytest.raises(CodegenError) as told:
        source(spec, schedule)
    assert str(told.value) == obstacle


@pytest.mark.parametrize(
    ("text", "x", "want"),
    [
        ("int4[halves256]", "bf16", ("end", "float")),
        ("int4[unscaled,halves256]", "bf16", ("end", "float")),
        ("uint4[zero,halves256]", "f16", ("end", "float")),
        ("int4[g128,halves256]", "bf16", ("lane", "sum", "float")),
        ("int4[g128,halves256]", "f16", ("sum", "float")),
        ("int4[g128,f16,halves256]", "f16", ("lane", "sum", "float")),
        ("int4[g128,f32,halves256]", "f16", ("sum", "float")),
        ("mxfp4[halves128]", "bf16", ("lane", "sum", "float")),
        ("mxfp4[halves128]", "f16", ("sum", "float")),
        ("nvfp4[halves64]", "f16", ("lane", "sum", "float")),
        ("nf4[g128,halves256]", "bf16", ("sum", "float")),
        ("uint4[g128,zero,halves256]", "bf16", ("sum", "float")),
        # 448 * 448 is no float16, 448 * 6 is.
        ("float8_e4m3fn[g64,e4m3,two_level,halves128]", "f16", ("sum", "float")),
        ("float8_e4m3fn[g64,e4m3,two_level,halves128]", "bf16", ("lane", "sum", "float")),
        # 2**31 is no float16, nor are the values of a float with a bias of 100.
        ("float8_e5m2b0[halves128]", "f16", ("float",)),
        ("float4_e2m1b100[g64,halves256]", "f16", ("float",)),
        ("float4_e2m1b100[g64,halves256]", "bf16", ("lane", "sum", "float")),
    ],
)
def test_where_a_scale_may_multiply(text: str, x: str, want: tuple[str, ...]) -> None:
    assert scales(GemmSpec(format(text), 128, 512, x)) == want


@pytest.mark.parametrize(("value", "x"), [(1e5, "f16"), (1e-7, "f16")])
def test_a_table_past_the_lane_is_scaled_in_float32(value: float, x: str) -> None:
    f = Format(
        Codebook("far", (0.0, value)), Scale(Granularity(1, 64), "f32"), format("int4[halves256]").layout
    )
    assert scales(GemmSpec(f, 64, 512, x)) == ("float",)
    assert scales(GemmSpec(f, 64, 512, "bf16")) == ("sum", "float")


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("linear 128x512 bf16 int4[unscaled,halves256]", "x codes y"),
        ("linear 128x512 bf16 int4[halves256] bias", "x codes scales bias y"),
        ("linear 128x512 bf16 uint4[g128,zero,halves256]", "x codes scales zeros y"),
        ("linear 128x512 bf16 nvfp4[halves64]", "x codes scales level y"),
        ("linear 128x512 bf16 nf4[g128,halves256] bias", "x codes scales table bias y"),
        ("linear 128x512 bf16 int8[bytes] x:int8 -> add(y0,e0)", "x x_scales codes scales matrix0 y"),
        ("linear 128x512 bf16 2*int8[halves128] -> mul(y0,y1)", "x codes scales codes_b scales_b y"),
        ("grouped 4 128x512 bf16 int8[halves128]", "x ends codes scales y"),
    ],
)
def test_a_kernel_takes_what_it_reads(text: str, want: str) -> None:
    found = list(arguments(GemmSpec.parse(text), Schedule(16, 64), plain=False))
    constants = ["SN", "SG"] if "scales" in want.replace("x_scales", "") else []
    constants += ["SE"] if "grouped" in text else []
    assert found == [*want.split(), "m", "x_stride", *constants]
