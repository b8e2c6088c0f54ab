"""The operators that a KV cache and its attention become: a quantizing write, and attention over codes.

In: q, k, v [B, heads, T, D], the parts of a cache, and the text of an `AttentionSpec`. Out: y [B, Hq, T, D].
Registered by `_operators.py`. Attention of a few queries is a generated kernel, on a GPU as in main memory,
and so is the write on a GPU; the rest is plain torch on decoded keys and values, which is also what kernels
are tested against.

    bitfold.cache_write(cache, k, v, positions, None, "attention 32/8x128 bf16 int8[...] int8[...]")
    bitfold.attend(q, cache, limits, None, None, "attention ...")      ->   y

positions [B or 1, T]: where the new tokens go. limits [B or 1, T or 1]: how many tokens each query sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache, lru_cache
from typing import Any, NoReturn

import torch
from torch import Tensor

from ...codegen.attention import AttentionSpec, grouped
from ...codegen.attention_operands import check_cache, check_queries, check_tokens, fresh
from ...formats import BitfoldError, Format, Granularity, Quantized, cache_tag

# Past this many queries a head (a prompt), decoding the cache once and calling torch's attention is faster.
MOST_QUERIES = 16


@lru_cache(maxsize=1024)
def parsed(text: str) -> AttentionSpec:
    """The spec that a text says; CodegenError if it says none."""
    return AttentionSpec.parse(text)


def cache_write(
    cache: Sequence[Tensor], k: Tensor, v: Tensor, positions: Tensor, pages: Tensor | None, text: str
) -> None:
    """On a GPU: one kernel."""
    # Triton is imported when the first kernel runs, not with bitfold.
    from ...codegen.triton.attention_build import cache_write as launch

    launch(parsed(text), cache, k, v, positions, pages)


def cache_write_on_cpu(
    cache: Sequence[Tensor], k: Tensor, v: Tensor, positions: Tensor, pages: Tensor | None, text: str
) -> None:
    """In main memory: the reference."""
    cache_write_reference(cache, k, v, positions, pages, text)


def cache_write_reference(
    cache: Sequence[Tensor], k: Tensor, v: Tensor, positions: Tensor, pages: Tensor | None, text: str
) -> None:
    """In main memory: `Format.quantize`, and the rows put where they belong."""
    spec = parsed(text)
    tokens = check_cache(spec, cache, k.shape[0], pages)
    check_tokens(spec, k, v, positions)
    batch, heads, new, _ = k.shape
    if k.numel() == 0:
        return
    at = positions.expand(batch, new)
    at = torch.where(at < 0, at + tokens, at).long()
    entry = torch.arange(batch, device=k.device)[:, None].expand(batch, new)
    if pages is not None:
        entry, at = pages.long()[entry, at // spec.page], at % spec.page
    parts = dict(zip(spec.parts, cache, strict=True))
    head = torch.arange(heads, device=k.device)[None, :, None]
    for (which, fmt), x in zip(spec.formats, (k, v), strict=True):
        made = _by_token(fmt).quantize(x, _static(spec, fmt, parts, which, x))
        for name in fmt.parts:
            if name == "codes" or grouped(fmt):
                held = fmt.turned(name, parts[f"{which}_{name}"])
                held[entry[:, None], head, at[:, None]] = getattr(made, name)


def attend(
    q: Tensor, cache: Sequence[Tensor], limits: Tensor, mask: Tensor | None, pages: Tensor | None, text: str
) -> Tensor:
    """On a GPU: the decode kernels for a few queries."""
    from ...codegen.triton.attention_build import attend as launch

    spec = parsed(text)
    if q.shape[2] > MOST_QUERIES:
        return attend_reference(q, cache, limits, mask, pages, text)
    return launch(spec, q, cache, limits, mask, pages)


def attend_on_cpu(
    q: Tensor, cache: Sequence[Tensor], limits: Tensor, mask: Tensor | None, pages: Tensor | None, text: str
) -> Tensor:
    """In main memory: a kernel for a few queries, where there is a compiler."""
    spec = parsed(text)
    if q.shape[2] > MOST_QUERIES or q.numel() == 0 or not _has_compiler():
        return attend_reference(q, cache, limits, mask, pages, text)
    tokens = check_cache(spec, cache, q.shape[0], pages)
    check_queries(spec, q, limits, mask, tokens)
    if tokens == 0:
        return fresh(q).zero_()
    found: Tensor = torch.ops.bitfold.attend_few(q, list(cache), limits, mask, pages, text)
    return found


@cache
def _has_compiler() -> bool:
    from ..target import get_target

    return getattr(get_target("cpu"), "missing", lambda: None)() is None


def build_for_cpu(
    q: Tensor, cache: Sequence[Tensor], limits: Tensor, mask: Tensor | None, pages: Tensor | None, text: str
) -> Tensor:
    """The first call of a process: builds the operator in C++, which takes its own place."""
    from ...codegen.cpp.attention_build import know_attention

    know_attention([parsed(text)])
    found: Tensor = torch.ops.bitfold.attend_few(q, list(cache), limits, mask, pages, text)
    return found


def attend_reference(
    q: Tensor, cache: Sequence[Tensor], limits: Tensor, mask: Tensor | None, pages: Tensor | None, text: str
) -> Tensor:
    """Decoded keys and values, and torch's attention; in float32 in main memory."""
    spec = parsed(text)
    tokens = check_cache(spec, cache, q.shape[0], pages)
    check_queries(spec, q, limits, mask, tokens)
    if q.numel() == 0 or tokens == 0:
        return fresh(q).zero_()
    dtype = torch.float32 if q.device.type == "cpu" else q.dtype
    k, v = decoded(spec, cache, pages, dtype)
    seen = (torch.arange(tokens, device=q.device) < limits[..., None])[:, None]
    # What is behind the last token may be anything, NaN too, and zero times NaN is NaN.
    held = seen.any(2)[..., None]
    k, v = (torch.where(held, x, 0) for x in (k, v))
    added: Tensor = seen
    if mask is not None and mask.dtype == torch.bool:
        added = seen & mask
    elif mask is not None:
        added = torch.where(seen, mask.to(dtype), -torch.inf)
    visible = (seen & mask) if mask is not None and mask.dtype == torch.bool else seen
    y = torch.nn.functional.scaled_dot_product_attention(
        q.to(dtype), k, v, attn_mask=added.expand(q.shape[0], -1, q.shape[2], -1),
        scale=spec.softmax_scale, enable_gqa=spec.group > 1,
    )  # fmt: skip
    # A query that sees nothing has no result; some of torch's kernels say NaN then.
    return fresh(q).copy_(torch.where(visible.any(-1, keepdim=True), y, 0))


def decoded(
    spec: AttentionSpec, cache: Sequence[Tensor], pages: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Keys and values [B, Hkv, S, D] as the cache holds them."""
    parts = dict(zip(spec.parts, cache, strict=True))
    found = []
    for which, fmt in spec.formats:
        held = {name: fmt.turned(name, parts[f"{which}_{name}"]) for name in fmt.parts}
        if fmt.scale is not None and not grouped(fmt):
            held["scales"] = held["scales"].expand(*held["codes"].shape[:3], 1)
        if pages is not None:
            held = {name: _contiguous(part, pages) for name, part in held.items()}
        found.append(Quantized(_by_token(fmt), spec.dim, **held).dequantize(dtype))
    return found[0], found[1]


def _contiguous(part: Tensor, pages: Tensor) -> Tensor:
    """[pages, Hkv, page, n] -> [B, Hkv, S, n]; entries of the table that mean no page show any."""
    table = pages.long().clamp(0, part.shape[0] - 1)
    return part[table].transpose(1, 2).flatten(2, 3)


def _by_token(fmt: Format) -> Format:
    """The format with a scale for each token: one for all of a head's says the same numbers."""
    if fmt.scale is None or grouped(fmt):
        return fmt
    return replace(fmt, scale=replace(fmt.scale, granularity=Granularity()))


def _static(
    spec: AttentionSpec, fmt: Format, parts: dict[str, Tensor], which: str, x: Tensor
) -> list[Tensor] | None:
    """The scales that are given, one a token."""
    if fmt.scale is None or grouped(fmt):
        return None
    return [parts[f"{which}_scales"].expand(x.shape[0], spec.kv_heads, x.shape[2], 1).contiguous()]


def attend_fake(
    q: Tensor, cache: Sequence[Tensor], limits: Tensor, mask: Tensor | None, pages: Tensor | None, text: str
) -> Tensor:
    """Shapes only."""
    return fresh(q)


def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """How many tensors get no gradient."""
    ctx.count = len(inputs[1])


def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """An error in place of q's gradient, when it is computed: a compiled forward may hold a backward that
    never runs."""
    return torch.ops.bitfold.no_cache_gradient(grad), [None] * ctx.count, None, None, None, None


def no_cache_gradient_shape(grad: Tensor) -> Tensor:
    """Shapes only."""
    return torch.empty_like(grad)


def no_cache_gradient(grad: Tensor) -> NoReturn:
    """Codes are integers, and the cache is another one by then."""
    raise BitfoldError(
        "no gradient goes through attention over a KV cache in codes; train without a cache, or call the "
        "model under torch.inference_mode()"
    )


def cache_write_fake(
    cache: Sequence[Tensor], k: Tensor, v: Tensor, positions: Tensor, pages: Tensor | None, text: str
) -> None:
    """Nothing: the cache keeps its shapes."""


# Torch's compile caches know the operators by name only; what they compute is the text's and codegen's.
cache_tag.add("attention 1")
