"""K or V as the decode kernel of attention reads it: its walk, and the lines that decode what was loaded.

In: a format, the walk over a token, the type of the product's operands. Out: lines of Triton source.

    int4[halves128], units in vw0_0  ->  va0 = tl.inline_asm_elementwise(V0, "=r,r", [vw0_0], ..)
                                         va1 = ..  va2 = ..  va3 = ..         a slice of 32 numbers each
"""

from __future__ import annotations

from dataclasses import dataclass

from ...formats import Format
from ..attention import grouped
from ..decode import decoder, decodes_together, finite
from ..slices import Take, Walk, renumbered
from .lines import TL
from .values import code_line, value_lines


@dataclass(frozen=True)
class Side:
    """K or V as the kernel reads it."""

    name: str
    format: Format
    walk: Walk
    lane: str
    plain: bool

    @property
    def decodes_plainly(self) -> bool:
        return self.plain or decoder(self.format.element, [self.walk.slices[0]], self.lane) is None

    @property
    def slices(self) -> list[tuple[int, int]]:
        """(run, slice within the run) in the order of the codes."""
        return [(run, i) for run in range(self.walk.runs) for i in range(len(self.walk.slices))]

    def start(self, index: int) -> int:
        """The first number of a slice."""
        return index * self.walk.length

    def calls(self) -> dict[str, tuple[list[list[Take]], list[int], list[int]]]:
        """Assembly blocks of a run: name -> (slices with loads renumbered, loads, slices by number)."""
        together = decodes_together(self.format.element)
        count = len(self.walk.slices)
        found = {}
        for i, numbers in enumerate([list(range(count))] if together else [[j] for j in range(count)]):
            slices, loads = renumbered([self.walk.slices[j] for j in numbers])
            found[f"{self.name.upper()}{i}"] = slices, loads, numbers
        return found

    def constants(self) -> list[str]:
        if self.decodes_plainly:
            return []
        lines = []
        for name, (slices, _, _) in self.calls().items():
            made = decoder(self.format.element, slices, self.lane)
            assert made is not None
            lines.append(f'{name} = tl.constexpr("""{made.asm}""")')
        return lines

    def decoded(self, run: int, units: list[str]) -> list[str]:
        """Assigns {name}a{index} for every slice of a run whose loads are `units`."""
        n, dtype, count = self.name, TL[self.lane], len(self.walk.slices)
        lines = []
        if self.decodes_plainly:
            lines += [f"{u} = {u}.to(tl.uint16, bitcast=True).to(tl.int32)" for u in units]
            for i, takes in enumerate(self.walk.slices):
                at = run * count + i
                lines.append(code_line(takes, units, f"{n}c"))
                code = value_lines(self.format.element, f"{n}c", f"{n}v")
                lines += [line.replace("tl.load(table", f"tl.load({n}_table") for line in code]
                lines.append(f"{n}a{at} = {n}v.to({dtype})")
            return lines
        for name, (_, loads, numbers) in self.calls().items():
            results = [f"{n}a{run * count + i}" for i in numbers]
            kinds = dtype if len(results) == 1 else f"({', '.join([dtype] * len(results))})"
            lines.append(
                f"{', '.join(results)} = tl.inline_asm_elementwise({name}, "
                f'"{",".join(["=r"] * len(results) + ["r"] * len(loads))}", '
                f"[{', '.join(units[load] for load in loads)}], dtype={kinds}, is_pure=True, pack=2)"
            )
            if not grouped(self.format) and not finite(self.format.element):
                # Codes that are no number come from a number that was none; the program takes them for large.
                high = self.format.element.high
                lines += [f"{r} = tl.where(tl.abs({r}) > {high!r}, float('nan'), {r})" for r in results]
        return lines
