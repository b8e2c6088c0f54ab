"""What attention over a quantized cache takes: operands are checked, in one sentence, before any write.

In: a spec and tensors. Out: how many tokens an entry of the cache can have, or a CodegenError.

    check_cache(spec, cache, batch=1, pages=None)   ->   8192
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .attention import AttentionSpec, cache_shapes
from .spec import CodegenError


def check_cache(spec: AttentionSpec, cache: Sequence[Tensor], batch: int, pages: Tensor | None) -> int:
    """Tokens that an entry can have; one sentence if these tensors are no cache of the spec."""
    if len(cache) != len(spec.parts):
        raise CodegenError(f"a cache of {spec} is {', '.join(spec.parts)}, not {len(cache)} tensors")
    if (pages is not None) != bool(spec.page):
        raise CodegenError(f"{spec} takes {'a table of pages' if spec.page else 'no table of pages'}")
    codes = cache[0]
    if codes.ndim != 4:
        raise CodegenError(
            f"codes of a cache are [B, Hkv, S, bytes] or [pages, Hkv, page, bytes], not {tuple(codes.shape)}"
        )
    count, tokens = codes.shape[0], codes.shape[2]
    wanted = cache_shapes(spec, count, tokens)
    for (name, (shape, dtype)), part in zip(wanted.items(), cache, strict=True):
        if tuple(part.shape) != shape or part.dtype != dtype:
            raise CodegenError(
                f"{name} of a cache of {spec} is {dtype} {list(shape)}, not {part.dtype} {list(part.shape)}"
            )
        if not part.is_contiguous() or (part.is_cuda and part.data_ptr() % 16):
            raise CodegenError(f"{name} must be contiguous and start at a multiple of 16 bytes; clone it")
    if tokens * max(shape[3] for shape, _ in wanted.values()) >= 2**31:
        raise CodegenError(f"{tokens} tokens a head are past 32-bit addresses; use a paged cache")
    if pages is None:
        if count != batch:
            raise CodegenError(f"the cache has {count} entries and the call {batch}")
        return tokens
    if pages.ndim != 2 or pages.shape[0] != batch or pages.dtype not in (torch.int32, torch.int64):
        raise CodegenError(
            f"the table of pages is integers [{batch}, pages], not {pages.dtype} {list(pages.shape)}"
        )
    if pages.stride(1) != 1:
        raise CodegenError("the rows of the table of pages must be contiguous; call pages.contiguous()")
    if pages.shape[1] * spec.page >= 2**31:
        raise CodegenError(f"{pages.shape[1]} pages of {spec.page} tokens are past 32-bit addresses")
    return pages.shape[1] * spec.page


def check_queries(spec: AttentionSpec, q: Tensor, limits: Tensor, mask: Tensor | None, tokens: int) -> None:
    """One sentence if these are no operands of the spec."""
    if q.ndim != 4 or q.shape[1] != spec.heads or q.shape[3] != spec.dim or q.dtype != spec.dtype:
        raise CodegenError(
            f"{spec} takes q [B, {spec.heads}, T, {spec.dim}] in {spec.x}, not {q.dtype} {list(q.shape)}"
        )
    batch, queries = q.shape[0], q.shape[2]
    if limits.dtype not in (torch.int32, torch.int64) or tuple(limits.shape) not in (
        (batch, queries), (batch, 1), (1, queries), (1, 1)
    ):  # fmt: skip
        raise CodegenError(
            f"limits are integers [{batch} or 1, {queries} or 1], not {limits.dtype} {list(limits.shape)}"
        )
    if (mask is not None) != (spec.mask != "none"):
        raise CodegenError(f"{spec} takes {'a mask' if spec.mask != 'none' else 'no mask'}")
    if mask is not None:
        wanted = (batch, spec.heads, queries, tokens)
        fits = mask.ndim == 4 and all(a in (1, b) for a, b in zip(mask.shape[:3], wanted[:3], strict=True))
        if not fits or mask.shape[3] != tokens:
            raise CodegenError(
                f"a mask is [{batch} or 1, {spec.heads} or 1, {queries} or 1, {tokens}], not "
                f"{list(mask.shape)}"
            )
        if (mask.dtype == torch.bool) != (spec.mask == "bool"):
            raise CodegenError(f"{spec} takes a mask of {spec.mask}, not of {mask.dtype}")


def check_tokens(spec: AttentionSpec, k: Tensor, v: Tensor, positions: Tensor) -> None:
    """One sentence if these are no new tokens of the spec's cache."""
    for name, x in (("k", k), ("v", v)):
        if x.ndim != 4 or x.shape[1] != spec.kv_heads or x.shape[3] != spec.dim or x.dtype != spec.dtype:
            raise CodegenError(
                f"{spec} takes {name} [B, {spec.kv_heads}, T, {spec.dim}] in {spec.x}, not {x.dtype} "
                f"{list(x.shape)}"
            )
    if k.shape != v.shape:
        raise CodegenError(f"k and v are of one shape, not {list(k.shape)} and {list(v.shape)}")
    batch, _, new, _ = k.shape
    if positions.dtype not in (torch.int32, torch.int64) or tuple(positions.shape) not in (
        (batch, new), (1, new)
    ):  # fmt: skip
        raise CodegenError(
            f"positions are integers [{batch} or 1, {new}], not {positions.dtype} {list(positions.shape)}"
        )


def fresh(q: Tensor) -> Tensor:
    """Memory for y: [B, Hq, T, D] with a token's heads side by side, as the next product wants them."""
    batch, heads, queries, dim = q.shape
    return q.new_empty(batch, queries, heads, dim).transpose(1, 2)
