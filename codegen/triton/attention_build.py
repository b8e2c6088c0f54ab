"""Attention kernels from text to launch: operands checked, workspaces made, splits run and combined.

In: a spec, q, the parts of the cache, limits. Out: y [B, Hq, T, D].

    attend(spec, q, cache, limits)     ->   y, by one launch, or two where programs share a context
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..attention import AttentionSpec, cache_shapes
from ..attention_schedule import AttentionSchedule, choose_attention, choose_splits
from ..spec import CodegenError
from .attention import source, tables
from .build import module
from .cache_write import ROWS
from .cache_write import source as write_source


@lru_cache(maxsize=256)
def kernels(spec: AttentionSpec, schedule: AttentionSchedule, plain: bool = False) -> Any:
    """The module with `kernel` and `combine`."""
    return module(source(spec, schedule, plain=plain))


@lru_cache(maxsize=64)
def _table(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)


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
            raise CodegenError(
                f"{name} must be contiguous and start at a multiple of 16 bytes; clone it"
            )
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


def fresh(q: Tensor) -> Tensor:
    """Memory for y: [B, Hq, T, D] with a token's heads side by side, as the next product wants them."""
    batch, heads, queries, dim = q.shape
    return q.new_empty(batch, queries, heads, dim).transpose(1, 2)


def attend(
    spec: AttentionSpec,
    q: Tensor,
    cache: Sequence[Tensor],
    limits: Tensor,
    mask: Tensor | None = None,
    pages: Tensor | None = None,
    *,
    schedule: AttentionSchedule | None = None,
    splits: int | None = None,
    out: Tensor | None = None,
    plain: bool = False,
) -> Tensor:
    """softmax(q k^T scale + mask) v over the tokens below limits [B or 1, T or 1]; 0 where there is none."""
    tokens = check_cache(spec, cache, q.shape[0], pages)
    check_queries(spec, q, limits, mask, tokens)
    batch, _, queries, _ = q.shape
    y = fresh(q) if out is None else out
    if y.numel() == 0:
        return y
    if tokens == 0:
        return y.zero_()
    q = q if q.stride(3) == 1 else q.contiguous()
    mask = mask if mask is None or mask.stride(3) == 1 else mask.contiguous()
    schedule = choose_attention(spec, queries) if schedule is None else schedule
    if splits is None:
        splits = choose_splits(spec, schedule, batch, queries, tokens)
    rows, pairs = spec.group * queries, batch * spec.kv_heads
    partial, sums = y, y
    if splits > 1:
        partial = q.new_empty(pairs * splits * rows * spec.dim, dtype=torch.float32)
        sums = q.new_empty(pairs * splits * rows * 2, dtype=torch.float32)
    given = _arguments(spec, schedule, q, cache, limits, mask, pages, plain=plain)
    made = kernels(spec, schedule, plain)
    grid = (pairs, splits, -(-rows // schedule.rows))
    options = {"num_warps": schedule.warps, "num_stages": schedule.stages}
    made.kernel[grid](**given, y=y, partial=partial, sums=sums, splits=splits, **options)
    if splits > 1:
        late = {"launch_pdl": True} if schedule.overlap and not plain else {}
        width = max(1 << (splits - 1).bit_length(), 2)
        made.combine[pairs, rows](partial, sums, y, rows, splits, queries, SPLITS=width, num_warps=4, **late)
    return y


def _arguments(
    spec: AttentionSpec,
    schedule: AttentionSchedule,
    q: Tensor,
    cache: Sequence[Tensor],
    limits: Tensor,
    mask: Tensor | None,
    pages: Tensor | None,
    *,
    plain: bool,
) -> dict[str, Any]:
    """The kernel's arguments by name; q stands for tensors that this spec does not have."""
    parts = dict(zip(spec.parts, cache, strict=True))
    given: dict[str, Any] = {"q": q}
    for which, fmt in spec.formats:
        given[f"{which}_codes"] = parts[f"{which}_codes"].view(torch.int16)
        for kind in ("scales", "zeros"):
            given[f"{which}_{kind}"] = parts.get(f"{which}_{kind}", q)
        read = tables(spec, schedule, plain=plain)[f"{which}_table"]
        given[f"{which}_table"] = _table(fmt.element.values(), q.device) if read else q
    seen = mask.view(torch.uint8) if mask is not None and mask.dtype == torch.bool else mask
    b_m, h_m, t_m = (_stride(mask, dim) for dim in range(3)) if mask is not None else (0, 0, 0)
    return given | {
        "limits": limits,
        "mask": q if seen is None else seen,
        "pages": q if pages is None else pages,
        "tokens": cache[0].shape[2],
        "t": q.shape[2],
        "q_b": q.stride(0),
        "q_h": q.stride(1),
        "q_t": q.stride(2),
        "l_b": _stride(limits, 0),
        "l_t": _stride(limits, 1),
        "m_b": b_m,
        "m_h": h_m,
        "m_t": t_m,
        # A paged cache's table is as wide as its rows are apart, or it would be read past its end.
        "p_b": 0 if pages is None else pages.stride(0),
    }


def _stride(x: Tensor, dim: int) -> int:
    """0 where one number serves all."""
    return 0 if x.shape[dim] == 1 else x.stride(dim)


@lru_cache(maxsize=256)
def write_kernel(spec: AttentionSpec) -> Any:
    """The jitted quantizing write."""
    return module(write_source(spec)).kernel


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


def cache_write(
    spec: AttentionSpec,
    cache: Sequence[Tensor],
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    pages: Tensor | None = None,
) -> None:
    """Quantizes k and v [B, Hkv, T, D] into the cache at positions [B or 1, T]; negative ones count from the
    end, and what lies outside is not written."""
    tokens = check_cache(spec, cache, k.shape[0], pages)
    check_tokens(spec, k, v, positions)
    if k.numel() == 0 or tokens == 0:
        return
    k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (k, v))
    parts = dict(zip(spec.parts, cache, strict=True))
    given: dict[str, Any] = {"k": k, "v": v}
    for which in ("k", "v"):
        given[f"{which}_codes"] = parts[f"{which}_codes"].view(torch.int16)
        for kind in ("scales", "zeros"):
            given[f"{which}_{kind}"] = parts.get(f"{which}_{kind}", k)
        x = given[which]
        given |= {f"{which}_b": x.stride(0), f"{which}_h": x.stride(1), f"{which}_t": x.stride(2)}
    count = k.shape[0] * k.shape[1] * k.shape[2]
    write_kernel(spec)[-(-count // ROWS), 2](
        **given,
        positions=positions,
        pages=k if pages is None else pages,
        count=count,
        tokens=cache[0].shape[2],
        t=k.shape[2],
        at_b=_stride(positions, 0),
        at_t=_stride(positions, 1),
        p_b=0 if pages is None else pages.stride(0),
        num_warps=1,
        enable_fp_fusion=False,
    )
