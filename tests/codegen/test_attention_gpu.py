"""On a GPU: the kernels' assembly against plain torch on the CPU, the write bit for bit, the same answer
twice, and a decode step through torch.compile and CUDA graphs."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn

from bitfold.codegen import CodegenError
from bitfold.codegen.attention import AttentionSpec, cache_format, empty_cache
from bitfold.codegen.attention_schedule import AttentionSchedule

pytestmark = pytest.mark.gpu

FORMATS = [
    "int8[bf16]", "int8", "int4[bf16]", "int4[g32]", "float8_e4m3fn", "float8_e5m2[f16]",
    "float8_e4m3fn[tensor]",
    "int8[tensor]", "mxfp8", "mxfp4", "uint4[zero]", "uint8[g64,zero]", "nf4[g32]", "float4_e2m1", "int6",
    "float8_e5m2[unscaled]", "float8_e4m3fnuz[bf16]", "int8[bf16,narrow]", "mxfp8[even]", "mxfp4[ceil]",
]  # fmt: skip


def filled(spec: AttentionSpec, entries: int, tokens: int) -> list[Tensor]:
    cache = empty_cache(spec, entries, tokens)
    for name, part in zip(spec.parts, cache, strict=True):
        if name.endswith("codes"):
            part.random_(0, 255)
    return cache


@pytest.mark.parametrize("index", range(len(FORMATS)))
def test_kernels_against_the_reference(index: int) -> None:
    from bitfold.codegen.triton.attention_build import attend, cache_write
    from bitfold.lowering.kv_cache.attention import attend_reference, cache_write_reference

    drawn = random.Random(index)
    texts = FORMATS[index], FORMATS[(index + 3) % len(FORMATS)]
    heads, kv_heads = drawn.choice([(8, 8), (8, 2), (6, 1), (32, 8)])
    batch, tokens, queries = drawn.choice([1, 3]), drawn.choice([1, 67, 515, 4099]), drawn.choice([1, 2, 5])
    page, mask, x = drawn.choice([0, 0, 16, 128]), drawn.choice(["none", "none", "bool", "float"]), "bf16"
    spec = AttentionSpec(heads, kv_heads, 128, x, *(cache_format(t, 128) for t in texts), mask, page)  # type: ignore[misc]
    shape = (batch, kv_heads, tokens, 128)
    sizes = torch.exp2(torch.randint(-4, 5, (batch, kv_heads, tokens, 1)))
    k, v = (torch.randn(shape) * sizes).to(spec.dtype), torch.randn(shape).to(spec.dtype)
    q = torch.randn(batch, queries, heads, 128, dtype=spec.dtype).transpose(1, 2)
    pages, entries, capacity = None, batch, tokens
    if page:
        each = -(-tokens // page)
        entries, capacity = batch * each, each * page
        pages = torch.randperm(entries).view(batch, each).to(torch.int32)
    here = filled(spec, entries, tokens)
    there = [part.cuda() for part in here]
    at = torch.arange(tokens)[None]
    cache_write_reference(here, k, v, at, pages, str(spec))
    table = None if pages is None else pages.cuda()
    cache_write(spec, there, k.cuda(), v.cuda(), at.cuda(), table)
    for name, mine, its in zip(spec.parts, here, there, strict=True):
        assert torch.equal(mine.view(torch.uint8), its.cpu().view(torch.uint8)), name
    limits = torch.randint(0, tokens + 1, (batch, queries))
    limits[0, -1] = tokens
    shown = {
        "none": None,
        "bool": torch.rand(batch, 1, queries, capacity) < 0.7,
        "float": torch.randn(1, heads, queries, capacity).to(spec.dtype),
    }[mask]
    want = attend_reference(q, here, limits, shown, pages, str(spec)).double()
    seen = None if shown is None else shown.cuda()
    for splits in (1, 3, None):
        schedules = [
            None,
            AttentionSchedule(16, 32, 2, 3, overlap=torch.cuda.get_device_capability() >= (9, 0)),
        ]
        for schedule in schedules:
            ys = [
                attend(spec, q.cuda(), there, limits.cuda(), seen, table, splits=splits, schedule=schedule)
                for _ in range(2)
            ]
            assert torch.equal(*ys), "another answer in the second run"
            error = (ys[0].cpu().double() - want).norm() / want.norm()
            # Weights and results are rounded to bf16, 2**-9 each, and so is the reference's result.
            assert error < 3 * 2.0**-8, f"{spec} {splits}: {error:.2g}"


class Step(nn.Module):
    """A write and an attention."""

    def __init__(self, spec: AttentionSpec, batch: int, tokens: int) -> None:
        super().__init__()
        self.text, self.names = str(spec), spec.parts
        for name, part in zip(spec.parts, empty_cache(spec, batch, tokens, "cuda"), strict=True):
            self.register_buffer(name, part)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, at: Tensor) -> Tensor:
        cache = [getattr(self, name) for name in self.names]
        torch.ops.bitfold.cache_write(cache, k, v, at[None], None, self.text)
        return torch.ops.bitfold.attend(q * 2, cache, (at + 1)[None], None, None, self.text) + 1


def test_a_decode_step_in_a_cuda_graph() -> None:
    spec = AttentionSpec(8, 2, 128, "bf16", cache_format("int8[bf16]", 128), cache_format("int4[g32]", 128))
    eager, other = Step(spec, 2, 400), Step(spec, 2, 400)
    compiled = torch.compile(other, fullgraph=True, mode="reduce-overhead")
    for i in range(8):
        q, k, v = (torch.randn(2, h, 1, 128, device="cuda", dtype=torch.bfloat16) for h in (8, 2, 2))
        at = torch.tensor([i * 37], device="cuda")
        with torch.inference_mode():
            assert torch.equal(compiled(q, k, v, at).clone(), eager(q, k, v, at))
    assert torch.equal(eager.k_codes, other.k_codes)


def test_unaligned_parts_are_refused() -> None:
    spec = AttentionSpec(2, 2, 128, "bf16", cache_format("int8", 128), cache_format("int8", 128))
    cache = empty_cache(spec, 1, 16, "cuda")
    cache[0] = torch.zeros(cache[0].numel() + 1, dtype=torch.uint8, device="cuda")[1:].view(cache[0].shape)
    q = torch.zeros(1, 2, 1, 128, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(CodegenError, match="start at a multiple of 16 bytes; clone it"):
        torch.ops.bitfold.attend(
            q, cache, torch.ones(1, 1, dtype=torch.int32, device="cuda"), None, None, str(spec)
        )
