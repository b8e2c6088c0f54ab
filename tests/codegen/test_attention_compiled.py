"""The attention kernels as compiled for explicit targets: registers, copies, and where decoded values go."""

from __future__ import annotations

import re

import pytest

from bitfold.codegen.attention import AttentionSpec, cache_format
from bitfold.codegen.attention_schedule import AttentionSchedule, choose_attention
from bitfold.codegen.slices import Walk, walk

pytest.importorskip("triton")
from bitfold.codegen.triton.attention_inspect import inspect_attention, inspect_combine, inspect_write
from bitfold.codegen.triton.inspect import Compiled

PAIRS = [
    ("int8[bf16]", "int8[bf16]", "", "r8 b64 w2 s3"),
    ("int4[g32]", "int4[g32]", "", "r8 b64 w2 s3"),
    ("int4[bf16]", "int4[bf16]", " page:64", "r8 b64 w2 s4"),
    ("float8_e4m3fn[tensor]", "float8_e4m3fn[tensor]", " mask:bool page:16", "r16 b64 w4 s3"),
    ("uint4[g64,zero]", "mxfp4", " mask:float", "r8 b32 w2 s3"),
    ("nf4[g32]", "int8", "", "r32 b32 w4 s3"),
]
FAST = {(i, 90) for i in range(4)} | {(0, 80)}


def spec_of(k: str, v: str, tail: str = "", x: str = "bf16") -> AttentionSpec:
    return AttentionSpec.parse(f"attention 32/8x128 {x} {cache_format(k, 128)} {cache_format(v, 128)}{tail}")


def through_shared(made: Compiled, spec: AttentionSpec, schedule: AttentionSchedule) -> int:
    """How often a decoded operand moves between layouts or into shared memory before its product."""
    count = 0
    for which, fmt in spec.formats:
        found = walk(fmt, spec.dim)
        assert isinstance(found, Walk)
        a, b = (schedule.block, found.length) if which == "k" else (found.length, schedule.block)
        if schedule.rows not in (a, b):  # else the queries or the weights have the operand's shape
            shape = rf"tensor<{a}x{b}xbf16, "
            count += len(
                re.findall(rf"(?:convert_layout|local_alloc|local_store) %\S+ : \(?{shape}", made.ttgir)
            )
    return count


@pytest.mark.parametrize(
    ("pair", "arch"),
    [
        pytest.param(i, arch, marks=[] if (i, arch) in FAST else pytest.mark.slow)
        for i in range(len(PAIRS))
        for arch in (80, 90, 100)
    ],
)
def test_a_kernel_as_compiled(pair: int, arch: int) -> None:
    k, v, tail, plan = PAIRS[pair]
    spec, schedule = spec_of(k, v, tail), AttentionSchedule.parse(plan)
    made = inspect_attention(spec, schedule, arch)
    assert made.spills == 0 and made.registers <= 255
    assert 0 < made.shared <= 163 * 1024
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?\], (0x[0-9a-f]+)", made.ptx)
    # Entries of the table of pages are fetched ahead too, each alone.
    narrow = {"0x4"} if spec.page else set()
    assert "0x10" in copies and set(copies) <= {"0x10"} | narrow, "codes are copied 16 bytes at a time"
    if arch < 100:
        assert through_shared(made, spec, schedule) == 0
    if schedule.rows == 8:
        assert "mma.sync" in made.ptx


@pytest.mark.slow
@pytest.mark.parametrize("text", ["int8[bf16]", "int4[g32]", "float8_e4m3fn[bf16]", "mxfp4", "nf4[g32]"])
@pytest.mark.parametrize("queries", [1, 4, 8, 16])
def test_chosen_schedules_do_not_spill(text: str, queries: int) -> None:
    """But for a few words of nf4's tables, under 64 rows."""
    for x in ("bf16", "f16"):
        spec = spec_of(text, text, x=x)
        made = inspect_attention(spec, choose_attention(spec, queries), 90)
        assert made.spills <= (48 if text.startswith("nf4") else 0), f"{spec}: {made.spills}"


@pytest.mark.parametrize("overlap", [False, True])
def test_the_combination_as_compiled(overlap: bool) -> None:
    """It waits for its predecessor before it reads, if it is launched before that one ends."""
    spec, schedule = spec_of("int8[bf16]", "int8[bf16]"), AttentionSchedule(8, 64, overlap=overlap)
    made = inspect_combine(spec, schedule, 90)
    assert made.spills == 0
    assert ("griddepcontrol.wait" in made.ptx) == overlap
    assert not overlap or made.ptx.index("griddepcontrol.wait") < made.ptx.index("ld.global")
    first = inspect_attention(spec, schedule, 90)
    assert ("griddepcontrol.launch_dependents" in first.ptx) == overlap


@pytest.mark.parametrize("text", ["int8[bf16]", "uint4[g32,zero]"])
def test_the_write_as_compiled(text: str) -> None:
    made = inspect_write(spec_of(text, text), 90)
    assert made.spills == 0
    assert "fma.rn.f32" not in made.ptx, (
        "a product fused into a sum rounds once where the format rounds twice"
    )
