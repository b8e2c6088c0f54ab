"""The quantizing write through Triton's interpreter: the bits of `format.quantize`, in their place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import by_token

from bitfold.codegen.attention import AttentionSpec, cache_format, empty_cache, grouped
from bitfold.formats import Quantized

FORMATS = [
    ("int8[bf16]", "int8"), ("int4[g32]", "int4[bf16]"), ("int8f6[g32,e8m0]", "int8[tensor]"),
    ("uint4[g32,f16,zero]", "uint8[zero]"), ("int8[zero]", "int4[g64,narrow]"), ("mxfp4", "mxfp8[even]"),
    ("mxfp8[ceil]", "float4_e2m1[bf16]"), ("float8_e4m3fn[bf16]", "float8_e5m2[f16]"),
    ("float8_e4m3fn[tensor]", "float8_e4m3fnuz"), ("nf4[g32]", "float8_e5m2[unscaled]"),
]  # fmt: skip


def hard_rows(dim: int, dtype: torch.dtype) -> torch.Tensor:
    """[rows, dim]: random ones, ties, zeros, the smallest and largest numbers, one large number among small,
    infinity, NaN."""
    drawn = torch.Generator().manual_seed(5)
    top = torch.finfo(dtype).max
    x = torch.randn(12, dim, generator=drawn) * 2.0 ** torch.arange(-6, 6)[:, None]
    ramp = torch.arange(dim) - dim / 2
    rows = [
        torch.zeros(dim), torch.full((dim,), -0.0), torch.full((dim,), torch.finfo(dtype).tiny),
        torch.full((dim,), top), ramp, ramp * 0.5, (ramp / dim * 30).round() / 2, torch.linspace(0.1, 3, dim),
        torch.full((dim,), 1e-3).index_fill(0, torch.tensor([3]), 500.0),
        torch.ones(dim).index_fill(0, torch.tensor([1]), float("inf")),
        torch.ones(dim).index_fill(0, torch.tensor([2]), float("nan")),
    ]  # fmt: skip
    return torch.cat([x, torch.stack(rows)]).to(dtype)


def check(interpret: Any, spec: AttentionSpec, page: int = 0) -> None:
    rows = hard_rows(spec.dim, spec.dtype)
    count = len(rows) // 2 + 1
    both = torch.cat([rows, rows[:1]]).view(1, 2, count, spec.dim)
    k, v = both, both.flip(2)
    tokens = 2 * count
    # Backwards, one counted from the end, and one that is outside and is not written.
    at = torch.arange(count).flip(0)[None].clone()
    at[0, 0], at[0, 1] = -1, tokens + 64
    pages, entries = None, 1
    if page:
        entries = -(-tokens // page)
        pages = torch.arange(entries).flip(0)[None].to(torch.int32)
        at[0, 0] = tokens - 1 - entries * page
    cache = empty_cache(spec, entries, tokens)
    for name, part in zip(spec.parts, cache, strict=True):
        static = not grouped(spec.k if name[0] == "k" else spec.v)
        if static and name.endswith("scales"):
            part.copy_(torch.tensor([0.25, 1.5])[None, :, None, None])
        else:
            part.view(torch.uint8).fill_(0x55)
    told = interpret(what="write", spec=spec, cache=cache, k=k, v=v, positions=at, pages=pages)
    got = dict(zip(spec.parts, told["cache"], strict=True))
    places = [int(p) % (entries * page if page else tokens) for p in at[0]]
    written = [i for i in range(count) if i != 1]
    for (which, fmt), x in zip(spec.formats, (k, v), strict=True):
        given = None
        if fmt.scale is not None and not grouped(fmt):
            given = [got[f"{which}_scales"].expand(1, 2, count, 1).contiguous()]
        want = by_token(fmt).quantize(x, given)
        bad = ~x.isfinite().all(-1)[0]
        for name in fmt.parts:
            part = getattr(want, name)
            if name != "codes" and given is not None:
                continue
            held = fmt.turned(name, got[f"{which}_{name}"]).contiguous()
            if page:
                held = held[pages[0].long()].transpose(0, 1).flatten(1, 2)[None]
            mine = torch.stack([held[:, :, places[i]] for i in range(count)], 2)
            for i in written:
                # The sign of a NaN is the processor's affair.
                same = mine[0, :, i].contiguous().view(torch.uint8) == part[0, :, i].contiguous().view(
                    torch.uint8
                )
                assert same[~bad[:, i]].all(), f"{spec}: {which} {name} of row {i}"
                if name == "scales" and held.dtype.is_floating_point:
                    assert torch.equal(mine[0, :, i].isnan(), part[0, :, i].isnan())
            rest = [t for t in range(held.shape[2]) if t not in [places[i] for i in written]]
            assert (held[:, :, rest].view(torch.uint8) == 0x55).all(), f"{spec}: {which} {name} elsewhere"
        if given is None and bad.any():
            parts = [fmt.turned(name, got[f"{which}_{name}"]).contiguous() for name in fmt.parts]
            if page:
                parts = [p[pages[0].long()].transpose(0, 1).flatten(1, 2)[None] for p in parts]
            back = Quantized(fmt, spec.dim, *parts).dequantize()
            expected = want.dequantize()
            for i in written:
                assert torch.equal(back[:, :, places[i]].isnan(), expected[:, :, i].isnan())


@pytest.mark.parametrize(("k", "v"), FORMATS)
def test_bits_are_those_of_quantize(interpret: Any, k: str, v: str) -> None:
    check(interpret, AttentionSpec(4, 2, 64, "bf16", cache_format(k, 64), cache_format(v, 64)))


@pytest.mark.parametrize(("k", "v"), [FORMATS[1], FORMATS[5]])
def test_pages_and_float16(interpret: Any, k: str, v: str) -> None:
    check(interpret, AttentionSpec(2, 2, 64, "f16", cache_format(k, 64), cache_format(v, 64), page=8), page=8)


def test_padding_is_zero(interpret: Any) -> None:
    """Of rows of 96 numbers that take the room of 128."""
    check(
        interpret, AttentionSpec(2, 2, 96, "bf16", cache_format("uint4[zero]", 96), cache_format("int8", 96))
    )
