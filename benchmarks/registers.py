"""Tried by hand: weights from memory to registers, without shared memory; and what zeroing counters costs.

In: a GPU. Out: `registers.json`: microseconds of int4[g128] at M of 1 and 8, as generated and by these two.

    PYTHONPATH=src python benchmarks/registers.py --out registers.json

`unrolled`: a program's warps share the sum over k, each reads its runs at once. `persistent`: programs stay
and read the codes of their next tile while they multiply those of this one. Rows of the generated kernel say
what its parts take with counters that are there (`shared`), or zeroed before each call (`own`).
docs/notes/gpu.md says what came of it: not faster, so no generator prints such kernels.
"""

import argparse
import itertools
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

D0 = gl.constexpr("""{
    .reg .b32 t0, kr0_1, kr0_2;
    mov.b32 kr0_1, 0x3F803F80;
    mov.b32 kr0_2, 0xC308C308;
    lop3.b32 t0, $1, 0x000F000F, 0x43084308, 0x6A;
    fma.rn.bf16x2 $0, t0, kr0_1, kr0_2;
}""")


def shifted(bits: int) -> Any:
    text = """{
    .reg .b32 t0, t1, kr0_1, kr0_2;
    mov.b32 kr0_1, 0x3F803F80;
    mov.b32 kr0_2, 0xC308C308;
    shr.b32 t0, $1, BITS;
    lop3.b32 t1, t0, 0x000F000F, 0x43084308, 0x6A;
    fma.rn.bf16x2 $0, t1, kr0_1, kr0_2;
}"""
    return gl.constexpr(text.replace("BITS", str(bits)))


D1, D2, D3 = shifted(8), shifted(4), shifted(12)


@gluon.jit
def product(u, s_0, s_1, x0, x1, x2, x3, total):
    a0 = gl.inline_asm_elementwise(D0, "=r,r", [u], dtype=gl.bfloat16, is_pure=True, pack=2)
    a1 = gl.inline_asm_elementwise(D1, "=r,r", [u], dtype=gl.bfloat16, is_pure=True, pack=2)
    a2 = gl.inline_asm_elementwise(D2, "=r,r", [u], dtype=gl.bfloat16, is_pure=True, pack=2)
    a3 = gl.inline_asm_elementwise(D3, "=r,r", [u], dtype=gl.bfloat16, is_pure=True, pack=2)
    z = gl.zeros_like(total)
    p = mma_v2(a0, x0, z)
    p = mma_v2(a1, x1, p)
    total += p * s_0.to(gl.float32)
    p = mma_v2(a2, x2, z)
    p = mma_v2(a3, x3, p)
    total += p * s_1.to(gl.float32)
    return total


@gluon.jit(do_not_specialize=["m"])
def unrolled(
    x,
    codes,
    scales,
    y,
    m,
    x_stride,
    N: gl.constexpr,
    K: gl.constexpr,
    BN: gl.constexpr,
    BM: gl.constexpr,
    W: gl.constexpr,
    MODE: gl.constexpr,
    OV: gl.constexpr,
    SN: gl.constexpr,
    SG: gl.constexpr,
):
    MMA: gl.constexpr = gl.NVMMADistributedLayout(
        version=[2, 0], warps_per_cta=[W, 1, 1], instr_shape=[1, 16, 8]
    )
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 8)
    B: gl.constexpr = gl.DotOperandLayout(1, MMA, 8)
    RUNS: gl.constexpr = K // 256
    PER: gl.constexpr = RUNS // W
    tile = gl.program_id(0)
    part_a = gl.arange(0, W, gl.SliceLayout(1, gl.SliceLayout(2, A)))
    rn = tile * BN + gl.arange(0, BN, gl.SliceLayout(0, gl.SliceLayout(2, A)))
    rk = gl.arange(0, 64, gl.SliceLayout(0, gl.SliceLayout(1, A)))
    part_b = gl.arange(0, W, gl.SliceLayout(1, gl.SliceLayout(2, B)))
    rkb = gl.arange(0, 64, gl.SliceLayout(0, gl.SliceLayout(2, B)))
    rm = gl.arange(0, BM, gl.SliceLayout(0, gl.SliceLayout(1, B)))
    # runs of a warp: interleaved, so that a program's warps read neighbouring bytes
    units = codes + (part_a[:, None, None] * 64 + rn[None, :, None] * (K // 4) + rk[None, None, :])
    xs = x + (part_b[:, None, None] * 256 + rm[None, None, :] * x_stride + rkb[None, :, None])
    here = (rm < m)[None, None, :]
    part_s = gl.arange(0, W, gl.SliceLayout(1, gl.SliceLayout(2, MMA)))
    rs = tile * BN + gl.arange(0, BN, gl.SliceLayout(0, gl.SliceLayout(2, MMA)))
    ss = scales + (part_s[:, None, None] * (2 * SG) + rs[None, :, None] * SN)
    total = gl.zeros([W, BN, BM], gl.float32, MMA)
    if OV == 2:
        gdc_launch_dependents()
    if MODE == 0:  # unrolled, the compiler orders
        if OV:
            gdc_wait()
        for run in gl.static_range(PER):
            u = gl.load(units + run * 64 * W, eviction_policy="evict_first")
            s_0 = gl.load(ss + (run * 2 * W) * SG)
            s_1 = gl.load(ss + (run * 2 * W + 1) * SG)
            x0 = gl.load(xs + run * 256 * W, mask=here, other=0.0)
            x1 = gl.load(xs + (run * 256 * W + 64), mask=here, other=0.0)
            x2 = gl.load(xs + (run * 256 * W + 128), mask=here, other=0.0)
            x3 = gl.load(xs + (run * 256 * W + 192), mask=here, other=0.0)
            total = product(u, s_0, s_1, x0, x1, x2, x3, total)
    else:  # rolled, codes MODE runs ahead, in registers
        u = gl.load(units, eviction_policy="evict_first")
        s_0 = gl.load(ss)
        s_1 = gl.load(ss + SG)
        if MODE == 2:
            v = gl.load(units + 64 * W, eviction_policy="evict_first")
            t_0 = gl.load(ss + 2 * W * SG)
            t_1 = gl.load(ss + (2 * W + 1) * SG)
        if OV:
            gdc_wait()
        for run in range(PER):
            ahead = gl.minimum(run + MODE, PER - 1)
            w = gl.load(units + ahead * (64 * W), eviction_policy="evict_first")
            w_0 = gl.load(ss + (ahead * (2 * W)) * SG)
            w_1 = gl.load(ss + (ahead * (2 * W) + 1) * SG)
            x0 = gl.load(xs + run * (256 * W), mask=here, other=0.0)
            x1 = gl.load(xs + (run * (256 * W) + 64), mask=here, other=0.0)
            x2 = gl.load(xs + (run * (256 * W) + 128), mask=here, other=0.0)
            x3 = gl.load(xs + (run * (256 * W) + 192), mask=here, other=0.0)
            total = product(u, s_0, s_1, x0, x1, x2, x3, total)
            if MODE == 2:
                u = v
                s_0 = t_0
                s_1 = t_1
                v = w
                t_0 = w_0
                t_1 = w_1
            else:
                u = w
                s_0 = w_0
                s_1 = w_1
    if OV == 1:
        gdc_launch_dependents()
    all = gl.sum(total, axis=0)
    L: gl.constexpr = gl.SliceLayout(0, MMA)
    on = tile * BN + gl.arange(0, BN, gl.SliceLayout(1, L))
    om = gl.arange(0, BM, gl.SliceLayout(0, L))
    gl.store(y + (om[None, :] * N + on[:, None]), all.to(gl.bfloat16), mask=(om < m)[None, :])


@gluon.jit
def load_x(xs, here, run, W: gl.constexpr):
    x0 = gl.load(xs + run * (256 * W), mask=here, other=0.0)
    x1 = gl.load(xs + (run * (256 * W) + 64), mask=here, other=0.0)
    x2 = gl.load(xs + (run * (256 * W) + 128), mask=here, other=0.0)
    x3 = gl.load(xs + (run * (256 * W) + 192), mask=here, other=0.0)
    return x0, x1, x2, x3


@gluon.jit(do_not_specialize=["m"])
def persistent(
    x,
    codes,
    scales,
    y,
    m,
    x_stride,
    N: gl.constexpr,
    K: gl.constexpr,
    BN: gl.constexpr,
    BM: gl.constexpr,
    W: gl.constexpr,
    PER: gl.constexpr,
    XR: gl.constexpr,
    OV: gl.constexpr,
    SN: gl.constexpr,
    SG: gl.constexpr,
):
    MMA: gl.constexpr = gl.NVMMADistributedLayout(
        version=[2, 0], warps_per_cta=[W, 1, 1], instr_shape=[1, 16, 8]
    )
    A: gl.constexpr = gl.DotOperandLayout(0, MMA, 8)
    B: gl.constexpr = gl.DotOperandLayout(1, MMA, 8)
    TILES: gl.constexpr = N // BN
    part_a = gl.arange(0, W, gl.SliceLayout(1, gl.SliceLayout(2, A)))
    rn = gl.arange(0, BN, gl.SliceLayout(0, gl.SliceLayout(2, A)))
    rk = gl.arange(0, 64, gl.SliceLayout(0, gl.SliceLayout(1, A)))
    part_b = gl.arange(0, W, gl.SliceLayout(1, gl.SliceLayout(2, B)))
    rkb = gl.arange(0, 64, gl.SliceLayout(0, gl.SliceLayout(2, B)))
    rm = gl.arange(0, BM, gl.SliceLayout(0, gl.SliceLayout(1, B)))
    units = codes + (part_a[:, None, None] * 64 + rn[None, :, None] * (K // 4) + rk[None, None, :])
    xs = x + (part_b[:, None, None] * 256 + rm[None, None, :] * x_stride + rkb[None, :, None])
    here = (rm < m)[None, None, :]
    part_s = gl.arange(0, W, gl.SliceLayout(1, gl.SliceLayout(2, MMA)))
    rs = gl.arange(0, BN, gl.SliceLayout(0, gl.SliceLayout(2, MMA)))
    ss = scales + (part_s[:, None, None] * (2 * SG) + rs[None, :, None] * SN)
    L: gl.constexpr = gl.SliceLayout(0, MMA)
    on = gl.arange(0, BN, gl.SliceLayout(1, L))
    om = gl.arange(0, BM, gl.SliceLayout(0, L))
    tile = gl.program_id(0)
    grid = gl.num_programs(0)
    u = gl.load(units + tile * (BN * (K // 4)), eviction_policy="evict_first")
    s_0 = gl.load(ss + tile * (BN * SN))
    s_1 = gl.load(ss + (tile * (BN * SN) + SG))
    if PER == 2:
        v = gl.load(units + (tile * (BN * (K // 4)) + 64 * W), eviction_policy="evict_first")
        t_0 = gl.load(ss + (tile * (BN * SN) + 2 * W * SG))
        t_1 = gl.load(ss + (tile * (BN * SN) + (2 * W + 1) * SG))
    if OV:
        gdc_wait()
    if OV == 2:
        gdc_launch_dependents()
    if XR:
        x0, x1, x2, x3 = load_x(xs, here, 0, W)
        if PER == 2:
            y0, y1, y2, y3 = load_x(xs, here, 1, W)
    while tile < TILES:
        ahead = gl.minimum(tile + grid, TILES - 1)
        n_u = gl.load(units + ahead * (BN * (K // 4)), eviction_policy="evict_first")
        n_0 = gl.load(ss + ahead * (BN * SN))
        n_1 = gl.load(ss + (ahead * (BN * SN) + SG))
        if PER == 2:
            n_v = gl.load(units + (ahead * (BN * (K // 4)) + 64 * W), eviction_policy="evict_first")
            m_0 = gl.load(ss + (ahead * (BN * SN) + 2 * W * SG))
            m_1 = gl.load(ss + (ahead * (BN * SN) + (2 * W + 1) * SG))
        total = gl.zeros([W, BN, BM], gl.float32, MMA)
        if not XR:
            x0, x1, x2, x3 = load_x(xs, here, 0, W)
        total = product(u, s_0, s_1, x0, x1, x2, x3, total)
        if PER == 2:
            if not XR:
                y0, y1, y2, y3 = load_x(xs, here, 1, W)
            total = product(v, t_0, t_1, y0, y1, y2, y3, total)
        all = gl.sum(total, axis=0)
        gl.store(
            y + (om[None, :] * N + (tile * BN + on)[:, None]), all.to(gl.bfloat16), mask=(om < m)[None, :]
        )
        u = n_u
        s_0 = n_0
        s_1 = n_1
        if PER == 2:
            v = n_v
            t_0 = m_0
            t_1 = m_1
        tile += grid
    if OV == 1:
        gdc_launch_dependents()


SHAPES = [(28672, 4096), (4096, 4096), (4096, 14336), (8192, 8192)]
Variant = tuple[str, int, int, int, int, int, int, int]
"""(kind, BN, BM, warps, MODE or PER, XR, overlap, programs; 0 for one a tile)."""


def run(v: Variant, n: int, k: int, x: Any, codes: Any, scales: Any, y: Any, warm: bool = False) -> Any:
    kind, bn, bm, w, a, b, ov, g = v
    fn = unrolled if kind == "unrolled" else persistent
    const = {"N": n, "K": k, "BN": bn, "BM": bm, "W": w, "OV": ov, "SN": 1, "SG": n, "num_warps": w}
    const |= {"launch_pdl": True} if ov else {}
    const |= {"MODE": a} if kind == "unrolled" else {"PER": a, "XR": b}
    if warm:
        bf16 = torch.bfloat16
        fn.warmup(bf16, torch.int16, bf16, bf16, 2, k, grid=(1,), **const)
        return None
    fn[(g or n // bn,)](x, codes, scales, y, x.shape[0], x.stride(0), **const)
    return y


def warm(job: tuple[int, int, Variant]) -> None:
    n, k, v = job
    run(v, n, k, None, None, None, None, True)


def variants(n: int, k: int) -> list[Variant]:
    found: list[Variant] = []
    if k == 4096:
        for ov, (bn, w, a, b), g in itertools.product(
            (0, 1, 2),
            ((16, 16, 1, 1), (32, 16, 1, 1), (16, 8, 2, 0), (16, 8, 2, 1), (32, 8, 2, 0)),
            (132, 264),
        ):
            if n // bn >= g:
                found.append(("persistent", bn, 8, w, a, b, ov, g))
    for ov, bn, w in itertools.product((0, 1), (16, 32, 64), (2, 4, 8)):
        if (k // 256) % w == 0 and bn * (k // 256) // w <= 512:
            found.append(("unrolled", bn, 8, w, 0, 0, ov, 0))
    return found


def main() -> None:
    from bitfold.codegen import GemmSpec, choose
    from bitfold.codegen.timing import microseconds
    from bitfold.codegen.trial import Trial, Weights
    from bitfold.codegen.triton.build import grid, launch, workspace_size

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("registers.json"))
    given = parser.parse_args()
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(warm, [(n, k, v) for n, k in SHAPES for v in variants(n, k)]))
    rows: list[dict[str, Any]] = []
    for n, k in SHAPES:
        spec = GemmSpec.parse(f"linear {n}x{k} bf16 int4[g128,halves256]")
        weights = Weights.of(spec)
        for m in (1, 8):
            trial = Trial.of(weights, m)
            y = torch.empty(m, n, device="cuda", dtype=torch.bfloat16)
            base = choose(spec, m)
            rows.append(
                {"n": n, "k": k, "m": m, "v": str(base), "us": microseconds(trial.calls(str(base)), 9)}
            )
            for overlap, split in itertools.product((0, 1), (4, 6)) if base.split > 1 else ():
                one = replace(base, overlap=overlap, split=split)
                programs = grid(spec, one, m)
                room = (
                    torch.empty(workspace_size(spec, one, m), device="cuda"),
                    torch.zeros(programs[0] * programs[2], dtype=torch.int32, device="cuda"),
                )
                zeroed = [partial(zeroing, spec, one, [*trial.first, *c], y, room) for c in weights.copies]
                kept = [
                    partial(launch, spec, one, [*trial.first, *c], out=y, workspace=room)
                    for c in weights.copies
                ]
                row = {"n": n, "k": k, "m": m, "v": str(one)}
                rows.append(row | {"shared": microseconds(kept, 9), "own": microseconds(zeroed, 9)})
            for v in variants(n, k):
                y.fill_(float("nan"))
                calls = [
                    partial(run, v, n, k, trial.first[0], c[0].view(torch.int16), c[1], y)
                    for c in weights.copies
                ]
                error = trial.error(calls)
                bad = trial.problem(error, calls)
                us = None if bad else microseconds(calls, 7)
                rows.append({"n": n, "k": k, "m": m, "v": v, "us": us, "err": error, "bad": bad})
    versions = {"card": torch.cuda.get_device_name(), "torch": torch.__version__}
    given.out.write_text(json.dumps({**versions, "rows": rows}, indent=1) + "\n")
    for n, k in SHAPES:
        mine = [row for row in rows if (row["n"], row["k"], row["m"]) == (n, k, 1)]
        for row in sorted(mine, key=lambda row: row.get("us") or row.get("shared") or 1e9)[:6]:
            print(n, k, row)


def zeroing(spec: Any, schedule: Any, inputs: Any, y: Any, room: Any) -> Any:
    from bitfold.codegen.triton.build import launch

    room[1].zero_()
    return launch(spec, schedule, inputs, out=y, workspace=room)


if __name__ == "__main__":
    main()
