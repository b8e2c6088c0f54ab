"""From a spec and a pipelined schedule to a kernel in Gluon, Triton's language of explicit layouts: what all
such kernels have.

In: `GemmSpec`, `Pipelined`. Out: the text of a module with one `kernel`; nothing in it names a format.

    linear 28672x4096 bf16 int4[g128,halves256], "tma m128 n128 g2 w4 x6 j1 c2 p1 lane"
    ->  load_codes:  per run   2 * [64, 64] 16-bit units -> a ring in shared memory
        load_x:      per run   four slices of x [128, 64] -> another ring
        compute:     sums of each tile, by `pipelined_halves.py` or `pipelined_bytes.py`
        store:       a tile of y

The weight is the first operand, so sums are [rows of the weight, rows of x] and are turned on their way
through shared memory to y.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

from ..pipelined import Pipelined, decodes_together
from ..slices import Take, Walk, renumbered
from ..spec import CodegenError, GemmSpec
from . import pieces
from .lines import TL, Lines
from .scales import Scales, functions

_IMPORTS = (
    "from triton.experimental import gluon",
    "from triton.experimental.gluon import language as tl",
    "from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma",
    "from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait",
)
# Tensors that both kinds of warps see, and what a compute warp sees besides.
RINGS = "x_ring, x_full, x_free, code_ring, codes_full, codes_free"
_STORED = "scales, x_scales, level, bias, y, y_tile"
STRIDES = "SN: tl.constexpr, SG: tl.constexpr"
READS = f"{_STORED}, zeros, partial, flags"


@dataclass(frozen=True)
class Kernel(ABC):
    """One kernel being printed."""

    spec: GemmSpec
    schedule: Pipelined

    def __post_init__(self) -> None:
        obstacle = self.schedule.obstacle(self.spec)
        if obstacle is not None:
            raise CodegenError(obstacle)

    @property
    def walk(self) -> Walk:
        return self.schedule.walk(self.spec)

    @cached_property
    @abstractmethod
    def scales(self) -> Scales:
        """In a compute warp `row` has the layout of whatever the scale multiplies."""

    @property
    @abstractmethod
    def _units(self) -> str:
        """The type of codes in shared memory."""

    @abstractmethod
    def _assembly(self, takes: list[list[Take]]) -> str | None:
        """The block that decodes these slices; None if units are lanes as they lie."""

    @abstractmethod
    def _compute(self, out: Lines) -> None:
        """The function of the warps that compute."""

    @abstractmethod
    def _finish(self, out: Lines) -> None:
        """The scaling that is left for complete sums."""

    @property
    def _lane(self) -> str:
        """What the tensor cores multiply."""
        return TL[self.spec.lane]

    @property
    def _width(self) -> int:
        """Bytes of one number of x, and of one unit of codes."""
        return self.schedule.width(self.spec)

    @property
    def _steps(self) -> int:
        """Tiles of x in a run."""
        return len(self.walk.slices) // self.schedule.joined

    # --- what the module is made of -----------------------------------------------------------------------

    def source(self) -> str:
        out = Lines()
        out.add(f'"""{self.spec}', "", f'{self.schedule}"""', *_IMPORTS)
        if self.schedule.overlap:
            out.add("from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait")
        out.add(*(line.replace("@triton.jit", "@gluon.jit") for line in functions(self.spec)))
        if self.schedule.streamk:
            out.add("", "barrier = tl.barrier if hasattr(tl, 'barrier') else tl.thread_barrier")
        self._constants(out)
        pieces.functions(out, self.schedule)
        self._load_x(out)
        self._load_codes(out)
        self._store(out)
        self._compute(out)
        self._kernel(out)
        return "\n".join(out.text) + "\n"

    def _constants(self, out: Lines) -> None:
        s, w = self.schedule, self.walk
        numbers = {
            "BLOCK_M": s.block_m,
            "BLOCK_N": s.block_n,
            "GROUPS": s.groups,
            "ROWS": s.rows,
            "TILES_N": -(-self.spec.n // s.block_n),
            "RUNS": w.runs,
            "X_STAGES": s.x_stages,
            "CODE_STAGES": s.code_stages,
        }
        out.add("", *(f"{name}: tl.constexpr = tl.constexpr({value})" for name, value in numbers.items()))
        for name, (takes, _) in self._calls.items():
            asm = self._assembly(takes)
            out.add(*[f'{name} = tl.constexpr("""{asm}""")'] * (asm is not None))

    @cached_property
    def _calls(self) -> dict[str, tuple[list[list[Take]], list[int]]]:
        """Assembly blocks: name -> (slices with their loads renumbered, the loads they read). All four codes
        of a unit are looked up in a table together."""
        slices = self.walk.slices
        size = len(slices) // self.schedule.unroll if decodes_together(self.spec.weight.element) else 1
        return {f"DECODE{i}": renumbered(slices[i : i + size]) for i in range(0, len(slices), size)}

    def _each_piece(self, out: Lines) -> None:
        """Opens the loop over pieces of work, each within one tile."""
        out.add(*pieces.BEGIN)
        out.indent("while at < stop:")
        out.add(*pieces.PLACE)

    @staticmethod
    def _advance(out: Lines) -> None:
        out.add(pieces.ADVANCE)
        out.depth -= 1

    # --- the warps that fetch -----------------------------------------------------------------------------

    def _load_codes(self, out: Lines) -> None:
        """Codes do not depend on what ran before, so with overlapped launches they come ahead of all else."""
        s, w = self.schedule, self.walk
        out.add("", "", "@gluon.jit")
        with out.indent("def load_codes(codes, code_ring, codes_full, codes_free, m):"):
            out.add(*["gdc_launch_dependents()"] * (s.overlap == 2), "step = 0")
            self._each_piece(out)
            with out.indent("for run in range(begin, end):"):
                self._next(out, "codes", "CODE_STAGES", len(w.loads) * s.block_n * w.length * self._width)
                for i, start in enumerate(w.loads):
                    at = f"run * {w.units} + {start}" if start else f"run * {w.units}"
                    for group in range(s.groups):
                        row = "n + ROWS" if group else "n"
                        slot = f"code_ring.index({self._slot(i, str(group))})"
                        out.add(
                            f"tma.async_copy_global_to_shared(codes, [{row}, {at}], "
                            f"codes_full.index(b), {slot})"
                        )
                out.add("step += 1")
            self._advance(out)
            out.add(*["gdc_launch_dependents()"] * (s.overlap == 1))

    def _load_x(self, out: Lines) -> None:
        """x, and so every product and all that is written, waits for the kernel before to be done."""
        s, w = self.schedule, self.walk
        wide = s.joined * w.length
        out.add("", "", "@gluon.jit")
        with out.indent("def load_x(x, x_ring, x_full, x_free, m):"):
            out.add(*["gdc_wait()"] * bool(s.overlap), "step = 0")
            self._each_piece(out)
            with (
                out.indent("for run in range(begin, end):"),
                out.indent(f"for tile_of_x in tl.static_range({self._steps}):"),
            ):
                self._next(out, "x", "X_STAGES", s.block_m * wide * self._width)
                for j in range(s.joined):
                    at = f"run * {w.codes} + tile_of_x * {wide}" + (f" + {j * w.length}" if j else "")
                    slot = f"x_ring.index({self._x_slot('b', j)})"
                    out.add(f"tma.async_copy_global_to_shared(x, [m0, {at}], x_full.index(b), {slot})")
                out.add("step += 1")
            self._advance(out)

    @staticmethod
    def _next(out: Lines, ring: str, stages: str, size: int) -> None:
        """Waits until the next place of a ring is free, and announces what will come to it."""
        out.add(
            f"b = step % {stages}",
            f"mbarrier.wait({ring}_free.index(b), (step // {stages} & 1) ^ 1)",
            f"mbarrier.expect({ring}_full.index(b), {size})",
        )

    def _slot(self, load: int, group: str, b: str = "b") -> str:
        """Where a warpgroup's rows of a load lie in stage b."""
        each = len(self.walk.loads) * self.schedule.groups
        return b if each == 1 else f"{b} * {each} + {load * self.schedule.groups} + {group}"

    def _x_slot(self, b: str, j: int) -> str:
        return b if self.schedule.joined == 1 else f"{b} * {self.schedule.joined} + {j}"

    # --- the warps that compute ---------------------------------------------------------------------------

    def _rows(self, layout: str) -> str:
        rows = f"n + group * ROWS + tl.arange(0, ROWS, tl.SliceLayout(1, {layout}))"
        ragged = self.spec.n % self.schedule.block_n
        return f"row = tl.minimum({rows}, {self.spec.n - 1})" if ragged else f"row = {rows}"

    def _codes_to_registers(self, out: Lines) -> None:
        out.add(
            "b = code_step % CODE_STAGES",
            "mbarrier.wait(codes_full.index(b), code_step // CODE_STAGES & 1)",
        )
        for i in range(len(self.walk.loads)):
            out.add(f"u{i} = code_ring.index({self._slot(i, 'group')}).load(OPERAND)")

    @staticmethod
    def _free_codes(out: Lines) -> None:
        """The copy engine writes here next; without the fence it was seen to overtake the reads. The fence
        waits for them while the first product is on its way."""
        out.add(
            "fence_async_shared()",
            "mbarrier.arrive(codes_free.index(code_step % CODE_STAGES))",
            "code_step += 1",
        )

    @staticmethod
    def _free(when: str = "") -> str:
        return f"mbarrier.arrive(x_free.index((x_step + X_STAGES - 1) % X_STAGES){when})"

    # --- the end of a piece ---------------------------------------------------------------------------------

    def _tail(self, out: Lines) -> None:
        store = f"store(group, total, n, m0, m, {_STORED}, SN, SG)"
        if self.schedule.streamk:
            pieces.add_parts(out, store)
        else:
            out.add(store)

    def _store(self, out: Lines) -> None:
        """A tile of y; it is copied while the next one is computed."""
        out.add("", "", "@gluon.jit")
        with out.indent(f"def store(group: tl.constexpr, total, n, m0, m, {_STORED}, {STRIDES}):"):
            self._finish(out)
            if self.spec.bias:
                out.add("total += tl.load(bias + row)[:, None].to(tl.float32)")
            out.add(
                "tma.store_wait(0)",
                f"y_tile.index(group).permute((1, 0)).store(total.to({TL[self.spec.x]}))",
                "fence_async_shared()",
                "tma.async_copy_shared_to_global(y, [m0, n + group * ROWS], y_tile.index(group))",
            )

    @property
    def _sums(self) -> str:
        s = self.schedule
        shape = f"[{s.warps}, 1], [16, {s.block_m}, {32 // self._width}]"
        return f"SUMS: tl.constexpr = tl.NVMMADistributedLayout([3, 0], {shape})"

    @property
    def _operand(self) -> str:
        """Units of codes in registers, as many to a register as it has room for."""
        return f"OPERAND: tl.constexpr = tl.DotOperandLayout(0, SUMS, {4 // self._width})"

    # --- the program --------------------------------------------------------------------------------------

    def _kernel(self, out: Lines) -> None:
        s, w = self.schedule, self.walk
        out.add("", "", '@gluon.jit(do_not_specialize=["m"])')
        arguments = "x, codes, y, scales, x_scales, zeros, level, bias, partial, flags, m"
        with out.indent(f"def kernel({arguments}, {STRIDES}):"):
            x_slots = s.x_stages * s.joined
            code_slots = s.code_stages * len(w.loads) * s.groups
            shared = "tl.allocate_shared_memory"
            out.add(
                f"x_ring = {shared}({self._lane}, [{x_slots}, BLOCK_M, {w.length}], x.layout)",
                f"code_ring = {shared}({self._units}, [{code_slots}, ROWS, {w.length}], codes.layout)",
                f"y_tile = {shared}({TL[self.spec.x]}, [GROUPS, BLOCK_M, ROWS], y.layout)",
            )
            for ring, stages in (("x", "X_STAGES"), ("codes", "CODE_STAGES")):
                for state in ("full", "free"):
                    out.add(f"{ring}_{state} = {shared}(tl.int64, [{stages}, 1], mbarrier.MBarrierLayout())")
                with out.indent(f"for i in tl.static_range({stages}):"):
                    out.add(
                        f"mbarrier.init({ring}_full.index(i), count=1)",
                        f"mbarrier.init({ring}_free.index(i), count=GROUPS)",
                    )
            out.add(
                "fence_async_shared()",
                f"computing = ({READS}, {RINGS}, m, SN, SG)",
            )
            parts = ["(compute, (0,) + computing)", "(compute, (1,) + computing)"][: s.groups]
            parts += ["(load_x, (x, x_ring, x_full, x_free, m))"]
            parts += ["(load_codes, (codes, code_ring, codes_full, codes_free, m))"]
            warps = [s.warps] * (s.groups - 1) + [1, 1]
            registers = [s.computing] * (s.groups - 1) + [s.fetching] * 2
            out.add(f"tl.warp_specialize([{', '.join(parts)}], {warps}, {registers})")


def pipelined_source(spec: GemmSpec, schedule: Pipelined) -> str:
    """The kernel's module as text. CodegenError if the schedule cannot run the spec."""
    from .pipelined_bytes import BytesKernel
    from .pipelined_halves import HalvesKernel

    return (HalvesKernel if spec.activation is None else BytesKernel)(spec, schedule).source()
