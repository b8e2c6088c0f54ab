"""What the compiler makes of kernels, for GPUs that are not here: no spills, shared memory that fits, wide
asynchronous copies, tensor cores fed from registers.

    linear 4096x4096 bf16 int4[g128,halves256], "m8 n64 w2 s3 k4 sum", 90  ->  registers, shared, PTX, TTGIR
"""

from __future__ import annotations

import re

import pytest

from bitfold.codegen import CodegenError, GemmSpec, Schedule, Walk, choose, kernel_layout, walk
from bitfold.codegen.triton.inspect import Compiled, inspect

pytest.importorskip("triton")

# Bytes of shared memory that one program may have (CUDA C++ Programming Guide, technical specifications).
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}

PAIRS = [
    ("linear 4096x4096 bf16 int4[g128,halves512]", "m16 n64 w4 s3 k2 sum"),
    ("linear 4096x4096 bf16 int4[g128,halves256] bias", "m8 n64 w2 s3 k8 lane o1"),
    ("linear 4000x4096 f16 uint4[g64,f16,zero,halves256]", "m16 n64 w2 s3 k1 sum"),
    ("linear 4096x4096 bf16 uint4[tensor,zero,halves256]", "m16 n64 w4 s3 k1 end"),
    ("linear 4096x4096 bf16 int3[g128,halves512]", "m16 n64 w4 s2 k1 sum"),
    ("linear 4096x4000 bf16 int8[halves128]", "m32 n64 w4 s3 k1 end"),
    ("linear 4096x4096 bf16 mxfp4[halves128]", "m16 n64 w2 s3 k4 lane"),
    ("linear 4096x4096 f16 nf4[g64,halves256]", "m16 n64 w4 s3 k1 sum"),
    ("linear 4096x4096 f16 float8_e4m3fn[halves128]", "m32 n64 w4 s3 k1 end o1"),
    ("linear 4096x4096 f16 float8_e5m2fnuz[halves128]", "m16 n64 w4 s2 k1 end"),
    ("linear 512x1152 bf16 uint5[128x128,f32,halves256]", "m8 n32 w4 s2 k1 sum"),
]
# Products of 8-bit numbers: bytes that are multiplied as they lie, and such that are decoded.
OF_BYTES = [
    ("linear 4096x4096 bf16 int8[bytes] x:int8", "m16 n64 w4 s3 k2 end"),
    ("linear 4096x4096 bf16 int4[g128,planar256] x:int8", "m8 n64 w2 s3 k4 sum"),
    ("linear 4096x4096 bf16 float8_e4m3fn[bytes] x:float8_e4m3fn", "m128 n128 w8 s4 k1 end"),
    ("linear 4096x4096 bf16 float8_e4m3fn[128x128] x:float8_e4m3fn[g128]", "m16 n64 w4 s3 k2 sum"),
    ("linear 4096x4096 bf16 int4[g128,planar256] x:float8_e4m3fn", "m16 n64 w4 s3 k1 sum"),
    ("grouped 8 4096x4096 bf16 int8[bytes] x:int8", "m32 n64 w4 s3 k1 end"),
    ("linear 4096x4032 bf16 float8_e4m3fn[bytes] x:float8_e4m3fn", "m16 n64 w4 s3 k1 end"),
    ("linear 14336x4096 bf16 2*int4[g128,halves256] -> mul(silu(y0),y1)", "m8 n64 w2 s3 k1 sum o1"),
    ("grouped 8 4096x4096 bf16 int4[g128,halves256]", "m16 n64 w2 s3 k1 sum"),
]


@pytest.mark.parametrize(("text", "plan"), OF_BYTES)
def test_kernels_of_8_bit_products_groups_and_epilogues(text: str, plan: str) -> None:
    spec, schedule = GemmSpec.parse(text), Schedule.parse(plan)
    made = inspect(spec, schedule, 90)
    assert made.spills <= 16 and 0 < made.shared <= SHARED[90]
    kind = {"int8": "s32.s8.s8", "e4m3": "f32.e4m3.e4m3"}.get(spec.lane, "f32.bf16.bf16")
    assert kind in made.ptx, "another product than that of the lanes"
    assert 0x10 in copies(made)


FAST = {(pair, 90) for pair in PAIRS[:9]} | {(pair, 80) for pair in (PAIRS[0], PAIRS[4])} | {(PAIRS[0], 100)}


def pairs() -> list[object]:
    return [
        pytest.param(*pair, arch, marks=[] if (pair, arch) in FAST else pytest.mark.slow)
        for pair in PAIRS
        for arch in (80, 90, 100)
        if arch >= 90 or " o" not in pair[1]
    ]


def through_shared(made: Compiled, spec: GemmSpec, schedule: Schedule) -> int:
    """How often a decoded operand, [block_n, length] of the lane's type, moves between layouts or into shared
    memory before its product."""
    found = walk(spec.weight, spec.k)
    assert isinstance(found, Walk)
    assert found.length != schedule.block_m, "the result, moved to be stored, would have the operand's shape"
    shape = rf"tensor<{schedule.block_n}x{found.length}x{spec.x}, "
    return len(re.findall(rf"(?:convert_layout|local_alloc|local_store) %\S+ : \(?{shape}", made.ttgir))


@pytest.mark.parametrize(("text", "plan", "arch"), pairs())
def test_a_kernel_as_compiled(text: str, plan: str, arch: int) -> None:
    spec, schedule = GemmSpec.parse(text), Schedule.parse(plan)
    made = inspect(spec, schedule, arch)
    assert made.spills == 0 and made.registers <= 255
    assert 0 < made.shared <= SHARED[arch]
    # A warp group's product takes 64 rows and four warps.
    small = schedule.block_n < 64 or schedule.warps < 4
    assert ("mma.sync" if small else TENSOR_CORES[arch]) in made.ptx
    wide = schedule.block_n >= 64
    assert 0x10 in copies(made) or not wide, "no asynchronous copy of 16 bytes"
    if spec.k % 16 == 0 and walk(spec.weight, spec.k).length >= 64:
        assert copies(made) == {0x10}, "narrow copies"
    if arch < 100:
        # On 100 the first operand's place is tensor memory, or shared memory as the compiler sees fit.
        assert through_shared(made, spec, schedule) == 0
    assert ("griddepcontrol" in made.ptx) == (schedule.overlap > 0)


def copies(made: Compiled) -> set[int]:
    """Widths in bytes of the asynchronous copies."""
    found = re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?\], (0x[0-9a-f]+)", made.ptx)
    return {int(width, 16) for width in found}


def test_overlap_is_refused_where_there_is_none() -> None:
    spec = GemmSpec.parse(PAIRS[1][0])
    with pytest.raises(CodegenError, match=r"for compute capability 9.0 on, not 8.0; leave out o1"):
        inspect(spec, Schedule.parse(PAIRS[1][1]), 80)


def test_overlap_lets_the_successor_start_when_the_products_are_done() -> None:
    made = inspect(GemmSpec.parse(PAIRS[1][0]), Schedule.parse(PAIRS[1][1]), 90)
    order = [made.ptx.index("griddepcontrol.wait"), made.ptx.index("cp.async.c")]
    order += [made.ptx.rindex("mma.sync"), made.ptx.index("launch_dependents")]
    assert order == sorted(order)


def test_the_check_sees_an_operand_in_shared_memory() -> None:
    """Scaling in the lanes goes through shared memory where the tensor cores take warp groups: the check
    above is not blind, and such schedules have two warps."""
    spec, schedule = GemmSpec.parse(PAIRS[6][0]), Schedule.parse("m16 n64 w4 s3 k4 lane")
    assert through_shared(inspect(spec, schedule, 90), spec, schedule) > 0


# Three loads of 64 units, eight groups and their scales a run are more than two warps can hold.
SPILLS = "linear 4096x4096 bf16 int3[g128,units1024]"
CHOSEN = [text.replace("int3[g128,halves512]", "int3[g128,halves256]") for text, _ in PAIRS]


def test_long_runs_of_several_loads_are_not_chosen() -> None:
    spec = GemmSpec.parse(SPILLS)
    assert inspect(spec, Schedule.parse("m8 n64 w2 s3 k1 sum"), 90).spills > 16
    assert str(kernel_layout(spec.weight, 4096)) == "int3[g128,units256]"


@pytest.mark.slow
@pytest.mark.parametrize("m", [1, 16])
@pytest.mark.parametrize("text", CHOSEN)
def test_chosen_schedules_neither_spill_nor_overflow(text: str, m: int) -> None:
    """On the GPU that `choose` is made for, and a few rows, where loads are all that counts. Sixteen bytes of
    stack are the compiler's own."""
    spec = GemmSpec.parse(text)
    schedule = choose(spec, m)
    assert schedule is not None
    made = inspect(spec, schedule, 90)
    assert made.shared <= SHARED[90] and made.spills <= 16, f"{schedule}: {made.spills}"
