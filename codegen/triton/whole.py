"""A weight decoded as a whole, for a product with so many rows that the library's is faster.

In: a spec. Out: source of a kernel that writes the weight [n, k] in x's dtype, bit for bit what `dequantize`
gives: computed in float32 as the reference does, rounded once.

    linear 4096x4096 bf16 int4[g128,halves256]   ->   one program for 64 rows and one run of 256 codes
"""

from __future__ import annotations

from ..schedule import Schedule
from ..slices import Walk, walk
from ..spec import CodegenError, GemmSpec
from .scales import Scales
from .source import TL, Lines
from .values import code_line, value_lines

BLOCK_N = 64


def whole_source(spec: GemmSpec) -> str:
    """The kernel's module as text."""
    found = walk(spec.weight, spec.k)
    if not isinstance(found, Walk):
        raise CodegenError(found.reason)
    lane, scale = TL[spec.x], spec.weight.scale
    scales = Scales(spec, Schedule(16, BLOCK_N, scale="float"), found, lane)
    out = Lines()
    out.add(f'"""decode {spec}"""', "import triton", "import triton.language as tl", "", *scales.function())
    out.add("", "@triton.jit")
    with out.indent("def kernel(codes, scales, zeros, level, table, w, SN: tl.constexpr, SG: tl.constexpr):"):
        out.add(
            "tile, run = tl.program_id(0), tl.program_id(1)",
            f"rn = tile * {BLOCK_N} + tl.arange(0, {BLOCK_N})",
            f"row = tl.minimum(rn, {spec.n - 1})",
            f"rk = tl.arange(0, {found.length})",
            f"units = codes + row[:, None] * {found.units * found.runs} + run * {found.units} + rk[None, :]",
        )
        for i, start in enumerate(found.loads):
            out.add(f"u{i} = tl.load(units + {start}).to(tl.uint16, bitcast=True).to(tl.int32)")
        if scales.groups:
            out.add(*scales.carried("run"))
        elif scale is not None:
            out.add(*scales.load("s_0", "z_0", "0"))
        for i, takes in enumerate(found.slices):
            out.add(code_line(takes, [f"u{j}" for j in range(len(found.loads))], "c"))
            out.add(*value_lines(spec.weight.element, "c", "v"))
            out.add(f"v = {scales.affine('v', scales.group(i))}")
            out.add(
                f"at = run * {found.codes} + {i * found.length} + rk[None, :]",
                f"place = w + row[:, None].to(tl.int64) * {spec.k} + at",
                f"tl.store(place, v.to({lane}), mask=(rn[:, None] < {spec.n}) & (at < {spec.k}))",
            )
    return "\n".join(out.text) + "\n"
