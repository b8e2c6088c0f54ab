"""Values of kernels with their assembly, as GPUs run them, against float64.

linear 40x512 f16 nvfp4[units64s9], "m8 n16 w4 s3 k2 lane j2", M = 3   ->   y within `tolerance`
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bitfold.codegen import GemmSpec, Schedule, kernel_layout, scales

sys.path.insert(0, str(Path(__file__).parent))
from test_pipelined import drawn, tolerance
from triton_machine import run

# Without layouts; what follows the numbers of the schedule is its tail.
CASES = [
    ("linear 40x512 bf16 nvfp4", "k2", " j2"),
    ("linear 40x512 f16 nvfp4 bias", "k1", " j4"),
    ("linear 24x480 f16 float6_e3m2[g32,e4m3]", "k1", ""),
    # Numbers that float16's exponent reaches by a division: 2**(15 - bias).
    ("linear 24x512 f16 float4_e2m1b20[g32,e4m3]", "k1", " j2"),
    ("linear 24x512 f16 float6_e3m2b17[g64,e4m3]", "k2", " o1"),
    ("linear 24x512 bf16 float5_e2m2[g16,e4m3,two_level]", "k1", ""),
    ("linear 24x416 bf16 mxfp4", "k2", ""),
    ("linear 24x768 bf16 int3[g128]", "k1", " j2"),
    ("linear 24x768 f16 uint5[g64,zero]", "k3", ""),
    ("linear 24x512 bf16 nf4[g64]", "k1", ""),
    ("linear 24x512 bf16 int2[g64,f16]", "k1", " j2"),
]
OF_BYTES = [
    ("linear 24x1024 bf16 int3[g64] x:int8[row]", "k2", " j2"),
    ("linear 24x512 bf16 float6_e2m3[g64] x:float8_e4m3fn[g128] bias", "k1", " j2"),
    ("linear 24x480 bf16 int8[row] x:int8[row]", "k2", ""),
]


def cases(texts: list[tuple[str, str, str]]) -> list[tuple[GemmSpec, Schedule]]:
    found = []
    for text, split, tail in texts:
        given = GemmSpec.parse(text)
        activation = None if given.activation is None else given.activation.with_layout("bytes")
        layout = kernel_layout(given.weight, given.k, activation)
        assert layout is not None
        spec = replace(given, weight=layout, activation=activation)
        for mode in scales(spec):
            schedule = Schedule.parse(f"m8 n16 w4 s3 {split} {mode}{tail}")
            assert schedule.obstacle(spec) is None
            found.append((spec, schedule))
    return found


@pytest.mark.parametrize(("spec", "schedule"), cases(CASES), ids=str)
def test_values(spec: GemmSpec, schedule: Schedule) -> None:
    x, q, bias = drawn(spec, 3)
    weight = spec.weight.dequantize(q)
    want = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    y, locks = run(spec, schedule, [x, *q.parts, *([] if bias is None else [bias])])
    # Zero points are multiplied by the sum of x, of which what the codes add is a part.
    more = 20 if spec.has_offset else 1
    assert not locks.any()
    assert ((y.double() - want).abs() <= more * tolerance(spec, x, weight, want)).all()


@pytest.mark.parametrize(("spec", "schedule"), cases(OF_BYTES), ids=str)
def test_values_of_bytes(spec: GemmSpec, schedule: Schedule) -> None:
    x, q, bias = drawn(spec, 3)
    assert spec.activation is not None
    of_x = spec.activation.quantize(x.float())
    weight, meant = spec.weight.dequantize(q), spec.activation.dequantize(of_x)
    want = meant.double() @ weight.double().T + (0 if bias is None else bias.double())
    y, locks = run(spec, schedule, [*of_x.parts[:2], *q.parts, *([] if bias is None else [bias])])
    assert not locks.any()
    assert ((y.double() - want).abs() <= tolerance(spec, meant, weight, want)).all()
