"""From a spec and a schedule to the source of a fused dequant-GEMM kernel in Triton.

In: `GemmSpec`, `Schedule`. Out: the text of a module with one `kernel`; nothing in it names a format.

    linear 4096x4096 bf16 int4[g128,halves512], "m16 n64 w4 s3 k2 sum"
    ->  for run in tl.range(first, last):                 runs of 512 codes
            u0 = tl.load(codes + ...)                      [64, 128] 16-bit units
            a0 = <and, flip the sign, or the exponent, subtract>(u0)   the first 128 codes, bf16
            p = tl.dot(a0, x0);  total += p * s0[:, None]

The weight is the dot's first operand: on Hopper that one comes from registers, so decoded values never pass
through shared memory. Sums are [block_n, block_m], the transpose of what is stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ...formats import Integer, Scale
from ..decode import decoder
from ..schedule import Schedule
from ..slices import Take, Walk, walk
from ..spec import CodegenError, GemmSpec
from .scales import Scales
from .values import code_line, needs_table, value_lines

TL = {"bf16": "tl.bfloat16", "f16": "tl.float16"}
_MULTIPLY = "fma.rn.{0}x2 $0, $1, $2, z;"


@dataclass
class Lines:
    """Source lines at a depth of indentation."""

    text: list[str] = field(default_factory=list)
    depth: int = 0

    def add(self, *lines: str) -> None:
        self.text += ["    " * self.depth + line if line else "" for line in lines]

    def indent(self, line: str) -> Lines:
        self.add(line)
        self.depth += 1
        return self

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        self.depth -= 1


@dataclass(frozen=True)
class Kernel:
    """One kernel being printed. `plain`: decode in Triton's own words (see `values.py`), not in assembly."""

    spec: GemmSpec
    schedule: Schedule
    plain: bool = False

    def __post_init__(self) -> None:
        obstacle = self.schedule.obstacle(self.spec)
        if obstacle is not None:
            raise CodegenError(obstacle)

    @property
    def walk(self) -> Walk:
        found = walk(self.spec.weight, self.spec.k)
        assert isinstance(found, Walk)
        return found

    @property
    def scale(self) -> Scale | None:
        return self.spec.weight.scale

    @property
    def scales(self) -> Scales:
        return Scales(self.spec, self.schedule, self.walk, TL[self.spec.x])

    @property
    def decodes_plainly(self) -> bool:
        """Whether values come from `values.py`: asked for, or no program of registers exists."""
        if self.plain or self.schedule.scale == "float":
            return True
        return decoder(self.spec.weight.element, [self.walk.slices[0]], self.spec.x) is None

    # --- what the kernel is made of ---------------------------------------------------------------------

    def source(self) -> str:
        out = Lines()
        out.add(f'"""{self.spec}', "", f'{self.schedule}{", plain" if self.plain else ""}"""')
        out.add("import triton", "import triton.language as tl")
        if self.schedule.overlap and not self.plain:
            out.add("from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait")
        out.add("")
        out.add(*self.scales.function())
        self._assembly(out)
        out.add("")
        out.add("@triton.jit(do_not_specialize=['m'])")
        arguments = "x, codes, scales, zeros, level, table, bias, y, partial, locks, m, x_stride"
        with out.indent(f"def kernel({arguments}, SN: tl.constexpr, SG: tl.constexpr):"):
            self._head(out)
            self._loop(out)
            self._tail(out)
        return "\n".join(out.text) + "\n"

    def _assembly(self, out: Lines) -> None:
        if self.decodes_plainly:
            return
        for name, (takes, _) in self._calls().items():
            made = decoder(self.spec.weight.element, takes, self.spec.x)
            assert made is not None
            out.add(f'{name} = tl.constexpr("""{made.asm}""")')
        if self.schedule.scale == "lane":
            body = _MULTIPLY.format(self.spec.x)
            out.add(f'TIMES = tl.constexpr("""{{ .reg .b32 z; mov.b32 z, 0x80008000; {body} }}""")')

    def _calls(self) -> dict[str, tuple[list[list[Take]], list[int]]]:
        """Assembly blocks: name -> (slices with their loads renumbered, the loads they read)."""
        element = self.spec.weight.element
        by_fours = not isinstance(element, Integer) and hasattr(element, "table") and element.bits == 4
        groups = [list(self.walk.slices)] if by_fours else [[takes] for takes in self.walk.slices]
        calls = {}
        for i, slices in enumerate(groups):
            loads = sorted({take.load for takes in slices for take in takes})
            renumbered = [
                [Take(loads.index(t.load), t.low, t.width, t.bit) for t in takes] for takes in slices
            ]
            calls[f"DECODE{i}"] = (renumbered, loads)
        return calls

    def _head(self, out: Lines) -> None:
        s, w = self.schedule, self.walk
        n, split = self.spec.n, s.split
        out.add(
            "tile, part, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)",
            f"rn = tile * {s.block_n} + tl.arange(0, {s.block_n})",
            f"rm = block * {s.block_m} + tl.arange(0, {s.block_m})",
            f"rk = tl.arange(0, {w.length})",
            "here = rm < m",
        )
        if n % s.block_n:
            out.add(f"row = tl.minimum(rn, {n - 1})", f"inside = rn < {n}")
        else:
            out.add("row = rn")
        out.add(
            f"first, last = part * {w.runs} // {split}, (part + 1) * {w.runs} // {split}",
            f"total = tl.zeros(({s.block_n}, {s.block_m}), dtype=tl.float32)",
            f"units = codes + row[:, None] * {w.units * w.runs} + rk[None, :]",
            "xs = x + rm[None, :] * x_stride + rk[:, None]",
        )
        if s.overlap and not self.plain:
            self._before_x(out)
        if self.scales.has_offset and s.scale in ("end", "sum"):
            out.add(f"ones = tl.full(({s.block_n}, {w.length}), 1.0, dtype={self._operand})")
            if s.scale == "end":
                out.add(f"plain_sum = tl.zeros(({s.block_n}, {s.block_m}), dtype=tl.float32)")
        if s.scale == "float" and self.scale is not None and not self.scales.groups:
            out.add(*self.scales.load("s_0", "z_0", "0"))
        out.add(*self.scales.carried("first"))
        if s.overlap and not self.plain:
            out.add("gdc_wait()")

    def _before_x(self, out: Lines) -> None:
        """Lets the successor start, and sends for the first codes while the predecessor still computes x."""
        w = self.walk
        size = min(self.schedule.overlap, max(w.runs // self.schedule.split, 1)) * w.units * 2
        asm = f"cp.async.bulk.prefetch.L2.global [$1], {size}; mov.u32 $0, 0;"
        out.add(
            "gdc_launch_dependents()",
            f"start = codes + row * {w.units * w.runs} + first * {w.units}",
            f'tl.inline_asm_elementwise("{asm}", "=r,l", [start], dtype=tl.int32, is_pure=False, pack=1)',
        )

    def _loop(self, out: Lines) -> None:
        s, w = self.schedule, self.walk
        with out.indent(f"for run in tl.range(first, last, num_stages={s.stages}):"):
            if self.scales.groups:
                out.add("ahead = tl.minimum(run + 1, last - 1)")
                out.add(*self.scales.carried("ahead", "next_"))
            widened = ".to(tl.uint16, bitcast=True).to(tl.int32)" if self.decodes_plainly else ""
            for i, start in enumerate(w.loads):
                offset = f" + {start}" if start else ""
                hint = ", eviction_policy='evict_first'" if s.block_m <= 64 else ""
                out.add(f"u{i} = tl.load(units + (run * {w.units}{offset}){hint}){widened}")
            for i in range(len(w.slices)):
                out.add(
                    f"x{i} = tl.load(xs + (run * {w.codes} + {i * w.length}), {self._x_mask(i)}, other=0.0)"
                )
            if not self.decodes_plainly:
                for name, (takes, loads) in self._calls().items():
                    self._call(out, name, takes, loads)
            for i in range(len(w.slices)):
                self._slice(out, i)
            for name in self.scales.names():
                out.add(f"{name} = next_{name}")

    @property
    def _operand(self) -> str:
        """Type of the dot's operands: the interpreter has no bf16 products, and in float32 they are exact."""
        return "tl.float32" if self.plain else TL[self.spec.x]

    def _dot(self, a: str, x: str, onto: str = "") -> str:
        if self.plain:
            a, onto = f"{a}.to(tl.float32)", f"{onto}, input_precision='ieee'" if onto else ""
            return (
                f"tl.dot({a}, {x}.to(tl.float32), {onto.lstrip(', ') or 'input_precision=' + repr('ieee')})"
            )
        return f"tl.dot({a}, {x}{onto})"

    def _x_mask(self, i: int) -> str:
        w = self.walk
        if w.runs * w.codes == self.spec.k:
            return "mask=here[None, :]"
        return f"mask=here[None, :] & (run * {w.codes} + {i * w.length} + rk[:, None] < {self.spec.k})"

    def _call(self, out: Lines, name: str, takes: list[list[Take]], loads: list[int]) -> None:
        first = int(name.removeprefix("DECODE"))
        results = [f"a{first + j}" for j in range(len(takes))]
        dtype = TL[self.spec.x]
        dtypes = dtype if len(takes) == 1 else f"({', '.join([dtype] * len(takes))})"
        constraint = ",".join(["=r"] * len(takes) + ["r"] * len(loads))
        operands = ", ".join(f"u{load}" for load in loads)
        out.add(
            f'{", ".join(results)} = tl.inline_asm_elementwise({name}, "{constraint}", [{operands}], '
            f"dtype={dtypes}, is_pure=True, pack=2)"
        )

    def _slice(self, out: Lines, i: int) -> None:
        """Adds slice i of the run to the sums."""
        mode, lane = self.schedule.scale, TL[self.spec.x]
        group = self.scales.group(i)
        if self.decodes_plainly:
            loads = [f"u{j}" for j in range(len(self.walk.loads))]
            out.add(code_line(self.walk.slices[i], loads, f"c{i}"))
            out.add(*value_lines(self.spec.weight.element, f"c{i}", f"v{i}"))
            if mode == "float":
                out.add(f"v{i} = {self.scales.affine(f'v{i}', group)}")
            out.add(f"a{i} = v{i}.to({lane})")
        if mode == "lane":
            if self.decodes_plainly:
                out.add(f"a{i} = (a{i}.to(tl.float32) * s_{group}.to(tl.float32)[:, None]).to({lane})")
            else:
                out.add(
                    f"s{i} = tl.broadcast_to(s_{group}[:, None], a{i}.shape)",
                    f'a{i} = tl.inline_asm_elementwise(TIMES, "=r,r,r", [a{i}, s{i}], dtype={lane}, '
                    "is_pure=True, pack=2)",
                )
        if mode != "sum":
            out.add(f"total = {self._dot(f'a{i}', f'x{i}', ', total')}")
            if mode == "end" and self.scales.has_offset:
                out.add(f"plain_sum = {self._dot('ones', f'x{i}', ', plain_sum')}")
            return
        opens = i == 0 or self.scales.group(i - 1) != group
        closes = i + 1 == len(self.walk.slices) or self.scales.group(i + 1) != group
        out.add(f"p = {self._dot(f'a{i}', f'x{i}', '' if opens else ', p')}")
        if self.scales.has_offset:
            out.add(f"o = {self._dot('ones', f'x{i}', '' if opens else ', o')}")
        if closes:
            out.add(f"total += p * s_{group}[:, None]")
            if self.scales.has_offset:
                out.add(f"total += o * z_{group}[:, None]")

    # --- the end -----------------------------------------------------------------------------------------

    def _tail(self, out: Lines) -> None:
        s = self.schedule
        inside = " & inside[:, None]" if self.spec.n % s.block_n else ""
        out.add(f"kept = here[None, :]{inside}")
        if self.scales.has_offset and s.scale == "end":
            out.add(*self.scales.load("s", "z", "0"))
            out.add("total = total * s[:, None] + plain_sum * z[:, None]")
        if s.split > 1:
            self._in_order(out)
            return
        self._store(out)

    def _in_order(self, out: Lines) -> None:
        """Whoever comes last adds the parts up, in the order of k: the same sum in every run."""
        s, n = self.schedule, self.spec.n
        out.add(
            f"mine = partial + (rm[None, :] * {n} + rn[:, None])",
            f"tl.store(mine + part * (m * {n}), total, mask=kept)",
            "tl.debug_barrier()",
            f"lock = locks + (block * {-(-n // s.block_n)} + tile)",
            "came = tl.atomic_add(lock, 1, sem='acq_rel')",
        )
        with out.indent(f"if came == {s.split - 1}:"):
            out.add("tl.debug_barrier()", f"total = tl.zeros(({s.block_n}, {s.block_m}), dtype=tl.float32)")
            with out.indent(f"for i in tl.static_range({s.split}):"):
                out.add(f"total += tl.load(mine + i * (m * {n}), mask=kept, other=0.0, cache_modifier='.cg')")
            self._store(out)
            out.add("tl.store(lock, 0)")

    def _store(self, out: Lines) -> None:
        if self.scale is not None and self.schedule.scale == "end" and not self.scales.has_offset:
            out.add(*self.scales.load("s", "z", "0"))
            out.add("total = total * s[:, None]")
        if self.scale is not None and self.scale.two_level and self.schedule.scale != "float":
            out.add("total = total * tl.load(level)")
        if self.spec.bias:
            out.add("total += tl.load(bias + row)[:, None].to(tl.float32)")
        out.add(
            f"tl.store(y + (rm[None, :] * {self.spec.n} + rn[:, None]), "
            f"total.to({TL[self.spec.x]}), mask=kept)"
        )


def source(spec: GemmSpec, schedule: Schedule, *, plain: bool = False) -> str:
    """The kernel's module as text. CodegenError if the schedule cannot run the spec."""
    return Kernel(spec, schedule, plain).source()


def arguments_needed(spec: GemmSpec, *, plain: bool) -> Sequence[str]:
    """Which optional tensors the kernel reads."""
    scale = spec.weight.scale
    wanted = []
    if scale is not None:
        wanted.append("scales")
        wanted += ["zeros"] if scale.zero != "none" else []
        wanted += ["level"] if scale.two_level else []
    if needs_table(spec.weight.element):
        wanted.append("table")
    return wanted + (["bias"] if spec.bias else [])
