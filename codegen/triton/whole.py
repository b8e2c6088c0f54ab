"""A weight decoded as a whole, for a product with so many rows that the library's is faster.

In: a spec. Out: source of a kernel that writes the weight [n, k] in x's dtype, bit for bit what `dequantize`
gives: computed in float32 as the reference does, rounded once; or in x's dtype where that is the same.

    linear 4096x4096 bf16 int4[g128,halves256]   ->   one program for 64 rows and one run of 256 codes
"""

from __future__ import annotations

from ...formats import Float, Integer
from ..decode import decoder, finite, holds
from ..schedule import Schedule
from ..schedule import scales as placements
from ..slices import Walk, renumbered, walk
from ..spec import CodegenError, GemmSpec
from .lines import TL, Lines
from .scales import Scales, functions, times
from .values import code_line, value_lines

BLOCK_N = 64


def whole_source(spec: GemmSpec, *, plain: bool = False) -> str:
    """The kernel's module as text. `plain`: in Triton's own words (see `values.py`), which decode any
    element; else in assembly where there is a program of registers, with half of the instructions."""
    found = walk(spec.weight, spec.k)
    if not isinstance(found, Walk):
        raise CodegenError(found.reason)
    lane, scale = TL[spec.x], spec.weight.scale
    programs = [] if plain else _programs(spec, found)
    in_lane = bool(programs) and scale is not None and not scale.two_level and "lane" in placements(spec)
    scales = Scales(spec, Schedule(16, BLOCK_N, scale="lane" if in_lane else "float"), found, lane)
    out = Lines()
    out.add(f'"""decode {spec}"""', "import triton", "import triton.language as tl", "", *functions(spec))
    for i, (text, _) in enumerate(programs):
        out.add(f'DECODE{i} = tl.constexpr("""{text}""")')
    if in_lane:
        out.add(times(spec.x))
    out.add("", "@triton.jit")
    with out.indent("def kernel(codes, scales, zeros, level, table, w, SN: tl.constexpr, SG: tl.constexpr):"):
        stride = found.units * found.runs
        out.add(
            # Neighbours write one row's runs: longer stretches of memory than one run of neighbouring rows.
            "place = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)",
            f"tile, run = place // {found.runs}, place % {found.runs}",
            f"rn = tile * {BLOCK_N} + tl.arange(0, {BLOCK_N})",
            f"row = tl.minimum(rn, {spec.n - 1})",
            f"rk = tl.arange(0, {found.length})",
            f"units = codes + row[:, None] * {stride} + run * {found.units} + rk[None, :]",
        )
        widened = "" if programs else ".to(tl.uint16, bitcast=True).to(tl.int32)"
        for i, start in enumerate(found.loads):
            out.add(f"u{i} = tl.load(units + {start}){widened}")
        if scales.groups:
            out.add(*scales.carried("run"))
        elif scale is not None:
            out.add(*scales.load("s_0", "z_0", "0"))
        for i, takes in enumerate(found.slices):
            if programs:
                out.add(*_by_program(spec, scales, i, programs[i][1], in_lane=in_lane))
            else:
                out.add(code_line(takes, [f"u{j}" for j in range(len(found.loads))], "c"))
                out.add(*value_lines(spec.weight.element, "c", "v"))
                out.add(f"v = {scales.affine('v', scales.group(i))}")
            out.add(*_store(spec, found, i))
    return "\n".join(out.text) + "\n"


def _programs(spec: GemmSpec, found: Walk) -> list[tuple[str, list[int]]]:
    """For each slice an assembly block and the loads that it reads; none unless they give every code's value
    as the reference has it: a table's entries are rounded, an infinity's code may come out as a number."""
    element = spec.weight.element
    if not isinstance(element, Integer | Float) or not finite(element) or not holds(element, spec.x):
        return []
    programs = []
    for takes in found.slices:
        numbered, loads = renumbered([takes])
        made = decoder(element, numbered, spec.x)
        if made is None:
            return []
        programs.append((made.asm, loads))
    return programs


def _by_program(spec: GemmSpec, scales: Scales, i: int, loads: list[int], *, in_lane: bool) -> list[str]:
    group = scales.group(i)
    lines = [_assembly(spec, f"DECODE{i}", [f"u{load}" for load in loads])]
    if in_lane:
        lines.append(_assembly(spec, "TIMES", ["v", f"tl.broadcast_to(s_{group}[:, None], v.shape)"]))
    elif spec.weight.scale is not None:
        lines.append(f"v = {scales.affine('v.to(tl.float32)', group)}")
    return lines


def _assembly(spec: GemmSpec, block: str, operands: list[str]) -> str:
    """Two neighbouring numbers are one register."""
    registers = ",".join(["=r"] + ["r"] * len(operands))
    return (
        f'v = tl.inline_asm_elementwise({block}, "{registers}", [{", ".join(operands)}], '
        f"dtype={TL[spec.x]}, is_pure=True, pack=2)"
    )


def _store(spec: GemmSpec, found: Walk, i: int) -> list[str]:
    ragged = spec.n % BLOCK_N or found.runs * found.codes != spec.k
    mask = f", mask=(rn[:, None] < {spec.n}) & (at < {spec.k})" if ragged else ""
    return [
        f"at = run * {found.codes} + {i * found.length} + rk[None, :]",
        f"tl.store(w + (row[:, None] * {spec.k} + at), v.to({TL[spec.x]}){mask})",
    ]
