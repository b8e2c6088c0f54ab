"""Lines of Triton that fetch scales and zero points, and where they multiply.

In: a spec, a schedule, the walk over a row. Out: source lines; `s` names what multiplies an element's value,
`z` what is added to the product.

    uint4[g128,zero], slices of 128   ->   s_0 = tl.load(scales + row * SN + (run * 4) * SG).to(tl.float32)
                                           z_0 = -tl.load(zeros + ...).to(tl.float32) * s_0
"""

from __future__ import annotations

from dataclasses import dataclass

from ...formats import Float, Integer, Scale
from ...formats.rules import middle
from ..schedule import Schedule
from ..slices import Walk
from ..spec import GemmSpec
from .values import value_lines

# Scales of 8 bits are bytes to Triton, which has the one type nowhere and the other on few GPUs.
BYTES = ("e8m0", "e4m3")


@dataclass(frozen=True)
class Scales:
    """Scales of one kernel; `scale` None means that there are none."""

    spec: GemmSpec
    schedule: Schedule
    walk: Walk
    lane: str

    @property
    def scale(self) -> Scale | None:
        return self.spec.weight.scale

    def function(self) -> list[str]:
        """A function that decodes stored bytes, where scales are such."""
        if self.scale is None or self.scale.dtype not in BYTES:
            return []
        lines = ["code = byte.to(tl.int32)"]
        if self.scale.dtype == "e8m0":
            # 2**(byte - 127): the byte is the exponent, but for 2**-127, a subnormal, and 255, NaN.
            lines.append("bits = tl.where(code == 0, 0x00400000, code << 23)")
            lines.append("value = tl.where(code == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)")
        else:
            lines += value_lines(Float(4, 3, "fn"), "code", "value")
        lines.append("return value")
        return ["", "@triton.jit", f"def {self.scale.dtype}(byte):", *("    " + line for line in lines), ""]

    @property
    def has_offset(self) -> bool:
        return self.scale is not None and self.scale.zero != "none"

    @property
    def groups(self) -> list[int]:
        """Groups of a run that have scales of their own; empty if one scale serves a whole row."""
        if self.scale is None or self.scale.granularity.cols is None:
            return []
        return sorted({self.group(i) for i in range(len(self.walk.slices))})

    def group(self, i: int) -> int:
        """Which group of its run slice i is in; its own where runs and groups do not divide each other."""
        cols = self.scale.granularity.cols if self.scale is not None else None
        if cols is None:
            return 0
        aligned = self.walk.codes % cols == 0 or cols % self.walk.codes == 0
        return i * self.walk.length // cols if aligned else i

    def column(self, run: str, group: int) -> str:
        """The column of the scales, for a run."""
        assert self.scale is not None
        cols = self.scale.granularity.cols
        assert cols is not None
        codes = self.walk.codes
        if cols % codes == 0:
            column = run if cols == codes else f"({run} // {cols // codes})"
        elif codes % cols == 0:
            column = f"({run} * {codes // cols} + {group})"
        else:
            column = f"(({run} * {codes} + {group * self.walk.length}) // {cols})"
        last = -(-self.spec.k // cols) - 1
        return column if self.walk.runs * codes == self.spec.k else f"tl.minimum({column}, {last})"

    def names(self) -> list[str]:
        """Registers carried from run to run: scales and offsets of the next groups."""
        offset = self.has_offset
        return [f"{kind}_{g}" for g in self.groups for kind in ("s", "z")[: 2 if offset else 1]]

    def carried(self, run: str, prefix: str = "") -> list[str]:
        """Loads of all scales of a run. Only loads that feed a dot are pipelined by the compiler, so these
        are fetched a run ahead by hand."""
        lines = []
        for g in self.groups:
            lines += self.load(f"{prefix}s_{g}", f"{prefix}z_{g}", self.column(run, g))
        return lines

    def load(self, s: str, z: str, column: str) -> list[str]:
        """s: what multiplies the element's value; z: what is added to the product (the stored zero point, in
        the mode `float`)."""
        assert self.scale is not None
        rows = self.scale.granularity.rows
        row = "row * 0" if rows is None else ("row" if rows == 1 else f"(row // {rows})")
        place = f"{row} * SN + {column} * SG"
        load = f"tl.load(scales + {place})"
        decoded = f"{self.scale.dtype}({load})" if self.scale.dtype in BYTES else f"{load}.to(tl.float32)"
        if self.schedule.scale == "lane":
            decoded += f".to({self.lane})"
        elif self.schedule.scale == "float" and self.scale.two_level:
            decoded += " * tl.load(level)"
        lines = [f"{s} = {decoded}"]
        if self.has_offset:
            lines.append(f"{z} = {self._offset(f'tl.load(zeros + {place}).to(tl.float32)', s)}")
        return lines

    def _offset(self, zero: str, s: str) -> str:
        assert self.scale is not None
        if self.schedule.scale == "float":
            return zero
        if self.scale.zero == "int":
            return f"-{zero} * {s}"
        return f"{zero} - {self._middle} * {s}" if self.scale.zero == "float" else zero

    @property
    def _middle(self) -> float:
        assert isinstance(self.spec.weight.element, Integer)
        return float(middle(self.spec.weight.element))

    def affine(self, value: str, group: int) -> str:
        """The reference's arithmetic on decoded float32 values (`formats/affine.py`)."""
        if self.scale is None:
            return value
        s, z = f"s_{group}[:, None]", f"z_{group}[:, None]"
        by_zero = {
            "none": f"{value} * {s}",
            "int": f"({value} - {z}) * {s}",
            "min": f"{value} * {s} + {z}",
        }
        return by_zero.get(self.scale.zero) or f"({value} - {self._middle}) * {s} + {z}"
