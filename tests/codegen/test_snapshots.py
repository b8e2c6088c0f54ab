"""Generated modules as text: every change of a kernel shows in review, as a difference in `snapshots/`.

python tests/codegen/test_snapshots.py        writes the files anew
"""

from __future__ import annotations

from pathlib import Path

import pytest

from bitfold.codegen import GemmSpec, Schedule
from bitfold.codegen.triton import source

FOLDER = Path(__file__).with_name("snapshots")
KERNELS = {
    "int4_sum": ("linear 4096x4096 bf16 int4[g128,halves256]", "m16 n64 w4 s3 k2 sum", False),
    "mxfp4_lane": ("linear 100x4064 bf16 mxfp4[halves128] bias", "m8 n64 w2 s3 k1 lane o1", False),
    "gate_and_up": (
        "linear 14336x4096 bf16 2*int4[g128,halves256] -> mul(silu(y0),y1)",
        "m8 n32 w2 s3 k1 sum o1",
        False,
    ),
    "int4_int8": (
        "linear 4096x4096 bf16 int4[g128,planar256] x:int8 -> add(y0,e0)",
        "m16 n64 w4 s3 k2 sum",
        False,
    ),
    "float8_blocks": (
        "linear 4096x4096 bf16 float8_e4m3fn[128x128] x:float8_e4m3fn[g128]",
        "m64 n128 w4 s3 k1 sum",
        False,
    ),
    "experts": ("grouped 8 1024x2048 bf16 int4[g128,halves256]", "m16 n64 w2 s3 k1 sum", False),
    "uint3_plain": ("linear 64x500 f16 uint3[zero,halves256]", "m16 n32 w4 s2 k1 end", True),
}


def text(name: str) -> str:
    spec, schedule, plain = KERNELS[name]
    return source(GemmSpec.parse(spec), Schedule.parse(schedule), plain=plain)


@pytest.mark.parametrize("name", KERNELS)
def test_a_module_reads_as_before(name: str) -> None:
    assert text(name) == (FOLDER / f"{name}.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", KERNELS)
def test_a_module_is_python(name: str) -> None:
    compile(text(name), name, "exec")
    assert all(len(line) == len(line.rstrip()) for line in text(name).splitlines())


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for each in KERNELS:
        (FOLDER / f"{each}.txt").write_text(text(each), encoding="utf-8")
