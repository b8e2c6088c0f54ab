"""How a kernel with explicit pipelines computes a spec: `Pipelined`, the second kind of schedule, for Hopper.

In: numbers. Out: a value that prints and parses, and says whether it can run a given spec.

    Pipelined(block_m=256, block_n=128, warps=8, x_stages=4, code_stages=2, scale="lane")
    tma m256 n128 g1 w8 x4 j1 c2 p1 lane

Two warps fetch (TMA), one codes and one x, and a warpgroup or two compute: codes come to registers, are
decoded there, and multiply by x in shared memory, asynchronously (wgmma), while the next slice is decoded.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..formats import Element, Integer
from .byte_lanes import byte_decoder
from .decode import decoder, holds
from .schedule import Schedule, scales
from .slices import Walk, joined, renumbered
from .spec import CodegenError, GemmSpec

MODES = ("end", "lane", "float", "sum")
ARCH = 90  # the one compute capability that has these instructions
# Bytes of shared memory of one multiprocessor of compute capability 9.0, and what each program costs beside
# its own (CUDA C++ Programming Guide, technical specifications).
SHARED, RESERVED = 228 * 1024, 1024
# 32-bit registers of a multiprocessor, and of a thread at most.
REGISTERS, MOST_REGISTERS = 65536, 255
# Groups that compute, and warps of each.
GROUPS = ((1, 4), (1, 8), (2, 4))
MOST_UNROLLED = 16
# Registers for addresses, masks, scales and counters: with fewer left int4's kernels spilled, with these
# none.
SPARE = 40
_TEXT = re.compile(
    r"tma m(\d{1,6}) n(\d{1,6}) g(\d) w(\d{1,2}) x(\d{1,6}) j(\d{1,6}) c(\d{1,6}) p(\d{1,6}) (\w+)"
    r"( streamk)?(?: u(\d{1,6}))?(?: o(\d))?"
)


@dataclass(frozen=True)
class Pipelined:
    """block_m, block_n: rows of x and of the weight in one tile; groups: of warps, which compute each on its
    own, on its share of the weight's rows; warps: of each; x_stages: tiles of x on their way, each of
    `joined` slices of K; code_stages: runs of codes on their way; programs: on one multiprocessor; scale:
    where it multiplies, as in `Schedule`; streamk: the tiles that fill no whole wave of programs are shared
    between all, cut along K, and their parts added up in order; unroll: runs of the layout that count as one.

    overlap: 0 for an ordinary launch; 1 if the next kernel may start in the places of programs that are done,
    from the last copy of codes on; 2 if it may start when this one does, beside it, for which half of each
    multiprocessor is left. Such a kernel fills its ring of codes before it waits for its predecessor
    (programmatic dependent launch).
    """

    block_m: int
    block_n: int
    groups: int = 1
    warps: int = 8
    x_stages: int = 4
    joined: int = 1
    code_stages: int = 2
    programs: int = 1
    scale: str = "lane"
    streamk: bool = False
    unroll: int = 1
    overlap: int = 0

    def __post_init__(self) -> None:
        for name in ("block_m", "block_n", "joined", "unroll"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise CodegenError(f"a pipelined schedule's {name} is a power of two, not {value}")
        if not 8 <= self.block_m <= 256:
            raise CodegenError(f"one instruction takes 8 to 256 rows of x, not {self.block_m}")
        if (self.groups, self.warps) not in GROUPS:
            raise CodegenError(
                f"a group of 4 or 8 warps computes, or two of 4, not {self.groups} of {self.warps} warps"
            )
        if self.rows < 16 * self.warps or self.rows > 256:
            raise CodegenError(
                f"{self.warps} warps take {16 * self.warps} to 256 rows of the weight, not {self.rows}"
            )
        if self.x_stages < 2 or self.code_stages < 1 or self.programs < 1:
            raise CodegenError(
                "a pipelined schedule has two stages of x, one of codes and one program at least"
            )
        if self.unroll > MOST_UNROLLED:
            raise CodegenError(f"at most {MOST_UNROLLED} runs count as one, not {self.unroll}")
        if self.overlap not in (0, 1, 2):
            raise CodegenError(f"a pipelined schedule's overlap is 0, 1 or 2, not {self.overlap}")
        if self.scale not in MODES:
            raise CodegenError(
                f"a pipelined schedule's scale is one of {', '.join(MODES)}, not {self.scale!r}"
            )

    def __str__(self) -> str:
        tail = " streamk" if self.streamk else ""
        tail += f" u{self.unroll}" if self.unroll > 1 else ""
        tail += f" o{self.overlap}" if self.overlap else ""
        return (
            f"tma m{self.block_m} n{self.block_n} g{self.groups} w{self.warps} x{self.x_stages} "
            f"j{self.joined} c{self.code_stages} p{self.programs} {self.scale}{tail}"
        )

    @classmethod
    def parse(cls, text: str) -> Pipelined:
        """The inverse of `str`; CodegenError if the text says something else."""
        found = _TEXT.fullmatch(text)
        if found is None:
            raise CodegenError(
                f"{text!r} is no pipelined schedule; one reads: tma m256 n128 g1 w8 x4 j1 c2 p1 lane"
            )
        *words, scale, streamk, unroll, overlap = found.groups()
        m, n, groups, warps, x_stages, joined, code_stages, programs = (int(word) for word in words)
        return cls(
            m, n, groups, warps, x_stages, joined, code_stages, programs, scale,
            streamk=streamk is not None, unroll=int(unroll or 1), overlap=int(overlap or 0),
        )  # fmt: skip

    @property
    def rows(self) -> int:
        """Rows of the weight in one group's tile."""
        return self.block_n // self.groups

    @property
    def threads(self) -> int:
        """Of a program; the two warps that fetch take the place of four."""
        return 32 * (self.groups * self.warps + 4)

    @property
    def residents(self) -> int:
        """Programs that a multiprocessor has room for: the next kernel's too, if they run side by side."""
        return self.programs * (2 if self.overlap == 2 else 1)

    @property
    def at_start(self) -> int:
        """Registers that a thread has when the program starts."""
        return min(REGISTERS // self.residents // self.threads // 8 * 8, MOST_REGISTERS)

    @property
    def fetching(self) -> int:
        """Registers that the fetching warps keep. With a second group it keeps all: in the compiler's eyes
        that group has as few as any warp beside the first group ever has, and it then sends off one product
        at a time ("insufficient register resources", ptxas 12.8)."""
        return 24 if self.groups == 1 else self.at_start

    @property
    def computing(self) -> int:
        """Registers of a thread that computes."""
        if self.groups > 1:
            return self.at_start
        left = self.at_start * self.threads - 128 * self.fetching
        return min(left // (32 * self.warps) // 8 * 8, MOST_REGISTERS)

    def walk(self, spec: GemmSpec) -> Walk:
        """How the kernel walks over a row."""
        w = spec.walk
        assert isinstance(w, Walk)
        return joined(w, self.unroll)

    @staticmethod
    def width(spec: GemmSpec) -> int:
        """Bytes of what the tensor cores multiply, and of a unit of codes."""
        return 2 if spec.activation is None else 1

    def shared(self, spec: GemmSpec) -> int:
        """Bytes of shared memory of one program: two rings, the tile of y, barriers."""
        w, width = self.walk(spec), self.width(spec)
        x = self.x_stages * self.block_m * w.length * self.joined * width
        codes = self.code_stages * len(w.loads) * self.block_n * w.length * width
        return x + codes + self.block_m * self.block_n * 2 + 16 * (self.x_stages + self.code_stages) + 1024

    def registers(self, spec: GemmSpec) -> int:
        """Registers that a thread needs, about: sums, codes, a slice on its way and those being decoded.
        Fitted to which of 100 kernels the compiler spilled."""
        w = self.walk(spec)
        slice_ = self.rows * w.length * self.width(spec) // 4 // (32 * self.warps)
        sums = self.block_m * self.rows // (32 * self.warps) * (2 if self.scale == "sum" else 1)
        if spec.activation is not None:
            # A column of sums has a scale for each block of x; codes as they lie stay in shared memory.
            of_tokens = self.block_m // 4 if spec.activation.cols is not None else 0
            return sums + of_tokens + (0 if lies(spec) else (len(w.loads) + 1) * slice_) + SPARE
        decoded = len(w.slices) if decodes_together(spec.weight.element) else 1
        scale = spec.weight.scale
        offset = scale is not None and scale.zero != "none"
        more = (8 + 32 * offset) if self.scale == "float" else 0
        return sums + (len(w.loads) + 1 + decoded) * slice_ + SPARE + more

    def check_arch(self, arch: int) -> None:
        """CodegenError if a GPU of this compute capability (90 for 9.0) cannot run the schedule."""
        if arch != ARCH:
            raise CodegenError(
                f"the schedule {self} is for compute capability {ARCH / 10}, not {arch / 10}; take one "
                "without tma"
            )

    def obstacle(self, spec: GemmSpec) -> str | None:
        """Why this schedule cannot run the spec, or None."""
        if spec.weights > 1 or spec.experts or not spec.epilogue.plain:
            return f"pipelined kernels take one weight and no epilogue but bias, not {spec}"
        # What keeps any kernel from reading the format: said by the other kind of schedule.
        general = Schedule(16, 64, scale=(*scales(spec), "end")[0]).obstacle(spec)
        return general or self._mode(spec) or self._tiles(spec)

    def _mode(self, spec: GemmSpec) -> str | None:
        allowed = modes(spec)
        if self.scale not in allowed:
            return f"{spec.weight} is not scaled by {self.scale!r} here, but by {', '.join(allowed)}"
        if spec.activation is not None:
            return self._sums_of_bytes(spec)
        if not has_program(spec):
            return f"{spec.weight.element.name} has no program of registers that decodes it to {spec.x}"
        return None

    def _sums_of_bytes(self, spec: GemmSpec) -> str | None:
        """What stands in the way of products in 8 bits."""
        if spec.has_offset:
            return f"pipelined kernels have no second sum for the zero points of {spec.weight}"
        if self.joined > 1:
            return "slices of bytes are not joined"
        if self.scale == "sum" and lies(spec) and len(self.walk(spec).slices) > self.x_stages:
            return f"a sum over a run reads more than {self.x_stages} tiles of x before it frees one"
        if self.scale == "end" and lies(spec) and self.code_stages < 2:
            return "codes that are read from shared memory are free a product later: two stages at least"
        if self.streamk and self.scale == "end":
            return "parts of sums of integers are not shared"
        return None

    def _tiles(self, spec: GemmSpec) -> str | None:
        w, width = self.walk(spec), self.width(spec)
        if spec.n % 8 or spec.k % (16 // width):
            return f"rows of x and y are copied in units of 16 bytes; {spec.n} and {spec.k} are no multiples"
        if w.stride * width % 16:
            return (
                f"rows of {w.stride * width} bytes of codes are no multiple of the 16 bytes that copies "
                "start at"
            )
        if w.length * width > 128:
            return (
                f"slices of {w.length} codes are wider than the 128 bytes that shared memory is swizzled by"
            )
        if len(w.slices) % self.joined:
            return f"{len(w.slices)} slices of a run are not joined by {self.joined}"
        if self.joined > 1 and self.scale == "float" and decodes_together(spec.weight.element):
            return f"slices of {spec.weight.element.name} are not joined: the compiler would not overlap them"
        room = SHARED // self.residents - RESERVED
        if self.shared(spec) > room:
            return f"{self} takes {self.shared(spec)} bytes of shared memory, of {room}"
        if self.registers(spec) > self.computing:
            return f"{self} takes about {self.registers(spec)} registers a thread, of {self.computing}"
        return None


def parsed(text: str) -> Schedule | Pipelined:
    """A schedule of either kind; CodegenError if the text says none."""
    return Pipelined.parse(text) if text.startswith("tma ") else Schedule.parse(text)


def modes(spec: GemmSpec) -> tuple[str, ...]:
    """Where this format's scale may multiply in a pipelined kernel, fastest first. Sums are not scaled group
    by group: that would take a second set of them, and a wait for each group."""
    if spec.activation is not None:
        return tuple(mode for mode in scales(spec) if mode == "sum" or spec.lane == "int8")
    scale = spec.weight.scale
    if scale is not None and scale.zero != "none":
        return ("float",)
    found = tuple(mode for mode in scales(spec) if mode in ("end", "lane", "float"))
    return found if "float" in found else (*found, "float")


def decodes_together(element: Element) -> bool:
    """Whether all codes of a unit are decoded at once: four selectors of one byte permutation."""
    return not isinstance(element, Integer) and hasattr(element, "table") and element.bits == 4


def lies(spec: GemmSpec) -> bool:
    """Whether codes are what the tensor cores multiply, byte for byte."""
    w = spec.walk
    assert isinstance(w, Walk)
    made = byte_decoder(spec.weight.element, renumbered(w.slices[:1])[0][0], spec.lane)
    return made is not None and made.asm is None


def has_program(spec: GemmSpec) -> bool:
    """Whether the element's values come from registers of codes by a program (`decode.py`)."""
    w = spec.walk
    assert isinstance(w, Walk)
    if not holds(spec.weight.element, spec.x):
        return False
    return decoder(spec.weight.element, [w.slices[0]], spec.x) is not None
