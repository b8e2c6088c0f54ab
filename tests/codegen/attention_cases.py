"""Caches, queries and the float64 answer for the tests of attention kernels; how far a kernel may be off.

A cache is filled by `format.quantize`, and poisoned where no query may look: NaN for scales, any codes, pages
that do not exist.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bitfold.codegen.attention import AttentionSpec, cache_format, empty_cache, grouped
from bitfold.formats import Codebook, Format, Granularity, Quantized


@dataclass(frozen=True)
class Case:
    """`limits`: full, ragged (0, 1, a prime, all) or causal."""

    k: str
    v: str
    x: str = "bf16"
    batch: int = 2
    heads: int = 4
    kv_heads: int = 2
    dim: int = 64
    tokens: int = 37
    queries: int = 1
    page: int = 0
    mask: str = "none"
    limits: str = "ragged"
    scale: float | None = None

    @property
    def spec(self) -> AttentionSpec:
        k, v = (cache_format(text, self.dim) for text in (self.k, self.v))
        return AttentionSpec(
            self.heads, self.kv_heads, self.dim, self.x, k, v, self.mask, self.page, self.scale
        )


@dataclass
class Operands:
    """What `attend` takes, and keys and values as [codes, scales, ..] of each token, [B, Hkv, S, n]."""

    q: Tensor
    cache: list[Tensor]
    limits: Tensor
    mask: Tensor | None
    pages: Tensor | None
    k: list[Tensor]
    v: list[Tensor]


def by_token(fmt: Format) -> Format:
    if fmt.scale is None or grouped(fmt):
        return fmt
    return replace(fmt, scale=replace(fmt.scale, granularity=Granularity()))


def quantized(fmt: Format, x: Tensor, static: Tensor | None) -> list[Tensor]:
    """Parts of each token; `static` [1, Hkv, 1, 1] if the scale is one a head."""
    given = None if static is None else [static.expand(*x.shape[:3], 1).contiguous()]
    made = by_token(fmt).quantize(x, given)
    return [getattr(made, name) for name in fmt.parts]


def values(fmt: Format, parts: list[Tensor], dim: int) -> Tensor:
    return Quantized(by_token(fmt), dim, *parts).dequantize(torch.float64)


def operands(case: Case, seed: int = 0) -> Operands:
    drawn = torch.Generator().manual_seed(seed)
    spec = case.spec
    shape = (case.batch, case.kv_heads, case.tokens, case.dim)
    sizes = 0.25 * 4 ** torch.randint(0, 3, (*shape[:3], 1), generator=drawn)
    new = [(torch.randn(shape, generator=drawn) * size).to(spec.dtype) for size in (1.0, sizes)]
    wide = torch.full((case.batch, case.queries, case.heads, case.dim + 8), float("nan"), dtype=spec.dtype)
    # Every second entry's softmax is of few tokens, so that a lost one is far beyond the tolerance.
    peaked = 1 + 7 * (torch.arange(case.batch) % 2)[:, None, None, None]
    wide[..., : case.dim] = torch.randn(wide[..., : case.dim].shape, generator=drawn) * peaked
    q = wide[..., : case.dim].transpose(1, 2)
    limits = _limits(case)
    capacity, pages, count = case.tokens, None, case.batch
    if case.page:
        each = -(-case.tokens // case.page)
        count, capacity = case.batch * each, each * case.page
        pages = torch.randperm(count, generator=drawn).view(case.batch, each).to(torch.int32)
    cache = empty_cache(spec, count, case.tokens)
    rows: list[list[Tensor]] = []
    for i, (which, fmt) in enumerate(spec.formats):
        mine = {name: part for name, part in zip(spec.parts, cache, strict=True) if name[0] == which}
        static = None
        if fmt.scale is not None and not grouped(fmt):
            static = mine[f"{which}_scales"]
            if fmt.scale.dtype == "e8m0":
                static.fill_(124)
            else:
                static.copy_((0.02 * (1 + torch.arange(case.kv_heads)))[None, :, None, None])
        parts = quantized(fmt, new[i], static)
        rows.append(parts)
        for name, part in zip(fmt.parts, parts, strict=True):
            if name != "codes" and static is not None:
                continue
            _put(case, mine[f"{which}_{name}"], fmt, name, part, limits, pages)
    if pages is not None:
        for b in range(case.batch):
            pages[b, -(-int(limits[min(b, len(limits) - 1)].max()) // case.page) :] = -1
    mask = None
    if case.mask == "bool":
        mask = torch.rand(case.batch, 1, case.queries, capacity, generator=drawn) < 0.6
    elif case.mask == "float":
        mask = torch.randn(1, case.heads, case.queries, capacity, generator=drawn).to(spec.dtype)
    return Operands(q, cache, limits, mask, pages, rows[0], rows[1])


def _limits(case: Case) -> Tensor:
    t = case.tokens
    if case.limits == "full":
        return torch.full((1, 1), t, dtype=torch.int64)
    if case.limits == "causal":
        ends = t - torch.arange(case.batch)[:, None] * (t // 3)
        return (ends - case.queries + 1 + torch.arange(case.queries)).clamp(min=0).to(torch.int32)
    some = torch.tensor([min(23, t), 0, 1, t], dtype=torch.int32)
    return some[torch.arange(case.batch * case.queries) % 4].view(case.batch, case.queries)


def _put(
    case: Case, held: Tensor, fmt: Format, name: str, part: Tensor, limits: Tensor, pages: Tensor | None
) -> None:
    """A token's rows to their place, and poison everywhere else."""
    raw = held.view(torch.uint8)
    raw.fill_(0xFF)  # NaN, as a scale of any type
    if held.dtype == torch.uint8:
        held.random_(0, 255)
    held = fmt.turned(name, held)
    for b in range(case.batch):
        end = int(limits[min(b, len(limits) - 1)].max())
        if pages is None:
            held[b, :, :end] = part[b, :, :end]
            continue
        for token in range(end):
            held[pages[b, token // case.page], :, token % case.page] = part[b, :, token]


def answer(case: Case, given: Operands) -> tuple[Tensor, Tensor]:
    """(y, how far a kernel's may be from it), float64 [B, Hq, T, D].

    scores    D products of two 16-bit floats, exact in float32, and at most D + 8 roundings (sum, groups,
              zero point, scales, the factor): e = (2 D + 16) u S, S = sum |q| K scale, u = 2**-24, where K
              bounds what is added: |k|, and with a zero point the code's and the zero's parts before they
              cancel. A table's entry is rounded to x's type, r more; a mask adds its own u, the power 8 u.
    weights   times a token's scale they are rounded to the type of the second product: r = 2**-7 for bf16,
              whose casts the interpreter truncates, 2**-11 for float16, and 2**-24 below its normals.
    sums      of S weights and of S products, and a rescaling a block: (4 S + 32) u.
    result    y is a weighted mean of v: the relative errors of numerator and denominator, each at most
              2 e + r + .., times sum p V (V bounds v as K does k), and rounded to x's type once.
    """
    spec, u = case.spec, 2.0**-24
    rounding = {"bf16": 2.0**-7, "f16": 2.0**-11, "f32": 2.0**-24}
    k, v = values(spec.k, given.k, case.dim), values(spec.v, given.v, case.dim)
    k_most, v_most = _bound(spec.k, given.k, case.dim), _bound(spec.v, given.v, case.dim)
    k, v, k_most, v_most = (t.repeat_interleave(spec.group, 1) for t in (k, v, k_most, v_most))
    q = given.q.double()
    scores = q @ k.mT * spec.softmax_scale
    magnitude = q.abs() @ k_most.mT * abs(spec.softmax_scale)
    off = (2 * case.dim + 16) * u * magnitude + 4 * u * scores.abs() + 8 * u
    if isinstance(spec.k.element, Codebook):
        off = off + rounding[spec.x] * magnitude
    seen = torch.arange(case.tokens)[None, None, None] < given.limits[:, None, :, None]
    if given.mask is not None and case.mask == "bool":
        seen = seen & given.mask[..., : case.tokens]
    elif given.mask is not None:
        scores = scores + given.mask[..., : case.tokens].double()
        off = off + 4 * u * given.mask[..., : case.tokens].double().abs()
    seen = seen.expand(scores.shape)
    p = torch.nan_to_num(scores.masked_fill(~seen, -torch.inf).softmax(-1))
    want = p @ v
    r, y_r = rounding[spec.v_lane], rounding[case.x]
    e = torch.where(seen, off, 0.0).amax(-1, keepdim=True)
    table = r if isinstance(spec.v.element, Codebook) else 0.0
    relative = torch.expm1(2 * e) + r + table + (4 * case.tokens + 32) * u
    bound = relative * (p @ v_most)
    if spec.v_lane == "f16":
        bound = bound + 2.0**-24 * (seen.double() @ v_most)
    least = 2.0**-24 if case.x == "f16" else 0.0
    return want, bound + y_r * (want.abs() + bound) + least


def _bound(fmt: Format, parts: list[Tensor], dim: int) -> Tensor:
    """What a sum over decoded numbers adds up, in magnitude."""
    found = values(fmt, parts, dim).abs()
    if fmt.scale is None or fmt.scale.zero == "none":
        return found
    shape = found.shape
    scales = fmt.scale.granularity.spread(parts[1].double())
    zeros = fmt.scale.granularity.spread(parts[2].double())
    codes = fmt.scale.granularity.split(fmt.element.decode(fmt.unpack(parts[0], dim)).double())
    return ((codes.abs() + zeros.abs()) * scales).reshape(shape)
