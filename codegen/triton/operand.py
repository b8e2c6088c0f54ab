"""One weight of a kernel: its loads, its decoding, its sums.

In: a spec, a schedule, which of the weights. Out: source lines of the loop over runs of codes.

    u0 = tl.load(codes + ...)                      [64, 64] 16-bit units
    a0 = <and, flip the sign, subtract>(u0)        the first 64 codes of the run, bf16
    p = tl.dot(a0, x0);  total += p * s_0[:, None]

The weight is the dot's first operand: on Hopper that one comes from registers, so decoded values never pass
through shared memory. Sums are [block_n, block_m], the transpose of what is stored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch

from ...formats import Float, Integer, Scale
from ...formats.scale import LARGEST
from ..byte_lanes import byte_decoder
from ..decode import decoder, raised
from ..schedule import Schedule
from ..slices import Take, Walk, renumbered
from ..spec import GemmSpec
from .arguments import SUFFIXES, reads_bytes, sums_are_integers
from .lines import TL, Lines
from .scales import Scales, TokenScales, group
from .values import code_line, value_lines

_MULTIPLY = "fma.rn.{0}x2 $0, $1, $2, z;"


@dataclass(frozen=True)
class Operand:
    """Weight number `which`. `plain`: decoded in Triton's own words (see `values.py`), not in assembly."""

    spec: GemmSpec
    schedule: Schedule
    plain: bool
    which: int = 0

    @cached_property
    def walk(self) -> Walk:
        return self.schedule.walk(self.spec)

    @property
    def suffix(self) -> str:
        return SUFFIXES[self.which]

    @property
    def scale(self) -> Scale | None:
        return self.spec.weight.scale

    @property
    def in_bytes(self) -> bool:
        """Whether the tensor cores multiply 8-bit lanes."""
        return self.spec.activation is not None

    @cached_property
    def scales(self) -> Scales:
        lane = TL[self.spec.x]
        if not self.in_bytes:
            return Scales(self.spec, self.schedule, self.walk, lane, self.suffix, lift=self.lift / self.left)
        made = byte_decoder(self.spec.weight.element, renumbered(self.walk.slices[:1])[0][0], self.spec.lane)
        assert made is not None
        factor = 1.0 if self.plain and self.spec.lane == "e4m3" else made.factor
        return Scales(self.spec, self.schedule, self.walk, lane, self.suffix, factor, made.middle)

    @cached_property
    def lift(self) -> float:
        """What scales in the lanes are multiplied by so that their product does the decoder's last one too: 1
        where it does not. A scale in E4M3 has few enough bits and powers of two."""
        element = self.spec.weight.element
        merges = self.schedule.scale == "lane" and not self.in_bytes and not self.decodes_plainly
        if not merges or not isinstance(element, Float) or self.scale is None or self.scale.dtype != "e4m3":
            return 1.0
        return raised(element, self.spec.x)

    @cached_property
    def left(self) -> float:
        """The power of two of it that is left to the finished sum, since no scale may become infinite."""
        most = math.log2(torch.finfo(self.spec.dtype).max) - math.log2(LARGEST["e4m3"])
        return 2.0 ** max(0, math.ceil(math.log2(self.lift) - most))

    @cached_property
    def tokens(self) -> TokenScales:
        return TokenScales(self.spec, self.walk)

    @property
    def decodes_plainly(self) -> bool:
        """Whether values come from `values.py`: asked for, or no program of registers exists."""
        if self.plain or self.schedule.scale == "float":
            return True
        return (
            not self.in_bytes
            and decoder(self.spec.weight.element, [self.walk.slices[0]], self.spec.x) is None
        )

    # --- before the loop ---------------------------------------------------------------------------------

    def assembly(self) -> list[str]:
        """The blocks that decode slices, which all weights share."""
        if self.decodes_plainly:
            return []
        lines = []
        for name, (takes, _) in self._calls().items():
            if self.in_bytes:
                by_byte = byte_decoder(self.spec.weight.element, takes[0], self.spec.lane)
                asm = None if by_byte is None else by_byte.asm
            else:
                by_half = decoder(self.spec.weight.element, takes, self.spec.x, small=self.lift > 1)
                asm = None if by_half is None else by_half.asm
            lines += [] if asm is None else [f'{name} = tl.constexpr("""{asm}""")']
        if self.schedule.scale == "lane":
            body = _MULTIPLY.format(self.spec.x)
            lines.append(f'TIMES = tl.constexpr("""{{ .reg .b32 z; mov.b32 z, 0x80008000; {body} }}""")')
        return lines

    def _calls(self) -> dict[str, tuple[list[list[Take]], list[int]]]:
        """Assembly blocks: name -> (slices with their loads renumbered, the loads they read)."""
        element = self.spec.weight.element
        by_fours = (
            not self.in_bytes
            and not isinstance(element, Integer)
            and hasattr(element, "table")
            and element.bits == 4
        )
        groups = [list(self.walk.slices)] if by_fours else [[takes] for takes in self.walk.slices]
        return {f"DECODE{i}": renumbered(slices) for i, slices in enumerate(groups)}

    def head(self, out: Lines) -> None:
        """Pointers, sums, and what has to be there before the first run."""
        s, t = self.schedule, self.suffix
        zeros = f"tl.zeros(({s.block_n}, {s.block_m}), dtype={self._summed})"
        out.add(f"total{t} = {zeros}")
        expert = f" + expert.to(tl.int64) * {self.spec.n * self.walk.stride}" if self.spec.experts else ""
        out.add(f"units{t} = codes{t}{expert} + row[:, None] * {self.walk.stride} + rk[None, :]")
        if self.spec.has_offset and s.scale in ("end", "sum"):
            if self.which == 0:
                out.add(f"ones = tl.full(({s.block_n}, {self.walk.length}), 1, dtype={self._ones})")
            if self.whole_rows:
                out.add(f"plain_sum{t} = {zeros}")
        if s.scale == "float" and self.scale is not None and not self.scales.groups:
            out.add(*self.scales.load(f"s_0{t}", f"z_0{t}", "0"))
        out.add(*self.scales.carried("first"))

    @property
    def whole_rows(self) -> bool:
        """Whether the weight's scale is one for a row, or for all, and multiplies at the end."""
        return not self.scales.groups

    @property
    def _summed(self) -> str:
        return "tl.int32" if self.spec.lane == "int8" and self.schedule.scale == "end" else "tl.float32"

    @property
    def _ones(self) -> str:
        if self.plain and self.spec.lane != "int8":
            return "tl.float32"
        return TL[self.spec.lane]

    # --- in the loop -------------------------------------------------------------------------------------

    def loads(self, out: Lines) -> None:
        """The units of one run."""
        w, t = self.walk, self.suffix
        widened = ""
        if self.decodes_plainly:
            widened = f".to({'tl.uint8' if self.in_bytes else 'tl.uint16'}, bitcast=True).to(tl.int32)"
        # Codes that are multiplied as they lie come as float8, which no integer is cast to.
        as_float8 = self.spec.lane == "e4m3" and reads_bytes(self.spec) and not self.plain
        zero = "0.0" if as_float8 else "0"
        for i, start in enumerate(w.loads):
            offset = f" + {start}" if start else ""
            hint = ", eviction_policy='evict_first'" if self.schedule.block_m <= 64 else ""
            inside = ""
            if w.stride < w.runs * w.units:  # the last run of a row is cut short
                inside = f", mask=(run * {w.units}{offset} + rk[None, :]) < {w.stride}, other={zero}"
            out.add(f"u{i}{t} = tl.load(units{t} + (run * {w.units}{offset}){inside}{hint}){widened}")

    def decode(self, out: Lines) -> None:
        """The assembly's calls, where there is assembly."""
        if self.decodes_plainly:
            return
        for name, (takes, loads) in self._calls().items():
            if not self.in_bytes:
                self._call(out, name, takes, loads)
                continue
            made = byte_decoder(self.spec.weight.element, takes[0], self.spec.lane)
            assert made is not None
            i = name.removeprefix("DECODE")
            if made.asm is None:
                out.add(f"a{i}{self.suffix} = u{loads[0]}{self.suffix}")
                continue
            operands = ", ".join(f"u{load}{self.suffix}" for load in loads)
            cast = "" if self.spec.lane == "int8" else f".to({TL[self.spec.lane]}, bitcast=True)"
            out.add(
                f'a{i}{self.suffix} = tl.inline_asm_elementwise({name}, "{_constraint(1, len(loads))}", '
                f"[{operands}], dtype=tl.int8, is_pure=True, pack=4){cast}"
            )

    def _call(self, out: Lines, name: str, takes: list[list[Take]], loads: list[int]) -> None:
        first = int(name.removeprefix("DECODE"))
        results = [f"a{first + j}{self.suffix}" for j in range(len(takes))]
        dtype = TL[self.spec.x]
        dtypes = dtype if len(takes) == 1 else f"({', '.join([dtype] * len(takes))})"
        operands = ", ".join(f"u{load}{self.suffix}" for load in loads)
        registers = _constraint(len(takes), len(loads))
        out.add(
            f'{", ".join(results)} = tl.inline_asm_elementwise({name}, "{registers}", '
            f"[{operands}], dtype={dtypes}, is_pure=True, pack=2)"
        )

    def slice(self, out: Lines, i: int) -> None:
        """Adds slice i of the run to the sums."""
        t = self.suffix
        if self.decodes_plainly:
            self._plain(out, i)
        if self.schedule.scale == "lane":
            self._in_lane(out, i)
        if self.schedule.scale != "sum":
            out.add(f"total{t} = {self._dot(f'a{i}{t}', f'x{i}', f'total{t}')}")
            if self.schedule.scale == "end" and self.spec.has_offset:
                out.add(f"plain_sum{t} = {self._dot('ones', f'x{i}', f'plain_sum{t}')}")
            return
        opens = i == 0 or self._groups(i - 1) != self._groups(i)
        closes = i + 1 == len(self.walk.slices) or self._groups(i + 1) != self._groups(i)
        out.add(f"p{t} = {self._dot(f'a{i}{t}', f'x{i}', '' if opens else f'p{t}')}")
        if self.spec.has_offset:
            out.add(f"o{t} = {self._dot('ones', f'x{i}', '' if opens else f'o{t}')}")
        if closes:
            self._close(out, *self._groups(i))

    def _groups(self, i: int) -> tuple[int, int]:
        """The groups of the weight's scales and of x's that slice i is in."""
        return self.scales.group(i), group(self.walk, self.tokens.cols, i)

    def _close(self, out: Lines, of: int, block: int) -> None:
        """The sum over a group, scaled, goes to the sum over the row."""
        t = self.suffix
        of_tokens = f" * t_{block}[None, :]" if self.tokens.groups else ""
        whole = ".to(tl.float32)" if self.spec.lane == "int8" else ""
        of_rows = "" if self.whole_rows else f" * s_{of}{t}[:, None]"
        out.add(f"total{t} += p{t}{whole}{of_rows}{of_tokens}")
        if self.spec.has_offset:
            target, added = ("plain_sum", "") if self.whole_rows else ("total", f" * z_{of}{t}[:, None]")
            out.add(f"{target}{t} += o{t}{whole}{added}{of_tokens}")

    def _plain(self, out: Lines, i: int) -> None:
        t, mode = self.suffix, self.schedule.scale
        loads = [f"u{j}{t}" for j in range(len(self.walk.loads))]
        out.add(code_line(self.walk.slices[i], loads, f"c{i}"))
        element = self.spec.weight.element
        if self.spec.lane == "int8":
            assert isinstance(element, Integer)
            flip = 0 if element.signed else 0x80
            placed = f"((c{i} << {8 - element.bits}) ^ {flip})"
            out.add(f"a{i}{t} = {placed}.to(tl.uint8).to(tl.int8, bitcast=True)")
            return
        out.add(*value_lines(element, f"c{i}", f"v{i}"))
        if mode == "float":
            out.add(f"v{i} = {self.scales.affine(f'v{i}', self.scales.group(i))}")
        out.add(f"a{i}{t} = v{i}" + ("" if self.in_bytes else f".to({TL[self.spec.x]})"))

    def _in_lane(self, out: Lines, i: int) -> None:
        t, lane = self.suffix, TL[self.spec.x]
        s = f"s_{self.scales.group(i)}{t}"
        if self.decodes_plainly:
            out.add(f"a{i}{t} = (a{i}{t}.to(tl.float32) * {s}.to(tl.float32)[:, None]).to({lane})")
            return
        out.add(
            f"s{i}{t} = tl.broadcast_to({s}[:, None], a{i}{t}.shape)",
            f'a{i}{t} = tl.inline_asm_elementwise(TIMES, "=r,r,r", [a{i}{t}, s{i}{t}], dtype={lane}, '
            "is_pure=True, pack=2)",
        )

    def _dot(self, a: str, x: str, onto: str) -> str:
        """The interpreter has no products of 16-bit floats and of e4m3: in float32 they are exact."""
        onto = f", {onto}" if onto else ""
        if self.spec.lane == "int8":
            return f"tl.dot({a}, {x}{onto}, out_dtype=tl.int32)"
        if self.plain:
            return f"tl.dot({a}.to(tl.float32), {x}.to(tl.float32){onto}, input_precision='ieee')"
        return f"tl.dot({a}, {x}{onto})"

    # --- after the loop ----------------------------------------------------------------------------------

    def before_sharing(self, out: Lines) -> None:
        """Scaling that comes before the parts of a split are added up: none, if they are to stay integers."""
        t = self.suffix
        if self.whole_rows and self.spec.has_offset and self.schedule.scale in ("end", "sum"):
            whole = ".to(tl.float32)" if self._summed == "tl.int32" else ""
            out.add(*self.scales.load("s", "z", "0"))
            out.add(f"total{t} = total{t}{whole} * s[:, None] + plain_sum{t}{whole} * z[:, None]")
        elif self._summed == "tl.int32" and not sums_are_integers(self.spec, self.schedule):
            out.add(f"total{t} = total{t}.to(tl.float32)")

    def after_sharing(self, out: Lines, sums: str) -> None:
        """The rest of the scaling, of what is called `sums`."""
        t = self.suffix
        y = sums + t
        if sums_are_integers(self.spec, self.schedule):
            out.add(f"{y} = {y}.to(tl.float32)")
        late = self.whole_rows and not self.spec.has_offset and self.schedule.scale in ("end", "sum")
        if late and (self.scale is not None or self.scales.factor != 1.0):
            out.add(*self.scales.load("s", "z", "0"))
            out.add(f"{y} = {y} * s[:, None]")
        if self.scale is not None and self.scale.two_level and self.schedule.scale != "float":
            out.add(f"{y} = {y} * tl.load(level{t})")
        if self.left > 1:
            out.add(f"{y} = {y} * {self.left!r}")
        if self.tokens.load():
            out.add(f"{y} = {y} * t[None, :]")
        if self.spec.bias:
            out.add(f"{y} += tl.load(bias{t} + row)[:, None].to(tl.float32)")


def _constraint(results: int, inputs: int) -> str:
    return ",".join(["=r"] * results + ["r"] * inputs)
