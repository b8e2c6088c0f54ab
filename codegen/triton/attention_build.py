"""Attention kernels from text to launch: operands checked, workspaces made, splits run and combined.

In: a spec, q, the parts of the cache, limits. Out: y [B, Hq, T, D].

    attend(spec, q, cache, limits)     ->   y, by one launch, or two where programs share a context
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..attention import AttentionSpec
from ..attention_operands import check_cache, check_queries, check_tokens, fresh
from ..attention_schedule import AttentionSchedule, choose_attention, choose_splits
from ..lanes import LANE_TYPES
from ..schedule import OVERLAP_FROM
from ..spec import CodegenError
from .attention import source, tables
from .build import capability, module
from .cache_write import ROWS
from .cache_write import source as write_source


@lru_cache(maxsize=256)
def kernels(spec: AttentionSpec, schedule: AttentionSchedule, plain: bool = False) -> Any:
    """The module with `kernel` and `combine`."""
    return module(source(spec, schedule, plain=plain))


@lru_cache(maxsize=64)
def _table(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)


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
    _check_lane(spec)
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
    if schedule is None:
        overlap = q.is_cuda and capability(q.device) >= OVERLAP_FROM
        schedule = replace(choose_attention(spec, queries), overlap=overlap)
    if splits is None:
        splits = choose_splits(spec, schedule, batch, queries, tokens)
    rows, pairs = spec.group * queries, batch * spec.kv_heads
    partial, sums = y, y
    if splits > 1:
        partial = q.new_empty(pairs * splits * rows * spec.dim, dtype=torch.float32)
        sums = q.new_empty(pairs * splits * rows * 2, dtype=torch.float32)
    given = _arguments(spec, schedule, q, cache, limits, mask, pages, plain=plain) | {"tokens": tokens}
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
        "t": q.shape[2],
        "q_b": q.stride(0),
        "q_h": q.stride(1),
        "q_t": q.stride(2),
        "l_b": _stride(limits, 0),
        "l_t": _stride(limits, 1),
        "m_b": b_m,
        "m_h": h_m,
        "m_t": t_m,
        "p_b": 0 if pages is None else pages.stride(0),
    }


def _check_lane(spec: AttentionSpec) -> None:
    if spec.x not in LANE_TYPES:
        raise CodegenError(f"a GPU's kernels take bf16 or f16; {spec} runs in main memory")


def _stride(x: Tensor, dim: int) -> int:
    """0 where one number serves all."""
    return 0 if x.shape[dim] == 1 else x.stride(dim)


@lru_cache(maxsize=256)
def write_kernel(spec: AttentionSpec, overlap: bool = False) -> Any:
    """The jitted quantizing write."""
    return module(write_source(spec, overlap=overlap)).kernel


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
    _check_lane(spec)
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
    overlap = k.is_cuda and capability(k.device) >= OVERLAP_FROM
    late = {"launch_pdl": True} if overlap else {}
    write_kernel(spec, overlap)[-(-count // ROWS), 2](
        **given,
        positions=positions,
        pages=k if pages is None else pages,
        count=count,
        tokens=tokens,
        t=k.shape[2],
        at_b=_stride(positions, 0),
        at_t=_stride(positions, 1),
        p_b=0 if pages is None else pages.stride(0),
        num_warps=1,
        enable_fp_fusion=False,
        **late,
    )
