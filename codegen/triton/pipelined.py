"""From a spec and a pipelined schedule to a kernel in Gluon, Triton's language of explicit layouts.

In: `GemmSpec`, `Pipelined`. Out: the text of a module with one `kernel`; nothing in it names a format.

    linear 28672x4096 bf16 int4[g128,halves256], "tma m128 n128 g2 w4 x6 j1 c2 p1 lane"
    ->  load:      per run   codes 2 * [64, 64], 16-bit units -> a ring; four slices of x [128, 64] -> another
        compute:   per run   u0 = code_ring[..].load(OPERAND)         registers, as the tensor cores want them
                             a0 = <and, flip the sign, subtract>(u0) * s_0
                             total += a0 @ x_ring[..].T               asynchronous: a1 is decoded meanwhile

A slice of x is free again when its product is known to be done, which a warpgroup asks after it has sent off
the next; a run of codes, when it is in registers and a fence stands behind that. The weight is the first
operand, so sums are [rows of the weight, rows of x] and are turned on their way through shared memory to y.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from ..decode import decoder
from ..pipelined import Pipelined, decodes_together
from ..schedule import Schedule
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
_MULTIPLY = "{{ .reg .b32 z; mov.b32 z, 0x80008000; fma.rn.{0}x2 $0, $1, $2, z; }}"
# Tensors that both kinds of warps see, and what a compute warp sees besides.
_RINGS = "x_ring, x_full, x_free, code_ring, codes_full, codes_free"
_STORED = "scales, level, bias, y, y_tile"
_STRIDES = "SN: tl.constexpr, SG: tl.constexpr"
_READS = f"{_STORED}, zeros, partial, flags"


@dataclass(frozen=True)
class Kernel:
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
    def scales(self) -> Scales:
        """In a compute warp `row` has the layout of whatever the scale multiplies."""
        placed = Schedule(16, self.schedule.block_n, scale=self.schedule.scale)
        return Scales(self.spec, placed, self.walk, self._lane)

    @property
    def _lane(self) -> str:
        return TL[self.spec.x]

    @property
    def _swizzle(self) -> int:
        """Bytes of a slice in a row of x or of codes."""
        return 2 * self.walk.length

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
            made = decoder(self.spec.weight.element, takes, self.spec.x)
            assert made is not None
            out.add(f'{name} = tl.constexpr("""{made.asm}""")')
        if s.scale == "lane":
            out.add(f'TIMES = tl.constexpr("""{_MULTIPLY.format(self.spec.x)}""")')

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
                self._next(out, "codes", "CODE_STAGES", len(w.loads) * s.block_n * w.length * 2)
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
                self._next(out, "x", "X_STAGES", s.block_m * wide * 2)
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

    def _slot(self, load: int, group: str) -> str:
        """Where a warpgroup's rows of a load lie in stage b."""
        each = len(self.walk.loads) * self.schedule.groups
        return "b" if each == 1 else f"b * {each} + {load * self.schedule.groups} + {group}"

    def _x_slot(self, b: str, j: int) -> str:
        return b if self.schedule.joined == 1 else f"{b} * {self.schedule.joined} + {j}"

    # --- the warps that compute ---------------------------------------------------------------------------

    def _compute(self, out: Lines) -> None:
        s, w = self.schedule, self.walk
        out.add("", "", "@gluon.jit")
        with out.indent(f"def compute(group: tl.constexpr, {_READS}, {_RINGS}, m, {_STRIDES}):"):
            out.add(
                self._sums,
                "OPERAND: tl.constexpr = tl.DotOperandLayout(0, SUMS, 2)",
                "code_step, x_step = 0, 0",
            )
            self._each_piece(out)
            out.add(
                self._rows("OPERAND"),
                "total = tl.zeros([ROWS, BLOCK_M], tl.float32, SUMS)",
                f"held = tl.zeros([ROWS, {w.length}], {self._lane}, OPERAND)",
            )
            if s.scale == "float" and self.spec.weight.scale is not None and not self.scales.groups:
                out.add(*self.scales.load("s_0", "z_0", "0"))
            if s.scale != "end":
                out.add(*self.scales.carried("begin"))
            with out.indent("for run in range(begin, end):"):
                self._run(out)
            out.add("total, held = warpgroup_mma_wait(0, [total, held])", self._free())
            self._tail(out)
            self._advance(out)
            out.add("tma.store_wait(0)")

    def _rows(self, layout: str) -> str:
        rows = f"n + group * ROWS + tl.arange(0, ROWS, tl.SliceLayout(1, {layout}))"
        ragged = self.spec.n % self.schedule.block_n
        return f"row = tl.minimum({rows}, {self.spec.n - 1})" if ragged else f"row = {rows}"

    def _run(self, out: Lines) -> None:
        w = self.walk
        carried = self.scales.names() if self.schedule.scale != "end" else []
        if carried:
            out.add("ahead = tl.minimum(run + 1, end - 1)", *self.scales.carried("ahead", "next_"))
        out.add(
            "b = code_step % CODE_STAGES",
            "mbarrier.wait(codes_full.index(b), code_step // CODE_STAGES & 1)",
            *(f"u{i} = code_ring.index({self._slot(i, 'group')}).load(OPERAND)" for i in range(len(w.loads))),
        )
        for i in range(len(w.slices)):
            self._slice(out, i)
        # The last product is still on its way, and reads its first operand.
        out.add(f"held = a{len(w.slices) - 1}", *(f"{name} = next_{name}" for name in carried))

    def _slice(self, out: Lines, i: int) -> None:
        """Decodes slice i and sends its product off; waits for the one before and frees its tile of x."""
        j = i % self.schedule.joined
        if f"DECODE{i}" in self._calls:
            self._decode(out, i)
        self._scale(out, i)
        if j == 0:
            out.add("b = x_step % X_STAGES", "mbarrier.wait(x_full.index(b), x_step // X_STAGES & 1)")
        x = f"x_ring.index({self._x_slot('b', j)}).permute((1, 0))"
        before = f"a{i - 1}" if i else "held"
        kept = ", ".join(["total", before, *self._left(i)])
        out.add(
            f"total = warpgroup_mma(a{i}, {x}, total, is_async=True)",
            f"{kept} = warpgroup_mma_wait(1, [{kept}])",
        )
        if i == 0:
            # The copy engine writes here next; without the fence it was seen to overtake the reads. The fence
            # waits for them while the first product is on its way.
            out.add(
                "fence_async_shared()",
                "mbarrier.arrive(codes_free.index(code_step % CODE_STAGES))",
                "code_step += 1",
            )
        if j == 0:
            out.add(self._free("" if i else ", pred=run > begin"))
        if j == self.schedule.joined - 1:
            out.add("x_step += 1")

    def _left(self, i: int) -> list[str]:
        """What later slices are made of. It passes through the wait after slice i, so that nothing of them is
        computed between a product's start and that wait: the compiler would wait for each product (C7513,
        "non wgmma instructions defining input registers")."""
        size = len(self.walk.slices) // len(self._calls)
        begun = (i // size + 1) * size
        loads = sorted({take.load for takes in self.walk.slices[begun:] for take in takes})
        return [*(f"a{j}" for j in range(i + 1, begun)), *(f"u{load}" for load in loads)]

    @staticmethod
    def _free(when: str = "") -> str:
        return f"mbarrier.arrive(x_free.index((x_step + X_STAGES - 1) % X_STAGES){when})"

    def _decode(self, out: Lines, i: int) -> None:
        takes, loads = self._calls[f"DECODE{i}"]
        dtypes = self._lane if len(takes) == 1 else f"({', '.join([self._lane] * len(takes))})"
        constraint = ",".join(["=r"] * len(takes) + ["r"] * len(loads))
        names = ", ".join(f"a{i + j}" for j in range(len(takes)))
        operands = ", ".join(f"u{load}" for load in loads)
        out.add(
            f'{names} = tl.inline_asm_elementwise(DECODE{i}, "{constraint}", [{operands}], dtype={dtypes}, '
            "is_pure=True, pack=2)"
        )

    def _scale(self, out: Lines, i: int) -> None:
        group = self.scales.group(i)
        if self.schedule.scale == "lane":
            out.add(
                f'a{i} = tl.inline_asm_elementwise(TIMES, "=r,r,r", [a{i}, s_{group}[:, None]], '
                f"dtype={self._lane}, is_pure=True, pack=2)"
            )
        elif self.schedule.scale == "float" and self.spec.weight.scale is not None:
            value = self.scales.affine(f"a{i}.to(tl.float32)", group)
            out.add(f"a{i} = ({value}).to({self._lane})")

    # --- the end of a piece ---------------------------------------------------------------------------------

    def _tail(self, out: Lines) -> None:
        store = f"store(group, total, n, m0, {_STORED}, SN, SG)"
        if self.schedule.streamk:
            pieces.add_parts(out, store)
        else:
            out.add(store)

    def _store(self, out: Lines) -> None:
        """A tile of y; it is copied while the next one is computed."""
        scale = self.spec.weight.scale
        out.add("", "", "@gluon.jit")
        with out.indent(f"def store(group: tl.constexpr, total, n, m0, {_STORED}, {_STRIDES}):"):
            if (scale is not None and self.schedule.scale == "end") or self.spec.bias:
                out.add(self._sums, self._rows("SUMS"))
            if scale is not None and self.schedule.scale == "end":
                out.add(*self.scales.load("s", "z", "0"), "total = total * s[:, None]")
            if scale is not None and scale.two_level and self.schedule.scale != "float":
                out.add("total = total * tl.load(level)")
            if self.spec.bias:
                out.add("total += tl.load(bias + row)[:, None].to(tl.float32)")
            out.add(
                "tma.store_wait(0)",
                f"y_tile.index(group).permute((1, 0)).store(total.to({self._lane}))",
                "fence_async_shared()",
                "tma.async_copy_shared_to_global(y, [m0, n + group * ROWS], y_tile.index(group))",
            )

    @property
    def _sums(self) -> str:
        s = self.schedule
        shape = f"[{s.warps}, 1], [16, {s.block_m}, 16]"
        return f"SUMS: tl.constexpr = tl.NVMMADistributedLayout([3, 0], {shape})"

    # --- the program --------------------------------------------------------------------------------------

    def _kernel(self, out: Lines) -> None:
        s, w = self.schedule, self.walk
        out.add("", "", '@gluon.jit(do_not_specialize=["m"])')
        arguments = "x, codes, y, scales, zeros, level, bias, partial, flags, m"
        with out.indent(f"def kernel({arguments}, {_STRIDES}):"):
            x_slots = s.x_stages * s.joined
            code_slots = s.code_stages * len(w.loads) * s.groups
            shared = "tl.allocate_shared_memory"
            out.add(
                f"x_ring = {shared}({self._lane}, [{x_slots}, BLOCK_M, {w.length}], x.layout)",
                f"code_ring = {shared}(tl.int16, [{code_slots}, ROWS, {w.length}], codes.layout)",
                f"y_tile = {shared}({self._lane}, [GROUPS, BLOCK_M, ROWS], y.layout)",
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
                f"computing = ({_READS}, {_RINGS}, m, SN, SG)",
            )
            parts = ["(compute, (0,) + computing)", "(compute, (1,) + computing)"][: s.groups]
            parts += ["(load_x, (x, x_ring, x_full, x_free, m))"]
            parts += ["(load_codes, (codes, code_ring, codes_full, codes_free, m))"]
            warps = [s.warps] * (s.groups - 1) + [1, 1]
            registers = [s.computing] * (s.groups - 1) + [s.fetching] * 2
            out.add(f"tl.warp_specialize([{', '.join(parts)}], {warps}, {registers})")


def pipelined_source(spec: GemmSpec, schedule: Pipelined) -> str:
    """The kernel's module as text. CodegenError if the schedule cannot run the spec."""
    return Kernel(spec, schedule).source()
