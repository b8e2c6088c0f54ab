"""Values of whole kernels through Triton's interpreter, against float64: formats x schedules x shapes.

    linear 13x192 bf16 int4[g32,halves128] bias, "m8 n16 w4 s3 k2 sum", M = 5   ->   y within `tolerance`

Memory is poisoned: y and the workspace hold NaN or 3e4 before, x has NaN between its rows and behind its
last number, and what lies around y must not change. Every second row of x has four numbers only, so that one
lost or doubled product is far beyond the tolerance, which grows with the sum of their magnitudes.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitfold.codegen import GemmSpec, Schedule, Walk, scales, walk
from bitfold.formats import Codebook, Format, Quantized, Scale, affine, format
from bitfold.formats.granularity import Granularity
from bitfold.formats.layout import Halfwords

Interpret = Callable[..., dict[str, Any]]

# Text of the format without its layout, and the codes of a slice.
TEXTS = [
    ("int2[g32]", 16),
    ("int3[g64]", 16),
    ("int4[g128]", 32),
    ("int4", 32),
    ("int4[g64,e4m3]", 32),
    ("int4[unscaled]", 16),
    ("int6", 16),
    ("int8[g32,f32]", 32),
    ("int8[128x128]", 64),
    ("int8f6[g32,e8m0]", 16),
    ("uint2[g64,f16,zero:min]", 16),
    ("uint3[zero]", 16),
    ("uint4[g32,zero]", 32),
    ("uint4[g128,zero:float]", 16),
    ("uint4[tensor,zero]", 16),
    ("uint4[g48,f32,zero:min]", 16),
    ("mxfp4", 16),
    ("nvfp4", 16),
    ("float6_e2m3[16x32,f32]", 16),
    ("mxfp8", 16),
    ("float8_e4m3fn", 64),
    ("float8_e4m3fn[g64,e4m3,two_level]", 16),
    ("float8_e5m2fnuz", 32),
    ("float4_e2m1b30[g32,f32]", 16),
    ("nf4[g64]", 16),
    ("ternary", 32),
]
MORE = [
    ("int1[g32]", 16),
    ("int4[g16,f16]", 16),
    ("int4[tensor]", 16),
    ("int5[g32,f32]", 16),
    ("int7[g64,f16]", 16),
    ("uint1[g32,zero]", 16),
    ("uint8[g16,zero]", 16),
    ("mxfp6_e3m2", 32),
    ("float8_e5m2[g32]", 32),
    ("float5_e2m2[g64]", 16),
    ("ternary[g64,f16]", 16),
]


def laid_out(text: str, length: int) -> Format:
    bits = format(text).element.bits
    return format(text).with_layout(Halfwords(length * 16 // (bits & -bits)))


def codebooks() -> list[Format]:
    drawn = torch.Generator().manual_seed(2)
    found: list[Format] = []
    for size, length in ((16, 16), (11, 32), (7, 16), (200, 16)):
        table = Codebook(f"book{size}", tuple(torch.randn(size, generator=drawn).tolist()))
        span = length * 16 // (table.bits & -table.bits)
        found.append(Format(table, Scale(Granularity(1, 64), "bf16"), Halfwords(span)))
    return found


BOOKS = codebooks()
# Whole codes in units, as kernels have them today where halfwords would cut a code.
WHOLE = [format(text) for text in ("int3[g32,units256]", "mxfp4[units128s9]", "uint6[g32,zero,units128]")]
FORMATS = [laid_out(*pair) for pair in TEXTS] + BOOKS[:2] + WHOLE
ALL = FORMATS + [laid_out(*pair) for pair in MORE] + BOOKS[2:]


def lengths(f: Format) -> tuple[int, ...]:
    """K: the smallest, a ragged one below a run, a run, and two runs and a ragged one."""
    found = walk(f, 1 << 12)
    assert isinstance(found, Walk)
    cols = f.scale.granularity.cols if f.scale is not None else None
    if cols is None:
        return 1, found.codes - 3, found.codes, 2 * found.codes + 5
    run = -(-found.codes // cols) * cols
    more = 2 * found.codes // cols * cols + cols
    return cols, max(run - cols, cols), run, more


def rows(f: Format) -> tuple[int, ...]:
    block = f.scale.granularity.rows if f.scale is not None else None
    return (1, 13, 32) if block in (None, 1) else (block,) if block > 32 else (block, 3 * block)


@dataclass(frozen=True)
class Case:
    spec: GemmSpec
    schedule: Schedule
    m: int

    def __str__(self) -> str:
        return f"{self.spec} | {self.schedule} | M={self.m}"


def operands(case: Case, seed: int) -> tuple[Tensor, Quantized, Tensor | None]:
    """x, a view with NaN around its numbers; the weight, of uneven rows; a bias."""
    drawn = torch.Generator().manual_seed(seed)
    spec = case.spec
    weight = torch.randn(spec.n, spec.k, generator=drawn) * (0.5 + torch.arange(spec.n) % 3)[:, None]
    x = torch.randn(case.m, spec.k, generator=drawn).to(spec.dtype)
    for i in range(seed % 2, case.m, 2):
        kept = torch.randint(0, spec.k, (4,), generator=drawn)
        mask = torch.zeros(spec.k, dtype=torch.bool)
        mask[kept] = True
        x[i, ~mask] = 0
    memory = torch.full((case.m, spec.k + 8), float("nan"), dtype=spec.dtype)
    memory[:, : spec.k] = x
    bias = torch.randn(spec.n, generator=drawn).to(spec.dtype) if spec.bias else None
    return memory[:, : spec.k], spec.weight.quantize(weight), bias


def tolerance(case: Case, x: Tensor, q: Quantized, bias: Tensor | None, want: Tensor) -> Tensor:
    """How far y may be from float64, each [M, N]; u = 2**-24, a float32's rounding.

    sums      K products, exact in float32 (two 16-bit floats), at most K more terms (groups, parts of a
              split, offsets) and 32 for scales and bias: (2 K + 32) u sum |x| B. B bounds what is added:
              |w|, and with a zero point also the value times the scale and the offset before they cancel.
    weights   in the modes lane and float, and for tables, a weight is rounded to x's type: r |w| each, with
              r = 2**-11 for float16 and, since the interpreter truncates where a GPU rounds, a whole bf16
              ulp, 2**-7; below float16's normals 2**-24.
    result    the same r, and 2**-24, once.
    """
    spec, f = case.spec, case.spec.weight
    u, r = 2.0**-24, 2.0**-7 if spec.x == "bf16" else 2.0**-11
    least = 2.0**-24 if spec.x == "f16" else 0.0
    magnitude = x.double().abs()
    w = q.dequantize(torch.float64).abs()
    added = w.clone()
    if f.scale is not None and f.scale.zero != "none":
        middle = 2.0 ** (f.element.bits - 1)
        codes = f.unpack(q.codes, q.k)
        bare = replace(f.scale, zero="none")
        largest = torch.full_like(codes, (1 << f.element.bits) - 1)
        for these, times in ((codes, 2.0), (largest, 2 * middle / (2 * middle - 1))):
            product = affine.decode(f.element, bare, f.scale.granularity, these, q.params[:1])
            added += times * product.double().abs()
    bound = (2 * spec.k + 32) * u * (magnitude @ added.T)
    if bias is not None:
        bound += (2 * spec.k + 32) * u * bias.double().abs()
    if case.schedule.scale in ("lane", "float") or isinstance(f.element, Codebook):
        bound += r * (magnitude @ w.T) + least * magnitude.sum(-1, keepdim=True)
    return bound + r * (want.abs() + bound) + least


def check(interpret: Interpret, case: Case, seed: int = 0) -> None:
    x, q, bias = operands(case, seed)
    inputs = [x, *q.parts] if bias is None else [x, *q.parts, bias]
    told = interpret(spec=case.spec, schedule=case.schedule, inputs=inputs)
    y = told["y"]
    want = x.double() @ q.dequantize(torch.float64).T
    want = want if bias is None else want + bias.double()
    bound = tolerance(case, x, q, bias, want)
    error = (y.double() - want).abs()
    assert y.shape == (case.m, case.spec.n) and y.dtype == case.spec.dtype
    assert (error <= bound).all(), f"{case}: off by {(error / bound).max():.3g} tolerances"
    assert torch.equal(y, told["again"]), f"{case}: another answer in the second run"
    assert (told["locks"] == 0).all(), f"{case}: locks are left behind"
    assert told["guarded"], f"{case}: memory around y was written"


# --- which cases ------------------------------------------------------------------------------------------

AXES: dict[str, Sequence[Any]] = {
    "format": FORMATS,
    "x": ("bf16", "f16"),
    "scale": ("end", "lane", "sum", "float"),
    "block_m": (8, 16, 32),
    "block_n": (16, 32, 64),
    "split": (1, 2, 3),
    "joined": (1, 2),
    "k": range(4),
    "n": range(3),
    "m": (1, 5, 11),
    "bias": (False, True),
}


def made(row: Sequence[Any]) -> Case | None:
    """The case of one choice on each axis, None if there is no such kernel."""
    f, x, scale, block_m, block_n, split, joined, k, n, m, bias = row
    spec = GemmSpec(f, rows(f)[n % len(rows(f))], lengths(f)[k], x, bias)
    schedule = Schedule(block_m, block_n, split=split, scale=scale, joined=joined)
    return Case(spec, schedule, m) if schedule.obstacle(spec) is None else None


def cover() -> list[Case]:
    """Cases in which every pair of choices occurs that can: each new one holds an open pair, and is of a few
    that do the one with the most."""
    drawn = random.Random(0)
    names = list(AXES)
    wanted = [
        ((i, a), (j, b))
        for i, j in itertools.combinations(range(len(names)), 2)
        for a, b in itertools.product(range(len(AXES[names[i]])), range(len(AXES[names[j]])))
    ]
    drawn.shuffle(wanted)
    seen: set[tuple[tuple[int, int], tuple[int, int]]] = set()
    found = []
    for (i, a), (j, b) in wanted:
        if ((i, a), (j, b)) in seen:
            continue
        best: tuple[int, Case, set[Any]] | None = None
        for attempt in range(200):
            pick = [drawn.randrange(len(AXES[name])) for name in names]
            pick[i], pick[j] = a, b
            case = made([AXES[name][p] for name, p in zip(names, pick, strict=True)])
            if case is None:
                continue
            pairs = set(itertools.combinations(enumerate(pick), 2))
            if best is None or len(pairs - seen) > best[0]:
                best = len(pairs - seen), case, pairs
            if attempt > 20:
                break
        if best is not None:
            found.append(best[1])
            seen |= best[2]
    return found


def whole() -> Iterator[Case]:
    """Formats x types x modes x splits x lengths x blocks, the rest in turn."""
    blocks = [(8, 16), (16, 64), (32, 32)]
    product = itertools.product(ALL, AXES["x"], AXES["scale"], AXES["split"], range(4), blocks)
    for i, (f, x, scale, split, k, (block_m, block_n)) in enumerate(product):
        m = AXES["m"][i % 3]
        case = made((f, x, scale, block_m, block_n, split, 1, k, i // 3, m, i % 2 == 0))
        if case is not None:
            yield case


COVER = cover()
PIECES = 8


def test_the_cover_is_one() -> None:
    """Every format, type, mode, split and shape occurs, and with each format every split and every mode."""
    assert 100 < len(COVER) < 300
    for f in FORMATS:
        mine = [c for c in COVER if c.spec.weight == f]
        assert {c.schedule.split for c in mine} == {1, 2, 3}, f
        assert {c.spec.x for c in mine} == {"bf16", "f16"}, f
        modes = {mode for x in ("bf16", "f16") for mode in scales(GemmSpec(f, rows(f)[0], lengths(f)[3], x))}
        assert {c.schedule.scale for c in mine} == modes, f
        assert {c.spec.k for c in mine} == set(lengths(f)), f


@pytest.mark.parametrize("piece", range(PIECES))
def test_a_cover_of_all_pairs(interpret: Interpret, piece: int) -> None:
    for i, case in enumerate(COVER[piece::PIECES]):
        check(interpret, case, i)


@pytest.mark.slow
@pytest.mark.parametrize("f", ALL, ids=str)
def test_the_whole_product(interpret: Interpret, f: Format) -> None:
    cases = [case for case in whole() if case.spec.weight == f]
    assert len(cases) >= 40
    for i, case in enumerate(cases):
        check(interpret, case, i)


@given(
    f=st.sampled_from(ALL),
    m=st.integers(0, 20),
    n=st.integers(1, 40),
    k=st.integers(1, 300),
    x=st.sampled_from(["bf16", "f16"]),
    bias=st.booleans(),
    mode=st.integers(0, 2),
    split=st.integers(1, 4),
    block_m=st.sampled_from([8, 16, 32]),
    block_n=st.sampled_from([16, 32, 64]),
    seed=st.integers(0, 99),
)
@settings(max_examples=25)
def test_any_format_and_shape(
    interpret: Interpret,
    f: Format,
    m: int,
    n: int,
    k: int,
    x: str,
    bias: bool,
    mode: int,
    split: int,
    block_m: int,
    block_n: int,
    seed: int,
) -> None:
    granularity = f.scale.granularity if f.scale is not None else Granularity()
    n = -(-n // (granularity.rows or 1)) * (granularity.rows or 1)
    k = -(-k // (granularity.cols or 1)) * (granularity.cols or 1)
    spec = GemmSpec(f, n, k, x, bias)
    modes = scales(spec)
    found = walk(f, k)
    assert isinstance(found, Walk)
    split = min(split, found.runs)
    case = Case(spec, Schedule(block_m, block_n, split=split, scale=modes[mode % len(modes)]), m)
    check(interpret, case, seed)
