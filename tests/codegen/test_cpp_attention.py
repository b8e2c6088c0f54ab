"""Attention's C++ kernels against float64: the cases of the Triton ones, in every kind of vectors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import attention_cases as cases
import pytest
import torch
from attention_cases import Case
from test_attention import COVER, FAST, FORMATS, SHAPES

from bitfold.codegen.cpp.attention import source
from bitfold.codegen.cpp.attention_build import know_attention
from bitfold.codegen.cpp.vectors import Vectors, runnable, widest
from bitfold.lowering.kv_cache.attention import attend_reference

# Those that tests of values do not go through anyway. Tiles are none of attention's.
OTHERS = [one for one in runnable() if one != widest() and not one.tiles] or [widest()]


def attend(case: Any, given: Any, vectors: Vectors | None = None) -> torch.Tensor:
    know_attention([case.spec], vectors)
    found: torch.Tensor = torch.ops.bitfold.attend_few(
        given.q, given.cache, given.limits, given.mask, given.pages, str(case.spec)
    )
    return found


def check(case: Any, seed: int = 0, vectors: Vectors | None = None) -> None:
    given = cases.operands(case, seed)
    want, bound = cases.answer(case, given)
    error = (attend(case, given, vectors).double() - want).abs()
    assert (error <= bound).all(), f"{case}: off by {(error / bound).max():.3g} tolerances"


@pytest.mark.parametrize("index", range(FAST))
def test_some_of_a_cover_of_all_pairs(index: int) -> None:
    """One for each format of K, every second in float32; all of them are in the slow test."""
    mine = [case for case, _, _ in COVER if case.k == FORMATS[index] and 1 < case.tokens < 64]
    case = mine[index % len(mine)]
    check(replace(case, x="f32") if index % 2 else case, seed=index)


@pytest.mark.slow
@pytest.mark.parametrize("piece", range(12))
def test_a_cover_of_all_pairs(piece: int) -> None:
    chosen = [case for case, _, _ in COVER[piece::12]]
    know_attention(case.spec for case in chosen)
    for i, case in enumerate(chosen):
        check(case, seed=i)


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_sizes_of_heads(case: Any) -> None:
    """Padded rows, several runs a row, more queries than are taken together, a scale of its own."""
    check(case)


@pytest.mark.parametrize("vectors", OTHERS, ids=str)
def test_in_every_kind_of_vectors(vectors: Vectors) -> None:
    check(
        Case("int4[g32]", "float8_e4m3fn[bf16]", x="f32", dim=96, limits="causal", queries=3), vectors=vectors
    )
    check(Case("mxfp4", "uint4[zero]", x="f16", page=8, mask="float"), vectors=vectors)


def test_nan_reaches_the_queries_that_see_it_and_no_others() -> None:
    case = Case("int8[bf16]", "int8[bf16]", tokens=20, queries=2, limits="causal", batch=1)
    for part in (1, 3):
        given = cases.operands(case)
        given.cache[part][0, 0, 19] = float("nan")
        wrong = attend(case, replace(given, limits=torch.tensor([[19, 20]]))).isnan()
        # Heads 0 and 1 read head 0 of the cache; a value's NaN times a weight of 0 is one, as in torch.
        assert wrong[0, :2, 1].all() and not wrong[0, 2:].any()
        assert not wrong[0, :2, 0].any() or part == 3


def test_the_operator_is_the_kernel_for_a_few_queries_and_torch_for_many() -> None:
    for queries in (2, 40):
        case = Case("int8[bf16]", "int4[g32]", x="f32", queries=queries, tokens=64, limits="full", batch=1)
        given = cases.operands(case)
        y = torch.ops.bitfold.attend(given.q, given.cache, given.limits, None, None, str(case.spec))
        right = attend_reference(given.q, given.cache, given.limits, None, None, str(case.spec))
        torch.testing.assert_close(y, right)


def test_operands_of_another_size_are_refused() -> None:
    case = Case("int8[bf16]", "int8[bf16]", x="f32")
    given = cases.operands(case)
    with pytest.raises(RuntimeError, match="takes a cache of 4 tensors"):
        attend(case, replace(given, cache=given.cache[:3]))
    with pytest.raises(RuntimeError, match="takes q"):
        attend(case, replace(given, q=given.q[:, :2]))
    with pytest.raises(RuntimeError, match="the cache has 2 entries and the call 1"):
        attend(case, replace(given, q=given.q[:1]))
    with pytest.raises(RuntimeError, match="limits are integers of two dimensions"):
        attend(case, replace(given, limits=given.limits[0]))
    changes: list[tuple[int, Any]] = [
        (0, lambda part: part[:, :1]),
        (0, lambda part: part[..., :-2]),
        (0, lambda part: part.float()),
        (1, lambda part: part[:, :, :1]),
        (1, lambda part: part.half()),
        (2, lambda part: part[:, :, :5]),
        (3, lambda part: part[:1]),
    ]
    for at, change in changes:
        cache = list(given.cache)
        cache[at] = change(cache[at]).contiguous()
        with pytest.raises(RuntimeError, match=f"part {at} of the cache has not the sizes"):
            attend(case, replace(given, cache=cache))


@pytest.mark.parametrize("page", [-1, 10, 2**40])
def test_a_page_that_is_not_there_is_not_read(page: int) -> None:
    """Where a query looks; the table may say anything behind."""
    case = Case("int8[bf16]", "int8[bf16]", x="f32", page=8, tokens=37, limits="full")
    given = cases.operands(case)
    assert given.pages is not None and int(given.pages.max()) == 9
    attend(case, given)
    pages = given.pages.long()
    pages[1, 4] = page
    with pytest.raises(RuntimeError, match=f"there is no page {page} in a cache of 10"):
        attend(case, replace(given, pages=pages))
    attend(case, replace(given, pages=pages, limits=torch.full((1, 1), 32)))


def test_the_source_reads_units_of_the_layout() -> None:
    text = source(Case("int8[bf16]", "nf4[g32]", x="f32").spec)
    assert "const uint32_t code = (uint32_t(units[0 + i]) >> 8 & 255);" in text
    assert "room[0 + i] = float((int32_t(code << 24) >> 24)) * scale0;" in text
    assert "room[32 + i] = k_v[code] * scale1;" in text and "INFINITY" not in text
