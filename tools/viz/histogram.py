"""How numbers lie: counts of equal bins between the smallest and the largest, and which channels stand out.

In: a tensor. Out: a `Histogram`; a few (channel, how many times the middle channel's largest value).

    histogram(torch.randn(1000))          ->  Histogram(low=-3.1, high=3.3, counts=(1, 0, 2, ...))
    outliers(weight.abs().amax(dim=1))    ->  ((417, 12.5), (3, 9.1))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BINS = 48
_SHOWN = 6
# A channel this many times as large as the middle one stands out: the square root of what four bits span.
STANDS_OUT = 4.0


@dataclass(frozen=True)
class Histogram:
    """counts: of bins of equal width from low to high; other: numbers that are no finite ones."""

    low: float
    high: float
    counts: tuple[int, ...]
    other: int = 0

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"low": self.low, "high": self.high, "counts": list(self.counts), "other": self.other}


def histogram(values: Tensor, bins: int = BINS) -> Histogram:
    """Of all numbers of a tensor."""
    flat = values.detach().reshape(-1).to(torch.float32).cpu()
    finite = flat[flat.isfinite()]
    other = flat.numel() - finite.numel()
    if finite.numel() == 0:
        return Histogram(0.0, 0.0, (), other)
    low, high = float(finite.min()), float(finite.max())
    if low == high:
        return Histogram(low, high, (finite.numel(),), other)
    counts = torch.histc(finite, bins, low, high)
    return Histogram(low, high, tuple(int(count) for count in counts), other)


def outliers(largest: Tensor) -> tuple[tuple[int, float], ...]:
    """largest: of each channel the largest absolute value. The channels that stand out, the largest first."""
    flat = largest.detach().reshape(-1).to(torch.float32).cpu()
    flat = torch.where(flat.isfinite(), flat, 0.0)
    if flat.numel() < 2:
        return ()
    middle = float(flat.median())
    if middle <= 0.0:
        return ()
    top = (flat / middle).topk(min(_SHOWN, flat.numel()))
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return tuple((int(i), float(ratio)) for i, ratio in pairs if ratio >= STANDS_OUT)


def spread(largest: Tensor) -> float:
    """The largest channel over the middle one; 1 where there is nothing to compare."""
    flat = largest.detach().reshape(-1).to(torch.float32)
    middle = float(flat.median()) if flat.numel() > 1 else 0.0
    return float(flat.max()) / middle if middle > 0.0 else 1.0
