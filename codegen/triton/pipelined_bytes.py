"""Pipelined kernels on activations in codes: what differs where the tensor cores multiply 8-bit numbers.

In: a `GemmSpec` with an activation, a `Pipelined`. Out: the module's text, of which most is `pipelined.py`'s.

    linear 28672x4096 bf16 float8_e4m3fn[128x128,bytes] x:float8_e4m3fn[g128], "... sum"
    ->  compute:   per run   u0 = code_ring[..].load(OPERAND)           128 codes of a row, as they lie
                             p = u0 @ x_ring[..].T                      asynchronous, from nothing
                             total += p * s_0[:, None] * t_0[None, :]   another group multiplies meanwhile

In mode `sum` products begin anew at each group of a scale, or at each run where there are none, since the
tensor cores add float8 products up with fewer bits than float32 has. Two groups of warps take turns: one
scales its sums while the other's products are on their way.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from ..byte_lanes import ByteDecoder, byte_decoder
from ..pipelined import lies
from ..schedule import Schedule
from ..slices import Take, renumbered
from .lines import Lines
from .pipelined import READS, RINGS, STRIDES, Kernel
from .scales import Scales, TokenScales, group

_COLUMNS = (
    "rm = m0 + tl.arange(0, BLOCK_M, tl.SliceLayout(0, SUMS))",
    "here = rm < m",
)


@dataclass(frozen=True)
class BytesKernel(Kernel):
    """One kernel being printed."""

    @cached_property
    def _decoder(self) -> ByteDecoder:
        return self._decoded(renumbered(self.walk.slices[:1])[0])

    def _decoded(self, takes: list[list[Take]]) -> ByteDecoder:
        made = byte_decoder(self.spec.weight.element, takes[0], self.spec.lane)
        assert made is not None
        return made

    @cached_property
    def scales(self) -> Scales:
        placed = Schedule(16, self.schedule.block_n, scale=self.schedule.scale)
        made = self._decoder
        return Scales(self.spec, placed, self.walk, self._lane, "", made.factor, made.middle)

    @cached_property
    def tokens(self) -> TokenScales:
        return TokenScales(self.spec, self.walk)

    @property
    def _type_of_sums(self) -> str:
        return "tl.int32" if self.spec.lane == "int8" else "tl.float32"

    def _assembly(self, takes: list[list[Take]]) -> str | None:
        return self._decoded(takes).asm

    @property
    def _units(self) -> str:
        return self._lane if self._as_they_lie else "tl.int8"

    @property
    def _as_they_lie(self) -> bool:
        """Whether codes are what is multiplied: then they stay in shared memory, as x does."""
        return lies(self.spec)

    def _decode(self, out: Lines, i: int) -> None:
        _, loads = self._calls[f"DECODE{i}"]
        cast = "" if self.spec.lane == "int8" else f".to({self._lane}, bitcast=True)"
        operands = ", ".join(f"u{load}" for load in loads)
        constraint = ",".join(["=r"] + ["r"] * len(loads))
        out.add(
            f'a{i} = tl.inline_asm_elementwise(DECODE{i}, "{constraint}", [{operands}], dtype=tl.int8, '
            f"is_pure=True, pack=4){cast}"
        )

    # --- the warps that compute ---------------------------------------------------------------------------

    def _compute(self, out: Lines) -> None:
        in_groups = self.schedule.scale == "sum"
        out.add("", "", "@gluon.jit")
        with out.indent(f"def compute(group: tl.constexpr, {READS}, {RINGS}, m, {STRIDES}):"):
            out.add(self._sums, *[self._operand] * (not self._as_they_lie), "code_step, x_step = 0, 0")
            self._each_piece(out)
            out.add(self._rows("SUMS"))
            kind = "tl.float32" if in_groups else self._type_of_sums
            out.add(f"total = tl.zeros([ROWS, BLOCK_M], {kind}, SUMS)")
            if in_groups:
                out.add(f"p = tl.zeros([ROWS, BLOCK_M], {self._type_of_sums}, SUMS)")
                out.add(*_COLUMNS * bool(self.tokens.groups), *self.scales.carried("begin"))
            with out.indent("for run in range(begin, end):"):
                self._run(out)
            if self._ahead:
                out.add("total = warpgroup_mma_wait(0, [total])", self._free(), self._free_last_codes())
            self._tail(out)
            self._advance(out)
            out.add("tma.store_wait(0)")

    @property
    def _ahead(self) -> bool:
        """Whether a product is sent off before the last one is done: where its sums are complete only at the
        end, and it reads no registers, which could not be named to the wait (8-bit types, Triton 3.6)."""
        return self._as_they_lie and self.schedule.scale == "end"

    def _run(self, out: Lines) -> None:
        carried = self.scales.names() if self.schedule.scale == "sum" else []
        if carried:
            out.add("ahead = tl.minimum(run + 1, end - 1)", *self.scales.carried("ahead", "next_"))
        self._codes_to_registers(out)
        begun = 0
        for i in range(len(self.walk.slices)):
            if not self._as_they_lie:
                self._decode(out, i)
            closes = self._closes(i)
            self._product(out, i, i - begun, closes)
            if self._ahead:
                self._free_behind(out, i)
            elif closes or not self._as_they_lie:
                self._free_done(out, begun if self._as_they_lie else i, i)
            if closes and self.schedule.scale == "sum":
                self._close(out, i)
            begun = i + 1 if closes else begun
        out.add(*["code_step += 1"] * self._as_they_lie, *(f"{name} = next_{name}" for name in carried))

    def _codes_to_registers(self, out: Lines) -> None:
        if not self._as_they_lie:
            super()._codes_to_registers(out)
            self._free_codes(out)
            return
        out.add("at_codes = code_step % CODE_STAGES")
        out.add("mbarrier.wait(codes_full.index(at_codes), code_step // CODE_STAGES & 1)")

    def _closes(self, i: int) -> bool:
        """Whether a sum ends with slice i."""
        if self.schedule.scale == "end":
            return False
        return i + 1 == len(self.walk.slices) or self._groups_of(i + 1) != self._groups_of(i)

    def _groups_of(self, i: int) -> tuple[int, int]:
        """The groups of the weight's scales and of x's that slice i is in."""
        return self.scales.group(i), group(self.walk, self.tokens.cols, i)

    def _product(self, out: Lines, i: int, inside: int, closes: bool) -> None:
        """Slice i sent off, the one of number `inside` of its sum. Scales of x come meanwhile, but where a
        product reads registers: nothing may stand between such a one and the wait for it."""
        step = f"(x_step + {inside})" if inside and self._as_they_lie and not self._ahead else "x_step"
        out.add(f"b = {step} % X_STAGES", f"mbarrier.wait(x_full.index(b), {step} // X_STAGES & 1)")
        of_x = []
        if closes and self.tokens.groups:
            of_x = self.tokens.carried("run")[self.tokens.groups.index(self._groups_of(i)[1]) :][:1]
        out.add(*of_x * (not self._as_they_lie))
        slot = self._slot(self._calls[f"DECODE{i}"][1][0], "group", "at_codes")
        a = f"code_ring.index({slot})" if self._as_they_lie else f"a{i}"
        in_groups = self.schedule.scale == "sum"
        sums = "p" if in_groups else "total"
        anew = ", use_acc=False" if in_groups and inside == 0 else ""
        x = "x_ring.index(b).permute((1, 0))"
        out.add(f"{sums} = warpgroup_mma({a}, {x}, {sums}{anew}, is_async=True)")
        out.add(*of_x * self._as_they_lie)
        if self._ahead:
            out.add("total = warpgroup_mma_wait(1, [total])")
        elif closes or not self._as_they_lie:
            out.add(f"{sums} = warpgroup_mma_wait(0, [{sums}])")

    def _free_behind(self, out: Lines, i: int) -> None:
        """The product before slice i's is done: its x is free, and with a run's first its codes."""
        out.add(self._free("" if i else ", pred=run > begin"))
        if i == 0:
            out.add(self._free_last_codes(", pred=run > begin"))
        out.add("x_step += 1")

    @staticmethod
    def _free_last_codes(when: str = "") -> str:
        return f"mbarrier.arrive(codes_free.index((code_step + CODE_STAGES - 1) % CODE_STAGES){when})"

    def _free_done(self, out: Lines, first: int, last: int) -> None:
        """Products of slices first .. last are done."""
        for _ in range(first, last + 1):
            out.add("mbarrier.arrive(x_free.index(x_step % X_STAGES))", "x_step += 1")
        if self._as_they_lie and last + 1 == len(self.walk.slices):
            out.add("mbarrier.arrive(codes_free.index(at_codes))")

    def _close(self, out: Lines, last: int) -> None:
        """The sum of a group, scaled, goes to the sum over the row."""
        of, block = self._groups_of(last)
        whole = ".to(tl.float32)" if self.spec.lane == "int8" else ""
        of_rows = f" * s_{of}[:, None]" if self.scales.groups else ""
        of_tokens = f" * t_{block}[None, :]" if self.tokens.groups else ""
        out.add(f"total += p{whole}{of_rows}{of_tokens}")

    def _finish(self, out: Lines) -> None:
        by_row, by_token = not self.scales.groups, self.tokens.load()
        scale = self.spec.weight.scale
        if by_row or by_token or self.spec.bias:
            out.add(self._sums, self._rows("SUMS"))
        if self.spec.lane == "int8" and self.schedule.scale == "end":
            out.add("total = total.to(tl.float32)")
        if by_row and scale is not None:
            out.add(*self.scales.load("s", "z", "0"), "total = total * s[:, None]")
        elif by_row and self.scales.factor != 1.0:
            out.add(f"total = total * {self.scales.factor!r}")
        if scale is not None and scale.two_level:
            out.add("total = total * tl.load(level)")
        if by_token:
            out.add(*_COLUMNS, *by_token, "total = total * t[None, :]")
