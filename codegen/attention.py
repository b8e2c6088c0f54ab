"""What attention over a quantized KV cache computes: `AttentionSpec`. Its text regenerates the kernels.

In: heads, the formats of K and V, the kind of mask, the page size. Out: a value that prints and parses.

    AttentionSpec(32, 8, 128, "bf16", cache_format("int8[bf16]", 128), cache_format("int4[g32]", 128))
    attention 32/8x128 bf16 int8[bf16,halves128] int4[g32,halves128]

    y [B, Hq, T, D] = softmax(q k^T * scale + mask) v,  k, v = dequantize(cache) [B, Hkv, S, D]

The cache is the parts of K and then those of V, each token and head a row of its format: codes [B, Hkv, S,
bytes] and scales (zero points) [B, Hkv, S, 1], or [B, Hkv, groups, S]; a static scale, `[tensor]` in the
format's text, is one a head, [1, Hkv, 1, 1]. A paged cache has [pages, Hkv] in the place of [B, Hkv] and the
tokens of a page in the place of S, and a table [B, pages of an entry] says which page holds an entry's tokens
i * page .. (i + 1) * page - 1.

Query t of entry b sees the tokens below limits[b, t] that the mask, if there is one, shows.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

import torch

from ..formats import Format, Integer, format
from ..formats.layout import Halfwords
from ..formats.sparsity import Dense
from .decode import holds
from .lanes import LANE_TYPES
from .slices import Walk, walk
from .spec import CodegenError

MASKS = ("none", "bool", "float")
TYPES = {**LANE_TYPES, "f32": torch.float32}
"""Of queries; float32 in main memory only."""
SCALE_TYPES = ("f32", "bf16", "f16", "e8m0")
RULES = ("absmax", "narrow", "floor", "ceil", "even")
_TEXT = re.compile(
    r"attention (\d+)/(\d+)x(\d+) (\w+) (\S+) (\S+)(?: mask:(\w+))?(?: page:(\d+))?(?: scale:(\S+))?"
)


@dataclass(frozen=True)
class AttentionSpec:
    """heads, kv_heads, dim: Hq, Hkv and D; x: bf16, f16 or f32, the dtype of q, k, v and y; k, v: formats
    with their layout; mask: none, or a tensor of bools or of numbers to add; page: tokens of a page, 0 for a
    contiguous cache; scale: what multiplies the scores, None for 1 / sqrt(D)."""

    heads: int
    kv_heads: int
    dim: int
    x: str
    k: Format
    v: Format
    mask: str = "none"
    page: int = 0
    scale: float | None = None

    def __post_init__(self) -> None:
        if self.x not in TYPES:
            raise CodegenError(f"attention takes queries in {', '.join(TYPES)}, not {self.x!r}")
        if self.kv_heads < 1 or self.heads < 1 or self.heads % self.kv_heads:
            raise CodegenError(
                f"{self.heads} query heads cannot share {self.kv_heads} key and value heads evenly"
            )
        if self.mask not in MASKS:
            raise CodegenError(f"a mask is one of {', '.join(MASKS)}, not {self.mask!r}")
        if self.page and (self.page < 1 or self.page & (self.page - 1)):
            raise CodegenError(f"a page holds a power of two of tokens, not {self.page}")
        if self.scale is not None and self.scale == self.dim**-0.5:
            object.__setattr__(self, "scale", None)
        for which, fmt in (("keys", self.k), ("values", self.v)):
            reason = _obstacle(fmt, self.dim, "bf16" if which == "values" and self.x != "f32" else self.x)
            if reason is not None:
                raise CodegenError(f"{which} of {self.dim} numbers cannot be cached as {fmt}: {reason}")

    @property
    def dtype(self) -> torch.dtype:
        """Of q, k, v and y."""
        return TYPES[self.x]

    @property
    def group(self) -> int:
        """Query heads that share a head of the cache."""
        return self.heads // self.kv_heads

    @property
    def softmax_scale(self) -> float:
        """What multiplies the scores."""
        return self.dim**-0.5 if self.scale is None else self.scale

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the cache's tensors in order: k_codes, k_scales, ..., v_codes, ..."""
        return tuple(f"{which}_{part}" for which, fmt in self.formats for part in fmt.parts)

    @property
    def formats(self) -> tuple[tuple[str, Format], tuple[str, Format]]:
        return ("k", self.k), ("v", self.v)

    @property
    def v_lane(self) -> str:
        """Type of the second product's operands. A probability times a token's scale needs bf16's range."""
        return "bf16" if grouped(self.v) and self.x != "f32" else self.x

    def __str__(self) -> str:
        text = f"attention {self.heads}/{self.kv_heads}x{self.dim} {self.x} {self.k} {self.v}"
        text += f" mask:{self.mask}" if self.mask != "none" else ""
        text += f" page:{self.page}" if self.page else ""
        return text + (f" scale:{self.scale!r}" if self.scale is not None else "")

    @classmethod
    def parse(cls, text: str) -> AttentionSpec:
        """The inverse of `str`; CodegenError if the text says something else."""
        found = _TEXT.fullmatch(text)
        try:
            if found is None:
                raise ValueError
            heads, kv_heads, dim, x, k, v, mask, page, scale = found.groups()
            number = None if scale is None else float(scale)
        except ValueError:
            raise CodegenError(
                f"{text!r} is no attention's text; one reads: attention 32/8x128 bf16 int8[halves128] "
                "int8[halves128] mask:bool"
            ) from None
        return cls(
            int(heads),
            int(kv_heads),
            int(dim),
            x,
            format(k),
            format(v),
            mask or "none",
            int(page or 0),
            number,
        )


def grouped(fmt: Format) -> bool:
    """Whether each token has scales of its own; otherwise one a head, or none, holds for all."""
    return fmt.scale is not None and fmt.scale.granularity.rows is not None


def has_zero(fmt: Format) -> bool:
    return fmt.scale is not None and fmt.scale.zero != "none"


def groups(fmt: Format, dim: int) -> int:
    """Scales of a token."""
    cols = fmt.cols
    return 1 if cols is None else dim // cols


def group_of(fmt: Format, position: int) -> int:
    """Which group of its token number `position` is in."""
    cols = fmt.cols
    return 0 if cols is None else position // cols


def row(fmt: Format, dim: int) -> Walk:
    """How a kernel walks over the codes of a token."""
    found = walk(fmt, dim)
    assert isinstance(found, Walk)
    return found


@lru_cache(maxsize=256)
def cache_format(fmt: Format | str, dim: int) -> Format:
    """`fmt` laid out for kernels that read tokens of `dim` numbers: halfwords of a token, or of a part of it.

    Long slices are preferred, since one load of a slice's units is a row of contiguous memory; padding is
    worse than short ones.
    """
    fmt = format(fmt)
    cols = fmt.cols
    narrowest = fmt.element.bits & -fmt.element.bits
    best: tuple[int, int] | None = None
    for length in (64, 32, 16):
        span = length * 16 // narrowest
        padded = -(-dim // span) * span
        if (cols is None or cols % length == 0) and (best is None or padded < best[0]):
            best = padded, span
    if best is None:
        raise CodegenError(f"{fmt} has groups of {cols}; a cache takes multiples of 16")
    return fmt.with_layout(Halfwords(best[1]))


def _obstacle(fmt: Format, dim: int, lane: str) -> str | None:
    """Why kernels cannot read or write such a cache, or None."""
    scale, element = fmt.scale, fmt.element
    if not isinstance(fmt.layout, Halfwords):
        return "kernels read halfwords; cache_format lays a format out"
    if not isinstance(fmt.sparsity, Dense):
        return "a cache stores every number"
    if lane in LANE_TYPES and not holds(element, lane):
        return f"its values are not all {lane} numbers"
    if not hasattr(element, "table") and element.bits < 2:
        return "one bit has no zero"
    if hasattr(element, "table") and len(element.values()) > 16:
        return "a codebook of a cache has at most 16 values"
    if scale is not None:
        if scale.native or scale.two_level or scale.dtype not in SCALE_TYPES or scale.rule not in RULES:
            return f"scales of a cache are {', '.join(SCALE_TYPES)}, chosen by {', '.join(RULES)}"
        if scale.granularity.is_block:
            return "a cache has one scale a head, a token, or a group of a token"
        if scale.zero not in ("none", "int"):
            return "zero points of a cache are integers"
        if scale.zero != "none" and not grouped(fmt):
            return "a zero point goes with a scale for each token"
        if isinstance(element, Integer) and not element.signed and scale.zero == "none":
            return "unsigned codes need a zero point"
    if grouped(fmt) and dim % (scale.granularity.cols or 1 if scale is not None else 1):
        return f"a group of {scale.granularity.cols if scale else 0} does not divide it"
    found = walk(fmt, dim)
    if not isinstance(found, Walk):
        return found.reason
    cols = scale.granularity.cols if scale is not None else None
    if cols is not None and cols % found.length:
        return f"slices of {found.length} codes straddle groups of {cols}"
    if 2 * found.runs * found.codes > 3 * dim:
        return f"a row would be padded to {found.runs * found.codes} numbers"
    return None


def cache_shapes(
    spec: AttentionSpec, batch: int, tokens: int
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each part of a cache; for a paged one `batch` is the number of pages and `tokens`
    is left out of account."""
    found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    length = spec.page or tokens
    for which, fmt in spec.formats:
        walked = row(fmt, spec.dim)
        units = walked.units * walked.runs
        found[f"{which}_codes"] = (batch, spec.kv_heads, length, 2 * units), torch.uint8
        if fmt.scale is None:
            continue
        by_group = fmt.scale.granularity.cols is not None
        each = (1, spec.kv_heads, 1, 1)
        if grouped(fmt):
            last = (groups(fmt, spec.dim), length) if by_group else (length, 1)
            each = (batch, spec.kv_heads, *last)
        found[f"{which}_scales"] = each, fmt.scale.stored
        if has_zero(fmt):
            assert isinstance(fmt.element, Integer)
            found[f"{which}_zeros"] = each, torch.int8 if fmt.element.signed else torch.uint8
    return found


def empty_cache(
    spec: AttentionSpec, batch: int, tokens: int, device: torch.device | str | None = None
) -> list[torch.Tensor]:
    """A cache of zeros; a static scale is 1."""
    made = []
    for name, (shape, dtype) in cache_shapes(spec, batch, tokens).items():
        static = not grouped(spec.k if name[0] == "k" else spec.v)
        if name.endswith("codes") or not static:
            made.append(torch.zeros(shape, dtype=dtype, device=device))
        elif dtype == torch.uint8:
            made.append(torch.full(shape, 127, dtype=dtype, device=device))
        else:
            made.append(torch.ones(shape, dtype=dtype, device=device))
    return made
