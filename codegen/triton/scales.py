"""Lines of Triton that fetch scales and zero points, and where they multiply.

In: a spec, a schedule, the walk over a row. Out: source lines; `s` names what multiplies an element's value,
`z` what is added to the product.

    uint4[g128,zero], slices of 128   ->   s_0 = tl.load(scales + row * SN + (run * 4) * SG).to(tl.float32)
                                           z_0 = -tl.load(zeros + ...).to(tl.float32) * s_0
"""

from __future__ import annotations

from dataclasses import dataclass

from ...formats import Integer, Scale
from ...formats.rules import middle
from ..schedule import Schedule
from ..slices import Walk
from ..spec import GemmSpec

# Scales of 8 bits are bytes to Triton, which has the one type nowhere and the other on few GPUs.
BYTES = ("e8m0", "e4m3")


def functions(spec: GemmSpec) -> list[str]:
    """Functions that decode stored bytes, where scales are such."""
    held = [f.scale.dtype for f in (spec.weight, spec.activation) if f is not None and f.scale is not None]
    return [line for dtype in dict.fromkeys(held) if dtype in BYTES for line in _function(dtype)]


def _function(dtype: str) -> list[str]:
    lines = ["code = byte.to(tl.int32)"]
    if dtype == "e8m0":
        # 2**(byte - 127): the byte is the exponent, but for 2**-127, a subnormal, and 255, NaN.
        lines.append("bits = tl.maximum(code << 23, 0x00400000)")
        lines.append("value = tl.where(code == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)")
    else:
        # Exponent and mantissa where float32 has them are the value times 2**-120, subnormals too.
        lines.append("bits = (code & 0x7F) << 20 | (code & 0x80) << 24")
        lines.append("value = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36")
        lines.append("value = tl.where((code & 0x7F) == 0x7F, float('nan'), value)")
    lines.append("return value")
    return ["", "@triton.jit", f"def {dtype}(byte):", *("    " + line for line in lines), ""]


def group(walk: Walk, cols: int | None, i: int) -> int:
    """Which group of `cols` codes of its run slice i is in; its own where runs and groups do not divide each
    other."""
    if cols is None:
        return 0
    aligned = walk.codes % cols == 0 or cols % walk.codes == 0
    return i * walk.length // cols if aligned else i


def groups(walk: Walk, cols: int | None) -> list[int]:
    """Groups of a run; none if there is one for a whole row."""
    return [] if cols is None else sorted({group(walk, cols, i) for i in range(len(walk.slices))})


def column(walk: Walk, k: int, cols: int | None, run: str, of: int) -> str:
    """The column of the scales [.., k / cols] that group `of` of a run reads."""
    assert cols is not None
    if cols % walk.codes == 0:
        found = run if cols == walk.codes else f"({run} // {cols // walk.codes})"
    elif walk.codes % cols == 0:
        found = f"({run} * {walk.codes // cols} + {of})"
    else:
        found = f"(({run} * {walk.codes} + {of * walk.length}) // {cols})"
    return found if walk.runs * walk.codes == k else f"tl.minimum({found}, {-(-k // cols) - 1})"


@dataclass(frozen=True)
class Scales:
    """Scales of one weight; `scale` None means that there are none. suffix: what its arguments' names end in;
    factor, middle: a lane's number times `factor`, plus `middle`, is the element's value (`byte_lanes.py`);
    lift: what scales in the lanes are multiplied by (`Operand.lift`).
    """

    spec: GemmSpec
    schedule: Schedule
    walk: Walk
    lane: str
    suffix: str = ""
    factor: float = 1.0
    middle: float = 0.0
    lift: float = 1.0

    @property
    def scale(self) -> Scale | None:
        return self.spec.weight.scale

    @property
    def cols(self) -> int | None:
        return self.spec.weight.cols

    @property
    def groups(self) -> list[int]:
        """Groups of a run that have scales of their own; empty if one scale serves a whole row."""
        return groups(self.walk, self.cols)

    def group(self, i: int) -> int:
        """Which group of its run slice i is in."""
        return group(self.walk, self.cols, i)

    def names(self) -> list[str]:
        """Registers carried from run to run: scales and offsets of the next groups."""
        kinds = ("s", "z") if self.spec.has_offset else ("s",)
        return [f"{kind}_{g}{self.suffix}" for g in self.groups for kind in kinds]

    def carried(self, run: str, prefix: str = "") -> list[str]:
        """Loads of all scales of a run. Only loads that feed a dot are pipelined by the compiler, so these
        are fetched a run ahead by hand."""
        lines = []
        for g in self.groups:
            s, z = (f"{prefix}{kind}_{g}{self.suffix}" for kind in "sz")
            lines += self.load(s, z, column(self.walk, self.spec.k, self.cols, run, g))
        return lines

    def load(self, s: str, z: str, column: str) -> list[str]:
        """s: what multiplies a lane's number; z: what is added to the product (the stored zero point, in the
        mode `float`)."""
        if self.scale is None:
            value = f"{s} = tl.full(({self.schedule.block_n},), {self.factor!r}, dtype=tl.float32)"
            return [value, f"{z} = {s} * {self.middle / self.factor!r}"][: 1 + self.spec.has_offset]
        rows = self.scale.granularity.rows
        row = "row * 0" if rows is None else ("row" if rows == 1 else f"(row // {rows})")
        place = f"{row} * SN + {column} * SG" + (" + expert * SE" if self.spec.experts else "")
        load = f"tl.load(scales{self.suffix} + {place})"
        decoded = f"{self.scale.dtype}({load})" if self.scale.dtype in BYTES else f"{load}.to(tl.float32)"
        if self.schedule.scale == "lane":
            decoded = f"({decoded} * {self.lift!r})" if self.lift != 1.0 else decoded
            decoded += f".to({self.lane})"
        elif self.schedule.scale == "float" and self.scale.two_level:
            decoded += f" * tl.load(level{self.suffix})"
        lines = [f"{s} = {decoded}"]
        if self.spec.has_offset:
            lines.append(f"{z} = {self._offset(f'tl.load(zeros{self.suffix} + {place}).to(tl.float32)', s)}")
        return lines + ([f"{s} = {s} * {self.factor!r}"] if self.factor != 1.0 else [])

    def _offset(self, zero: str, s: str) -> str:
        assert self.scale is not None
        if self.schedule.scale == "float":
            return zero
        terms = {
            "none": f"{self.middle!r} * {s}",
            "int": f"({self.middle!r} - {zero}) * {s}" if self.middle else f"-{zero} * {s}",
            "float": f"{zero} - {self._middle - self.middle!r} * {s}",
            "min": f"{zero} + {self.middle!r} * {s}" if self.middle else zero,
        }
        return terms[self.scale.zero]

    @property
    def _middle(self) -> float:
        element = self.spec.weight.element
        return float(middle(element)) if isinstance(element, Integer) else 0.0

    def affine(self, value: str, group: int) -> str:
        """The reference's arithmetic on decoded float32 values (`formats/affine.py`)."""
        if self.scale is None:
            return value
        s, z = f"s_{group}{self.suffix}[:, None]", f"z_{group}{self.suffix}[:, None]"
        by_zero = {
            "none": f"{value} * {s}",
            "int": f"({value} - {z}) * {s}",
            "min": f"{value} * {s} + {z}",
        }
        return by_zero.get(self.scale.zero) or f"({value} - {self._middle}) * {s} + {z}"


@dataclass(frozen=True)
class TokenScales:
    """Scales of quantized activations: t names what multiplies a column of the sums."""

    spec: GemmSpec
    walk: Walk

    @property
    def scale(self) -> Scale | None:
        return self.spec.activation.scale if self.spec.activation is not None else None

    @property
    def cols(self) -> int | None:
        return self.spec.activation.cols if self.spec.activation is not None else None

    @property
    def groups(self) -> list[int]:
        """Blocks of a run that have scales of their own."""
        return groups(self.walk, self.cols)

    def names(self) -> list[str]:
        """Registers carried from run to run."""
        return [f"t_{g}" for g in self.groups]

    def carried(self, run: str, prefix: str = "") -> list[str]:
        """Loads of all scales of a run."""
        return [
            self._load(f"{prefix}t_{g}", column(self.walk, self.spec.k, self.cols, run, g))
            for g in self.groups
        ]

    def load(self) -> list[str]:
        """The one of a token, or of the tensor."""
        return [self._load("t", "0")] if self.scale is not None and self.cols is None else []

    def _load(self, name: str, at: str) -> str:
        assert self.scale is not None
        if self.scale.granularity.rows is None:
            return f"{name} = {self._decoded('tl.load(x_scales + rm * 0)')}"
        stride = 1 if self.cols is None else self.spec.k // self.cols
        row = "rm" if stride == 1 else f"rm * {stride}"
        place = row if at == "0" else f"{row} + {at}"
        return f"{name} = {self._decoded(f'tl.load(x_scales + {place}, mask=here, other=0)')}"

    def _decoded(self, load: str) -> str:
        assert self.scale is not None
        return f"{self.scale.dtype}({load})" if self.scale.dtype in BYTES else f"{load}.to(tl.float32)"
