"""What the compiler makes of pipelined kernels, for a GPU that is not here: no spills, shared memory as
foretold, products that stay on their way while the next slice is decoded.

    linear 4096x4096 bf16 int4[g128,halves256], "tma m256 n128 g1 w8 x4 j1 c2 p1 lane streamk"
    ->  16 products a run in each group, and one wait for all of them, at the end of a piece
"""

from __future__ import annotations

import pytest

from bitfold.codegen import GemmSpec, Walk, kernel_layout
from bitfold.codegen.pipelined import SHARED, Pipelined, modes
from bitfold.formats import format

pytest.importorskip("triton")

PLANS = [
    "tma m256 n128 g1 w8 x4 j1 c2 p1 {} streamk",
    "tma m128 n128 g2 w4 x5 j1 c3 p1 {}",
    "tma m64 n128 g2 w4 x3 j2 c3 p1 {} streamk",
    "tma m32 n64 g1 w4 x3 j2 c3 p3 {}",
    "tma m32 n128 g1 w8 x3 j1 c2 p2 {}",
    "tma m16 n64 g1 w4 x4 j1 c2 p2 {} streamk",
]
FORMATS = [
    "int4[g128]", "int8", "int3[g128]", "mxfp4", "nvfp4", "uint4[g64,zero]", "nf4[g64]", "float8_e4m3fn",
    "int5[g64]", "int6[g128]", "int2[g128]", "uint1[g64]", "float6_e3m2[g64]", "mxfp8", "int4[tensor]",
    "uint5[128x128,f32]", "int7[g64]",
]  # fmt: skip
# Formats by plan, a pair each; the rest of the product is slow.
FAST = {("int4[g128]", 0), ("int4[g128]", 1), ("nvfp4", 2), ("int8", 3), ("nf4[g64]", 5)}


def cases() -> list[object]:
    found = []
    for i, plan in enumerate(PLANS):
        for j, text in enumerate(FORMATS):
            x = "f16" if (i + j) % 3 == 2 else "bf16"
            layout = kernel_layout(format(text), 4096)
            assert layout is not None
            spec = GemmSpec(layout, 4096 if j % 2 else 1000, 4096, x, bias=(i + j) % 4 == 0)
            mode = modes(spec)[0]
            if Pipelined.parse(plan.format(mode)).obstacle(spec) is None:
                marks = [] if (text, i) in FAST else [pytest.mark.slow]
                found.append(pytest.param(str(spec), plan.format(mode), marks=marks))
    return found


@pytest.mark.parametrize(("text", "plan"), cases())
def test_a_kernel_as_compiled(text: str, plan: str) -> None:
    from bitfold.codegen.triton.pipelined_inspect import inspect_pipelined

    spec, schedule = GemmSpec.parse(text), Pipelined.parse(plan)
    made = inspect_pipelined(spec, schedule)
    assert isinstance(spec.walk, Walk)
    assert made.spills == 0
    assert made.shared <= schedule.shared(spec) <= SHARED // schedule.programs
    assert made.registers <= schedule.at_start
    # Instructions of 64 rows of weights and 16 codes of each.
    rows = schedule.rows // (16 * schedule.warps)
    assert made.products == rows * spec.walk.codes // 16 * schedule.groups
    # More would mean that the compiler sends off one product at a time.
    assert made.drained == schedule.groups
    assert "UTMALDG" in made.sass and "UTMASTG" in made.sass


# Spilled bytes: what is allowed where a tile is scaled and stored, behind the loop.
OF_BYTES = [
    ("float8_e4m3fn[row,bytes] x:float8_e4m3fn[row]", "tma m128 n128 g2 w4 x4 j1 c4 p1 sum", 0),
    ("float8_e4m3fn[128x128,bytes] x:float8_e4m3fn[g128]", "tma m128 n128 g1 w8 x4 j1 c4 p1 sum", 0),
    ("int4[g128,planar256] x:float8_e4m3fn[row]", "tma m128 n128 g1 w8 x4 j1 c4 p1 sum", 0),
    ("int4[g128,planar256] x:int8[row]", "tma m64 n128 g2 w4 x4 j1 c4 p1 sum streamk", 0),
    ("int8[row,bytes] x:int8[row]", "tma m128 n256 g2 w4 x4 j1 c3 p1 end", 128),
]


@pytest.mark.parametrize(("formats", "plan", "spills"), OF_BYTES)
def test_a_kernel_of_bytes_as_compiled(formats: str, plan: str, spills: int) -> None:
    from bitfold.codegen.triton.pipelined_inspect import inspect_pipelined

    spec, schedule = GemmSpec.parse(f"linear 4096x4096 bf16 {formats}"), Pipelined.parse(plan)
    assert schedule.obstacle(spec) is None
    made = inspect_pipelined(spec, schedule)
    assert made.spills <= spills
    assert made.shared <= schedule.shared(spec) <= SHARED // schedule.programs
    # Instructions of 64 rows of weights and 32 codes of each.
    assert isinstance(spec.walk, Walk)
    sums = len(spec.walk.slices) if schedule.scale == "sum" else 1
    assert made.products == schedule.rows // (16 * schedule.warps) * spec.walk.codes // 32 * schedule.groups
    # One wait for each sum that begins anew, and no other.
    assert made.drained == sums * schedule.groups


def test_enough_is_compiled() -> None:
    """Most formats have a kernel by most plans."""
    assert len(cases()) > 0.7 * len(PLANS) * len(FORMATS)
