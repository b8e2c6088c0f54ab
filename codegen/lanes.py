"""Programs on 32-bit registers that hold two 16-bit lanes, printed as PTX and run here in numpy.

In: operations in order. Out: the text of an inline assembly block, or the registers' values.

    p = Program(inputs=1);  t = p.shift(0, -4);  u = p.logic(t, 0x000F000F, 0x43084308, AND_XOR)
    p.ptx([u])       shr.b32 t1, $1, 4;  lop3.b32 $0, t1, 0x000F000F, 0x43084308, 0x6A;
    p.run([words])   the same on uint32 arrays

Registers are numbers, inputs first. No GPU is needed to test a program over every half-word.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

# Truth tables of lop3: a is 0xF0, b is 0xCC, c is 0xAA (PTX ISA, "lop3").
AND = 0xF0 & 0xCC
AND_XOR = (0xF0 & 0xCC) ^ 0xAA
AND_OR = (0xF0 & 0xCC) | 0xAA
OR = 0xF0 | 0xCC
XOR = 0xF0 ^ 0xCC
SELECT = (0xF0 & 0xCC) | (~0xF0 & 0xAA)  # a ? b : c, bit by bit

# How PTX and torch call the 16-bit floats.
LANE_TYPES = {"bf16": torch.bfloat16, "f16": torch.float16}


@dataclass(frozen=True)
class Constant:
    """A 32-bit number in a place where a register could stand."""

    bits: int


Operand = int | Constant


@dataclass(frozen=True)
class Step:
    """One instruction: `op` is shr, shl, add, sub, lop3, prmt or fma; `detail` its shift, table or type."""

    op: str
    operands: tuple[Operand, ...]
    detail: int | str = ""


@dataclass
class Program:
    """Steps after `inputs` input registers; step i writes register inputs + i."""

    inputs: int
    steps: list[Step] = field(default_factory=list)

    def _add(self, op: str, *operands: Operand, detail: int | str = "") -> int:
        self.steps.append(Step(op, operands, detail))
        return self.inputs + len(self.steps) - 1

    def shift(self, a: int, by: int) -> int:
        """a << by, or a >> -by; a itself for 0. The lanes shift as one register, so mask afterwards."""
        if by == 0:
            return a
        step = Step("shl" if by > 0 else "shr", (a,), abs(by))
        if step in self.steps:  # several codes of a unit may need the same
            return self.inputs + self.steps.index(step)
        return self._add(step.op, a, detail=step.detail)

    def logic(self, a: int, b: Operand | int, c: Operand, table: int) -> int:
        """Any function of three bits, bit by bit."""
        return self._add("lop3", a, b, c, detail=table)

    def permute(self, a: Operand, b: Operand, selector: Operand) -> int:
        """Byte i is byte selector[4i .. 4i+2] of b:a (PTX "prmt"); selector bits 4i + 3 must be 0."""
        return self._add("prmt", a, b, selector)

    def fma(self, a: int, b: Operand, c: Operand, lane: str) -> int:
        """a * b + c in both lanes, rounded once; subnormals are kept."""
        return self._add("fma", a, b, c, detail=lane)

    def add(self, a: int, b: int) -> int:
        """a + b as 32-bit integers; where no lane carries, the sums of the lanes."""
        return self._add("add", a, b)

    def subtract(self, a: int, b: int) -> int:
        """a - b as 32-bit integers; where no lane borrows, the differences of the lanes."""
        return self._add("sub", a, b)

    def ptx(self, results: Sequence[int]) -> str:
        """The block for `inline asm`: results are $0.., inputs follow; everything else is local to it."""
        place = {r: f"${i}" for i, r in enumerate(results) if r >= self.inputs}
        if len(place) != len(results):
            raise ValueError("each result of an assembly block is the register of a different step")
        names = {i: f"${len(results) + i}" for i in range(self.inputs)}
        lines = []
        for i, step in enumerate(self.steps):
            out = self.inputs + i
            names[out] = place.get(out, f"t{i}")
            operands = [names[o] if isinstance(o, int) else f"0x{o.bits:08X}" for o in step.operands]
            lines += self._instruction(step, names[out], operands)
        local = [f"t{i}" for i in range(len(self.steps)) if self.inputs + i not in place]
        constants = [line for line in lines if line.startswith("mov")]
        body = constants + [line for line in lines if not line.startswith("mov")]
        registers = local + [line.split()[1].rstrip(",") for line in constants]
        declared = [f".reg .b32 {', '.join(registers)};"] if registers else []
        return "{\n" + "\n".join("    " + line for line in declared + body) + "\n}"

    @staticmethod
    def _instruction(step: Step, out: str, operands: list[str]) -> list[str]:
        if step.op in ("shl", "shr"):
            return [f"{step.op}.b32 {out}, {operands[0]}, {step.detail};"]
        if step.op in ("add", "sub"):
            return [f"{step.op}.u32 {out}, {', '.join(operands)};"]
        if step.op == "lop3":
            return [f"lop3.b32 {out}, {', '.join(operands)}, 0x{step.detail:02X};"]
        if step.op == "prmt":
            return [f"prmt.b32 {out}, {', '.join(operands)};"]
        # A floating operand cannot be written as raw bits, so constants go through registers.
        moved, lines = [], []
        for j, operand in enumerate(operands):
            if operand.startswith("0x"):
                name = f"k{out.strip('$')}_{j}" if out[0] != "$" else f"kr{out[1:]}_{j}"
                lines.append(f"mov.b32 {name}, {operand};")
                operand = name
            moved.append(operand)
        return [*lines, f"fma.rn.{step.detail}x2 {out}, {', '.join(moved)};"]

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Every register's value, uint32, for input registers of one shape."""
        values = [np.asarray(x, dtype=np.uint32) for x in inputs]
        if len(values) != self.inputs:
            raise ValueError(f"the program has {self.inputs} inputs, not {len(values)}")
        for step in self.steps:
            given = [values[o] if isinstance(o, int) else np.uint32(o.bits) for o in step.operands]
            values.append(_evaluate(step, given))
        return values


def _evaluate(step: Step, given: Sequence[np.ndarray | np.uint32]) -> np.ndarray:
    a, *rest = (np.asarray(g, dtype=np.uint32) for g in given)
    if step.op == "shl":
        return a << np.uint32(step.detail)
    if step.op == "shr":
        return a >> np.uint32(step.detail)
    if step.op == "add":
        return a + rest[0]
    if step.op == "sub":
        return a - rest[0]
    if step.op == "lop3":
        return _lop3(a, rest[0], rest[1], int(step.detail))
    if step.op == "prmt":
        return _prmt(a, rest[0], rest[1])
    shape = np.broadcast_shapes(*(np.shape(g) for g in given))
    lane = LANE_TYPES[str(step.detail)]
    x, y, z = (_lanes(np.broadcast_to(g, shape), lane) for g in (a, *rest))
    # Sums and products of 16-bit floats are exact in float64 but for sums far apart, which no program makes.
    return _register((x * y + z).to(lane))


def _lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: int) -> np.ndarray:
    out = np.zeros(np.broadcast_shapes(a.shape, b.shape, c.shape), dtype=np.uint32)
    for row in range(8):
        if table >> row & 1:
            term = (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
            out |= term
    return out


def _prmt(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    both = b.astype(np.uint64) << np.uint64(32) | a
    out = np.zeros(np.broadcast_shapes(a.shape, b.shape, selector.shape), dtype=np.uint32)
    for i in range(4):
        place = (selector >> np.uint32(4 * i)) & np.uint32(15)
        if (place > 7).any():
            raise ValueError("a selector of prmt with bit 3 set replicates a sign; no program means that")
        byte = (both >> (np.uint64(8) * place.astype(np.uint64))) & np.uint64(255)
        out |= byte.astype(np.uint32) << np.uint32(8 * i)
    return out


def _lanes(register: np.ndarray, lane: torch.dtype) -> torch.Tensor:
    """uint32 [...] -> float64 [..., 2], low lane first."""
    halves = np.ascontiguousarray(register)[..., None].view(np.uint16).view(np.int16)
    return torch.from_numpy(halves.copy()).view(lane).to(torch.float64)


def _register(lanes: torch.Tensor) -> np.ndarray:
    """16-bit floats [..., 2] -> uint32 [...]."""
    return lanes.contiguous().view(torch.int16).numpy().view(np.uint32)[..., 0]


def pair(value: float, lane: str) -> Constant:
    """A constant with `value` in both lanes; ValueError if the lane's type does not have it."""
    half = torch.tensor(value, dtype=torch.float64).to(LANE_TYPES[lane])
    if float(half) != value:
        raise ValueError(f"{value} is no {lane} number")
    bits = int(half.view(torch.int16)) & 0xFFFF
    return Constant(bits << 16 | bits)


def both(bits: int) -> Constant:
    """A constant with the same 16 bits in both lanes."""
    return Constant((bits & 0xFFFF) * 0x10001)
