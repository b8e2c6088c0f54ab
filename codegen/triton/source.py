"""From a spec and a schedule to the source of a fused dequant-GEMM kernel in Triton.

In: `GemmSpec`, `Schedule`. Out: the text of a module with one `kernel`; nothing in it names a format.

    linear 4096x4096 bf16 int4[g128,halves256], "m16 n64 w2 s3 k2 sum"
    ->  for run in tl.range(first, last):          runs of 256 codes
            loads, decoding, products              `operand.py`, for each weight
        the parts of a split added up in order, the epilogue, the store

Programs: tiles of the weights' rows, parts of the sum over k, blocks of x's rows (of one expert's, if x's
rows are sorted by expert).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from ..schedule import Schedule
from ..spec import CodegenError, GemmSpec, type_name
from .arguments import arguments, extra_names, sums_are_integers
from .lines import TL, Lines
from .operand import Operand
from .scales import functions
from .values import value_lines


@dataclass(frozen=True)
class Kernel:
    """One kernel being printed. `plain`: decode in Triton's own words, which the interpreter runs."""

    spec: GemmSpec
    schedule: Schedule
    plain: bool = False

    def __post_init__(self) -> None:
        obstacle = self.schedule.obstacle(self.spec)
        if obstacle is not None:
            raise CodegenError(obstacle)

    @cached_property
    def operands(self) -> tuple[Operand, ...]:
        return tuple(Operand(self.spec, self.schedule, self.plain, i) for i in range(self.spec.weights))

    @property
    def overlaps(self) -> bool:
        return bool(self.schedule.overlap) and not self.plain

    def source(self) -> str:
        """The module's text."""
        out = Lines()
        out.add(f'"""{self.spec}', "", f'{self.schedule}{", plain" if self.plain else ""}"""')
        out.add("import triton", "import triton.language as tl")
        if self.overlaps:
            out.add("from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait")
        out.add("")
        out.add(*functions(self.spec), *self.spec.epilogue.functions.splitlines())
        out.add(*self.operands[0].assembly())
        out.add("")
        out.add("@triton.jit(do_not_specialize=['m'])")
        named = arguments(self.spec, self.schedule, self.plain)
        words = [f"{name}: tl.constexpr" if kind == "constexpr" else name for name, kind in named.items()]
        with out.indent(f"def kernel({', '.join(words)}):"):
            self._place(out)
            self._head(out)
            self._loop(out)
            self._tail(out)
        return "\n".join(out.text) + "\n"

    # --- where this program works -----------------------------------------------------------------------

    def _place(self, out: Lines) -> None:
        s, n, w = self.schedule, self.spec.n, self.operands[0].walk
        out.add("tile, part, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)")
        if self.spec.experts:
            self._expert(out)
        else:
            out.add(f"rm = block * {s.block_m} + tl.arange(0, {s.block_m})", "here = rm < m")
        out.add(f"rn = tile * {s.block_n} + tl.arange(0, {s.block_n})", f"rk = tl.arange(0, {w.length})")
        if n % s.block_n:
            out.add(f"row = tl.minimum(rn, {n - 1})", f"inside = rn < {n}")
        else:
            out.add("row = rn")
        if s.split == 1:
            out.add(f"first, last = 0, {w.runs}")
        else:
            out.add(f"first, last = part * {w.runs} // {s.split}, (part + 1) * {w.runs} // {s.split}")

    def _expert(self, out: Lines) -> None:
        """The expert and the rows of this block: experts have blocks of their own, found from the ends."""
        size, count = self.schedule.block_m, self.spec.experts
        out.add(*["gdc_wait()"] * self.overlaps)  # the predecessor may be what counts the rows
        out.add(
            f"of = tl.arange(0, {1 << (count - 1).bit_length()})",
            f"to = tl.load(ends + of, mask=of < {count}, other=0)",
            f"since = tl.load(ends + of - 1, mask=(of > 0) & (of < {count}), other=0)",
            f"blocks = (to - since + {size - 1}) // {size}",
            f"blocks = tl.where(of < {count}, blocks, 0)",
            "before = tl.cumsum(blocks, 0) - blocks",
            "mine = (before <= block) & (block < before + blocks)",
        )
        with out.indent("if tl.sum(mine.to(tl.int32)) == 0:"):
            out.add("return")
        out.add(
            "expert = tl.sum(tl.where(mine, of, 0))",
            f"start = tl.sum(tl.where(mine, since + (block - before) * {size}, 0))",
            f"rm = start + tl.arange(0, {size})",
            "here = rm < tl.sum(tl.where(mine, to, 0))",
        )

    # --- the sums ----------------------------------------------------------------------------------------

    def _head(self, out: Lines) -> None:
        if self.schedule.split > 1:
            out.add(f"lock = locks + (block * {-(-self.spec.n // self.schedule.block_n)} + tile)")
        for operand in self.operands:
            operand.head(out)
        if self.overlaps and not self.spec.experts:
            out.add("gdc_wait()")
        tokens = self.operands[0].tokens
        out.add(*tokens.carried("first"))
        out.add("xs = x + rm[None, :] * x_stride + rk[:, None]")

    def _loop(self, out: Lines) -> None:
        s, w = self.schedule, self.operands[0].walk
        tokens = self.operands[0].tokens
        carried = [name for operand in self.operands for name in operand.scales.names()] + tokens.names()
        with out.indent(f"for run in tl.range(first, last, num_stages={s.stages}):"):
            if carried:
                out.add("ahead = tl.minimum(run + 1, last - 1)")
                for operand in self.operands:
                    out.add(*operand.scales.carried("ahead", "next_"))
                out.add(*tokens.carried("ahead", "next_"))
            for operand in self.operands:
                operand.loads(out)
            for i in range(len(w.slices)):
                self._load_x(out, i)
            for operand in self.operands:
                operand.decode(out)
            for operand in self.operands:
                for i in range(len(w.slices)):
                    operand.slice(out, i)
            out.add(*(f"{name} = next_{name}" for name in carried))
        if self.overlaps:
            # Earlier, the successor's programs would take the place of this kernel's last ones.
            out.add("gdc_launch_dependents()")

    def _load_x(self, out: Lines, i: int) -> None:
        w = self.operands[0].walk
        mask, at = "mask=here[None, :]", f"run * {w.codes} + {i * w.length}"
        if w.runs * w.codes != self.spec.k:
            mask += f" & ({at} + rk[:, None] < {self.spec.k})"
        whole = self.spec.lane == "int8" or (self.spec.lane == "e4m3" and self.plain)
        other = "0" if whole else "0.0"
        out.add(f"x{i} = tl.load(xs + ({at}), {mask}, other={other})")
        if self.plain and self.spec.lane == "e4m3":
            element = self.spec.activation.element if self.spec.activation is not None else None
            assert element is not None
            out.add(f"b{i} = x{i}.to(tl.int32)", *value_lines(element, f"b{i}", f"x{i}"))

    # --- the end -----------------------------------------------------------------------------------------

    def _tail(self, out: Lines) -> None:
        inside = " & inside[:, None]" if self.spec.n % self.schedule.block_n else ""
        out.add(f"kept = here[None, :]{inside}")
        for operand in self.operands:
            operand.before_sharing(out)
        if self.schedule.split > 1:
            self._in_order(out)
        else:
            self._store(out, "total")

    def _in_order(self, out: Lines) -> None:
        """Whoever comes last adds the parts up, in the order of k: the same sum in every run."""
        s, n = self.schedule, self.spec.n
        out.add(f"mine = partial + (rm[None, :] * {n} + rn[:, None])")
        for operand in self.operands:
            place = self._part("part", operand)
            out.add(f"tl.store(mine + {place}, total{operand.suffix}, mask=kept)")
        out.add(
            "tl.debug_barrier()",
            "came = tl.atomic_add(lock, 1, sem='acq_rel')",
        )
        kind = "tl.int32" if sums_are_integers(self.spec, s) else "tl.float32"
        with out.indent(f"if came == {s.split - 1}:"):
            out.add("tl.debug_barrier()")
            for operand in self.operands:
                out.add(f"sum{operand.suffix} = tl.zeros(({s.block_n}, {s.block_m}), dtype={kind})")
            with out.indent(f"for i in tl.static_range({s.split}):"):
                for operand in self.operands:
                    place = self._part("i", operand)
                    out.add(
                        f"sum{operand.suffix} += tl.load(mine + {place}, mask=kept, other=0, "
                        "cache_modifier='.cg')"
                    )
            self._store(out, "sum")
            out.add("tl.store(lock, 0)")

    def _part(self, part: str, operand: Operand) -> str:
        """Where the sums of a part begin: those of all weights lie behind one another."""
        many = self.spec.weights
        index = part if many == 1 else f"({part} * {many} + {operand.which})"
        return f"{index} * (m * {self.spec.n})"

    def _store(self, out: Lines, sums: str) -> None:
        out.add(*self.operands[0].tokens.load())
        for operand in self.operands:
            operand.after_sharing(out, sums)
        epilogue, n = self.spec.epilogue, self.spec.n
        names = {f"y{operand.which}": sums + operand.suffix for operand in self.operands}
        place = f"(rm[None, :] * {n} + rn[:, None])"
        for leaf, argument in extra_names(self.spec).items():
            whole = f"tl.load({argument} + {place}, mask=kept, other=0.0)"
            load = whole if leaf.startswith("e") else f"tl.load({argument} + row)[:, None]"
            out.add(f"of_{argument} = {load}.to(tl.float32)")
            names[leaf] = f"of_{argument}"
        lines, result = epilogue.triton(names)
        out.add(*lines)
        out.add(f"tl.store(y + {place}, {result}.to({TL[str(type_name(self.spec.out))]}), mask=kept)")


def source(spec: GemmSpec, schedule: Schedule, *, plain: bool = False) -> str:
    """The kernel's module as text. CodegenError if the schedule cannot run the spec."""
    return Kernel(spec, schedule, plain).source()
