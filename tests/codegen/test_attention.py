"""Values of the attention kernels through Triton's interpreter against float64: a pairwise cover of formats,
granularities, heads, lengths, masks and pages, and queries that see one token each."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

import attention_cases as cases
import pytest
import torch
from attention_cases import Case

from bitfold.codegen import CodegenError
from bitfold.codegen.attention import AttentionSpec, cache_format
from bitfold.codegen.attention_schedule import AttentionSchedule, choose_attention, choose_splits
from bitfold.formats import format

Interpret = Callable[..., dict[str, Any]]


def check(interpret: Interpret, case: Any, schedule: AttentionSchedule, splits: int, seed: int = 0) -> None:
    given = cases.operands(case, seed)
    want, bound = cases.answer(case, given)
    told = interpret(
        what="attend", runs=[{"schedule": schedule, "splits": splits}], spec=case.spec, q=given.q,
        cache=given.cache, limits=given.limits, mask=given.mask, pages=given.pages,
    )  # fmt: skip
    (y,) = told["y"]
    error = (y.double() - want).abs()
    assert (error <= bound).all(), f"{case}: off by {(error / bound).max():.3g} tolerances"
    assert told["guarded"], f"{case}: memory around y was written"


FORMATS = [
    "int8[bf16]", "int8", "int8[g32,f16]", "int8[tensor]", "int4[bf16]", "int4[g32]", "uint8[g64,zero]",
    "uint4[zero]", "uint4[g32,f16,zero]", "float8_e4m3fn[bf16]", "float8_e4m3fn[tensor]",
    "float8_e5m2[unscaled]",
    "float8_e4m3fnuz[g64]", "float4_e2m1[g16]", "mxfp8", "mxfp4", "nf4[g32]",
]  # fmt: skip
AXES: dict[str, Sequence[Any]] = {
    "k": FORMATS,
    "v": FORMATS,
    "x": ("bf16", "f16"),
    "heads": ((4, 4), (4, 2), (6, 1), (9, 1)),
    "tokens": (1, 16, 37, 64),
    "queries": (1, 2, 3),
    "page": (0, 8, 16, 32),
    "mask": ("none", "bool", "float"),
    "limits": ("full", "ragged", "causal"),
    "schedule": ("r8 b16 w4 s3", "r16 b16 w4 s3", "r8 b32 w4 s3"),
    "splits": (1, 2, 3),
}


def made(row: Sequence[Any]) -> tuple[Any, AttentionSchedule, int] | None:
    """The case of one choice on each axis, None if there is none."""
    k, v, x, (heads, kv_heads), tokens, queries, page, mask, limits, schedule, splits = row
    batch = 2 if kv_heads < 4 else 1
    case = Case(k, v, x, batch, heads, kv_heads, 64, tokens, queries, page, mask, limits)
    try:
        assert case.spec
    except CodegenError:
        return None
    return case, AttentionSchedule.parse(schedule), splits


def cover() -> list[tuple[Any, AttentionSchedule, int]]:
    """Cases in which every pair of choices occurs that can, found greedily."""
    drawn = random.Random(0)
    sizes = [len(axis) for axis in AXES.values()]
    pairs = itertools.combinations(range(len(sizes)), 2)
    wanted = [((i, a), (j, b)) for i, j in pairs for a in range(sizes[i]) for b in range(sizes[j])]
    drawn.shuffle(wanted)
    seen: set[Any] = set()
    found = []
    for pair in wanted:
        if pair in seen:
            continue
        best: tuple[int, Any, set[Any]] | None = None
        for _ in range(20):
            pick = [drawn.randrange(size) for size in sizes]
            for axis, choice in pair:
                pick[axis] = choice
            one = made([axis[p] for axis, p in zip(AXES.values(), pick, strict=True)])
            if one is not None:
                mine = set(itertools.combinations(enumerate(pick), 2))
                if best is None or len(mine - seen) > best[0]:
                    best = len(mine - seen), one, mine
        if best is not None:
            found.append(best[1])
            seen |= best[2]
    return found


COVER = cover()
FAST = len(FORMATS)


def test_the_cover_holds_every_format() -> None:
    for text in FORMATS:
        assert any(case.k == text for case, _, _ in COVER) and any(case.v == text for case, _, _ in COVER)
    assert len(COVER) > len(FORMATS) ** 2


@pytest.mark.parametrize("index", range(FAST))
def test_some_of_a_cover_of_all_pairs(interpret: Interpret, index: int) -> None:
    """One for each format of K; all of them are in the slow test."""
    mine = [one for one in COVER if one[0].k == FORMATS[index] and 1 < one[0].tokens < 64]
    check(interpret, *mine[index % len(mine)], seed=index)


@pytest.mark.slow
@pytest.mark.parametrize("piece", range(12))
def test_a_cover_of_all_pairs(interpret: Interpret, piece: int) -> None:
    for i, one in enumerate(COVER[piece::12]):
        check(interpret, *one, seed=i)


SHAPES = [
    Case("int8[bf16]", "int4[g32]", dim=128, heads=8, kv_heads=1, tokens=97, limits="causal", queries=2),
    Case("int8", "int4", dim=96, heads=2, kv_heads=2, tokens=19),
    Case("int4[g16]", "int8", x="f16", dim=256, heads=3, kv_heads=1, tokens=33, scale=0.3),
    Case("int6", "float8_e5m2[unscaled]", dim=128, tokens=21),
    Case("float8_e5m2", "int8[tensor]", dim=32, tokens=67, limits="full", queries=5),
]


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_sizes_of_heads(interpret: Interpret, case: Any) -> None:
    """Padded rows, several runs a row, more rows than a program takes, a scale of its own."""
    check(interpret, case, AttentionSchedule(8, 32), 2)


@pytest.mark.parametrize("page", [0, pytest.param(8, marks=pytest.mark.slow), 32])
def test_each_query_sees_one_token(interpret: Interpret, page: int) -> None:
    """Then y is that token's value, whichever it is: no token is taken for another."""
    case = Case(
        "int8[bf16]",
        "uint4[g32,zero]",
        batch=1,
        heads=2,
        kv_heads=1,
        queries=37,
        mask="bool",
        page=page,
        limits="full",
    )
    given = cases.operands(case)
    assert given.mask is not None
    given.mask.zero_()
    given.mask[0, 0, torch.arange(37), torch.arange(37)] = True
    want, bound = cases.answer(case, given)
    schedule = AttentionSchedule(16, 16)
    runs = [{"schedule": schedule, "splits": splits} for splits in (1, 3)]
    told = interpret(
        what="attend", runs=runs, spec=case.spec, q=given.q, cache=given.cache, limits=given.limits,
        mask=given.mask, pages=given.pages,
    )  # fmt: skip
    assert torch.equal(want[0, 0], cases.values(case.spec.v, given.v, 64)[0, 0])
    for y in told["y"]:
        assert ((y.double() - want).abs() <= bound).all()


def test_entries_may_share_a_row_of_the_table(interpret: Interpret) -> None:
    case = Case("int8[bf16]", "int4[g32]", batch=1, tokens=37, page=16, limits="full")
    given = cases.operands(case)
    want, bound = cases.answer(case, given)
    assert given.pages is not None
    told = interpret(
        what="attend", runs=[{"schedule": AttentionSchedule(8, 16), "splits": 2}], spec=case.spec,
        q=given.q.expand(3, -1, -1, -1), cache=given.cache, limits=given.limits, mask=None,
        pages=given.pages.expand(3, -1),
    )  # fmt: skip
    assert ((told["y"][0].double() - want).abs() <= bound).all()


def test_nan_reaches_the_queries_that_see_it_and_no_others(interpret: Interpret) -> None:
    case = Case("int8[bf16]", "int8[bf16]", tokens=20, queries=2, limits="causal", batch=1)
    for part in (1, 3):
        given = cases.operands(case)
        given.cache[part][0, 0, 19] = float("nan")
        told = interpret(
            what="attend", runs=[{"schedule": AttentionSchedule(8, 16), "splits": 2}], spec=case.spec,
            q=given.q, cache=given.cache, limits=torch.tensor([[19, 20]]),
        )  # fmt: skip
        wrong = told["y"][0].isnan()
        # Heads 0 and 1 read head 0 of the cache; a value's NaN times a weight of 0 is one, as in torch.
        assert wrong[0, :2, 1].all() and not wrong[0, 2:].any()
        assert not wrong[0, :2, 0].any() or part == 3


# --- specs and schedules ---------------------------------------------------------------------------------


def test_text_goes_there_and_back() -> None:
    for one in [case.spec for case, _, _ in COVER[:40]] + [case.spec for case in SHAPES]:
        assert AttentionSpec.parse(str(one)) == one
    spec = Case("int8[bf16]", "int4[g32]", heads=8, kv_heads=2, dim=128, page=16, mask="bool", scale=0.5).spec
    assert str(spec) == (
        "attention 8/2x128 bf16 int8[bf16,halves128] int4[g32,halves128] mask:bool page:16 scale:0.5"
    )
    schedule = AttentionSchedule(16, 32, 2, 4, overlap=True)
    assert AttentionSchedule.parse(str(schedule)) == schedule


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("attention 8x128 bf16 int8 int8", "is no attention's text"),
        ("attention 8/3x128 bf16 int8[halves128] int8[halves128]", "8 query heads cannot share 3"),
        ("attention 8/2x128 f64 int8[halves128] int8[halves128]", "queries in bf16, f16, f32, not 'f64'"),
        (
            "attention 8/2x128 bf16 int8[halves128] int8[halves128] page:12",
            "a power of two of tokens, not 12",
        ),
        (
            "attention 8/2x128 bf16 int8[halves128] int8[halves128] mask:tree",
            "a mask is one of none, bool, float",
        ),
        ("attention 8/2x128 bf16 int8 int8[halves128]", "keys of 128 numbers cannot be cached as int8"),
        ("attention 8/2x128 bf16 int8[halves128] nvfp4[halves128]", "values of .* scales of a cache are f32"),
        ("attention 8/2x128 bf16 int3[halves256] int8[halves128]", "a row would be padded to 256 numbers"),
        ("attention 8/2x128 bf16 uint8[halves128] int8[halves128]", "unsigned codes need a zero point"),
        (
            "attention 8/2x128 bf16 int8[tensor,zero,halves128] int8[halves128]",
            "goes with a scale for each token",
        ),
        ("attention 8/2x128 bf16 int8[g96,halves64] int8[halves128]", "a group of 96 does not divide it"),
    ],
)
def test_what_no_kernel_takes_is_said(text: str, match: str) -> None:
    with pytest.raises(CodegenError, match=match):
        AttentionSpec.parse(text)


def test_layouts_of_caches() -> None:
    """Long slices, but padding is worse."""
    found = {
        (t, d): str(cache_format(t, d).layout)
        for t, d in (("int8", 128), ("int4", 128), ("int4[g16]", 128), ("int8", 96), ("int8", 256))
    }
    assert list(found.values()) == ["halves128", "halves128", "halves64", "halves32", "halves128"]
    assert cache_format(format("int8"), 128) == cache_format("int8", 128)


def test_splits_fill_the_gpu_and_follow_from_sizes_alone() -> None:
    spec = Case("int8[bf16]", "int8[bf16]", heads=32, kv_heads=8, dim=128).spec
    schedule = choose_attention(spec, 1)
    assert schedule.rows == 8 and choose_attention(spec, 16).rows == 64
    found = {
        (batch, tokens): choose_splits(spec, schedule, batch, 1, tokens)
        for batch, tokens in ((1, 8192), (1, 32768), (16, 8192), (16, 32768), (1, 100), (4096, 100), (1, 0))
    }
    assert list(found.values()) == [32, 64, 4, 4, 1, 1, 1]
    # No multiprocessor has more than 4 % above the mean.
    for (batch, tokens), splits in list(found.items())[1:4]:
        blocks = tokens // schedule.block
        busiest = -(-batch * 8 * splits // 132) * -(-blocks // splits)
        assert busiest <= 1.04 * batch * 8 * blocks / 132
