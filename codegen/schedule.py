"""How a fused kernel computes it: `Schedule`, data that a tuner searches and a table stores.

In: numbers. Out: a value that prints and parses, and says whether it can run a given spec.

    Schedule(block_m=16, block_n=64, warps=4, stages=3, split=2, scale="sum")
    m16 n64 w4 s3 k2 sum
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch

from ..formats import Float, Integer, Scale
from ..formats.scale import LARGEST
from ..formats.sparsity import Dense
from .byte_lanes import byte_decoder
from .decode import holds
from .lanes import LANE_TYPES
from .slices import Unwalkable, Walk, joined, renumbered
from .spec import CodegenError, GemmSpec

SCALES = ("end", "sum", "lane", "float")
# Shortest product of 8-bit tensor cores, and the most products of two int8 (-128 among them) in an int32.
SHORTEST_OF_BYTES = 32
MOST_INTEGERS = (2**31 - 1) // (128 * 128)
# Launches overlap from this compute capability on.
OVERLAP_FROM = 90
_TEXT = re.compile(r"m(\d{1,6}) n(\d{1,6}) w(\d{1,6}) s(\d{1,6}) k(\d{1,6}) (\w+)(?: o(\d))?(?: j(\d{1,2}))?")


@dataclass(frozen=True)
class Schedule:
    """block_m, block_n: rows of x and of the weight that one program takes; warps, stages: Triton's;
    split: programs that share the sum over k, added up in order; scale: where the scale multiplies:

        end     the finished sum (one scale a row or a tensor)
        sum     the sum over each group, in float32; without groups, the sum over each run, which float8's
                tensor cores would go on adding up with fewer bits
        lane    the decoded values, in x's dtype: those of `dequantize`, bit for bit
        float   the decoded values, in float32, then rounded: any format, slower

    overlap: 0 for an ordinary launch; 1 if the kernel may start while its predecessor still runs, and waits
    for it before it reads x (programmatic dependent launch, compute capability 9.0 on).

    joined: runs of codes that a turn of the loop takes at once, a power of two. What a turn costs beside its
    codes (waits, addresses) is paid less often; shared memory and registers are needed for all of them.
    """

    block_m: int
    block_n: int
    warps: int = 4
    stages: int = 3
    split: int = 1
    scale: str = "end"
    overlap: int = 0
    joined: int = 1

    def __post_init__(self) -> None:
        for name in ("block_m", "block_n", "warps", "joined"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise CodegenError(f"a schedule's {name} is a power of two, not {value}")
        if self.scale not in SCALES:
            raise CodegenError(f"a schedule's scale is one of {', '.join(SCALES)}, not {self.scale!r}")
        if self.stages < 1 or self.split < 1:
            raise CodegenError("a schedule has at least one stage and one split")
        if self.overlap not in (0, 1):
            raise CodegenError(f"a schedule's overlap is 0 or 1, not {self.overlap}")

    def __str__(self) -> str:
        tail = (f" o{self.overlap}" if self.overlap else "") + (f" j{self.joined}" if self.joined > 1 else "")
        return (
            f"m{self.block_m} n{self.block_n} w{self.warps} s{self.stages} k{self.split} {self.scale}{tail}"
        )

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """The inverse of `str`; CodegenError if the text says something else."""
        found = _TEXT.fullmatch(text)
        if found is None:
            raise CodegenError(f"{text!r} is no schedule; one reads: m16 n64 w4 s3 k1 sum")
        *numbers, scale, overlap, joins = found.groups()
        block_m, block_n, warps, stages, split = (int(number) for number in numbers)
        return cls(block_m, block_n, warps, stages, split, scale, int(overlap or 0), int(joins or 1))

    def walk(self, spec: GemmSpec) -> Walk:
        """How the kernel walks over a row. CodegenError if the layout cannot be walked over."""
        if isinstance(spec.walk, Unwalkable):
            raise CodegenError(spec.walk.reason)
        return joined(spec.walk, self.joined)

    def check_arch(self, arch: int) -> None:
        """CodegenError if a GPU of this compute capability (90 for 9.0) cannot run the schedule."""
        if self.overlap and arch < OVERLAP_FROM:
            raise CodegenError(
                f"the schedule {self} overlaps launches, for compute capability 9.0 on, not {arch / 10}; "
                f"leave out o{self.overlap}"
            )

    def check(self, spec: GemmSpec, arch: int) -> None:
        """CodegenError if a GPU of this compute capability cannot run the spec by this schedule."""
        self.check_arch(arch)
        if spec.lane == "e4m3" and arch < 89:
            raise CodegenError(
                f"tensor cores multiply float8_e4m3fn from compute capability 8.9 on, not {arch / 10}; "
                "decode the activations to bfloat16"
            )

    def obstacle(self, spec: GemmSpec) -> str | None:
        """Why this schedule cannot run the spec, or None."""
        return _unreadable(spec) or self._unfit(spec)

    def _unfit(self, spec: GemmSpec) -> str | None:
        found = self.walk(spec)
        runs = replace(self, joined=1).walk(spec).runs
        if self.joined > runs:
            return f"a row of {spec.k} has {runs} runs of codes, of which no {self.joined} are joined"
        if self.split > found.runs:
            return f"{self.split} splits of {found.runs} runs of codes leave some without work"
        if self.scale not in scales(spec):
            return f"{spec.weight} is not scaled by {self.scale!r}, but by {', '.join(scales(spec))}"
        return None


def _unreadable(spec: GemmSpec) -> str | None:
    """Why no schedule can run the spec, or None."""
    weight, activation = spec.weight, spec.activation
    if spec.x not in LANE_TYPES:
        return f"tensor cores multiply {' or '.join(LANE_TYPES)}, not {spec.x}"
    if not isinstance(weight.sparsity, Dense):
        return f"kernels read every number of a row; {weight} stores {weight.sparsity} of them"
    if weight.scale is not None and weight.scale.native:
        return f"kernels compute in float32; the arithmetic of {weight} is that of its input"
    found = spec.walk
    if isinstance(found, Unwalkable):
        return found.reason
    if activation is not None:
        if byte_decoder(weight.element, renumbered(found.slices[:1])[0][0], spec.lane) is None:
            return f"{spec.lane}, in which {activation} is multiplied, has not the values of {weight}"
        if found.length < SHORTEST_OF_BYTES:
            return f"8-bit tensor cores take {SHORTEST_OF_BYTES} numbers, and slices have {found.length}"
        if spec.lane == "int8" and spec.k > MOST_INTEGERS:
            return f"a sum of {spec.k} products of 8-bit integers may not fit in 32 bits"
    for cols in spec.groups:
        if cols % found.length:
            return f"slices of {found.length} codes straddle groups of {cols}"
    return None


def scales(spec: GemmSpec) -> tuple[str, ...]:
    """Where this format's scale may multiply, fastest first."""
    scale = spec.weight.scale
    if spec.x not in LANE_TYPES or (scale is not None and scale.native):
        return ()
    if spec.activation is not None:
        return _scales_of_bytes(spec)
    if not holds(spec.weight.element, spec.x):
        return ("float",)
    if scale is None or spec.weight.cols is None:
        return ("end", "float")
    if scale.zero == "none" and _exact_in_lane(scale, spec):
        return ("lane", "sum", "float")
    return ("sum", "float")


def _scales_of_bytes(spec: GemmSpec) -> tuple[str, ...]:
    if spec.groups:
        return ("sum",)
    return ("end",) if spec.lane == "int8" else ("sum", "end")


def _exact_in_lane(scale: Scale, spec: GemmSpec) -> bool:
    """Whether scale, code and so the rounded product are what the reference computes in float32.

    E4M3 fits both types; E8M0 has float16's range behind it. A table's entries are rounded before the
    product, so they are not. With two levels the product is no weight yet: 448 times an e4m3 is no float16.
    """
    element, dtype = spec.weight.element, scale.dtype
    fits = dtype == "e4m3" or dtype == spec.x or (dtype == "e8m0" and spec.x == "bf16")
    largest = LARGEST["e4m3"] * max(-element.low, element.high) if scale.two_level else 0.0
    return fits and isinstance(element, Integer | Float) and largest <= torch.finfo(spec.dtype).max
