"""Pipelined kernels on 16-bit activations: how codes are decoded, scaled and multiplied.

In: a `GemmSpec` without an activation, a `Pipelined`. Out: the module's text; most is `pipelined.py`'s.

    linear 28672x4096 bf16 int4[g128,halves256], "tma m128 n128 g2 w4 x6 j1 c2 p1 lane"
    ->  compute:   per run   u0 = code_ring[..].load(OPERAND)         registers, as the tensor cores want them
                             a0 = <and, flip the sign, subtract>(u0) * s_0
                             total += a0 @ x_ring[..].T               asynchronous: a1 is decoded meanwhile

A slice of x is free again when its product is known to be done, which a warpgroup asks after it has sent off
the next; a run of codes, when it is in registers and a fence stands behind that.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from ..decode import decoder
from ..schedule import Schedule
from ..slices import Take
from .lines import Lines
from .pipelined import READS, RINGS, STRIDES, Kernel
from .scales import Scales

_MULTIPLY = "{{ .reg .b32 z; mov.b32 z, 0x80008000; fma.rn.{0}x2 $0, $1, $2, z; }}"


@dataclass(frozen=True)
class HalvesKernel(Kernel):
    """One kernel being printed."""

    @cached_property
    def scales(self) -> Scales:
        """In a compute warp `row` has the layout of whatever the scale multiplies."""
        placed = Schedule(16, self.schedule.block_n, scale=self.schedule.scale)
        return Scales(self.spec, placed, self.walk, self._lane)

    @property
    def _units(self) -> str:
        """The type of codes in shared memory."""
        return "tl.int16"

    def _assembly(self, takes: list[list[Take]]) -> str | None:
        """The block that decodes these slices; None if units are lanes as they lie."""
        made = decoder(self.spec.weight.element, takes, self.spec.x)
        assert made is not None
        return made.asm

    def _constants(self, out: Lines) -> None:
        super()._constants(out)
        if self.schedule.scale == "lane":
            out.add(f'TIMES = tl.constexpr("""{_MULTIPLY.format(self.spec.x)}""")')

    # --- the warps that compute ---------------------------------------------------------------------------

    def _compute(self, out: Lines) -> None:
        s, w = self.schedule, self.walk
        out.add("", "", "@gluon.jit")
        with out.indent(f"def compute(group: tl.constexpr, {READS}, {RINGS}, m, {STRIDES}):"):
            out.add(
                self._sums,
                self._operand,
                "code_step, x_step = 0, 0",
            )
            self._each_piece(out)
            out.add(
                self._rows("OPERAND"),
                "total = tl.zeros([ROWS, BLOCK_M], tl.float32, SUMS)",
                f"held = tl.zeros([ROWS, {w.length}], {self._lane}, OPERAND)",
            )
            if s.scale == "float" and self.spec.weight.scale is not None and not self.scales.groups:
                out.add(*self.scales.load("s_0", "z_0", "0"))
            if s.scale != "end":
                out.add(*self.scales.carried("begin"))
            with out.indent("for run in range(begin, end):"):
                self._run(out)
            out.add("total, held = warpgroup_mma_wait(0, [total, held])", self._free())
            self._tail(out)
            self._advance(out)
            out.add("tma.store_wait(0)")

    def _run(self, out: Lines) -> None:
        w = self.walk
        carried = self.scales.names() if self.schedule.scale != "end" else []
        if carried:
            out.add("ahead = tl.minimum(run + 1, end - 1)", *self.scales.carried("ahead", "next_"))
        self._codes_to_registers(out)
        for i in range(len(w.slices)):
            self._slice(out, i)
        # The last product is still on its way, and reads its first operand.
        out.add(f"held = a{len(w.slices) - 1}", *(f"{name} = next_{name}" for name in carried))

    def _slice(self, out: Lines, i: int) -> None:
        """Decodes slice i and sends its product off; waits for the one before and frees its tile of x."""
        j = i % self.schedule.joined
        if f"DECODE{i}" in self._calls:
            self._decode(out, i)
        self._scale(out, i)
        if j == 0:
            out.add("b = x_step % X_STAGES", "mbarrier.wait(x_full.index(b), x_step // X_STAGES & 1)")
        x = f"x_ring.index({self._x_slot('b', j)}).permute((1, 0))"
        before = f"a{i - 1}" if i else "held"
        kept = ", ".join(["total", before, *self._left(i)])
        out.add(
            f"total = warpgroup_mma(a{i}, {x}, total, is_async=True)",
            f"{kept} = warpgroup_mma_wait(1, [{kept}])",
        )
        if i == 0:
            self._free_codes(out)
        if j == 0:
            out.add(self._free("" if i else ", pred=run > begin"))
        if j == self.schedule.joined - 1:
            out.add("x_step += 1")

    def _left(self, i: int) -> list[str]:
        """What later slices are made of. It passes through the wait after slice i, so that nothing of them is
        computed between a product's start and that wait: the compiler would wait for each product (C7513,
        "non wgmma instructions defining input registers")."""
        size = len(self.walk.slices) // len(self._calls)
        begun = (i // size + 1) * size
        loads = sorted({take.load for takes in self.walk.slices[begun:] for take in takes})
        return [*(f"a{j}" for j in range(i + 1, begun)), *(f"u{load}" for load in loads)]

    def _decode(self, out: Lines, i: int) -> None:
        takes, loads = self._calls[f"DECODE{i}"]
        dtypes = self._lane if len(takes) == 1 else f"({', '.join([self._lane] * len(takes))})"
        constraint = ",".join(["=r"] * len(takes) + ["r"] * len(loads))
        names = ", ".join(f"a{i + j}" for j in range(len(takes)))
        operands = ", ".join(f"u{load}" for load in loads)
        out.add(
            f'{names} = tl.inline_asm_elementwise(DECODE{i}, "{constraint}", [{operands}], dtype={dtypes}, '
            "is_pure=True, pack=2)"
        )

    def _scale(self, out: Lines, i: int) -> None:
        group = self.scales.group(i)
        if self.schedule.scale == "lane":
            out.add(
                f'a{i} = tl.inline_asm_elementwise(TIMES, "=r,r,r", [a{i}, s_{group}[:, None]], '
                f"dtype={self._lane}, is_pure=True, pack=2)"
            )
        elif self.schedule.scale == "float" and self.spec.weight.scale is not None:
            value = self.scales.affine(f"a{i}.to(tl.float32)", group)
            out.add(f"a{i} = ({value}).to({self._lane})")

    def _finish(self, out: Lines) -> None:
        """The scaling that is left for complete sums."""
        scale = self.spec.weight.scale
        if (scale is not None and self.schedule.scale == "end") or self.spec.bias:
            out.add(self._sums, self._rows("SUMS"))
        if scale is not None and self.schedule.scale == "end":
            out.add(*self.scales.load("s", "z", "0"), "total = total * s[:, None]")
        if scale is not None and scale.two_level and self.schedule.scale != "float":
            out.add("total = total * tl.load(level)")
