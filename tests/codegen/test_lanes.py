"""Programs of registers: every instruction against a case worked out by hand, and the assembly they print.

shr 0x12345678 by 8   ->   0x00123456
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bitfold.codegen.decode import decoder
from bitfold.codegen.lanes import (
    AND,
    AND_OR,
    AND_XOR,
    LANE_TYPES,
    SELECT,
    Constant,
    Program,
    both,
    pair,
)
from bitfold.codegen.slices import Take
from bitfold.formats import Integer

A, B, C = 0xF0F0_1234, 0x0FF0_FFFF, 0x3C3C_00FF


def run(program: Program, *words: int) -> int:
    """The last register, for one word a register."""
    values = program.run([np.array([word], dtype=np.uint32) for word in words])
    return int(values[-1][0])


def lanes(low: float, high: float, lane: str) -> int:
    """The register with these two numbers."""
    halves = torch.tensor([low, high], dtype=torch.float64).to(LANE_TYPES[lane])
    return int(halves.view(torch.int32).item()) & 0xFFFF_FFFF


def test_shifts_move_the_whole_register() -> None:
    right, left, none = Program(1), Program(1), Program(1)
    right.shift(0, -8)
    left.shift(0, 4)
    assert none.shift(0, 0) == 0 and none.steps == []
    assert run(right, 0x12345678) == 0x00123456
    assert run(left, 0x12345678) == 0x23456780


@pytest.mark.parametrize(
    ("table", "want"),
    [
        (AND, A & B),
        (AND_XOR, (A & B) ^ C),
        (AND_OR, (A & B) | C),
        (SELECT, (A & B) | (~A & C)),
        (0xFF, 0xFFFF_FFFF),
        (0x00, 0),
        (0x96, A ^ B ^ C),
    ],
)
def test_logic_is_its_truth_table(table: int, want: int) -> None:
    program = Program(3)
    program.logic(0, 1, 2, table)
    assert run(program, A, B, C) == want
    program = Program(1)
    program.logic(0, Constant(B), Constant(C), table)
    assert run(program, A) == want


def test_permute_takes_bytes_of_two_registers() -> None:
    program = Program(3)
    program.permute(0, 1, 2)
    low, high = 0x33221100, 0x77665544
    assert run(program, low, high, 0x3210) == low
    assert run(program, low, high, 0x7654) == high
    assert run(program, low, high, 0x5140) == 0x55114400
    assert run(program, low, high, 0x0007) == 0x00000077
    # The upper half of a selector is not looked at.
    assert run(program, low, high, 0xFFFF_3210) == low


def test_permute_does_not_replicate_signs() -> None:
    program = Program(3)
    program.permute(0, 1, 2)
    with pytest.raises(ValueError, match="replicates a sign"):
        run(program, 0, 0, 0x8000)


@pytest.mark.parametrize("lane", ["bf16", "f16"])
def test_fma_rounds_once_to_even_and_keeps_subnormals(lane: str) -> None:
    digits = {"bf16": 7, "f16": 10}[lane]
    ulp, tiny = 2.0**-digits, float(torch.finfo(LANE_TYPES[lane]).smallest_normal) * 2.0**-digits
    program = Program(3)
    program.fma(0, 1, 2, lane)

    def fma(x: tuple[float, float], y: tuple[float, float], z: tuple[float, float]) -> int:
        return run(program, lanes(*x, lane), lanes(*y, lane), lanes(*z, lane))

    assert fma((3, -5), (2, 4), (1, 0.5)) == lanes(7, -19.5, lane)
    # 1 + ulp / 2 is a tie, to even; (1 + ulp) + ulp / 2 a tie the other way.
    assert fma((ulp, ulp), (0.5, 0.5), (1, 1 + ulp)) == lanes(1, 1 + 2 * ulp, lane)
    # (1 + ulp)**2 - (1 + 2 ulp) is ulp**2, which a product rounded by itself loses.
    assert fma((1 + ulp, 1), (1 + ulp, 1), (-1 - 2 * ulp, 0)) == lanes(ulp * ulp, 1, lane)
    assert fma((tiny, -tiny), (1, 3), (0, 0)) == lanes(tiny, -3 * tiny, lane)
    assert fma((-0.0, 0.0), (2, 2), (-0.0, -0.0)) == lanes(-0.0, 0.0, lane)


def test_constants_hold_both_lanes() -> None:
    assert both(0x00F0) == Constant(0x00F0_00F0)
    assert pair(1.0, "bf16") == Constant(0x3F80_3F80) and pair(1.0, "f16") == Constant(0x3C00_3C00)
    assert pair(-136.0, "bf16") == Constant(0xC308_C308)
    with pytest.raises(ValueError, match=r"257.0 is no bf16 number"):
        pair(257.0, "bf16")


def test_a_program_takes_its_inputs() -> None:
    program = Program(2)
    program.logic(0, 1, both(0), AND)
    with pytest.raises(ValueError, match="the program has 2 inputs, not 1"):
        program.run([np.zeros(1, dtype=np.uint32)])


def test_results_of_an_assembly_block_are_steps_of_their_own() -> None:
    program = Program(1)
    shifted = program.shift(0, -4)
    for results in ([0], [shifted, shifted]):
        with pytest.raises(ValueError, match="each result of an assembly block"):
            program.ptx(results)


def test_int4_prints_as_three_instructions() -> None:
    """bf16: shift, mask with the sign flipped into 128's mantissa, subtract 136 = 128 + 8."""
    made = decoder(Integer(4), [[Take(0, 0, 4, 4)]], "bf16")
    assert made is not None
    assert made.asm == (
        "{\n"
        "    .reg .b32 t0, t1, kr0_1, kr0_2;\n"
        "    mov.b32 kr0_1, 0x3F803F80;\n"
        "    mov.b32 kr0_2, 0xC308C308;\n"
        "    shr.b32 t0, $1, 4;\n"
        "    lop3.b32 t1, t0, 0x000F000F, 0x43084308, 0x6A;\n"
        "    fma.rn.bf16x2 $0, t1, kr0_1, kr0_2;\n"
        "}"
    )


def test_a_slice_of_two_loads_prints_both() -> None:
    """int3, two low bits in load 0 and the sign in load 1; f16: from bit 2 of 1024's mantissa on, where the
    low bits lie anyway, times a quarter, minus 260."""
    made = decoder(Integer(3), [[Take(0, 0, 2, 2), Take(1, 2, 1, 5)]], "f16")
    assert made is not None
    assert made.asm == (
        "{\n"
        "    .reg .b32 t0, t1, t2, kr0_1, kr0_2;\n"
        "    mov.b32 kr0_1, 0x34003400;\n"
        "    mov.b32 kr0_2, 0xDC10DC10;\n"
        "    lop3.b32 t0, $1, 0x000C000C, 0x64106410, 0x6A;\n"
        "    shr.b32 t1, $2, 1;\n"
        "    lop3.b32 t2, t1, 0x00100010, t0, 0x6A;\n"
        "    fma.rn.f16x2 $0, t2, kr0_1, kr0_2;\n"
        "}"
    )
